"""Tests of the plan that assigns the boxes of each tensor to ranks."""

from __future__ import annotations

import pytest
import torch

from stratagem.checkpoint.directory.tensor_layout import TensorSpec
from stratagem.checkpoint.directory.write_plan import _assign_writers, make_write_plan
from stratagem.checkpoint.tree.boxes import TensorBox
from stratagem.dist import SINGLE_PROCESS, RankGroup
from stratagem.errors import CheckpointError
from tests.support.ranks import Ranks

SPEC = TensorSpec(torch.float32, (4, 2))
UPPER, LOWER = TensorBox((0, 0), (2, 2)), TensorBox((2, 0), (2, 2))


def test_the_first_of_several_replicas_writes() -> None:
    """Two halves held by four ranks are each written once, by the lower rank."""
    holders = [(rank, (SPEC, (half,))) for rank, half in enumerate([UPPER, LOWER, UPPER, LOWER])]
    assert [(assignment.box, assignment.rank) for assignment in _assign_writers("w", SPEC, holders)] == [
        (UPPER, 0),
        (LOWER, 1),
    ]


def test_boxes_are_ordered_by_position() -> None:
    """Boxes are ordered by position, regardless of the ranks that hold them."""
    holders = [(0, (SPEC, (LOWER,))), (1, (SPEC, (UPPER,)))]
    assert [(assignment.box, assignment.rank) for assignment in _assign_writers("w", SPEC, holders)] == [
        (UPPER, 1),
        (LOWER, 0),
    ]


def test_ranks_that_hold_nothing_write_nothing() -> None:
    """Five rows on eight ranks leave some ranks without a box."""
    empty = TensorBox((4, 0), (0, 2))
    holders = [(0, (SPEC, (TensorBox.whole((4, 2)),))), (1, (SPEC, (empty,))), (2, (SPEC, ()))]
    assert [assignment.rank for assignment in _assign_writers("w", SPEC, holders)] == [0]


def test_an_empty_tensor_is_written_by_the_first() -> None:
    """The first rank writes an empty tensor, so that it is in the manifest."""
    spec = TensorSpec(torch.float32, (0, 2))
    holders = [(rank, (spec, (TensorBox.whole((0, 2)),))) for rank in range(2)]
    assert [assignment.rank for assignment in _assign_writers("w", spec, holders)] == [0]


@pytest.mark.parametrize("halves", [[UPPER], [UPPER, TensorBox((1, 0), (3, 2))], [UPPER, TensorBox((2, 0), (3, 2))]])
def test_gaps_and_overlaps_are_rejected(halves: list[TensorBox]) -> None:
    """A missing rank or inconsistent sharding raises an error."""
    with pytest.raises(
        CheckpointError, match=r"The checkpoint's model/w: the boxes of all ranks.* do not cover a tensor"
    ):
        _assign_writers("model/w", SPEC, [(rank, (SPEC, (half,))) for rank, half in enumerate(halves)])


def test_a_different_shape_on_another_rank_is_reported() -> None:
    """The error contains both shapes and the rank."""
    other = TensorSpec(torch.float64, (4, 2))
    with pytest.raises(
        CheckpointError, match=r"w has dtype torch.float32 .* on rank 0, but torch.float64 .* on rank 1"
    ):
        _assign_writers("w", SPEC, [(0, (SPEC, (UPPER,))), (1, (other, (LOWER,)))])


def test_parts_without_tensors_have_no_file() -> None:
    """Parts without tensors have no file, and the size of a plan is the total size of its files."""
    plan = make_write_plan({"meta": {}, "state_dict": {"a": torch.ones(3)}}, SINGLE_PROCESS)
    assert list(plan.layouts) == ["state_dict"]
    assert plan.size == plan.layouts["state_dict"].size


def plain_on_ranks() -> list[tuple[int, int]]:
    """Plan an unsharded tensor that every rank has."""
    plan = make_write_plan({"state_dict": {"a": torch.ones(3)}}, RankGroup.of())
    return [(piece.rank, piece.box.numel) for piece in plan.assignments["state_dict"]["a"]]


def test_the_first_rank_writes_unsharded_tensors(ranks: Ranks) -> None:
    """All ranks plan that the first one writes an unsharded tensor."""
    assert ranks.run(plain_on_ranks) == [[(0, 3)]] * 2
