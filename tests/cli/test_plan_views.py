"""The views of a plan: terminal, bars, HTML, PNG and JSON."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stratagem.cli.plan.facts import Unit, bar_chart, speed_cells
from stratagem.cli.plan.html import html_of, write_html
from stratagem.cli.plan.terminal import print_report
from stratagem.cli.plot.bars import Bar, BarChart, BarGroup, print_bars, write_bars_png
from stratagem.errors import ConfigFileError, ConfigValueError
from stratagem.planning.report import Report, build_report
from stratagem.planning.result import MemoryPlan
from tests.planning.plans import GIB, collective, memory, plan, step
from tests.planning.test_timing import CLUSTER

ZERO = MemoryPlan(parameters=0, gradients=0, optimizer_state=0)


def report() -> Report:
    """Return a report with a strategy that fits, one that does not, one that cannot be used and one that was not simulated."""
    steps = (
        step("DDP", memory(parameters=28, gradients=28, optimizer=56), strategy="DDPStrategy"),
        step(
            "FSDP", memory(parameters=2, gradients=2, optimizer=4, gathered=3), largest_micro_batch=9,
            collectives=(collective("all_gather", 100 * 10**9, count=4, group=8),),
        ),
        step("Single", ZERO, refusal="there are 16 ranks & one <device>"),
        step("Gemini", memory(parameters=5, gradients=5, optimizer=10, activations=None), flops=None, failure="a reason"),
    )  # fmt: skip
    return build_report("<llama>.py", [(CLUSTER, plan(*steps))], replan=None)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines of the report in a pipe."""
    print_report(report())
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], label: str, number: int = 0) -> list[str]:
    """Return the cells of a row that begins with a label."""
    return [line.split() for line in lines if line.startswith(f"{label} ")][number]


def test_the_table_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Each strategy has a row with GiB: the sum, what remains, and the parts."""
    lines = printed(capsys)
    assert "16 ranks, 2 nodes of 8 x h100-80g (80.0 GiB)" in lines
    assert row(lines, "DDP") == ["DDP", "no", "-41.0", "121", "28.0", "28.0", "56.0", "8.00", "0.00", "1.00"]
    assert row(lines, "FSDP") == ["FSDP", "yes", "60.0", "20.0", "2.00", "2.00", "4.00", "8.00", "3.00", "1.00"]
    assert row(lines, "Single")[1] == "cannot"
    assert row(lines, "Gemini") == ["Gemini", "?", "<59.0", ">21.0", "5.00", "5.00", "10.0", "?", "?", "1.00"]


def test_the_table_of_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """A rank sends 7/8 of 100 GB, which are 81.5 GiB; 32 samples take 2.02 s to 2.90 s."""
    lines = printed(capsys)
    assert row(lines, "FSDP", 1) == ["FSDP", "2", "9", "81.5", "2.02", "s", "to", "2.90", "s", "11.0", "to", "15.8"]


def test_choices_advice_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    """The best choice has a reason, and strategies that cannot be used have theirs."""
    text = "\n".join(printed(capsys))
    assert "1. FSDP: the only strategy that fits; 60.0 GiB of the memory remain free." in text
    assert "Most of the memory of FSDP: activations, 8.00 GiB (40 %)." in text
    assert "Note: Single: cannot be used: there are 16 ranks & one <device>" in text
    assert "Note: Gemini: without activations and times: a reason" in text
    assert "all-gather 8 ranks inside nodes 4 93.1 GiB 81.5 GiB 0 B 875 ms" in " ".join(text.split())


def bars(chart: BarChart, width: int = 80) -> list[str]:
    """Return the lines of a chart on a terminal without color."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_bars(chart, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO


def chart(*bars_of_group: Bar, limit: float | None) -> BarChart:
    """Return a chart with one group."""
    group = BarGroup(title="group", bars=bars_of_group, limit=limit, limit_label="limit")
    return BarChart(title="", unit="GiB", segments=("parameters", "gradients"), groups=(group,))


def test_bars_have_the_length_of_their_sizes() -> None:
    """At a width of 46 there are 40 cells for 20 GiB: each segment of 10 GiB takes 20, and the line is at 10 GiB."""
    lines = bars(chart(Bar(label="a", sizes={"parameters": 10, "gradients": 10}, text="20"), limit=10), width=46)
    assert lines[1] == "a " + "P" * 20 + "┃" + "G" * 19 + " 20"
    assert lines[2] == " " * 22 + "┃ limit"


def test_a_long_name_continues_in_the_next_line() -> None:
    """At 40 columns, 20 are for the names, and a name with 27 characters is not cut."""
    bar = Bar(label="ColossalAI tp=8 bfloat16 xy", sizes={"parameters": 1.0}, text="1 GiB")
    lines = bars(chart(bar, limit=None), width=40)
    assert lines[1].startswith("ColossalAI tp=8      PPPP")
    assert lines[2] == "bfloat16 xy"


def test_the_legend_has_as_many_lines_as_the_width_requires() -> None:
    """The names P parameters and G gradients have 26 characters with three spaces between them."""
    bar = Bar(label="FSDP", sizes={"parameters": 1.0}, text="1 GiB")
    assert bars(chart(bar, limit=None), width=26)[-1] == "P parameters   G gradients"
    assert bars(chart(bar, limit=None), width=25)[-2:] == ["P parameters", "G gradients"]


def test_a_bar_that_is_much_longer_than_the_limit_is_cut() -> None:
    """Otherwise the bars that fit would be too short to be seen."""
    lines = bars(
        chart(
            Bar(label="a", sizes={"parameters": 1000}, text="1,000"), Bar(label="b", sizes={"parameters": 10}), limit=10
        )
    )
    assert lines[1].endswith("P» 1,000")
    assert lines[2].count("P") > 30


def test_a_limit_far_to_the_right_is_not_drawn() -> None:
    """The bars of a small model use the whole width, and the limit is stated."""
    lines = bars(chart(Bar(label="a", sizes={"parameters": 1}, text="1"), limit=80))
    assert lines[1].count("P") > 70
    assert lines[2] == "limit is far to the right."


class Elements(HTMLParser):
    """Collects the elements of a page, and checks that they are nested correctly."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_file_refers_to_nothing_outside() -> None:
    """It has no scripts, links or images, so it can be sent and opened without a network, also on a phone."""
    page = html_of(report())
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    names = {name for name, _ in elements.found}
    assert not names & {"script", "link", "img", "iframe", "a", "object"}
    assert not {"src", "href"} & {key for _, attributes in elements.found for key in attributes}
    assert "url(" not in page
    assert "://" not in page
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in elements.found


def test_names_in_the_html_file_are_not_markup() -> None:
    """A name of a file or an error message cannot add elements."""
    page = html_of(report())
    assert "&lt;llama&gt;.py" in page
    assert "one &lt;device&gt;" in page
    assert "<llama>" not in page


def test_names_of_a_hostile_configuration_are_not_markup() -> None:
    """The model, the batch, the options of a strategy, file names in a failure and notes cannot add elements."""
    hostile = "<img src=x onerror=alert(1)>\"'&"
    planned = plan(
        step(
            f"FSDP {hostile}", memory(parameters=2, gradients=2, optimizer=4, host={hostile: GIB}), options={hostile: hostile},
            notes=(hostile,), failure=f"/tmp/{hostile}.py:3 in {hostile}", compute_dtype=hostile,
        )
    )  # fmt: skip
    model = replace(planned.model, name=hostile, batch=(hostile,), batch_source=hostile)
    page = html_of(build_report(hostile, [(CLUSTER, replace(planned, model=model))], replan=None))
    assert "<img" not in page
    assert page.count("&lt;img src") >= 6


def test_the_html_file_has_all_parts(tmp_path: Path) -> None:
    """Choices, bars with the line at the device, tables, advice, details and assumptions are in the file."""
    write_html(report(), tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    for text in ("the only strategy that fits", "What to try", "FSDP in detail", "Save", "11.0 to 15.8", "Sources"):
        assert text.lower() in page.lower()
    # The longest bar has 121 GiB, and the line is at 80.
    assert f'class="limit" style="left:{100 * 80 / 121:.3f}%"' in page
    assert f'width:{100 * 28 / 121:.3f}%;background:#0072B2" title="parameters: 28 GiB"' in page
    with pytest.raises(ConfigFileError, match="Choose a different path with --html"):
        write_html(report(), tmp_path / "plan.html" / "inside")


@pytest.mark.slow
def test_the_picture(tmp_path: Path) -> None:
    """The PNG file is written; strategies that cannot be used have no bar."""
    contents = bar_chart(report())
    assert [bar.label for bar in contents.groups[0].bars] == ["DDP", "FSDP", "Gemini"]
    assert contents.groups[0].limit == 80
    write_bars_png(contents, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_end_of_the_search_is_not_shown_as_the_largest_micro_batch() -> None:
    """More than 2^20 samples may fit, so the number has a sign; a smaller number is exact."""
    steps = [
        step("DDP", memory(parameters=1, gradients=1, optimizer=1), largest_micro_batch=number)
        for number in (2**20, 2**20 - 1)
    ]
    (section,) = build_report("two", [(CLUSTER, plan(*steps))], replan=None).sections
    cells = [speed_cells(each, Unit("GiB", GIB))[2] for each in section.estimates]
    assert cells == [">=1048576", "1048575"]


def test_a_report_without_a_usable_strategy_has_no_bars(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Text and HTML show why no strategy can be used, and a picture without bars is refused instead of failing in max()."""
    refused = build_report("all", [(CLUSTER, plan(step("DDP", ZERO, refusal="a reason")))], replan=None)
    print_report(refused)
    lines = capsys.readouterr().out.splitlines()
    assert "No strategy can train this model at this number of ranks." in lines
    assert "Note: DDP: cannot be used: a reason" in lines
    assert "cannot be used: a reason" in html_of(refused)
    with pytest.raises(ConfigValueError, match="there are no bars to draw"):
        write_bars_png(bar_chart(refused), tmp_path / "plan.png")


def test_json_has_exact_bytes() -> None:
    """All sizes are integers of bytes, and everything can be written as JSON."""
    content: dict[str, Any] = json.loads(json.dumps(report().as_dict()))
    (section,) = content["sections"]
    ddp, fsdp, single, _ = section["strategies"]
    assert ddp["memory"]["total"] == 121 * GIB
    assert (ddp["fits"], ddp["free"]) == (False, -41 * GIB)
    assert fsdp["collectives"][0]["sent"] == pytest.approx(87.5e9)
    assert fsdp["time"]["longest"] == pytest.approx(fsdp["time"]["compute"] + 0.875)
    assert single["refusal"] == "there are 16 ranks & one <device>"
    assert section["choices"][0]["label"] == "FSDP"


def test_a_model_in_mebibytes(capsys: pytest.CaptureFixture[str]) -> None:
    """If all parts are smaller than a GiB, the table is in MiB, and what would be 0.00 has its own unit."""
    sizes = {"parameters": 3 * 2**20, "gradients": 2048}
    small = MemoryPlan(parameters=3 * 2**20, gradients=2048, optimizer_state=0, peak=sum(sizes.values()), at_peak=sizes)
    print_report(build_report("small", [(CLUSTER, plan(step("DDP", small)))], replan=None))
    lines = capsys.readouterr().out.splitlines()
    assert row(lines, "DDP")[4:8] == ["3.00", "2.00", "KiB", "0.00"]
    assert any(line.startswith("Sizes in MiB") for line in lines)
