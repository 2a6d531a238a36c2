"""Checkpoints written by earlier versions stay readable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stratagem.checkpoint import CheckpointLoader, format_for

GOLDEN = Path(__file__).with_name("golden")
NAMES = ["v2-single", "v2-sharded", "v2.pth"]


def equal(one: Any, other: Any) -> bool:
    """Return whether two trees have the same types and are bitwise equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_checkpoint_is_restored(name: str) -> None:
    """A checkpoint that was written once, by one process or by two, is restored with every value and type."""
    assert format_for(GOLDEN / name).verify(GOLDEN / name) > 1000
    found = CheckpointLoader.load_checkpoint(GOLDEN / name)
    # Eighths up to 14/8 in five rows of three; the moments are the negative integers.
    weight = torch.tensor([[number / 8 for number in range(row, row + 3)] for row in range(0, 15, 3)])
    assert equal(
        found,
        {
            "meta": {"epoch": 3, "iter": 12, "stratagem": "0.1.0", "finite": True},
            "state_dict": {
                "weight": weight,
                "bias": torch.tensor([0.5, -2.0, 1e30], dtype=torch.bfloat16),
                "count": torch.tensor(7),
                "nothing": torch.empty(0, 2),
            },
            "optimizer": {
                "state": {"weight": {"step": torch.tensor(12.0), "exp_avg": -8 * weight}},
                "param_groups": [{"lr": 0.125, "betas": (0.9, 0.999), "params": ["weight"]}],
            },
            "notes": {
                "best": float("-inf"),
                "seen": {1, 2, 3},
                1: "a number as a key",
                "$name": "a dollar",
                "none": None,
                "text": "é\n",
                "deep": [[], {}, [True, 2**70, 1e-300]],
            },
        },
    )


def test_ranks_and_one_process_wrote_the_same_files() -> None:
    """Checkpoints written by one and by two processes differ only in their manifests, which list the boxes."""
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (GOLDEN / "v2-single" / name).read_bytes() == (GOLDEN / "v2-sharded" / name).read_bytes()


def test_safetensors_alone_reads_the_golden_weights() -> None:
    """The safetensors library alone reads the weights, without Stratagem."""
    tensors = load_file(GOLDEN / "v2-sharded" / "model.safetensors")
    assert sorted(tensors) == ["bias", "count", "nothing", "weight"]
    assert tensors["weight"][4].tolist() == [1.5, 1.625, 1.75]
