"""Charts in the terminal, dot by dot."""

import io

import numpy as np
import pytest
from rich.console import Console

from stratagem.cli.plot.braille import print_chart
from stratagem.cli.plot.charts import Chart, Line, Mark, Panel, wants_log_scale


def draw(panel: Panel, *, width: int = 100, log_x: bool = False, end: float = 10.0) -> list[str]:
    """Return the lines of a chart with one panel, which starts at 0, or at 1 if the axis is logarithmic."""
    console = Console(file=io.StringIO(), width=width, no_color=True)
    chart = Chart(title="a run", x_label="iteration", x_range=(float(log_x), end), panels=(panel,), log_x=log_x)
    print_chart(chart, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO


def line(*y: float, label: str = "", faint: bool = False) -> Line:
    """Return a line with x values from 0 to 10."""
    return Line(label=label, x=np.linspace(0, 10, len(y)), y=np.asarray(y), faint=faint)


def body(lines: list[str]) -> list[str]:
    """Return the part to the right of the axis, from top to bottom."""
    return [each.split(sep, 1)[1] for each in lines for sep in "┤│" if sep in each]


def test_a_rising_line():
    """An increasing line is drawn from the bottom left to the top right without gaps."""
    rows = body(draw(Panel(label="lr", lines=(line(0.0, 1.0),))))
    assert len(rows) == 11
    # Dots 7 and 8 are the lowest of a character, dots 1 and 4 the highest.
    assert ord(rows[-1][0]) & 0xC0
    assert ord(rows[0][-1]) & 0x09
    filled = {column for row in rows for column, sign in enumerate(row) if sign != " "}
    assert filled == set(range(len(rows[0])))


def test_a_step_is_a_vertical_line():
    """A step has a dot in every row of its column."""
    steps = Line(label="", x=np.asarray([0.0, 5.0, 5.0001, 10.0]), y=np.asarray([1.0, 1.0, 0.0, 0.0]))
    rows = body(draw(Panel(label="lr", lines=(steps,))))
    assert any(all(len(row) > column and row[column] != " " for row in rows) for column in range(len(rows[-1])))


def test_a_constant_line_is_in_the_middle():
    """A constant line is drawn in the middle, with values above and below it."""
    lines = draw(Panel(label="lr", lines=(line(2.0, 2.0),)))
    rows = body(lines)
    assert [number for number, row in enumerate(rows) if row.strip()] == [5]
    assert [each.split("┤")[0].strip() for each in lines if "┤" in each] == ["3", "2", "1"]


def test_values_that_are_all_zero_can_be_drawn():
    """Values that are all zero, such as a weight decay of 0, can be drawn."""
    rows = body(draw(Panel(label="weight decay", lines=(line(0.0, 0.0),))))
    assert rows[-1].strip()


def test_an_exponential_is_straight_on_a_logarithmic_axis():
    """On a logarithmic axis, an exponential is a straight line, with 1, 0.1 and 0.01 at the top, middle and bottom."""
    values = np.geomspace(1.0, 0.01, 11)
    lines = draw(Panel(label="lr", lines=(line(*values),), log=True))
    labels = [each.split("┤")[0].strip() for each in lines if "┤" in each]
    assert labels[0] == "1"
    assert labels[-1] == "0.01"
    rows = body(lines)
    # The curve crosses the end of the middle row just beyond the middle of the width.
    assert abs(len(rows[5].rstrip()) / len(rows[-1]) - 6 / 11) < 0.05


def test_marks_have_a_position_and_a_label():
    """A mark at 10 is in the middle of a logarithmic axis from 1 to 100 and is in the legend."""
    curve = Line(label="loss", x=np.asarray([1.0, 100.0]), y=np.asarray([1.0, 1.0]))
    panel = Panel(label="loss", lines=(curve,), marks=(Mark(label="steepest", x=10.0),))
    lines = draw(panel, log_x=True, end=100.0)
    assert any("● loss  ● steepest" in each for each in lines)
    rows = body(lines)
    width = next(each for each in lines if "└" in each).count("─")
    assert abs(rows[0].index("┊") - width // 2) <= 1


def test_faint_lines_do_not_affect_the_axis():
    """Faint lines do not affect the range of the axis, so a single loss of 1,000 is not a problem."""
    panel = Panel(label="loss", lines=(line(1.0, 2.0), line(1.0, 1000.0, faint=True)))
    assert any("2 ┤" in each for each in draw(panel))


@pytest.mark.parametrize("width", [10, 40, 80, 300])
def test_no_line_is_wider_than_the_terminal(width: int):
    """Narrow terminals get fewer ticks, down to 32 columns, and wide ones are used up to 110."""
    lines = draw(Panel(label="lr", lines=(line(0.0, 1.0),)), width=width)
    assert max(map(len, lines)) <= max(32, min(width, 110))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.geomspace(1.0, 1e-4, 100), True),  # an exponential decay over four decades
        (np.repeat([1.0, 0.1, 0.01], 30), True),  # three stages
        (np.cos(np.linspace(0, np.pi, 100)) / 2 + 0.5 + 1e-9, False),  # a cosine, close to zero only at its end
        (np.linspace(0.0, 1.0, 100), False),  # zero has no logarithm
        (np.ones(5), False),
    ],
)
def test_the_scale_is_logarithmic_if_the_range_requires_it(values: np.ndarray, expected: bool):
    """The scale is logarithmic if a large part of the run would otherwise be close to zero."""
    assert wants_log_scale((line(*values),)) is expected
