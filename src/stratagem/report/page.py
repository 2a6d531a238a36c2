"""Write the report: one HTML file with its style, script and data, and without references to the network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from stratagem._version import __version__
from stratagem.errors import ConfigFileError
from stratagem.report.collect import RunFacts, SessionFacts, config_changes
from stratagem.report.log_records import name_of_curve
from stratagem.storage import write_atomic
from stratagem.train.goodput.account import LABELS, SessionTimes
from stratagem.utils import mask_text
from stratagem.utils.printable import printable_name

__all__ = ["page_of", "write_report"]

_MOST_ROWS: Final = 60
_MOST_POINTS: Final = 300
_MINUTE_S: Final = 60
_FEW_SESSIONS: Final = 10
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(runs: Sequence[RunFacts], path: Path) -> None:
    """Write the report to ``path`` atomically.

    Raises:
        ConfigFileError: if the file cannot be written.
    """
    try:
        write_atomic(path, page_of(runs).encode())
    except OSError as error:
        raise ConfigFileError(
            f"{path} cannot be written: {error.strerror or error}. Choose a different path with --out."
        ) from error


def page_of(runs: Sequence[RunFacts]) -> str:
    """Return the report as HTML."""
    names = _names(runs)
    title = _text(names[0] if len(runs) == 1 else f"{len(runs)} runs compared")
    parts = [
        _summary(runs, names),
        _goodput(runs, names),
        _section("Progress", '<div id="lineages"></div>' + _sessions(runs, names)),
        '<section><h2>Curves</h2><div id="controls"></div><div id="charts"></div></section>\n',
        _validation(runs, names),
        _checkpoints(runs, names),
        _warnings(runs, names),
        _nonfinite(runs, names),
        _configuration(runs, names),
        _environment(runs, names),
    ]
    data = {"runs": [_data(run, name) for run, name in zip(runs, names, strict=True)]}
    # "<" could end the script element.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>\n{_asset('report.css')}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1><p class=faint>Written {written} by stratagem {escape(__version__)}</p></header>\n"
        f"<noscript><p>The curves need JavaScript, which is part of this file.</p></noscript>\n<main>\n{''.join(parts)}</main>\n"
        f'<script type="application/json" id="data">{text}</script>\n<script>\n{_asset("report.js")}</script>\n</body>\n</html>\n'
    )


def _asset(name: str) -> str:
    return files("stratagem.report").joinpath("assets", name).read_text(encoding="utf-8")


def _names(runs: Sequence[RunFacts]) -> list[str]:
    """Return distinct names of the runs: those of their folders, with as many parents as necessary."""
    for depth in range(1, 8):
        names = ["/".join(run.work_dir.parts[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            return [printable_name(name) for name in names]
    return [printable_name(str(run.work_dir)) + f" ({number})" for number, run in enumerate(runs, 1)]


# Texts and tables.


def _text(value: object) -> str:
    return escape(mask_text(str(value)))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>\n" if content else ""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already; empty without rows."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n{body}</table></div>\n' if body else ""


def _of_run(runs: Sequence[RunFacts], names: Sequence[str], content: Iterable[str]) -> str:
    """Return the content of each run under its name, if there are several runs."""
    if len(runs) == 1:
        return "".join(content)
    return "".join(
        f"<h3>{_dot(number)}{_text(name)}</h3>\n{part}"
        for number, (name, part) in enumerate(zip(names, content, strict=True))
        if part
    )


def _dot(number: int) -> str:
    return f'<i class="dot c{number % 8}"></i>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _duration(seconds: float) -> str:
    if seconds < _MINUTE_S:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


# The sections.


def _summary(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    facts = [_facts(run) for run in runs]
    if len(runs) == 1:
        tiles = "".join(
            f"<div class=tile><span>{escape(label)}</span><b>{_text(value)}</b></div>"
            for label, value in facts[0].items()
            if value
        )
        return f'<section><div class="tiles">{tiles}</div></section>\n'
    labels = list(dict.fromkeys(label for each in facts for label in each))
    rows = [
        [_dot(number) + _text(name), *(_text(each.get(label, "")) for label in labels)]
        for number, (name, each) in enumerate(zip(names, facts, strict=True))
    ]
    return _section("Summary", _table(["run", *labels], rows))


def _facts(run: RunFacts) -> dict[str, str]:
    """Return the most important facts about a run by their labels."""
    records = run.records
    facts = {
        "state": run.sessions[-1].how,
        "iterations": f"{run.sessions[-1].last_iter:,}",
        "epoch": str(records.last_epoch or ""),
        "sessions": str(len(run.sessions)),
    }
    if run.goodput is not None:
        facts |= {"wall time": _duration(run.goodput.wall), "goodput": f"{100 * run.goodput.share:.1f} %"}
    loss = records.curves.get(("train", "loss"))
    if loss is not None:
        facts["last loss"] = _number(loss.last)
    best: dict[str, float] = {}
    for each in run.checkpoints:
        if each.metric:
            best[f"best {name_of_curve(each.metric)}"] = each.score
    facts |= {name: _number(score) for name, score in best.items()}
    for (mode, name), curve in list(records.curves.items()):
        if mode == "val" and len(facts) < 11 and f"best {name_of_curve(name)}" not in facts:
            facts[f"last {name_of_curve(name)}"] = _number(curve.last)
    return facts


def _goodput(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    rows, table = [], []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        goodput = run.goodput
        if goodput is None or goodput.wall <= 0:
            continue
        parts = "".join(
            f'<i class="g-{part}" style="width:{100 * seconds / goodput.wall:.4f}%" '
            f'title="{escape(LABELS[part])}: {_duration(seconds)}, {100 * seconds / goodput.wall:.1f} %"></i>'
            for part, seconds in goodput.seconds.items()
            if seconds > 0
        )
        label = "" if len(runs) == 1 else f"<span>{_dot(number)}{_text(name)}</span>"
        rows.append(
            f'<div class="bar">{label}<span class="track">{parts}</span><b>{100 * goodput.share:.1f} %</b></div>\n'
        )
        table.append(
            [
                *([] if len(runs) == 1 else [_dot(number) + _text(name)]),
                *(f"{_duration(goodput.seconds[part])}<br><small>{100 * goodput.seconds[part] / goodput.wall:.1f} %</small>"
                  for part in LABELS),
                _duration(goodput.wall),
            ]
        )  # fmt: skip
    if not rows:
        return ""
    legend = "".join(f'<span><i class="g-{part}"></i>{escape(label)}</span>' for part, label in LABELS.items())
    headings = [*([] if len(runs) == 1 else ["run"]), *LABELS.values(), "total"]
    return _section(
        "Goodput",
        '<p class="faint">The share of the wall time, over all sessions, that trained iterations that count.</p>\n'
        f'<div class="bars">{"".join(rows)}</div><div class="legend">{legend}</div>\n{_table(headings, table)}',
    )


def _sessions(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    return _of_run(runs, names, (_sessions_of(run) for run in runs))


def _sessions_of(run: RunFacts) -> str:
    rows = []
    for number, each in list(enumerate(run.sessions, 1))[-_MOST_ROWS:]:
        record = each.session
        source = "" if record is None or record.checkpoint is None else Path(record.checkpoint).name
        ranks = "" if record is None else f"{record.strategy}, {record.world_size}"
        began = _moment(each.times[0].began) if each.times else ""
        rows.append(
            [
                f"{number}", _text(each.folder.name), began, _text(source), f"{each.first_iter:,}", f"{each.last_iter:,}",
                _text(ranks), _text(each.how),
            ]
        )  # fmt: skip
    headings = ["", "session", "began", "resumed from", "from iteration", "to", "strategy, ranks", "outcome"]
    others = f'<p class="faint">The folder contains {run.others} session(s) of other runs.</p>' if run.others else ""
    table = _table(headings, rows)
    return (table if len(rows) <= _FEW_SESSIONS else _folded(f"{len(run.sessions)} sessions", table)) + others


def _validation(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    return _section("Validation", _of_run(runs, names, (_validation_of(run) for run in runs)))


def _validation_of(run: RunFacts) -> str:
    curves = {name: curve for (mode, name), curve in run.records.curves.items() if mode == "val"}
    if not curves:
        return ""
    shown = list(curves)[:8]
    values: dict[float, dict[str, float | None]] = {}
    for name in shown:
        for step, mean in curves[name].means():
            values.setdefault(step, {})[name] = mean
    steps = sorted(values)
    rows = [
        [f"{step:,.0f}", *(_number(values[step].get(name)) or "-" for name in shown)] for step in steps[-_MOST_ROWS:]
    ]
    ranges = ["range", *(_range(curves[name].extremes()) for name in shown)]
    note = f'<p class="faint">The last {_MOST_ROWS} of {len(steps)} rows.</p>' if len(steps) > _MOST_ROWS else ""
    return _folded(
        f"{len(steps)} evaluation{'s' * (len(steps) != 1)}",
        _table(["iteration", *map(name_of_curve, shown)], [*rows[::-1], ranges]) + note,
    )


def _range(extremes: tuple[float, float] | None) -> str:
    return "" if extremes is None else f"{extremes[0]:.6g} to {extremes[1]:.6g}"


def _folded(title: str, content: str, *, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{escape(title)}</summary>\n{content}</details>\n"


def _checkpoints(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    return _section("Checkpoints", _of_run(runs, names, (_checkpoints_of(run) for run in runs)))


def _checkpoints_of(run: RunFacts) -> str:
    # The best ones first, then the newest ones.
    shown = sorted(run.checkpoints, key=lambda each: (not each.metric, -each.saved_at))[:_MOST_ROWS]
    rows = [
        [
            _text(each.name), _moment(each.saved_at), f"{each.iter:,}",
            f"best {_text(each.metric)} = {each.score:.6g}" if each.metric else "", _text(each.fault or "complete"),
        ]
        for each in shown
    ]  # fmt: skip
    return _table(["checkpoint", "saved", "iteration", "", "state"], rows)


def _warnings(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    return _section("Warnings and errors", _of_run(runs, names, (_warnings_of(run) for run in runs)))


def _warnings_of(run: RunFacts) -> str:
    rows = []
    for (level, message), (at, count) in run.warnings.messages.items():
        first, _, rest = message.partition("\n")
        more = _folded("more", f"<pre>{_text(rest)}</pre>") if rest.strip() else ""
        times = f' <span class="faint">({count} times)</span>' if count > 1 else ""
        rows.append(
            [
                at,
                f'<span class="{level.lower()}">{level}</span>',
                f'<div class="text">{_text(first)}{times}{more}</div>',
            ]
        )
    notes = []
    if run.warnings.omitted:
        notes.append(f"{run.warnings.omitted} further messages are not shown.")
    if run.records.damaged:
        notes.append(
            f"{run.records.damaged} of {run.records.lines} lines of scalars.json are damaged and were skipped."
        )
    if run.records.omitted:
        notes.append(f"{run.records.omitted} values are not shown because there are too many different names.")
    return _table(["time", "level", "message"], rows) + "".join(f"<p>{escape(note)}</p>\n" for note in notes)


def _nonfinite(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    return _section("Skipped updates and samples", _of_run(runs, names, (_nonfinite_of(run) for run in runs)))


def _nonfinite_of(run: RunFacts) -> str:
    rows = []
    for record in run.records.nonfinite[-_MOST_ROWS:]:
        values = ", ".join(
            f"{name}={value}" for name, value in record.items() if value in ("NaN", "Infinity", "-Infinity")
        )
        samples = record.get("samples")
        indices = (
            "; ".join(f"rank {rank}: {_short(each)}" for rank, each in samples.items() if each is not None)
            if isinstance(samples, Mapping)
            else ""
        )
        parameters = record.get("parameters")
        rows.append(
            [
                _text(record.get("iter", "")), _text(printable_name(values)),
                f'<div class="text">{_text(_short(parameters))}</div>',
                f'<div class="text">{_text(indices)}</div>',
            ]
        )  # fmt: skip
    count = run.records.nonfinite_count
    note = f'<p class="faint">The log reports NaN or Inf in {count} update{"s" * (count != 1)}.</p>' if count else ""
    return note + _table(["iteration", "values", "gradients of", "samples"], rows)


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
    return text if len(text) <= 300 else text[:300] + " …"


def _configuration(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    changes = "".join(
        f"<h3>{_dot(number) if len(runs) > 1 else ''}{_text(names[number])}: changed in session {position}</h3>\n"
        + _changes(each.session.changes)
        for number, run in enumerate(runs)
        for position, each in enumerate(run.sessions, 1)
        if each.session is not None and each.session.changes
    )
    differences = "".join(
        f"<h3>{_dot(0)}{_text(names[0])} and {_dot(number)}{_text(names[number])}</h3>\n"
        + _changes(found, (names[0], names[number]))
        for number, run in enumerate(runs)
        if number and (found := config_changes(runs[0], run))
    )
    texts = "".join(
        _folded(f"configuration of {name}", f"<pre>{_text(run.config)}</pre>\n")
        for run, name in zip(runs, names, strict=True)
        if run.config
    )
    return _section("Configuration", differences + changes + texts)


def _changes(lines: Sequence[str], headings: tuple[str, str] = ("before", "after")) -> str:
    rows = []
    for line in lines:
        key, _, values = line.partition(": ")
        old, arrow, new = values.partition(" -> ")
        cells = [f"<del>{_text(old)}</del>", f"<ins>{_text(new)}</ins>"] if arrow else [_text(values), ""]
        rows.append([_text(key), *cells])
    return _table(["key", *headings], rows)


def _environment(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    return _section("Environment", _of_run(runs, names, (_environment_of(run) for run in runs)))


def _environment_of(run: RunFacts) -> str:
    return "".join(
        _folded(
            part,
            f"<dl>{''.join(f'<dt>{_text(key)}</dt><dd>{_text(value)}</dd>' for key, value in values.items())}</dl>",
        )
        for part, values in run.environment.items()
    )


# The data of the pictures.


def _data(run: RunFacts, name: str) -> dict[str, Any]:
    curves: dict[str, dict[str, Any]] = {}
    for (mode, key), curve in run.records.curves.items():
        curves.setdefault(name_of_curve(mode), {})[name_of_curve(key)] = curve.as_json()
    return {"name": name, "curves": curves, "lineage": list(_lineage(run))}


def _lineage(run: RunFacts) -> Iterator[dict[str, Any]]:
    """Yield the sessions for the picture: their lines in wall time and iterations, and what happened at their ends."""
    all_times = [(session, times) for session in run.sessions for times in session.times]
    first_iters = [times.first_iter for _, times in all_times]
    for number, (session, times) in enumerate(all_times):
        later = [first for first, (_, each) in zip(first_iters[number + 1 :], all_times[number + 1 :], strict=True)
                 if each.run_id is not None]  # fmt: skip
        yield {
            "number": run.sessions.index(session) + 1,
            "began": times.began,
            "ended": times.ended,
            "how": _ending(session, times),
            "label": mask_text(session.how),
            "kept": min(later, default=None),
            **_lines_of(times),
        }


def _ending(session: SessionFacts, times: SessionTimes) -> str:
    """Return the word for the sign at the end of a session: how it ended, without the reason."""
    if times.outcome is not None or times is not session.times[-1]:
        return times.outcome or "killed"
    return session.how.split()[0].rstrip(":") if session.how else "killed"


def _lines_of(times: SessionTimes) -> dict[str, Any]:
    """Return the lines of a session, which a rollback interrupts, and its saves."""
    lines: list[list[list[float]]] = []
    saves: list[list[float]] = []
    # Before the run is prepared, its iteration is unknown.
    start = next((n for n, moment in enumerate(times.moments) if moment.event == "session"), len(times.moments))
    for moment in times.moments[start:]:
        point = [round(times.began + moment.elapsed, 2), moment.iter]
        if moment.event == "rolled back" or not lines:
            lines.append([])
        if moment.event == "saved":
            saves.append(point)
        else:
            lines[-1].append(point)
    return {"lines": [_thinned(line) for line in lines], "saves": _thinned(saves)}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """Return at most some hundred of the points, with the last one."""
    if len(points) <= _MOST_POINTS:
        return points
    step = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:step], points[-1]]
