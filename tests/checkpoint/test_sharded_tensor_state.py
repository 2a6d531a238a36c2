"""Tests of tensors whose boxes are stored on different ranks, such as the flat ranges of ZeRO."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stratagem.checkpoint import (
    BackgroundSaver,
    ShardedTensorState,
    TensorBox,
    read_any,
    save_checkpoint,
    take_box,
    take_range,
)
from stratagem.checkpoint.tree.boxes import boxes_of_range
from stratagem.dist import RankGroup
from stratagem.errors import CheckpointError, CheckpointMismatchError
from tests.support.ranks import Ranks

SHAPES = st.lists(st.integers(0, 5), max_size=4)


@given(SHAPES, st.data())
def test_boxes_of_a_range_are_its_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    """The boxes of a range of a flattened tensor contain its elements in order."""
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    found = list(boxes_of_range(shape, start, stop))
    assert [number for box in found for number in box.of(tensor).flatten().tolist()] == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_a_range_within_a_row_is_one_box() -> None:
    """In a 4 x 5 tensor, the elements 6 to 8 are columns 1 to 3 of row 1; 3 to 12 need three boxes."""
    assert list(boxes_of_range([4, 5], 6, 9)) == [TensorBox((1, 1), (1, 3))]
    assert list(boxes_of_range([4, 5], 3, 13)) == [
        TensorBox((0, 3), (1, 2)),
        TensorBox((1, 0), (1, 5)),
        TensorBox((2, 0), (1, 3)),
    ]


@pytest.mark.parametrize(("start", "stop"), [(0, 20), (0, 0), (3, 13), (19, 20)])
def test_a_range_can_be_taken_back(start: int, stop: int) -> None:
    """A range can be read from the state of a rank and from the global tensor."""
    whole = torch.randn(4, 5)
    pieces = ShardedTensorState.from_flat_range(whole.flatten()[start:stop], start, whole.shape)
    assert torch.equal(take_range(pieces, start, stop), whole.flatten()[start:stop])
    assert torch.equal(take_range(whole, start, stop), whole.flatten()[start:stop])
    for box, content in pieces.shards.items():
        assert torch.equal(take_box(whole, box), content)


def test_shards_are_views_of_the_given_memory() -> None:
    """The shards share memory with the given values."""
    flat = torch.zeros(10)
    pieces = ShardedTensorState.from_flat_range(flat[2:9], 2, (2, 5))
    flat.fill_(7.0)
    assert all(content.eq(7.0).all() for content in pieces.shards.values())


def test_a_box_that_the_rank_does_not_hold_is_rejected() -> None:
    """Taking a box that this rank does not hold raises an error."""
    pieces = ShardedTensorState.from_flat_range(torch.zeros(4), 0, (2, 4))
    with pytest.raises(CheckpointMismatchError, match="does not have the box"):
        take_range(pieces, 2, 6)


def test_a_shard_of_another_shape_is_rejected() -> None:
    """The shape of a shard must match its box."""
    with pytest.raises(CheckpointError, match=r"has dtype torch.float32 and shape \[3\]"):
        ShardedTensorState(torch.float32, (4,), {TensorBox((0,), (2,)): torch.zeros(3)})


def test_one_process_stores_complete_shards_as_a_tensor(tmp_path) -> None:
    """Shards that together cover a tensor are stored as one full tensor."""
    whole = torch.randn(3, 4)
    halves = [
        ShardedTensorState.from_flat_range(whole.flatten()[:5], 0, (3, 4)),
        ShardedTensorState.from_flat_range(whole.flatten()[5:], 5, (3, 4)),
    ]
    both = ShardedTensorState(torch.float32, (3, 4), {**halves[0].shards, **halves[1].shards})
    save_checkpoint({"state_dict": {"w": both}}, tmp_path / "all")
    assert torch.equal(read_any(tmp_path / "all")["state_dict"]["w"], whole)
    with pytest.raises(CheckpointError, match="do not cover"):
        save_checkpoint({"state_dict": {"w": halves[0]}}, tmp_path / "half")


def test_a_tensor_without_elements_is_stored(tmp_path) -> None:
    """A tensor without elements is stored even if no rank holds a box of it."""
    save_checkpoint({"state_dict": {"w": ShardedTensorState.empty(torch.float32, (0, 3))}}, tmp_path / "empty")
    assert read_any(tmp_path / "empty")["state_dict"]["w"].shape == (0, 3)


def _save(path: str, *, background: bool) -> dict[str, float]:
    rank_group = RankGroup.of()
    whole = torch.arange(15.0).reshape(3, 5)
    # -0.0 must be preserved.
    whole[2, 4] = -0.0
    cut = 7
    own = (whole.flatten()[:cut], 0) if rank_group.is_rank0 else (whole.flatten()[cut:], cut)
    tree = {
        "state_dict": {
            "ranges": ShardedTensorState.from_flat_range(*own, whole.shape),
            "first": _of_first(whole, rank_group),
        },
        "meta": {"iter": 3},
    }
    if background:
        saver = BackgroundSaver(logging.getLogger("test"))
        saver.save(tree, path, rank_group)
        saver.wait()
        saver.close()
    else:
        save_checkpoint(tree, path, rank_group)
    return {name: leaf.full_tensor().tolist() for name, leaf in tree["state_dict"].items()}


def _of_first(whole: torch.Tensor, rank_group: RankGroup) -> ShardedTensorState:
    return (
        ShardedTensorState.from_flat_range(whole, 0, whole.shape)
        if rank_group.is_rank0
        else ShardedTensorState.empty(whole.dtype, whole.shape)
    )


@pytest.mark.parametrize("name", ["epoch_1", "epoch_1.pth"])
@pytest.mark.parametrize("background", [False, True])
def test_ranks_store_their_ranges_of_one_tensor(ranks: Ranks, tmp_path, name: str, background: bool) -> None:
    """The ranges of two ranks are stored as one tensor, bit for bit, also in a single file and in the background."""
    whole = torch.arange(15.0).reshape(3, 5)
    whole[2, 4] = -0.0
    found = ranks.run(_save, str(tmp_path / name), background=background)
    assert found == [{"ranges": whole.tolist(), "first": whole.tolist()}] * 2
    saved = read_any(tmp_path / name)["state_dict"]
    for tensor in saved.values():
        assert torch.equal(tensor, whole)
        assert math.copysign(1.0, tensor[2, 4]) == -1.0
