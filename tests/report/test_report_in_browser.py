"""Open reports in headless Chromium: the curves are drawn, nothing fails, and nothing is requested from the network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stratagem.report.collect import collect
from stratagem.report.page import write_report
from tests.report.written_runs import FIRST, session_entry, train_record, write_killed_run, write_session
from tests.support.browser import Page, open_browser

pytestmark = pytest.mark.slow

# The position and size of the curve of a chart, and those of the chart.
_BOXES = """[...document.querySelectorAll("figure")].map((figure) => {
  const box = (element) => { const b = element.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; };
  const chart = box(figure.querySelector("svg"));
  const points = (path) => (path.getAttribute("d").match(/[ML]/g) || []).length;
  return [...figure.querySelectorAll("path.line")].map((path) => ({ points: points(path), curve: box(path), chart }));
})"""
_LINE = "document.querySelector('figure path.line').getAttribute('d')"


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    """A page of headless Chromium."""
    with open_browser() as page:
        yield page


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that was killed, resumed and rolled back."""
    folder = tmp_path_factory.mktemp("killed")
    write_report([collect(write_killed_run(folder / "run"))], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of three runs."""
    folder = tmp_path_factory.mktemp("compared")
    scales = {"first": 1.0, "second": 1.5, "third": 0.7}
    runs = [collect(write_killed_run(folder / name, scale=scale)) for name, scale in scales.items()]
    write_report(runs, folder / "report.html")
    return folder / "report.html"


def open_without_errors(browser: Page, file: Path, **options: Any) -> None:
    """Open a report, and check that nothing failed and that only the file was read."""
    browser.open(file, **options)
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [file.as_uri()]


def check_curves(browser: Page, *, charts: int, runs: int) -> None:
    """Check that each chart has a curve for each run, which lies inside of the chart and fills its width."""
    found = browser.evaluate(_BOXES)
    assert len(found) == charts
    for curves in found:
        assert len(curves) == runs
        for each in curves:
            assert each["points"] >= 5
            x, y, width, height = each["curve"]
            left, top, full, tall = each["chart"]
            assert width > 0.6 * full
            assert left <= x
            assert x + width <= left + full + 1
            assert top <= y
            assert y + height <= top + tall + 1


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_the_curves_are_drawn(browser: Page, killed: Path, width: int, dark: bool) -> None:
    """At the width of a desk and of a phone, and in both color schemes, the page has no errors and does not scroll sideways."""
    open_without_errors(browser, killed, width=width, dark=dark)
    check_curves(browser, charts=6, runs=1)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark


def test_the_picture_of_the_sessions_shows_kills_and_repeated_work(browser: Page, killed: Path) -> None:
    """Two sessions, one of them killed; a rollback; and training that was repeated after each of these."""
    open_without_errors(browser, killed)
    counts = {
        name: browser.evaluate(f"document.querySelectorAll('.lineage .{name}').length")
        for name in ("session:not(.repeated)", "repeated", "rollback", "killed", "complete", "save")
    }
    assert counts == {
        "session:not(.repeated)": 3, "repeated": 2, "rollback": 1, "killed": 1, "complete": 1, "save": 2,
    }  # fmt: skip


def test_several_runs_are_drawn_in_one_chart(browser: Page, compared: Path) -> None:
    """Three runs are overlaid with different colors, and a run can be hidden."""
    open_without_errors(browser, compared)
    check_curves(browser, charts=6, runs=3)
    colors = browser.evaluate(
        "[...document.querySelector('figure').querySelectorAll('path.line')].map((p) => p.getAttribute('stroke'))"
    )
    assert len(set(colors)) == 3
    browser.evaluate("document.querySelector('#controls .runs input').click()")
    browser.settle()
    check_curves(browser, charts=6, runs=2)


def test_smoothing_and_log_scale_change_the_curves(browser: Page, killed: Path) -> None:
    """Both controls redraw the curves; with smoothing, the unchanged values stay visible."""
    open_without_errors(browser, killed)
    plain = browser.evaluate(_LINE)
    browser.evaluate(
        "(() => { const s = document.getElementById('smoothing'); s.value = 0.9; s.dispatchEvent(new Event('input')); })()"
    )
    browser.settle()
    smooth = browser.evaluate(_LINE)
    assert smooth != plain
    assert browser.evaluate("document.querySelector('figure path.raw').getAttribute('d')") == plain
    browser.evaluate("document.getElementById('log').click()")
    browser.settle()
    assert browser.evaluate(_LINE) not in {plain, smooth}
    assert browser.errors == []


def test_the_values_under_the_pointer_are_shown(browser: Page, killed: Path) -> None:
    """The iteration and the value are those of the nearest record."""
    open_without_errors(browser, killed)
    browser.evaluate("document.querySelector('figure').scrollIntoView({ block: 'center' })")
    box = browser.evaluate(
        "(() => { const b = document.querySelector('figure svg').getBoundingClientRect(); return [b.x, b.y, b.width]; })()"
    )
    left, right = 54, 12  # the margins of the axes
    wanted = 10 + 0.485 * 990
    browser.move_pointer(box[0] + left + 0.485 * (box[2] - left - right), box[1] + 80)
    shown = browser.evaluate("document.querySelector('figure .tip').innerText")
    loss = json.loads(browser.evaluate("document.getElementById('data').textContent"))["runs"][0]["curves"]["train"][
        "loss"
    ]
    nearest = min(loss["x"], key=lambda x: abs(x - wanted))
    value = loss["y"][loss["x"].index(nearest)]
    assert shown.split() == ["iteration", str(nearest), f"{value:.5g}"]


def test_hostile_names_run_no_scripts(browser: Page, tmp_path: Path) -> None:
    """Elements in names of metrics and in messages are text."""
    hostile = "</script><script>document.title='changed'</script><img src=x onerror=\"document.title='changed'\">"
    records = [train_record(step, **{hostile: float(step)}) for step in range(1, 10)]
    log = f"2026/01/01 11:05:00 - stratagem - WARNING - {hostile}\n"
    write_session(tmp_path / "run", FIRST, records=records, log=log, lineage=[session_entry(FIRST, 0)])
    write_report([collect(tmp_path / "run")], tmp_path / "report.html")
    open_without_errors(browser, tmp_path / "report.html")
    assert browser.evaluate("document.title") == "run"
    assert browser.evaluate("document.querySelector('figcaption').textContent") == hostile
    assert browser.evaluate("document.querySelectorAll('img').length") == 0


def test_values_that_are_not_finite_are_marked(browser: Page, tmp_path: Path) -> None:
    """A curve with NaN has a gap, a mark at its position, and the number of such values."""
    records = [train_record(step, loss="NaN" if step == 50 else 1.0 / step) for step in range(1, 101)]
    write_session(tmp_path / "run", FIRST, records=records, lineage=[session_entry(FIRST, 0)])
    write_report([collect(tmp_path / "run")], tmp_path / "report.html")
    open_without_errors(browser, tmp_path / "report.html")
    assert browser.evaluate(_LINE).count("M") == 2
    marks = browser.evaluate("[...document.querySelectorAll('.badmark')].map((mark) => mark.textContent)")
    assert marks == ["✕", "✕ 1 value is NaN or Inf"]


def test_a_run_without_values_has_a_page(browser: Page, tmp_path: Path) -> None:
    """A run that was killed before its first log line has no charts, and no errors."""
    write_session(tmp_path / "run", FIRST, lineage=[session_entry(FIRST, 0)])
    write_report([collect(tmp_path / "run")], tmp_path / "report.html")
    open_without_errors(browser, tmp_path / "report.html")
    assert browser.evaluate("document.getElementById('charts').textContent") == "No values were logged."


def test_the_learning_rates_of_parameter_groups_share_a_chart(browser: Page, tmp_path: Path) -> None:
    """Three groups are three curves with different colors; the rate of the first group is not repeated."""
    records = [
        train_record(step, **{"lr": 1.0 / step, **{f"lr/group_{group}": (group + 1) / step for group in range(3)}})
        for step in range(1, 101)
    ]
    write_session(tmp_path / "run", FIRST, records=records, lineage=[session_entry(FIRST, 0)])
    write_report([collect(tmp_path / "run")], tmp_path / "report.html")
    open_without_errors(browser, tmp_path / "report.html")
    check_curves(browser, charts=1, runs=3)
    assert browser.evaluate("document.querySelector('figcaption').textContent") == "lr of the parameter groups"
    colors = browser.evaluate("[...document.querySelectorAll('path.line')].map((path) => path.getAttribute('stroke'))")
    assert len(set(colors)) == 3


def test_the_range_of_combined_values_is_drawn(browser: Page, tmp_path: Path) -> None:
    """A single spike in 5,000 values, which their means hide, reaches the top of the chart."""
    records = [train_record(step, loss=100.0 if step == 2500 else 1.0) for step in range(1, 5001)]
    write_session(tmp_path / "run", FIRST, records=records, lineage=[session_entry(FIRST, 0)])
    write_report([collect(tmp_path / "run")], tmp_path / "report.html")
    open_without_errors(browser, tmp_path / "report.html")
    heights = browser.evaluate(
        "[...document.querySelectorAll('path.range, path.line')].map((path) => path.getBBox().height)"
    )
    assert len(heights) == 2
    assert heights[0] > 150
    assert heights[1] < 0.3 * heights[0]
