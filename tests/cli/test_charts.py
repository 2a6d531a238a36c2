"""What is drawn, dot by dot."""

import io

import numpy as np
import pytest
from rich.console import Console

from stratagem.cli.plot.braille import print_chart
from stratagem.cli.plot.charts import Chart, Line, Mark, Panel, wants_log_scale


def drawn(panel: Panel, *, width: int = 100, log_x: bool = False, end: float = 10.0) -> list[str]:
    """Return the lines of a chart with one panel from 0, or 1 where the axis is logarithmic."""
    console = Console(file=io.StringIO(), width=width, no_color=True)
    chart = Chart(title="a run", x_label="iteration", x_range=(float(log_x), end), panels=(panel,), log_x=log_x)
    print_chart(chart, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO


def line(*y: float, label: str = "", faint: bool = False) -> Line:
    """Return a line over 0 to 10."""
    return Line(label=label, x=np.linspace(0, 10, len(y)), y=np.asarray(y), faint=faint)


def body(lines: list[str]) -> list[str]:
    """Return what stands right of the axis, from top to bottom."""
    return [each.split(sep, 1)[1] for each in lines for sep in "┤│" if sep in each]


def test_a_rising_line_goes_from_the_lowest_dot_to_the_highest():
    """From the bottom left to the top right, without a gap in any column."""
    rows = body(drawn(Panel(label="lr", lines=(line(0.0, 1.0),))))
    assert len(rows) == 11
    # Dots 7 and 8 are the lowest of a character, 1 and 4 the highest.
    assert ord(rows[-1][0]) & 0xC0
    assert ord(rows[0][-1]) & 0x09
    filled = {column for row in rows for column, sign in enumerate(row) if sign != " "}
    assert filled == set(range(len(rows[0])))


def test_a_step_is_an_upright_line():
    """Every row of the column where it happens has a dot."""
    steps = Line(label="", x=np.asarray([0.0, 5.0, 5.0001, 10.0]), y=np.asarray([1.0, 1.0, 0.0, 0.0]))
    rows = body(drawn(Panel(label="lr", lines=(steps,))))
    assert any(all(len(row) > column and row[column] != " " for row in rows) for column in range(len(rows[-1])))


def test_a_flat_line_lies_in_the_middle():
    """With values above and below it."""
    lines = drawn(Panel(label="lr", lines=(line(2.0, 2.0),)))
    rows = body(lines)
    assert [number for number, row in enumerate(rows) if row.strip()] == [5]
    assert [each.split("┤")[0].strip() for each in lines if "┤" in each] == ["3", "2", "1"]


def test_values_that_are_all_zero_can_be_drawn():
    """A weight decay of 0."""
    rows = body(drawn(Panel(label="weight decay", lines=(line(0.0, 0.0),))))
    assert rows[-1].strip()


def test_a_logarithmic_axis_makes_an_exponential_straight():
    """1, 0.1 and 0.01 are at the top, in the middle and at the bottom."""
    values = np.geomspace(1.0, 0.01, 11)
    lines = drawn(Panel(label="lr", lines=(line(*values),), log=True))
    labels = [each.split("┤")[0].strip() for each in lines if "┤" in each]
    assert labels[0] == "1"
    assert labels[-1] == "0.01"
    rows = body(lines)
    # The end of the middle row is crossed just beyond the middle of the width.
    assert abs(len(rows[5].rstrip()) / len(rows[-1]) - 6 / 11) < 0.05


def test_marks_stand_where_they_belong_and_are_named():
    """In the middle of a logarithmic axis from 1 to 100 is 10."""
    curve = Line(label="loss", x=np.asarray([1.0, 100.0]), y=np.asarray([1.0, 1.0]))
    panel = Panel(label="loss", lines=(curve,), marks=(Mark(label="steepest", x=10.0),))
    lines = drawn(panel, log_x=True, end=100.0)
    assert any("● loss  ● steepest" in each for each in lines)
    rows = body(lines)
    width = next(each for each in lines if "└" in each).count("─")
    assert abs(rows[0].index("┊") - width // 2) <= 1


def test_what_is_faint_does_not_stretch_the_axis():
    """A single loss of 1,000 leaves the smoothed ones readable."""
    panel = Panel(label="loss", lines=(line(1.0, 2.0), line(1.0, 1000.0, faint=True)))
    assert any("2 ┤" in each for each in drawn(panel))


@pytest.mark.parametrize("width", [10, 40, 80, 300])
def test_no_line_is_wider_than_the_terminal(width: int):
    """Narrow terminals get fewer ticks, down to 32 columns; wide ones are used up to 110."""
    lines = drawn(Panel(label="lr", lines=(line(0.0, 1.0),)), width=width)
    assert max(map(len, lines)) <= max(32, min(width, 110))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.geomspace(1.0, 1e-4, 100), True),  # an exponential decay over four decades
        (np.repeat([1.0, 0.1, 0.01], 30), True),  # three stages
        (np.cos(np.linspace(0, np.pi, 100)) / 2 + 0.5 + 1e-9, False),  # a cosine, near to zero only at its end
        (np.linspace(0.0, 1.0, 100), False),  # zero has no logarithm
        (np.ones(5), False),
    ],
)
def test_the_scale_is_logarithmic_where_the_range_asks_for_it(values: np.ndarray, expected: bool):
    """Where a long stretch of the run could not be told from zero."""
    assert wants_log_scale((line(*values),)) is expected
