"""Training is equal on one process, two replicas, two shards, and two halves of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import sharded_runs
from tests.support.ranks import Ranks
from tests.support.sharded_runs import EPOCH, GLOBAL_BATCH, OPTIM, PLACEMENTS, Gpt, Sentences, resumed, stopped, trained

# Sums of float32 products are computed in a different order. A loss of about 3, the mean over 48 words, may differ by
# sqrt(48) x 2**-24 x 3 = 1.2e-6. Gradients sum 16 to 64 products, and an AdamW update differs by at most the learning
# rate of 0.01 times the relative error of a moment. Over 6 updates, this is far below 1e-5 of the largest parameters
# (about 3).
TOLERANCE = 1e-5
HALF = 6
SHARDED = ["FSDP x2", "TP x2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of training in one process."""
    torch.manual_seed(0)
    return trained("single", str(tmp_path_factory.mktemp("single")))


def largest_difference(these: Mapping[str, Tensor], those: Mapping[str, Tensor]) -> float:
    """Return the largest difference between tensors with the same names."""
    assert these.keys() == those.keys()
    return max((tensor - those[name]).abs().max().item() for name, tensor in these.items())


def mean_losses(ranks: list[dict[str, Any]]) -> list[float]:
    """Return the mean loss over ranks for each iteration, as it is logged."""
    return [sum(losses) / len(losses) for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]


@pytest.mark.parametrize("placement", ["DDP x2", *SHARDED])
def test_every_placement_matches_one_process(
    ranks: Ranks, alone: dict[str, Any], tmp_path: Path, placement: str
) -> None:
    """Initial weights are bit-identical; losses, norms, parameters, moments and the average are equal up to rounding.

    The training includes accumulation, clipping, a schedule, a tied weight, a frozen layer, a scalar parameter, and a
    parameter whose rows cannot be divided evenly.
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
    # Frozen parameters do not change, and trainable ones do.
    moved = {name for name, value in alone["first"].items() if not torch.equal(both[0]["last"][name], value)}
    assert moved == alone["first"].keys() - {"places.weight"}


def test_tensor_parallel_ranks_see_the_same_samples(ranks: Ranks, alone: dict[str, Any], tmp_path: Path) -> None:
    """With tensor parallelism, both ranks use the whole batch; with FSDP, the samples are distributed."""
    first, second = ranks.run(trained, "TP x2", str(tmp_path / "tp"), 2)
    assert first["ids"] == second["ids"] == alone["ids"][:2]
    dealt = ranks.run(trained, "FSDP x2", str(tmp_path / "fsdp"), 2)
    assert [rank["ids"] for rank in dealt] == [[ids[rank::2] for ids in alone["ids"][:2]] for rank in (0, 1)]


def test_the_first_loss_is_bit_identical_to_one_process(ranks: Ranks, tmp_path: Path) -> None:
    """With gathered parameters, the loss of a rank is bit-identical to that of one process for the same samples."""
    both = ranks.run(trained, "FSDP x2", str(tmp_path / "fsdp"), 1)
    torch.manual_seed(0)
    model = Gpt()
    model.init_weights()
    # Compute the batches of both ranks with the same weights.
    strategy = sharded_runs.prepared("single", str(tmp_path / "single"))
    words = Sentences().words
    for rank in both:
        loss = strategy.model(words[rank["ids"][0]], mode="loss")["loss"]
        assert loss.item() == rank["losses"][0]
    strategy.close()
    assert len(both[0]["ids"][0]) == GLOBAL_BATCH // 2


def changed(placement: str, folder: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Train 4 iterations with modified options."""
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
        {"wrap_policy": "tests.support.sharded_runs.Block", "state": "full"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_performance_options_do_not_change_the_results(
    ranks: Ranks, alone: dict[str, Any], tmp_path: Path, changes: Mapping[str, Any]
) -> None:
    """Options for resharding, prefetching, offloading and recomputation do not change the losses."""
    both = ranks.run(changed, "FSDP x2", str(tmp_path), changes)
    assert mean_losses(both) == pytest.approx(alone["losses"][:4], abs=TOLERANCE)
    assert all(torch.equal(both[1]["first"][name], alone["first"][name]) for name in alone["first"])


def test_mixed_precision_keeps_float32_weights(ranks: Ranks, alone: dict[str, Any], tmp_path: Path) -> None:
    """With mixed_precision="bfloat16", parameters and moments are float32, and losses match to bfloat16 precision."""
    both = ranks.run(changed, "FSDP x2", str(tmp_path), {"mixed_precision": "bfloat16"})
    assert {value.dtype for kind in ("last", "moments") for value in both[0][kind].values()} == {torch.float32}
    differences = [abs(a - b) for a, b in zip(mean_losses(both), alone["losses"], strict=False)]
    assert 0 < max(differences) < 3 * 2**-7


def test_float16_loss_scaling_on_shards(ranks: Ranks, alone: dict[str, Any], tmp_path: Path) -> None:
    """With float16, ranks agree on the loss scale and on skipped updates for every kind of sharding."""
    scaled = {**OPTIM, "type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": {"init_scale": 1024.0}}
    for placement in SHARDED:
        both = ranks.run(changed, placement, str(tmp_path / placement), {"optim": scaled})
        assert mean_losses(both) == pytest.approx(alone["losses"][:4], abs=0.02)
        assert largest_difference(both[0]["last"], both[1]["last"]) == 0.0


def from_one_placement_to_another(ranks: Ranks, tmp_path: Path, before: str, after: str) -> tuple[Any, Any]:
    """Train half of the epoch under one placement and the rest under another; return the results of both."""
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
def test_every_placement_resumes_from_every_other(
    ranks: Ranks, alone: dict[str, Any], tmp_path: Path, before: str, after: str
) -> None:
    """The restored state is bit-identical to the saved one, and training continues as without interruption."""
    saved, taken_up = from_one_placement_to_another(ranks, tmp_path, before, after)
    for rank in taken_up:
        for kind in ("last", "moments"):
            assert largest_difference(rank["found"][kind], saved[0][kind]) == 0.0
            assert largest_difference(rank[kind], alone[kind]) < TOLERANCE
        assert rank["rates"] == alone["rates"][HALF:]
    assert mean_losses(taken_up) == pytest.approx(alone["losses"][HALF:], abs=TOLERANCE)
    assert EPOCH == 2 * HALF


def test_a_checkpoint_without_optimizer_state_can_be_resumed(ranks: Ranks, tmp_path: Path) -> None:
    """A checkpoint from before the first update can be resumed."""
    checkpoint = str(tmp_path / "start")
    ranks.run(stopped, "FSDP x2", str(tmp_path / "before"), checkpoint, 0)
    (first, _), whole = (
        ranks.run(resumed, "FSDP x2", str(tmp_path / "after"), checkpoint, 0),
        ranks.run(trained, "FSDP x2", str(tmp_path / "whole")),
    )
    assert first["found"]["moments"] == {}
    assert first["losses"] == whole[0]["losses"]


def test_random_numbers_of_training_match_ddp(ranks: Ranks, tmp_path: Path) -> None:
    """Dropout uses the same random numbers under FSDP as under DDP."""
    with_dropout = {"model": {"type": Gpt, "drop": 0.3}}
    sharded = ranks.run(changed, "FSDP x2", str(tmp_path / "fsdp"), with_dropout)
    replicated = ranks.run(changed, "DDP x2", str(tmp_path / "ddp"), with_dropout)
    for rank, other in zip(sharded, replicated, strict=True):
        assert rank["losses"] == pytest.approx(other["losses"], abs=TOLERANCE)
