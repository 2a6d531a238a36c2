"""Boxes of tensors, beside NumPy's own indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratagem.checkpoint.tree.boxes import Region, tiles

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    """Draw a shape and a box in it."""
    shape = draw(SHAPES)
    starts = [draw(st.integers(0, size)) for size in shape]
    lengths = [draw(st.integers(0, size - start)) for size, start in zip(shape, starts, strict=True)]
    return shape, Region(tuple(starts), tuple(lengths))


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    """Return an array in which each element is its own place."""
    return np.arange(int(np.prod(shape, dtype=int))).reshape(shape)


def cut(array: np.ndarray, region: Region) -> np.ndarray:
    """Return the box as NumPy cuts it."""
    return array[tuple(slice(start, start + size) for start, size in zip(region.start, region.shape, strict=True))]


@given(boxes())
def test_runs_are_the_places_of_the_elements_in_order(case: tuple[tuple[int, ...], Region]) -> None:
    """Written one after the other, the runs are the box row by row."""
    shape, region = case
    places = [place for first, count in region.runs(shape) for place in range(first, first + count)]
    assert places == cut(numbers(shape), region).ravel().tolist()


@given(boxes())
def test_a_box_of_a_tensor_is_what_numpy_cuts(case: tuple[tuple[int, ...], Region]) -> None:
    """And a view, which copies nothing."""
    shape, region = case
    whole = torch.from_numpy(numbers(shape))
    part = region.of(whole)
    assert part.tolist() == cut(numbers(shape), region).tolist()
    assert part.numel() == region.numel
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("region", "runs"),
    [
        (Region((0, 0), (4, 6)), [(0, 24)]),
        (Region((1, 0), (2, 6)), [(6, 12)]),
        (Region((0, 2), (2, 3)), [(2, 3), (8, 3)]),
        (Region((3, 0), (0, 6)), []),
    ],
)
def test_what_lies_in_one_piece_is_one_run(region: Region, runs: list[tuple[int, int]]) -> None:
    """Of a matrix of 4 rows of 6, whole rows are one run, and parts of rows one each."""
    assert list(region.runs((4, 6))) == runs


@given(st.data())
def test_boxes_make_up_a_tensor_if_each_element_is_in_one(data: st.DataObject) -> None:
    """The answer is that of counting the elements."""
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3).map(tuple))
    starts = st.tuples(*(st.integers(0, 3) for _ in shape))
    lengths = st.tuples(*(st.integers(0, 3) for _ in shape))
    regions = data.draw(st.lists(st.builds(Region, starts, lengths), max_size=4))
    inside = all(
        start + length <= size
        for region in regions
        for start, length, size in zip(region.start, region.shape, shape, strict=True)
    )
    counts = np.zeros(shape, dtype=int)
    for region in regions:
        counts[tuple(slice(start, start + size) for start, size in zip(region.start, region.shape, strict=True))] += 1
    assert tiles(regions, shape) == bool(inside and (counts == 1).all())


@given(boxes(), st.integers(0, 3), st.data())
def test_a_box_split_in_two_makes_itself_up(
    case: tuple[tuple[int, ...], Region], dim: int, data: st.DataObject
) -> None:
    """Halves tile; one of them alone, or one twice, does not."""
    shape, _ = case
    if len(shape) <= dim or 0 in shape:
        return
    at = data.draw(st.integers(0, shape[dim]))
    halves = [
        Region((0,) * len(shape), (*shape[:dim], at, *shape[dim + 1 :])),
        Region((*(0,) * dim, at, *(0,) * (len(shape) - dim - 1)), (*shape[:dim], shape[dim] - at, *shape[dim + 1 :])),
    ]
    assert tiles(halves, shape)
    assert tiles(halves[::-1], shape)
    if 0 < at < shape[dim]:
        assert not tiles(halves[:1], shape)
        assert not tiles([halves[0], *halves], shape)
    assert not halves[0].overlaps(halves[1])


def test_a_scalar_is_one_box() -> None:
    """Of no dimensions there is one element, once."""
    assert tiles([Region((), ())], ())
    assert not tiles([], ())
    assert not tiles([Region((), ()), Region((), ())], ())
