"""Models with many equal blocks are planned from a few of them."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stratagem
from stratagem import SupervisedModel
from stratagem.planning import timelines
from stratagem.planning.repeated_blocks import (
    BlockFinder,
    RepeatedBlocks,
    extended_changes,
    find_repeated_blocks,
    names_blocks,
    with_more_samples,
)
from stratagem.planning.simulate import Simulation
from stratagem.planning.storage_history import Change, StorageHistory
from tests.support.planned_models import Language, language_batch

ADAMW = {"optimizer": {"type": "AdamW"}}
BATCH = (torch.zeros(4, 8), torch.zeros(4, 8))
GIB = 2**30


class Blocks(nn.Module):
    """Equal linear layers, optionally with another activation in the last ones."""

    def __init__(self, count: int, *, slopes: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.1 * index if slopes else 0.1)) for index in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def changes(*sizes: int) -> list[Change]:
    """Return changes of activations in the forward pass."""
    return [Change("activations", size, "forward") for size in sizes]


def test_additional_parts_are_repeated() -> None:
    """5, 6, 7 and 8, 9 are added for each block, so two more blocks have both three times."""
    short = changes(1000, 2000, 5000, 6000, 7000, 3000, 8000, 9000, 4000)
    long = changes(
        1000, 2000, *[5000, 6000, 7000] * 2, 3000, *[8000, 9000] * 2, 4000
    )  # fmt: skip
    expected = changes(1000, 2000, *[5000, 6000, 7000] * 4, 3000, *[8000, 9000] * 4, 4000)
    assert extended_changes(short, long, 2) == expected


def test_a_small_tensor_grows_with_the_blocks() -> None:
    """The norms of 2 and 3 blocks have 8 and 12 bytes, so those of 5 blocks have 20."""
    short, long = changes(5000, 5000, 8, 3000), changes(5000, 5000, 5000, 12, 3000)
    assert extended_changes(short, long, 2) == changes(*[5000] * 5, 20, 3000)


def test_changes_that_are_replaced_are_not_extended() -> None:
    """A large tensor that grows with the blocks is not an additional part."""
    assert extended_changes(changes(5000, 8000), changes(5000, 5000, 9000), 1) is None
    assert extended_changes(changes(5000, 5000), changes(5000), 1) is None


def test_sizes_with_more_samples_follow_from_one_more_block() -> None:
    """5, 6 and 8 are additional in 3 blocks, and 1, 2 and 3 grow by 10, 20 and 30 with the samples, so they do in 2 blocks."""
    short = StorageHistory({"batch": 4}, tuple(changes(1000, 2000, 3000)))
    long = StorageHistory({"batch": 4}, tuple(changes(1000, 5000, 6000, 2000, 8000, 3000)))
    larger = StorageHistory({"batch": 8}, tuple(changes(1010, 5050, 6060, 2020, 8080, 3030)))
    expected = StorageHistory({"batch": 8}, tuple(changes(1010, 2020, 3030)))
    assert with_more_samples(short, long, larger) == expected
    assert with_more_samples(short, long, short) is None


def test_equal_blocks_are_found_by_their_attributes() -> None:
    """14 equal blocks are found; blocks with different attributes, shared parameters, or fewer blocks are not."""
    assert find_repeated_blocks(Blocks(14)) == RepeatedBlocks("blocks", 14)
    assert find_repeated_blocks(Blocks(14, slopes=True)) is None
    assert find_repeated_blocks(Blocks(13)) is None
    tied = Blocks(14)
    tied.blocks[3][0].weight = tied.blocks[2][0].weight
    assert find_repeated_blocks(tied) is None


def test_options_that_select_single_blocks() -> None:
    """Patterns with numbers and functions may select single blocks, and dtypes do not."""
    assert names_blocks({"paramwise_cfg": {"custom_keys": {"blocks.13": {"lr_mult": 0.0}}}})
    assert names_blocks({"wrap_policy": lambda module: True})
    assert not names_blocks({"mixed_precision": "bfloat16", "wrap_policy": ["Block"], "replicate": 2})


def planned(model: Any, batch: Any, strategy: Any, memory: int = 2**20) -> dict[str, Any]:
    """Return the plan for four ranks without the time that it took. ``memory`` is what is left after the driver."""
    [step] = stratagem.plan(
        model, optim_wrapper=ADAMW, batch=batch, strategies=[strategy], worlds=[4], memory=GIB + memory
    ).steps
    assert (step.refusal, step.failure) == (None, None)
    return asdict(replace(step, seconds=0.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "most"),
    [
        ("single", 4),
        ("ddp", 20),  # The only bucket grows with the model, so the whole model is simulated.
        ({"type": "fsdp", "wrap_policy": "Sequential"}, 4),
        ({"type": "fsdp", "cpu_offload": True}, 4),
    ],
    ids=str,
)
def test_plans_from_a_few_blocks_equal_those_of_all_blocks(
    monkeypatch: pytest.MonkeyPatch, strategy: Any, most: int
) -> None:
    """All sizes, collectives, operations and the largest micro-batch are equal, and the simulated models are small."""
    simulated: list[int] = []
    step = Simulation.step

    def noted(sim: Simulation, batch: Any) -> Any:
        simulated.append(len(sim.model.network.blocks))
        return step(sim, batch)

    monkeypatch.setattr(Simulation, "step", noted)
    few = planned(SupervisedModel(Blocks(20), nn.MSELoss()), BATCH, strategy)
    assert max(simulated) == most
    monkeypatch.setattr(BlockFinder, "find", lambda finder: None)
    assert few == planned(SupervisedModel(Blocks(20), nn.MSELoss()), BATCH, strategy)
    assert few["largest_micro_batch"] > 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        {"type": "fsdp", "tp": 2, "wrap_policy": "Block", "mixed_precision": "bfloat16"},
        {"type": "colossalai", "plugin": {"type": "hybrid-parallel", "tp_size": 2}, "mixed_precision": "bf16"},
        {"type": "deepspeed", "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}, "bf16": True},
    ],
    ids=lambda each: each["type"],
)
def test_sharded_layers_and_engines_are_planned_from_a_few_blocks(
    monkeypatch: pytest.MonkeyPatch, strategy: Any
) -> None:
    """Plans of tensor parallelism and of engines equal those of all blocks, whose micro-batch is recorded for one size only."""
    sizes: list[tuple[int, int]] = []
    step, record = Simulation.step, timelines.record_timeline

    def noted_step(sim: Simulation, batch: Any) -> Any:
        sizes.append((len(sim.model.blocks), len(batch["tokens"])))
        return step(sim, batch)

    def noted_record(job: Any, batch: Any, dtype: Any, **options: Any) -> Any:
        sizes.append((len(job.make_model().blocks), len(batch["tokens"])))
        return record(job, batch, dtype, **options)

    monkeypatch.setattr(Simulation, "step", noted_step)
    monkeypatch.setattr(timelines, "record_timeline", noted_record)
    few = planned(Language(20), language_batch(), strategy, 2**24)
    assert {size for size in sizes if size[0] > 4} == {(20, 4)}
    monkeypatch.setattr(BlockFinder, "find", lambda finder: None)
    sizes.clear()
    assert few == planned(Language(20), language_batch(), strategy, 2**24)
    assert {blocks for blocks, _ in sizes} == {20}
    assert few["largest_micro_batch"] > 4
