"""Tests of the report of runs: what it reads, and what the file contains."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from stratagem.errors import CheckpointNotFoundError, ConfigTypeError
from stratagem.report.automatic import require_report
from stratagem.report.collect import collect
from stratagem.report.decimation import Curve
from stratagem.report.log_records import Records, read_records
from stratagem.report.page import page_of, write_report
from tests.report.written_runs import FIRST, SECOND, session_entry, train_record, write_killed_run, write_session


def data_of(page: str) -> dict[str, Any]:
    """Return the data in a page."""
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


def curve_of(page: str, mode: str, name: str) -> dict[str, Any]:
    """Return a curve of the first run in a page."""
    return data_of(page)["runs"][0]["curves"][mode][name]


@pytest.mark.slow
def test_a_long_curve_keeps_its_extremes_and_means() -> None:
    """Of 100,000 values, each point has the mean, minimum and maximum of the values that it combines."""
    curve = Curve()
    values = [math.sin(x / 5000) for x in range(100_000)]
    values[54_321] = 50.0
    for x, value in enumerate(values):
        curve.add(x, value)
    found = curve.as_json()
    size = found["x"][0] + 1
    assert 200 <= len(found["x"]) <= 800
    assert max(found["hi"]) == 50.0
    assert min(found["lo"]) == pytest.approx(-1.0, abs=1e-6)
    for number, x in enumerate(found["x"][:-1]):
        part = values[number * size : (number + 1) * size]
        assert x == (number + 1) * size - 1
        assert found["y"][number] == pytest.approx(sum(part) / size, rel=1e-5, abs=1e-6)
        assert (found["lo"][number], found["hi"][number]) == (
            pytest.approx(min(part), rel=1e-5, abs=1e-6), pytest.approx(max(part), rel=1e-5, abs=1e-6),
        )  # fmt: skip


def test_a_short_curve_is_unchanged() -> None:
    """Values are not combined unless there are too many."""
    curve = Curve()
    for x in range(10):
        curve.add(x, x * 0.1)
    assert curve.as_json() == {"x": list(range(10)), "y": [float(f"{x * 0.1:.7g}") for x in range(10)]}


def test_values_that_are_not_finite_are_gaps_with_a_mark() -> None:
    """NaN and Inf are gaps in the curve, and do not change the values around them."""
    curve = Curve()
    for x, value in enumerate([1.0, math.nan, math.inf, 2.0]):
        curve.add(x, value)
    assert curve.as_json() == {"x": [0, 1, 2, 3], "y": [1.0, None, None, 2.0], "bad": [1, 2], "badCount": 2}


def test_values_before_a_rollback_are_a_separate_part() -> None:
    """If the iteration decreases, the values from there on were discarded."""
    curve = Curve()
    for x, value in [(1, 1.0), (2, 2.0), (3, 3.0), (2, 5.0), (3, 6.0)]:
        curve.add(x, value)
    assert curve.as_json() == {"x": [1, 2, 3], "y": [1.0, 5.0, 6.0], "lost": [{"x": [2, 3], "y": [2.0, 3.0]}]}


def test_each_iteration_of_a_resumed_run_has_one_value(tmp_path: Path) -> None:
    """The values of iterations 410 to 550 come from the second session; those of the first one are a separate part."""
    page = page_of([collect(write_killed_run(tmp_path / "run"))])
    loss = curve_of(page, "train", "loss")
    assert loss["x"] == list(range(10, 1001, 10))
    assert [(part["x"][0], part["x"][-1]) for part in loss["lost"]] == [(410, 550), (710, 800)]


def test_values_after_the_checkpoint_are_discarded_when_the_run_resumes(tmp_path: Path) -> None:
    """A session that has resumed from iteration 4 but not logged anything yet discards the values of iterations 5 and 6."""
    run, start = tmp_path / "run", session_entry(FIRST, 0)
    write_session(run, FIRST, records=[train_record(step, loss=1.0) for step in range(1, 7)], lineage=[start])
    write_session(run, SECOND, lineage=[start, session_entry(SECOND, 4, checkpoint="run/iter_4")])
    loss = curve_of(page_of([collect(run)]), "train", "loss")
    assert loss["x"] == [1, 2, 3, 4]
    assert [part["x"] for part in loss["lost"]] == [[5, 6]]


def test_the_report_contains_what_happened(tmp_path: Path) -> None:
    """Sessions, changes of the configuration, warnings, skipped samples and the goodput are in the page."""
    page = page_of([collect(write_killed_run(tmp_path / "run"))])
    for text in (
        FIRST,
        SECOND,
        "killed",
        "iter_400",
        "Rolled back.",
        "rank 0: 7, 8",
        "<del>0.01</del>",
        "<ins>0.02</ins>",
    ):
        assert text in page
    # The first session trained 40 s until its checkpoint; 10.5 s of the 70.5 s of the second one were rolled back.
    facts = collect(tmp_path / "run")
    assert facts.goodput is not None
    assert facts.goodput.seconds["train"] == pytest.approx(100.0)
    assert f"{100 * facts.goodput.share:.1f} %" in page


def test_secrets_are_masked_in_the_report(tmp_path: Path) -> None:
    """Secrets in a saved configuration, a message or a name are not in the page, even if another program wrote them."""
    run = write_killed_run(tmp_path / "run")
    log = run / SECOND / f"{SECOND}.log"
    log.write_text("2026/01/01 11:05:00 - stratagem - ERROR - password=hunter2hunter2\n  token=hunter2hunter2\n")
    with (run / SECOND / "vis_data" / "scalars.json").open("a") as records:
        records.write(json.dumps({"mode": "nonfinite", "iter": 1, "step": 1, "password=hunter2hunter2": "NaN"}) + "\n")
    assert "hunter2" not in page_of([collect(run)])


class Tags(HTMLParser):
    """Collect the names and attributes of all elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def test_names_and_messages_cannot_add_elements_to_the_page(tmp_path: Path) -> None:
    """Names of metrics, modes, sessions, messages and configuration values are escaped."""
    run = tmp_path / "a<b>&"
    entry = session_entry(HOSTILE.replace("/", "_"), 0, f"{HOSTILE}: {HOSTILE} -> {HOSTILE}", checkpoint=HOSTILE)
    records = [train_record(1, **{HOSTILE: 1.0}), {"x": 1.0, "mode": HOSTILE, "iter": 1, "step": 1}]
    records.append(
        {
            "mode": "nonfinite",
            "iter": 1,
            "step": 1,
            HOSTILE: "NaN",
            "parameters": [HOSTILE],
            "samples": {HOSTILE: [HOSTILE]},
        }
    )
    folder = write_session(
        run, FIRST, records=records, lineage=[entry],
        log=f"2026/01/01 11:05:00 - stratagem - WARNING - {HOSTILE}\n{HOSTILE}\n",
        ending={"how": HOSTILE, "epoch": 0, "iter": 1, "at": HOSTILE},
    )  # fmt: skip
    (folder / "environment.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}}))
    (run / "config.py").write_text(HOSTILE)
    page = page_of([collect(run)])
    tags = Tags()
    tags.feed(page)
    assert "img" not in tags.names
    assert tags.names.count("script") == 2
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert HOSTILE in data_of(page)["runs"][0]["curves"]["train"]


def test_the_page_has_no_references_to_the_network(tmp_path: Path) -> None:
    """All that the page loads is inside of the file; the address of the SVG namespace is a name."""
    page = page_of([collect(write_killed_run(tmp_path / "run"))])
    assert set(re.findall(r"https?://[^\s\"'<]*", page)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"\b(?:src|href)=\"([^\"]*)\"", page) == ["data:,"]
    assert "default-src 'none'" in page


def test_damaged_lines_are_counted_and_skipped(tmp_path: Path) -> None:
    """Incomplete lines, other JSON values and records without a position are damaged; the rest is read."""
    lines = [
        train_record(1, loss=1.0),
        '{"loss": 0.',
        "[1]",
        "null",
        '{"loss": 1}',
        "[" * 100_000,
        train_record(2, loss=10**400),
    ]
    folder = write_session(tmp_path / "run", FIRST, records=lines, lineage=[session_entry(FIRST, 0)])
    records = Records()
    read_records(folder / "vis_data" / "scalars.json", records)
    assert (records.lines, records.damaged) == (7, 5)
    assert records.curves["train", "loss"].as_json() == {"x": [1], "y": [1.0]}
    assert "5 of 7 lines of scalars.json are damaged" in page_of([collect(tmp_path / "run")])


def test_a_log_with_more_names_than_can_be_shown_is_bounded(tmp_path: Path) -> None:
    """A metric whose name contains the iteration does not fill the memory; the report counts what is missing."""
    records = [train_record(step, **{f"loss_{step}": 1.0}) for step in range(1, 1001)]
    write_session(tmp_path / "run", FIRST, records=records, lineage=[session_entry(FIRST, 0)])
    facts = collect(tmp_path / "run")
    assert len(facts.records.curves) == 400
    assert facts.records.omitted == 600


@pytest.mark.parametrize(
    "files", [{}, {"times.jsonl": ""}, {"start.json": ""}, {"start.json": "{", "times.jsonl": '{"ev'}]
)
def test_a_run_without_records_has_a_report(tmp_path: Path, files: dict[str, str]) -> None:
    """A session that was killed while it started, or whose files are damaged, has a report without curves."""
    folder = tmp_path / "run" / FIRST
    (folder / "vis_data").mkdir(parents=True)
    for name, text in {"vis_data/scalars.json": "", **files}.items():
        (folder / name).write_text(text)
    page = page_of([collect(tmp_path / "run")])
    assert data_of(page)["runs"][0]["curves"] == {}
    assert "killed" in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    """The message names the folder and what was expected."""
    with pytest.raises(CheckpointNotFoundError, match=r"does not contain a run: it has no folder with start\.json"):
        collect(tmp_path)


def test_several_runs_are_overlaid_and_their_configurations_compared(tmp_path: Path) -> None:
    """Runs whose folders have the same name are told apart by their parents, and the differences are listed."""
    runs = [
        collect(write_killed_run(tmp_path / parent / "run", scale=scale)) for parent, scale in (("a", 1.0), ("b", 2.0))
    ]
    write_report(runs, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    assert [run["name"] for run in data_of(page)["runs"]] == ["a/run", "b/run"]
    assert "<del>0.02</del>" in page
    assert "<ins>0.04</ins>" in page


def test_the_folder_of_a_session_has_the_report_up_to_this_session(tmp_path: Path) -> None:
    """The first session of a run does not contain what happened later."""
    write_killed_run(tmp_path / "run")
    facts = collect(tmp_path / "run" / FIRST)
    assert [session.folder.name for session in facts.sessions] == [FIRST]
    assert facts.sessions[0].last_iter == 550


def test_the_argument_report_must_be_a_bool() -> None:
    """A path is refused with the command that accepts one."""
    with pytest.raises(ConfigTypeError, match="stratagem report RUN -o"):
        require_report("report.html")
