"""Boxes of tensors, compared with NumPy's indexing."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratagem.checkpoint.tree.boxes import TensorBox, boxes_cover

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], TensorBox]:
    """Draw a shape and a box in it."""
    shape = draw(SHAPES)
    starts = [draw(st.integers(0, size)) for size in shape]
    lengths = [draw(st.integers(0, size - start)) for size, start in zip(shape, starts, strict=True)]
    return shape, TensorBox(tuple(starts), tuple(lengths))


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    """Return an array in which each element is its flat index."""
    return np.arange(int(np.prod(shape, dtype=int))).reshape(shape)


def cut(array: np.ndarray, box: TensorBox) -> np.ndarray:
    """Return the elements in the box by NumPy's indexing."""
    return array[tuple(slice(start, start + size) for start, size in zip(box.start, box.shape, strict=True))]


@pytest.mark.slow
@given(cuts())
def test_runs_are_the_elements_in_order(case: tuple[tuple[int, ...], TensorBox]) -> None:
    """The concatenated runs are the elements of the box in row-major order."""
    shape, box = case
    places = [place for first, count in box.runs(shape) for place in range(first, first + count)]
    assert places == cut(numbers(shape), box).ravel().tolist()


@given(cuts())
def test_a_box_matches_numpy_indexing(case: tuple[tuple[int, ...], TensorBox]) -> None:
    """``of`` returns the same elements as NumPy's indexing, as a view."""
    shape, box = case
    whole = torch.from_numpy(numbers(shape))
    part = box.of(whole)
    assert part.tolist() == cut(numbers(shape), box).tolist()
    assert part.numel() == box.numel
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("box", "runs"),
    [
        (TensorBox((0, 0), (4, 6)), [(0, 24)]),
        (TensorBox((1, 0), (2, 6)), [(6, 12)]),
        (TensorBox((0, 2), (2, 3)), [(2, 3), (8, 3)]),
        (TensorBox((3, 0), (0, 6)), []),
    ],
)
def test_contiguous_elements_are_one_run(box: TensorBox, runs: list[tuple[int, int]]) -> None:
    """In a 4 x 6 matrix, whole rows are one run, and parts of rows are one run each."""
    assert list(box.runs((4, 6))) == runs


@given(st.data())
def test_boxes_cover_a_tensor_if_each_element_is_in_one_box(data: st.DataObject) -> None:
    """``boxes_cover`` agrees with counting how many boxes contain each element."""
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3).map(tuple))
    starts = st.tuples(*(st.integers(0, 3) for _ in shape))
    lengths = st.tuples(*(st.integers(0, 3) for _ in shape))
    boxes = data.draw(st.lists(st.builds(TensorBox, starts, lengths), max_size=4))
    inside = all(
        start + length <= size for box in boxes for start, length, size in zip(box.start, box.shape, shape, strict=True)
    )
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        counts[tuple(slice(start, start + size) for start, size in zip(box.start, box.shape, strict=True))] += 1
    assert boxes_cover(boxes, shape) == bool(inside and (counts == 1).all())


@given(cuts(), st.integers(0, 3), st.data())
def test_two_halves_cover_a_box(case: tuple[tuple[int, ...], TensorBox], dim: int, data: st.DataObject) -> None:
    """Two halves cover a box; one half alone, or the same half twice, does not."""
    shape, _ = case
    if len(shape) <= dim or 0 in shape:
        return
    at = data.draw(st.integers(0, shape[dim]))
    halves = [
        TensorBox((0,) * len(shape), (*shape[:dim], at, *shape[dim + 1 :])),
        TensorBox(
            (*(0,) * dim, at, *(0,) * (len(shape) - dim - 1)), (*shape[:dim], shape[dim] - at, *shape[dim + 1 :])
        ),
    ]
    assert boxes_cover(halves, shape)
    assert boxes_cover(halves[::-1], shape)
    if 0 < at < shape[dim]:
        assert not boxes_cover(halves[:1], shape)
        assert not boxes_cover([halves[0], *halves], shape)
    assert not halves[0].overlaps(halves[1])


def test_a_scalar_is_one_box() -> None:
    """A tensor without dimensions has one element and one box."""
    assert boxes_cover([TensorBox((), ())], ())
    assert not boxes_cover([], ())
    assert not boxes_cover([TensorBox((), ()), TensorBox((), ())], ())


def calls_of(function: Callable[[], object]) -> int:
    """Return the number of calls that a function makes."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def columns(count: int) -> list[TensorBox]:
    """Return boxes that all cover the whole first dimension."""
    return [TensorBox((0, index), (2, 1)) for index in range(count)]


def grid(count: int) -> list[TensorBox]:
    """Return rows of boxes."""
    return [TensorBox((row, index), (1, 1)) for row in range(2) for index in range(count)]


@pytest.mark.parametrize("make", [columns, grid])
def test_the_time_to_check_a_cover_is_linear(make: Callable[[int], list[TensorBox]]) -> None:
    """Four times as many boxes need four times as many operations, so that a manifest cannot keep a reader busy."""
    small, large = make(200), make(800)
    assert boxes_cover(small, (2, 200))
    assert boxes_cover(large, (2, 800))
    few, many = calls_of(lambda: boxes_cover(small, (2, 200))), calls_of(lambda: boxes_cover(large, (2, 800)))
    assert many < 4.5 * few
    assert not boxes_cover([*large[:-1], large[0]], (2, 800))


def test_a_cover_of_many_dimensions_is_checked() -> None:
    """Boxes that cut more dimensions than a strategy does are compared in pairs."""
    shape, boxes, start = (2,) * 12, [], (0,) * 12
    for dim in range(12):
        size = (*(1 for _ in range(dim + 1)), *(2 for _ in range(11 - dim)))
        boxes.append(TensorBox((*start[:dim], 1, *start[dim + 1 :]), size))
    boxes.append(TensorBox(start, (1,) * 12))
    assert boxes_cover(boxes, shape)
    assert not boxes_cover([*boxes[:-1], boxes[-2]], shape)
