"""Functions for tests of ColossalAI, each for one behavior, that run on every rank."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stratagem.checkpoint import BackgroundSaver
from stratagem.dist import get_rank
from stratagem.errors import StratagemError
from tests.engines.colossalai import boosted_runs
from tests.support import sharded_runs
from tests.support.sharded_runs import EPOCH, OPTIM, SCHEDULE, Gpt, Sentences

LOGGER = logging.getLogger(__name__)


class WeightedGpt(Gpt):
    """Weights samples by their first word, so that ranks and micro-batches have different weights."""

    def forward(self, words: Tensor, numbers: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return the loss with its weight, or the model's own output."""
        if mode != "loss":
            return super().forward(words, numbers, mode)
        weights = 1.0 + words[:, 0].float()
        scores = super().forward(words, numbers, "tensor")
        losses = torch.nn.functional.cross_entropy(scores.transpose(1, 2), words[:, 1:], reduction="none").mean(1)
        return {"loss": (losses * weights).sum() / weights.sum(), "weight": weights.sum()}


class NanGpt(Gpt):
    """Returns a NaN loss on rank 1 in the second iteration."""

    seen = 0

    def forward(self, words: Tensor, numbers: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return the model's output, with NaN as that loss."""
        outputs = super().forward(words, numbers, mode)
        if mode == "loss":
            self.seen += 1
            if self.seen == 2 and get_rank() == 1:
                return {"loss": outputs["loss"] * float("nan")}
        return outputs


def trained_alone(folder: str, *, stop: int, iterations: int = EPOCH, **options: Any) -> dict[str, Any]:
    """Train in one process with schedules for the given number of iterations."""
    model, optim = options.get("model", {"type": Gpt}), options.get("optim", OPTIM)
    strategy = sharded_runs.SingleDeviceStrategy(
        work_dir=folder, env_kwargs={"randomness": {"seed": 0}}, log_kwargs={"log_level": "ERROR"}
    )
    try:
        strategy.prepare(
            model,
            optim_wrapper=optim,
            param_scheduler=SCHEDULE,
            dispatch_kwargs={"epoch_length": EPOCH, "max_iters": iterations},
        )
        return boosted_runs.train(strategy, 0, stop)
    finally:
        strategy.close()


def with_one_nan(plugin: str, folder: str) -> dict[str, Any]:
    """Train two steps, the second with a NaN loss on one rank only."""
    optim = {**OPTIM, "accumulative_counts": 1, "nonfinite": "skip"}
    strategy = boosted_runs.prepared(plugin, folder, model={"type": NanGpt}, optim=optim)
    try:
        batch = _batch(strategy)
        strategy.model.train_step(batch, optim_wrapper=strategy.optim_wrapper)
        before = boosted_runs.state_of(strategy)["weights"]
        strategy.model.train_step(batch, optim_wrapper=strategy.optim_wrapper)
        after = boosted_runs.state_of(strategy)["weights"]
        return {
            "attempts": strategy.optim_wrapper.num_steps_attempted,
            "updates": strategy.optim_wrapper.num_steps_applied,
            "kept": all(torch.equal(before[name], after[name]) for name in before),
            "finite": all(bool(value.isfinite().all()) for value in after.values()),
        }
    finally:
        strategy.close()


def overflowing(folder: str) -> dict[str, Any]:
    """Train in float16 from a loss scale at which every step overflows, with a schedule by step."""
    precision = {"type": "fp16", "init_scale": 2.0**32, "hysteresis": 1, "backoff_factor": 2.0**-8}
    strategy = boosted_runs.prepared(
        "zero 1", folder, mixed_precision=precision, optim={**OPTIM, "accumulative_counts": 1}
    )
    try:
        seen = boosted_runs.train(strategy, 0, 6)
        schedule = strategy.param_schedulers[0]
        return {
            "attempts": seen["attempts"],
            "updates": seen["updates"],
            "skipped": seen["attempts"] - seen["updates"],
            "scale": seen["scale"]["scale"],
            "moved": schedule.state_dict()["_global_step"],
        }
    finally:
        strategy.close()


def predicted(plugin: str, folder: str) -> bool:
    """Run ``val_step`` once on rank 0, twice on rank 1, and so on."""
    strategy = boosted_runs.prepared(plugin, folder)
    try:
        strategy.model.eval()
        dtype = next(strategy.unwrap_model().parameters()).dtype
        with torch.no_grad():
            outputs = [strategy.model.val_step(_batch(strategy)) for _ in range(1 + get_rank())]
        return all(each["scores"].dtype == dtype and each["scores"].isfinite().all() for each in outputs)
    finally:
        strategy.close()


def saved_in_background(folder: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Start a background save, continue training, and resume from it; return the states at the save and after."""
    strategy = boosted_runs.prepared("zero 1 bf16", folder, **options)
    saver = BackgroundSaver(strategy.logger)
    try:
        boosted_runs.train(strategy, 0, 2)
        before = boosted_runs.state_of(strategy)
        strategy.save_checkpoint(f"{folder}/at", write=saver.save)
        boosted_runs.train(strategy, 2, 4)
        saver.wait()
        strategy.resume(f"{folder}/at")
        return before, boosted_runs.state_of(strategy)
    finally:
        saver.close()
        strategy.close()


class LargerGpt(Gpt):
    """The small model with one additional parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = torch.nn.Parameter(torch.ones(3))

    def forward(self, words: Tensor, numbers: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return the small model's output, with the additional parameter in the loss."""
        outputs = super().forward(words, numbers, mode)
        return {"loss": outputs["loss"] + self.extra.sum()} if mode == "loss" else outputs


def resumed_with_more(folder: str) -> None:
    """Resume the small model from a checkpoint of the larger one."""
    larger = boosted_runs.prepared("zero 1", folder, model={"type": LargerGpt})
    try:
        larger.save_checkpoint(f"{folder}/larger")
    finally:
        larger.close()
    strategy = boosted_runs.prepared("zero 1", folder)
    try:
        strategy.resume(f"{folder}/larger")
    finally:
        strategy.close()


def _batch(strategy: Any) -> list[Tensor]:
    first = strategy.dp_rank * 4
    return [Sentences().words[first : first + 4], torch.arange(first, first + 4)]


class WithBatchNorm(Gpt):
    """A model with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.over_batch = torch.nn.BatchNorm1d(3)


class OfTwoTypes(Gpt):
    """A model in which one parameter has a different dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(self.shift.detach().double())


def error_message(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Return the error of a call on every rank, or an empty string if there is none."""
    try:
        function(*arguments, **options)
    except StratagemError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def only_prepared(folder: str, **options: Any) -> None:
    """Build and prepare a strategy without training."""
    boosted_runs.prepared("", folder, **options).close()


def prepared_twice(folder: str) -> None:
    """Prepare for evaluation and then for training."""
    strategy = boosted_runs.ColossalAIStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"})
    try:
        strategy.prepare({"type": Gpt})
        strategy.model.eval()
        strategy.model.val_step(_batch(strategy))
        strategy.prepare({"type": Gpt}, optim_wrapper=OPTIM, dispatch_kwargs={"max_iters": 4})
    finally:
        strategy.close()


def with_built_plugin(folder: str, clip_grad: Any) -> bool:
    """Train with a built plugin that clips gradients to a norm of 0.3."""
    # The library can be imported only after a strategy has been built.
    boosted_runs.prepared("zero 1", folder).close()
    plugins = importlib.import_module("colossalai.booster.plugin")
    plugin = plugins.LowLevelZeroPlugin(precision="fp32", max_norm=0.3, overlap_communication=False)
    strategy = boosted_runs.prepared("", folder, plugin=plugin, optim={**OPTIM, "clip_grad": clip_grad})
    try:
        return boosted_runs.train(strategy, 0, 2)["updates"] == 1
    finally:
        strategy.close()
