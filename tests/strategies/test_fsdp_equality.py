"""One process, two replicas, two shards and two halves of each layer compute the same training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sharded_runs
from ranks import Ranks
from sharded_runs import EPOCH, GLOBAL_BATCH, OPTIM, PLACEMENTS, Gpt, Sentences, resumed, stopped, trained

# The same float32 products are added in another order. A loss of about 3 from a mean of 48 words may differ by sqrt(48) x
# 2**-24 x 3 = 1.2e-6; gradients add 16 to 64 products, and an update of AdamW is at most the learning rate of 0.01 times
# the relative error of a moment, over 6 updates: far below 1e-5 of the largest parameters (about 3).
TOLERANCE = 1e-5
HALF = 6
SHARDED = ["FSDP x2", "TP x2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The training in one process."""
    torch.manual_seed(0)
    return trained("single", str(tmp_path_factory.mktemp("single")))


def largest_difference(these: Mapping[str, Tensor], those: Mapping[str, Tensor]) -> float:
    """Return the largest difference between tensors of the same names."""
    assert these.keys() == those.keys()
    return max((tensor - those[name]).abs().max().item() for name, tensor in these.items())


def mean_losses(ranks: list[dict[str, Any]]) -> list[float]:
    """Return the mean over ranks of each iteration's loss, as the log has it."""
    return [sum(losses) / len(losses) for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]


@pytest.mark.parametrize("placement", ["DDP x2", *SHARDED])
def test_every_placement_trains_as_one_process_does(
    ranks: Ranks, alone: dict[str, Any], tmp_path: Path, placement: str
) -> None:
    """Initial weights are equal bit for bit; losses, norms, parameters, moments and the average to rounding.

    With accumulation, clipping, a schedule, a tied weight, a frozen layer, a parameter that is a number, and one whose
    rows the ranks cannot share evenly.
    """
    both = ranks.run(trained, placement, str(tmp_path))
    for rank in both:
        assert all(torch.equal(rank["first"][name], alone["first"][name]) for name in alone["first"])
        assert rank["rates"] == alone["rates"]
        assert rank["norms"] == pytest.approx(alone["norms"], rel=TOLERANCE)
        assert (rank["state"], rank["tied"]) == (alone["state"], True)
        for kind in ("last", "average", "moments"):
            assert largest_difference(rank[kind], alone[kind]) < TOLERANCE
    assert mean_losses(both) == pytest.approx(alone["losses"], abs=TOLERANCE)
    # What is frozen stays, what learns moves.
    moved = {name for name, value in alone["first"].items() if not torch.equal(both[0]["last"][name], value)}
    assert moved == alone["first"].keys() - {"places.weight"}


def test_ranks_that_share_layers_see_the_same_samples(ranks: Ranks, alone: dict[str, Any], tmp_path: Path) -> None:
    """Under tensor parallel both ranks take the whole batch; shards of data are dealt in turn."""
    first, second = ranks.run(trained, "TP x2", str(tmp_path / "tp"), 2)
    assert first["ids"] == second["ids"] == alone["ids"][:2]
    dealt = ranks.run(trained, "FSDP x2", str(tmp_path / "fsdp"), 2)
    assert [rank["ids"] for rank in dealt] == [[ids[rank::2] for ids in alone["ids"][:2]] for rank in (0, 1)]


def test_the_first_loss_is_that_of_one_process_bit_for_bit(ranks: Ranks, tmp_path: Path) -> None:
    """Gathered parameters are the parameters: for its samples a rank computes exactly what one process computes."""
    both = ranks.run(trained, "FSDP x2", str(tmp_path / "fsdp"), 1)
    torch.manual_seed(0)
    model = Gpt()
    model.init_weights()
    # Of one draw of the weights, the batches of both ranks.
    strategy = sharded_runs.prepared("single", str(tmp_path / "single"))
    words = Sentences().words
    for rank in both:
        loss = strategy.model(words[rank["ids"][0]], mode="loss")["loss"]
        assert loss.item() == rank["losses"][0]
    strategy.close()
    assert len(both[0]["ids"][0]) == GLOBAL_BATCH // 2


def changed(placement: str, folder: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Train 4 iterations with changed options."""
    return trained(placement, folder, 4, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"reshard_after_forward": False, "wrap_policy": "Block"},
        {"reshard_after_forward": {"blocks.0": False}, "wrap_policy": {"modules": ["blocks.*"]}},
        {"cpu_offload": True, "wrap_policy": {"min_params": 2000}},
        {"forward_prefetch": 1, "backward_prefetch": 2},
        {"ignored": ["blocks.1.up", "norm.*"]},
        {"activation_checkpointing": True},
        {
            "activation_checkpointing": {
                "policy": {"classes": Gpt.__name__.replace("Gpt", "Block")},
                "save_ops": "costly",
            }
        },
        {"initial_weights": "per_rank"},
        {"initial_weights": "whole"},
        {"wrap_policy": "sharded_runs.Block", "state": "full"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_options_change_where_and_when_and_not_what(
    ranks: Ranks, alone: dict[str, Any], tmp_path: Path, changes: Mapping[str, Any]
) -> None:
    """Whatever is kept, freed, gathered ahead, offloaded or computed again, the losses are the same."""
    both = ranks.run(changed, "FSDP x2", str(tmp_path), changes)
    assert mean_losses(both) == pytest.approx(alone["losses"][:4], abs=TOLERANCE)
    assert all(torch.equal(both[1]["first"][name], alone["first"][name]) for name in alone["first"])


def test_smaller_types_compute_and_float32_is_kept(ranks: Ranks, alone: dict[str, Any], tmp_path: Path) -> None:
    """With mixed_precision="bfloat16" parameters and moments stay float32; losses differ by the 8 bits of bfloat16."""
    both = ranks.run(changed, "FSDP x2", str(tmp_path), {"mixed_precision": "bfloat16"})
    assert {value.dtype for kind in ("last", "moments") for value in both[0][kind].values()} == {torch.float32}
    differences = [abs(a - b) for a, b in zip(mean_losses(both), alone["losses"], strict=False)]
    assert 0 < max(differences) < 3 * 2**-7


def test_float16_scales_its_loss_on_shards(ranks: Ranks, alone: dict[str, Any], tmp_path: Path) -> None:
    """Under autocast with float16, ranks agree on the scale and whether an update is skipped, on shards of all kinds."""
    scaled = {**OPTIM, "type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": {"init_scale": 1024.0}}
    for placement in SHARDED:
        both = ranks.run(changed, placement, str(tmp_path / placement), {"optim": scaled})
        assert mean_losses(both) == pytest.approx(alone["losses"][:4], abs=0.02)
        assert largest_difference(both[0]["last"], both[1]["last"]) == 0.0


def from_one_placement_to_another(ranks: Ranks, tmp_path: Path, before: str, after: str) -> tuple[Any, Any]:
    """Train half of the epoch under one placement and the rest under another; return what both saw."""
    checkpoint = str(tmp_path / "half")

    def on(placement: str) -> Any:
        return ranks.run if PLACEMENTS[placement][2] == 2 else lambda function, *args: [function(*args)]

    saved = on(before)(stopped, before, str(tmp_path / "before"), checkpoint, HALF)
    return saved, on(after)(resumed, after, str(tmp_path / "after"), checkpoint, HALF)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("single", "FSDP x2"), ("FSDP x2", "single"), ("FSDP x2", "FSDP x2"), ("DDP x2", "TP x2"),
        ("TP x2", "FSDP x2"), ("FSDP x2", "DDP x2"),
    ],
)  # fmt: skip
def test_any_placement_goes_on_from_what_another_saved(
    ranks: Ranks, alone: dict[str, Any], tmp_path: Path, before: str, after: str
) -> None:
    """What is found in the checkpoint is what was saved, bit for bit, and the run goes on as the unbroken one."""
    saved, taken_up = from_one_placement_to_another(ranks, tmp_path, before, after)
    for rank in taken_up:
        for kind in ("last", "moments"):
            assert largest_difference(rank["found"][kind], saved[0][kind]) == 0.0
            assert largest_difference(rank[kind], alone[kind]) < TOLERANCE
        assert rank["rates"] == alone["rates"][HALF:]
    assert mean_losses(taken_up) == pytest.approx(alone["losses"][HALF:], abs=TOLERANCE)
    assert EPOCH == 2 * HALF


def test_a_checkpoint_before_the_first_update_has_no_moments_and_is_taken_up(ranks: Ranks, tmp_path: Path) -> None:
    """A run that was saved before its first update goes on from the beginning."""
    checkpoint = str(tmp_path / "start")
    ranks.run(stopped, "FSDP x2", str(tmp_path / "before"), checkpoint, 0)
    (first, _), whole = (
        ranks.run(resumed, "FSDP x2", str(tmp_path / "after"), checkpoint, 0),
        ranks.run(trained, "FSDP x2", str(tmp_path / "whole")),
    )
    assert first["found"]["moments"] == {}
    assert first["losses"] == whole[0]["losses"]
