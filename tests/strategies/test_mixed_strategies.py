"""Muon for hidden matrices and AdamW for all other parameters, under several strategies."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from stratagem.dist import all_reduce, get_world_size
from stratagem.errors import CheckpointMismatchError
from tests.support.ranks import Ranks
from tests.support.sharded_runs import EPOCH, Gpt, Sentences, full, prepared, resumed, stopped, trained
from tests.support.training_loop import iterations

# The fused implementation rounds the last elements of a tensor differently, and shards end at other elements.
ADAMW: Mapping[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "foreach": False}
MIXED: Mapping[str, Any] = {
    "type": "MixedOptimizer",
    "parts": {"muon": {"type": "Muon", "lr": 0.02}, "adamw": {"type": "AdamW", **ADAMW}},
    "hidden_matrices": "muon",
    "others": "adamw",
}
PLAIN: Mapping[str, Any] = {"optimizer": MIXED}
CLIPPED: Mapping[str, Any] = {"optimizer": MIXED, "clip_grad": {"max_norm": 0.3}, "accumulative_counts": 2}
STEPS = 10


def separate(model: nn.Module) -> list[Optimizer]:
    """Return the two optimizers that a user would write by hand."""
    hidden = [each for name, each in model.named_parameters() if name.startswith("blocks.") and each.ndim == 2]
    others = [each for name, each in model.named_parameters() if not (name.startswith("blocks.") and each.ndim == 2)]
    return [Muon(hidden, lr=0.02), AdamW(others, **ADAMW)]


def by_hand(first: Mapping[str, Tensor], batches: list[Tensor], rates: list[list[float]]) -> dict[str, Tensor]:
    """Train with two torch optimizers, averaging the gradients over the ranks; return the parameters."""
    model = Gpt()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(first[name])
    optimizers = separate(model)
    for words, own in zip(batches, rates, strict=True):
        model(words, mode="loss")["loss"].backward()
        for parameter in model.parameters():
            if parameter.grad is not None and get_world_size() > 1:
                parameter.grad /= get_world_size()
                all_reduce(parameter.grad, "sum")
        for each, rate in zip(optimizers, own, strict=True):
            each.param_groups[0]["lr"] = rate
            each.step()
            each.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def differing(placement: str, folder: str) -> list[str]:
    """Return the parameters that differ after 10 steps from those of two optimizers without Stratagem."""
    strategy = prepared(placement, folder, optim=PLAIN)
    try:
        model = strategy.unwrap_model()
        first = {name: full(parameter) for name, parameter in model.named_parameters()}
        batches, rates = [], []
        for step in iterations(strategy, Sentences(), 0, STEPS, global_batch=8):
            batches.append(step.batch[0])
            rates.append(step.rates)
        last = {name: full(parameter) for name, parameter in model.named_parameters()}
    finally:
        strategy.close()
    expected = by_hand(first, batches, rates)
    assert any(not torch.equal(first[name], last[name]) for name in first)
    return [name for name in last if not torch.equal(last[name], expected[name])]


def results(folder: str) -> dict[str, list[str]]:
    """Return the parameters that differ under each strategy for two processes."""
    return {placement: differing(placement, folder) for placement in ("DDP x2", "FSDP x2")}


@pytest.mark.slow
def test_a_single_process_has_the_bits_of_two_separate_optimizers(tmp_path: Path) -> None:
    """With schedules, every parameter equals that of torch's Muon and AdamW after 10 steps."""
    assert differing("single", str(tmp_path)) == []


def test_ddp_and_fsdp_have_the_bits_of_two_separate_optimizers(ranks: Ranks, tmp_path: Path) -> None:
    """On two ranks, every parameter equals that of a loop that averages the gradients and calls torch's optimizers."""
    for found in ranks.run(results, str(tmp_path)):
        assert found == {"DDP x2": [], "FSDP x2": []}


@pytest.mark.slow
def test_a_run_resumes_with_the_same_bits_in_the_middle_of_an_accumulation_window(tmp_path: Path) -> None:
    """Losses, norms, parameters, averages and the state of both parts equal those of an uninterrupted run."""
    whole = trained("single", str(tmp_path / "whole"), optim=CLIPPED)
    stopped("single", str(tmp_path / "first"), str(tmp_path / "half"), 5, optim=CLIPPED)
    again = resumed("single", str(tmp_path / "second"), str(tmp_path / "half"), 5, optim=CLIPPED)
    assert again["losses"] == whole["losses"][5:]
    assert again["norms"] == whole["norms"][2:]
    assert whole["moments"].keys() == again["moments"].keys()
    for part in ("last", "moments"):
        assert all(torch.equal(again[part][name], value) for name, value in whole[part].items())


def across(folder: str) -> dict[str, Any]:
    """Save under DDP and resume under FSDP and tensor parallelism; return what was restored, and the final results."""
    whole = trained("DDP x2", f"{folder}/whole", optim=CLIPPED)
    stopped("DDP x2", f"{folder}/first", f"{folder}/half", EPOCH // 2, optim=CLIPPED)
    saved = resumed("DDP x2", f"{folder}/ddp", f"{folder}/half", EPOCH // 2, optim=CLIPPED)
    return {
        "whole": whole,
        "DDP x2": saved,
        **{
            placement: resumed(placement, f"{folder}/{placement[:2]}", f"{folder}/half", EPOCH // 2, optim=CLIPPED)
            for placement in ("FSDP x2", "TP x2")
        },
    }


def test_a_checkpoint_of_ddp_is_resumed_under_fsdp_and_tensor_parallelism(ranks: Ranks, tmp_path: Path) -> None:
    """The state of both parts is restored exactly, DDP continues with the same bits, and the other losses are close."""
    both = ranks.run(across, str(tmp_path))
    for found in both:
        whole, again = found["whole"], found["DDP x2"]
        assert again["losses"] == whole["losses"][EPOCH // 2 :]
        assert all(torch.equal(again["last"][name], value) for name, value in whole["last"].items())
        for placement in ("FSDP x2", "TP x2"):
            moments = found[placement]["found"]["moments"]
            assert moments.keys() == again["found"]["moments"].keys()
            assert all(torch.equal(moments[name], value) for name, value in again["found"]["moments"].items())
        assert found["FSDP x2"]["losses"] == pytest.approx(again["losses"], rel=1e-3)
    # With tensor parallelism, both ranks have the samples of both replicas.
    means = [sum(pair) / 2 for pair in zip(*(found["DDP x2"]["losses"] for found in both), strict=True)]
    assert both[0]["TP x2"]["losses"] == pytest.approx(means, rel=1e-3)


def test_a_changed_rule_is_refused_before_the_weights_are_loaded(tmp_path: Path) -> None:
    """Resuming with another rule names a parameter and both parts, and leaves the model as it was."""
    stopped("single", str(tmp_path / "first"), str(tmp_path / "half"), 4, optim=CLIPPED)
    changed = {**CLIPPED, "optimizer": {**MIXED, "rules": {r"\.down\.": "adamw"}}}
    strategy = prepared("single", str(tmp_path / "second"), optim=changed)
    before = copy.deepcopy(strategy.unwrap_model().state_dict())
    with pytest.raises(CheckpointMismatchError, match=r"blocks.0.down.weight \(checkpoint: muon, this run: adamw\)"):
        strategy.resume(str(tmp_path / "half"))
    after = strategy.unwrap_model().state_dict()
    strategy.close()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def with_adafactor(folder: str) -> tuple[list[str], list[str]]:
    """Return the parameters that differ between DDP and FSDP, and between DDP and DDP resumed from FSDP."""
    parts = {"muon": MIXED["parts"]["muon"], "factored": {"type": "Adafactor", "lr": 0.01}}
    optim = {"optimizer": {**MIXED, "parts": parts, "others": "factored"}}
    whole = trained("DDP x2", f"{folder}/ddp", optim=optim)["last"]
    sharded = trained("FSDP x2", f"{folder}/fsdp", optim=optim)["last"]
    stopped("FSDP x2", f"{folder}/first", f"{folder}/half", EPOCH // 2, optim=optim)
    again = resumed("DDP x2", f"{folder}/second", f"{folder}/half", EPOCH // 2, optim=optim)["last"]
    return tuple([name for name in whole if not torch.equal(whole[name], other[name])] for other in (sharded, again))  # type: ignore[return-value]


def test_a_part_whose_state_is_divided_among_the_ranks_is_saved_and_resumed(ranks: Ranks, tmp_path: Path) -> None:
    """With Adafactor, which reads whole parameters, as the other part, all parameters have the same bits under FSDP and DDP."""
    for found in ranks.run(with_adafactor, str(tmp_path)):
        assert found == ([], [])
