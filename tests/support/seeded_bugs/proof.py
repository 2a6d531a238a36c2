"""Prove that ``stratagem parity`` finds seeded bugs and raises no false alarms: ``make proof``.

Prints three tables, and writes them with the date and the revision to a file. The exit code is 1 if fewer than 64 of 66 bugs are
found in the right part of the step, or a run without a bug raises an alarm.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.support.ranks import Ranks
from tests.support.seeded_bugs.bugs import BUGS, MODELS
from tests.support.seeded_bugs.trial import Trial, compare, placed_in

STRATEGIES = ("DDPStrategy", "FSDPStrategy")
REQUIRED = 64
ERRORS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
DTYPES = ("float32", "bfloat16", "float16")


def main() -> int:
    """Run all trials, print and write the tables, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path, help="the file to write the tables to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begin = time.monotonic()
    ranks = Ranks(2)
    try:
        found, bug_table = _bugs(ranks)
        alarms, clean_table = _clean(ranks)
        error_table = _smallest(ranks)
    finally:
        ranks.close()
    total = len(BUGS) * len(MODELS) * len(STRATEGIES)
    lines = [
        "# Proof",
        "",
        "`make proof` writes this page; [comparing trainings](parity.md) describes the command. Each model is trained",
        "for 4 steps in one process and on 2 ranks. A hook or a sampler in the configuration injects a bug, on several ranks",
        "only, except for the learning rate.",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, revision {_revision()}, torch {torch.__version__}, {time.monotonic() - begin:.0f} s.",
        "",
        f"## Seeded bugs: {found} of {total} found in the right part of the step",
        "",
        *bug_table,
        "",
        f"## Runs without a bug: {alarms} false alarms in {len(clean_table) - 2} runs",
        "",
        *clean_table,
        "",
        "## The smallest error of a gradient that is found",
        "",
        *error_table,
        "",
    ]
    print("\n".join(lines))  # noqa: T201 -- command output
    if options.write is not None:
        options.write.write_text("\n".join(lines), encoding="utf-8")
    return 0 if found >= REQUIRED and not alarms else 1


def _bugs(ranks: Ranks) -> tuple[int, list[str]]:
    """Return the number of bugs that were found in the right part, and a table."""
    columns = [(model, strategy) for model in MODELS for strategy in STRATEGIES]
    names = [f"{model}, {strategy.removesuffix('Strategy')} x2" for model, strategy in columns]
    table = [_row("bug", "part", *names), _row(*["---"] * (2 + len(names)))]
    right = 0
    for key, bug in BUGS.items():
        cells = []
        for model, strategy in columns:
            parts = _parts(Trial(model=model, strategy=strategy, bug=key), ranks)
            is_right = parts == [bug.part]
            right += is_right
            cells.append("found" if is_right else f"found in {', '.join(parts)}" if parts else "**missed**")
        table.append(_row(bug.name, bug.part, *cells))
        _say(table[-1])
    return right, table


def clean_trials() -> Iterator[Trial]:
    """Yield 40 trials without a bug."""
    models = [*MODELS, "cnn"]
    for number in range(40):
        model = models[number % 4]
        changes: dict[str, object] = {"randomness.seed": number}
        settings: dict[str, object] = {"resumed": number % 2 == 0, "accumulate": (2,) if number % 3 == 0 else ()}
        if number % 4 == 3:
            changes["model.batch_norm"] = True
            settings["eval_layers"] = True
        if number % 5 == 1:
            settings["workers"] = (2,)
        if number % 5 == 2:
            optimizer = ("SGD", "AdamW", "RMSprop", "Muon")[number // 5 % 4]
            if optimizer == "Muon":
                model = "gpt_muon"
            else:
                settings["optimizers"] = (optimizer,)
        if number % 5 == 3:
            settings["dtypes"] = (DTYPES[1 + number % 2],)
        if number % 5 == 4:
            changes["optim_wrapper.accumulative_counts"] = 2
        yield Trial(model=model, strategy=STRATEGIES[number // 4 % 2], changes=changes, settings=settings)


def _clean(ranks: Ranks) -> tuple[int, list[str]]:
    """Return the number of false alarms, and a table."""
    table = [
        _row("model", "strategy", "changes", "result", "largest difference / tolerance"),
        _row(*["---"] * 5),
    ]
    alarms = 0
    for trial in clean_trials():
        report = compare(trial, ranks)
        alarms += report.exit_status != 0
        ratios = [ratio for result in report.results if result.variant.noise is None for ratio in result.ratios]
        largest = max(ratios, default=0.0)
        result = f"**{', '.join(placed_in(report)) or 'not comparable'}**" if report.exit_status else "equal"
        given = {**trial.changes, **{key: value for key, value in trial.settings.items() if value}}
        text = ", ".join(f"{key.rpartition('.')[2]}={_text(value)}" for key, value in given.items())
        table.append(_row(trial.model, trial.strategy.removesuffix("Strategy"), text, result, f"{largest:.2f}"))
        _say(table[-1])
    return alarms, table


def _smallest(ranks: Ranks) -> list[str]:
    """Return a table of the smallest relative error of the first parameter's gradient that is found, by dtype and model."""
    table = [_row("dtype", *MODELS), _row(*["---"] * (1 + len(MODELS)))]
    for dtype in DTYPES:
        cells = []
        for model in MODELS:
            sizes = [size for size in ERRORS if "reduction" in _parts(_with_error(model, dtype, size), ranks)]
            cells.append(f"{min(sizes):g}" if sizes else "none")
        table.append(_row(dtype, *cells))
        _say(table[-1])
    return table


def _with_error(model: str, dtype: str, size: float) -> Trial:
    settings = {"dtypes": (dtype,)}
    return Trial(model=model, strategy="DDPStrategy", bug="relative_error", relative=size, settings=settings)


def _parts(trial: Trial, ranks: Ranks) -> Sequence[str]:
    return placed_in(compare(trial, ranks))


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 -- command output


def _revision() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
