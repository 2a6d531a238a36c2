"""Precision, accumulation windows, weighted losses, non-finite values, and compilation with DeepSpeed."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratagem.errors import ConfigValueError, StratagemError, TrainingError
from stratagem.registry import STRATEGIES
from stratagem.utils import import_module
from tests.engines.deepspeed.engine_runs import FP32, differences, go, placed, state_in
from tests.support import backward_passes, batch_norm_runs, parameter_hooks, special_layers
from tests.support.backward_passes import OPTIMIZERS, by_plain_torch, require_equal
from tests.support.changing_models import Freezing, Unfreezing, Unfrozen, change_in_a_manual_loop
from tests.support.ranks import RankError, Ranks
from tests.support.sharded_runs import OPTIM, Gpt

pytestmark = pytest.mark.deepspeed

SOME = ["ZeRO-0", "ZeRO-2", "ZeRO-2 offload", "ZeRO-3", "ZeRO-3 offload"]


class Weighed(Gpt):
    """Returns a weight for each micro-batch that differs between ranks and iterations."""

    def forward(self, words: Tensor, numbers: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return the loss with its weight."""
        losses = super().forward(words, numbers, mode)
        return {**losses, "weight": (numbers % 5).float().sum() + 1} if mode == "loss" else losses


class Poisoned(Gpt):
    """Returns a NaN loss for one sample, which only one rank has."""

    def forward(self, words: Tensor, numbers: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return the loss, or NaN."""
        losses = super().forward(words, numbers, mode)
        if mode == "loss" and bool((numbers == 5).any()):
            return {"loss": losses["loss"] * torch.nan}
        return losses


class Recomputed(Gpt):
    """Uses DeepSpeed's activation checkpointing for its blocks."""

    def forward(self, words: Tensor, numbers: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return the loss, and whether DeepSpeed moves activations to the CPU."""
        checkpointing = import_module("deepspeed.runtime.activation_checkpointing.checkpointing")
        x = self.words(words[:, :6]) + self.places(self.order) + self.shift.sum(0)
        for block in self.blocks:
            x = checkpointing.checkpoint(block, x)
        scores = self.head(self.norm(self.drop(x))) * self.temperature
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), words[:, 1:].flatten())
        return {"loss": loss, "on_cpu": torch.tensor(float(checkpointing.CPU_CHECKPOINT))}


class WithUnused(Gpt):
    """The small model with a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Linear(3, 3)


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-2", "ZeRO-3"])
def test_parameters_without_a_gradient_are_named_at_the_first_update(two: Ranks, folder: Path, name: str) -> None:
    """DeepSpeed updates unused parameters, unlike a single process; used parameters are not named."""
    for model in (WithUnused, Gpt):
        two.run(go, placed(name), folder / model.__name__, model={"type": model}, stop=4, log_level="WARNING")
    with_unused, without = (
        "".join(file.read_text() for file in sorted((folder / model.__name__).rglob("*.log")))
        for model in (WithUnused, Gpt)
    )
    assert with_unused.count("2 parameters got no gradient in the first update: extra.weight, extra.bias.") == 1
    assert "got no gradient" not in without


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-2", "ZeRO-3"])
def test_special_layers_train_as_in_one_process(two: Ranks, folder: Path, name: str) -> None:
    """Layers with hooks and parametrizations train as in one process; stage 3 rejects an empty parameter with its name."""
    kinds = [kind for kind in special_layers.KINDS if name != "ZeRO-3" or kind != "empty"]
    expected = special_layers.all_losses(placed("single"), str(folder), kinds)
    for found in two.run(special_layers.all_losses, placed(name), str(folder), [*kinds, "empty"]):
        assert all(found[kind] == pytest.approx(expected[kind], rel=1e-5) for kind in kinds)
        assert name != "ZeRO-3" or "does not support parameters without elements: empty." in found["empty"]


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-2 offload", "ZeRO-3"])
def test_hooks_on_gradients_are_called_as_in_one_process(two: Ranks, folder: Path, name: str) -> None:
    """Hooks of both kinds, registered before or after prepare, mask the gradients as in plain torch."""
    kinds = ["register_hook", "post up"]
    for late in (False, True):
        for found in two.run(parameter_hooks.all_trained, placed(name), str(folder), kinds, late=late):
            parameter_hooks.require_equal(found)


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unfreezing, r"1 parameter became trainable: places\.weight, but DeepSpeed determines"),
        (Freezing, r"2 parameters became frozen: norm\.weight, norm\.bias, but DeepSpeed determines"),
    ],
)
def test_a_change_of_the_trainable_parameters_is_an_error_at_the_next_step(
    two: Ranks, folder: Path, name: str, model: type[Gpt], message: str
) -> None:
    """DeepSpeed would never train the unfrozen parameter, and would still change the frozen ones; the error names them."""
    with pytest.raises(RankError, match=message):
        two.run(go, placed(name), folder, model={"type": model})


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_a_change_in_a_manual_loop_is_an_error_at_the_next_forward_pass(two: Ranks, folder: Path, name: str) -> None:
    """A loop that calls the model and update_params, but not train_step, gets the same error."""
    for unfreeze, verb in ((True, "became trainable"), (False, "became frozen")):
        for error in two.run(change_in_a_manual_loop, placed(name), str(folder), unfreeze=unfreeze):
            assert error.startswith(f"2 parameters {verb}: a.weight, a.bias, but DeepSpeed determines")


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_a_checkpoint_with_other_trainable_parameters_is_refused(two: Ranks, folder: Path, name: str) -> None:
    """A run whose layer was frozen cannot resume a run that trained it, and a model that trains it can."""
    go(placed("single"), folder / "a", model={"type": Unfrozen}, stop=6, save=folder / "at")
    expected = go(placed("single"), folder / "b", model={"type": Unfrozen}, start=6, resume=folder / "at")
    resumed = {"start": 6, "resume": folder / "at"}
    with pytest.raises(RankError, match=r"1 parameter became trainable: places\.weight\. DeepSpeedStrategy determines"):
        two.run(go, placed(name), folder / "c", **resumed)
    seen = two.run(go, placed(name), folder / "d", model={"type": Unfrozen}, **resumed)[0]
    assert seen["losses"] == pytest.approx(expected["losses"], rel=2e-5)


@pytest.mark.parametrize("name", SOME)
def test_a_shorter_last_window_is_averaged_over_its_length(two: Ranks, folder: Path, name: str) -> None:
    """Of eleven micro-batches in windows of four, the third window has three, as in one process."""
    changes = {"optim": {**OPTIM, "accumulative_counts": 4}, "max_iters": 11, "stop": 11}
    expected = go(placed("single"), folder / "a", save=folder / "one", **changes)
    seen = two.run(go, placed(name), folder / "b", save=folder / "two", **changes)[0]
    assert seen["updates"] == 3
    assert seen["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    one, other = state_in(folder / "one"), state_in(folder / "two")
    for key in (key for key in one if key.startswith("/state_dict/")):
        assert torch.allclose(one[key], other[key], atol=2e-4), key


@pytest.mark.parametrize("name", SOME)
def test_micro_batches_are_averaged_by_weight(two: Ranks, folder: Path, name: str) -> None:
    """A step is the weighted mean over all ranks, also with gradient clipping."""
    expected = two.run(go, placed("DDP"), folder / "a", model={"type": Weighed})[0]
    seen = two.run(go, placed(name), folder / "b", model={"type": Weighed})[0]
    assert seen["losses"] == pytest.approx(expected["losses"], rel=2e-5)
    assert seen["norms"] == pytest.approx(expected["norms"], rel=1e-4)


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-2", "ZeRO-3"])
def test_weights_in_float16_match_ddp(two: Ranks, folder: Path, name: str) -> None:
    """With a loss scale, the norms of weighted steps agree with those of DDP in float32."""
    expected = two.run(go, placed("DDP"), folder / "a", model={"type": Weighed})[0]
    strategy = placed(name, fp16={"enabled": True, "initial_scale_power": 10})
    seen = two.run(go, strategy, folder / "b", model={"type": Weighed})[0]
    assert seen["norms"] == pytest.approx(expected["norms"], abs=0.005)


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-1", "ZeRO-2 offload", "ZeRO-3"])
def test_a_nonfinite_update_is_skipped_on_all_ranks(two: Ranks, folder: Path, name: str) -> None:
    """If the loss is NaN on one rank, no rank takes the step or advances schedules, and later steps match a single process."""
    changes = {"optim": {**OPTIM, "nonfinite": "skip"}, "model": {"type": Poisoned}}
    expected = go(placed("single"), folder / "a", **changes)
    seen = two.run(go, placed(name), folder / "b", **changes)[0]
    assert seen["attempts"] == 6
    assert seen["updates"] == expected["updates"] == 5
    assert seen["rates"] == expected["rates"]
    finite = [(one, other) for one, other in zip(seen["losses"], expected["losses"], strict=True) if math.isfinite(one)]
    assert len(finite) == 11
    assert [one for one, _ in finite] == pytest.approx([other for _, other in finite], rel=2e-5)


def test_a_nonfinite_update_stops_the_run_with_nonfinite_error(two: Ranks, folder: Path) -> None:
    """nonfinite="error" raises on every rank before the weights are corrupted."""
    changes = {"optim": {**OPTIM, "nonfinite": "error"}, "model": {"type": Poisoned}}
    messages = two.run(_error, placed("ZeRO-2"), folder, **changes)
    assert all("norm of the gradients is nan" in message for message in messages)


def _error(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(TrainingError) as raised:
        go(*args, **kwargs)
    return str(raised.value)


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-2 offload", "ZeRO-3 offload"])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_16_bits_resume_exactly(two: Ranks, folder: Path, name: str, kind: str) -> None:
    """The checkpoint has master weights, optimizer states, and the loss scale, so losses are bit-identical."""
    strategy = placed(name, **{kind: True})
    unbroken = two.run(go, strategy, folder / "a", save=folder / "end")[0]
    first = two.run(go, strategy, folder / "b", stop=6, save=folder / "mid")[0]
    rest = two.run(go, strategy, folder / "c", start=6, resume=folder / "mid", save=folder / "other end")[0]
    assert unbroken["losses"] == first["losses"] + rest["losses"]
    assert differences(state_in(folder / "end"), state_in(folder / "other end")) == []
    assert state_in(folder / "end")["/state_dict/words.weight"].dtype == torch.float32


def _refusal_of_float16(folder: Path) -> str:
    accelerator = import_module("deepspeed.accelerator").get_accelerator()
    supported, accelerator.is_fp16_supported = accelerator.is_fp16_supported, lambda: False
    strategy = {**placed("ZeRO-2", fp16=True), "work_dir": folder}
    try:
        with pytest.raises(ConfigValueError) as raised:
            STRATEGIES.build(strategy).prepare({"type": Gpt}, optim_wrapper=OPTIM, dispatch_kwargs={"max_iters": 2})
    finally:
        accelerator.is_fp16_supported = supported
    return str(raised.value)


def test_float16_on_an_unsupported_device_is_rejected(two: Ranks, folder: Path) -> None:
    """DeepSpeed needs CPU instructions for float16; the error suggests bf16."""
    assert "Set bf16=True" in two.run(_refusal_of_float16, folder)[0]


def test_an_overflow_only_counts_as_an_attempted_step(two: Ranks, single: dict[str, Any], folder: Path) -> None:
    """float16 starts with too large a loss scale, so steps are skipped and schedules do not advance."""
    strategy = placed("ZeRO-2", fp16={"enabled": True, "initial_scale_power": 20, "hysteresis": 1})
    seen = two.run(go, strategy, folder)[0]
    assert seen["attempts"] == 6
    assert 0 < seen["updates"] < 6
    # The last window's step was taken; earlier steps of two iterations each advanced the schedule.
    assert seen["rates"][-1] == single["rates"][2 * (seen["updates"] - 1)]


def test_master_weights_start_from_the_unrounded_weights(two: Ranks, single: dict[str, Any], folder: Path) -> None:
    """Master weights equal the weights of the model; without Stratagem, DeepSpeed would round them to bfloat16."""
    go(placed("single"), folder / "a", stop=0, save=folder / "one")
    for name in ("ZeRO-0", "ZeRO-2", "ZeRO-3"):
        two.run(go, placed(name, bf16=True), folder / "b", stop=0, save=folder / name)
        one, other = state_in(folder / "one"), state_in(folder / name)
        assert torch.equal(one["/state_dict/words.weight"], other["/state_dict/words.weight"])


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-2", "ZeRO-3"])
def test_a_compiled_model_trains_the_same(two: Ranks, single: dict[str, Any], folder: Path, name: str) -> None:
    """compile=True compiles the model's forward for every ZeRO stage."""
    seen = two.run_within(240.0, go, placed(name), folder, compile={"backend": "aot_eager"}, stop=4)[0]
    assert seen["losses"] == pytest.approx(single["losses"][:4], rel=2e-5)


@pytest.mark.parametrize("name", ["ZeRO-1", "ZeRO-3"])
def test_activation_checkpointing_is_configured(two: Ranks, single: dict[str, Any], folder: Path, name: str) -> None:
    """The option activation_checkpointing configures deepspeed.checkpointing, and the losses are the same."""
    strategy = placed(name, activation_checkpointing={"partition_activations": True, "cpu_checkpointing": True})
    seen = two.run(go, strategy, folder, model={"type": Recomputed})[0]
    assert seen["losses"] == pytest.approx(single["losses"], rel=2e-5)
    assert seen["others"] == [1.0] * 12


@pytest.mark.parametrize(("way", "window"), [("a head each", 1), ("a head each", 2), ("a head each, one NaN", 1)])
@pytest.mark.parametrize("name", FP32)
def test_unused_parameters_do_not_keep_earlier_gradients(
    two: Ranks, folder: Path, name: str, way: str, window: int
) -> None:
    """Heads that train alternately take the same steps as in one process, also after a skipped step."""
    optim = {"optimizer": OPTIMIZERS["SGD"], "accumulative_counts": window, "nonfinite": "skip"}
    require_equal(
        two.run(backward_passes.trained, placed(name), str(folder), way, optim), by_plain_torch(way, window=window)
    )


@pytest.mark.parametrize("name", ["ZeRO-2 offload", "ZeRO-3 offload"])
def test_offloaded_gradients_of_all_micro_batches_are_clipped(two: Ranks, folder: Path, name: str) -> None:
    """The norm includes parameters that only the first micro-batch of a window used."""
    optim = {"optimizer": OPTIMIZERS["SGD"], "accumulative_counts": 2, "clip_grad": {"max_norm": 0.1}}
    found = two.run(backward_passes.trained, placed(name), str(folder), "a head each", optim)
    require_equal(found, by_plain_torch("a head each", window=2, max_norm=0.1))


def test_unused_parameters_keep_their_master_weights_in_bfloat16(two: Ranks, folder: Path) -> None:
    """ZeRO 3 in bfloat16 takes the same steps as float32, up to the rounding of gradients."""
    optim = {"optimizer": OPTIMIZERS["SGD"]}
    found = two.run(backward_passes.trained, placed("ZeRO-3", bf16=True), str(folder), "a head each", optim)
    require_equal(found, by_plain_torch("a head each"), tolerance=5e-3)


@pytest.mark.parametrize(
    ("name", "way"),
    [("ZeRO-0", "two forwards"), ("ZeRO-0", "in turn"), ("ZeRO-0", "one forward"), ("ZeRO-3", "in turn"),
     ("ZeRO-3 offload", "in turn")],
)  # fmt: skip
def test_gradients_of_several_backward_passes_are_added(two: Ranks, folder: Path, name: str, way: str) -> None:
    """The gradients of all backward passes before a step add up where DeepSpeed supports it."""
    optim = {"optimizer": OPTIMIZERS["SGD"], "clip_grad": {"max_norm": 0.5}}
    require_equal(
        two.run(backward_passes.trained, placed(name), str(folder), way, optim), by_plain_torch(way, max_norm=0.5)
    )


@pytest.mark.parametrize(
    ("name", "way", "window", "message"),
    [
        ("ZeRO-1", "two forwards", 1, "only keeps the gradients of the last backward pass. Add the losses"),
        ("ZeRO-2", "in turn", 1, "only keeps the gradients of the last backward pass. Add the losses"),
        ("ZeRO-2 offload", "one forward", 1, "only keeps the gradients of the last backward pass. Add the losses"),
        ("ZeRO-3", "two forwards", 1, "without another forward pass"),
        ("ZeRO-3", "two forwards", 2, "without another forward pass"),
        ("ZeRO-3", "one forward", 1, "without another forward pass"),
        ("ZeRO-0", "by hand", 1, r"instead of loss.backward\(\)"),
        ("ZeRO-1", "by hand", 1, r"instead of loss.backward\(\)"),
        ("ZeRO-3 offload", "by hand and wrapper", 1, r"instead of loss.backward\(\)"),
        ("ZeRO-2", "two forwards", 3, r"after 2 of 3 accumulated backward passes"),
    ],
)
def test_unsupported_backward_passes_are_rejected(
    two: Ranks, folder: Path, name: str, way: str, window: int, message: str
) -> None:
    """A second backward pass raises an error with the code to use, because the step would use only the last loss."""
    optim = {"optimizer": OPTIMIZERS["SGD"], "accumulative_counts": window}
    for error in two.run(_refusal, placed(name), str(folder), way, optim):
        assert re.search(message, error), error


def _refusal(*args: Any) -> str:
    with pytest.raises(StratagemError) as raised:
        backward_passes.trained(*args)
    return str(raised.value)


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3"])
@pytest.mark.parametrize("source", ["rank0", "mean"])
def test_evaluations_use_the_buffers_of_the_checkpoint(two: Ranks, folder: Path, name: str, source: str) -> None:
    """BatchNorm is evaluated with the same buffers on both ranks, and each rank trains and resumes with its own."""
    batch_norm_runs.require_synced_buffers(two, folder, placed(name), source)


@pytest.mark.parametrize("name", ["ZeRO-0", "ZeRO-1", "ZeRO-2"])
def test_statistics_of_averaged_weights_are_recomputed_over_all_ranks(two: Ranks, folder: Path, name: str) -> None:
    """``EMAHook(update_bn=True)`` computes the statistics of torch's ``update_bn`` for the batches of both ranks."""
    batch_norm_runs.require_recomputed_statistics(two, folder, placed(name))


def test_averaging_under_stage_3_is_refused(two: Ranks, folder: Path) -> None:
    """The error of an EMAHook names strategies whose models have the master weights."""
    with pytest.raises(RankError, match=r"EMAHook needs the master weights.*ZeRO stage 0, 1 or 2 in float32"):
        batch_norm_runs.require_recomputed_statistics(two, folder, placed("ZeRO-3"))
