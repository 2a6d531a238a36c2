"""Record hand-written loops on two ranks: with DistributedDataParallel, FSDP, and an own all-reduce."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import stratagem
from stratagem.trace import Part, Tolerances, compare, read_trace
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow

ROUNDING: Final = Tolerances(relative=2e-5, floor=1e-3)
# The loops of this test by name, each with the part in which it differs from one process.
LOOPS: Final[Mapping[str, Part | None]] = {
    "ddp": None,
    "ddp no_sync": None,
    "fsdp": None,
    "by hand": None,
    "by hand, not reduced": Part.REDUCTION,
    "by hand, summed": Part.REDUCTION,
    "ddp, same data": Part.DATA,
    "fsdp, other rate": Part.SCHEDULE,
}


class Network(nn.Module):
    """Two layers; one weight is read without calling its module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.shift = nn.Linear(4, 8), nn.Linear(8, 3), nn.Embedding(2, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores."""
        scores: Tensor = self.last(torch.tanh(self.first(inputs) + self.shift.weight[0]))
        return scores


def train(path: Path, kind: str = "one process") -> None:
    """Train for two steps of 16 samples in total, in two micro-batches on each rank."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if kind != "one process" else (0, 1)
    model: Any = Network()
    if kind.startswith("ddp"):
        model = DistributedDataParallel(model)
    elif kind.startswith("fsdp"):
        fully_shard(model.first)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2 if "other rate" in kind else 0.1)
    data = torch.Generator().manual_seed(1)
    share = 0 if "same data" in kind else rank
    with stratagem.trace.record(path, model) as recording:
        for _ in range(2):
            inputs, labels = torch.randn(16, 4, generator=data), torch.randint(3, (16,), generator=data)
            for part in (0, 1):
                mine = slice(part * 8 + share * 8 // size, part * 8 + (share + 1) * 8 // size)
                recording.batch((inputs[mine], labels[mine]))
                skips = kind == "ddp no_sync" and part == 0
                context = model.no_sync() if skips else torch.enable_grad()
                with context:
                    (cross_entropy(model(inputs[mine]), labels[mine]) / 2).backward()
            if kind.startswith("by hand") and "not reduced" not in kind:
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= 1 if "summed" in kind else size
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()


def train_on_rank(folder: Path) -> None:
    """Record all loops on this rank."""
    for kind in LOOPS:
        train(folder / f"{kind}.json", kind)


def test_loops_on_two_ranks_are_compared_with_one_process(tmp_path: Path, ranks: Ranks) -> None:
    """Correct loops differ by rounding only, in all parts; each fault is found in its part of the first step."""
    ranks.run_within(120, train_on_rank, tmp_path)
    train(tmp_path / "one.json")
    reference = read_trace(tmp_path / "one.json")
    for kind, part in LOOPS.items():
        trace = read_trace(tmp_path / f"{kind}.json")
        assert [step.absent for rank in trace.ranks for step in rank.steps] == [{}] * 4, kind
        result = compare(reference, trace, ROUNDING)
        assert set(result.sizes) == set(Part) - {Part.AVERAGE}, kind
        if part is None:
            assert result.first is None, (kind, result.first)
        else:
            assert result.first is not None, kind
            assert (result.first.step, result.first.part) == (1, part), kind
            if "summed" in kind:
                assert result.first.note == "2 times the value in the first trace"
