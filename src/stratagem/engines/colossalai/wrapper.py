"""The optimizer wrapper for ColossalAI."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
from colossalai.amp.naive_amp.mixed_precision_mixin import FP16MixedPrecisionMixin
from colossalai.interface import OptimizerWrapper
from torch import Tensor, nn

from stratagem.distributed import all_reduce
from stratagem.engines.colossalai.shard_layout import ParamShard, gradients_of
from stratagem.errors import ConfigValueError, StateError
from stratagem.optim import AccumulatingOptimWrapper
from stratagem.optim.gradient_policy import NO_CONTEXT
from stratagem.optim.gradients import Clipping, scale

__all__ = ["BoosterOptimWrapper"]

logger = logging.getLogger(__name__)


@final
class BoosterOptimWrapper(AccumulatingOptimWrapper):
    """Train with the backward pass, loss scaling, clipping and update of ColossalAI's optimizer.

    Args:
        engine: the optimizer, wrapped by the booster.
        param_shards: this rank's shard of each parameter.
        settings: the configured optimizer wrapper, whose accumulation and ``nonfinite`` options are used.
        no_sync: a function that returns the context manager for a micro-batch whose gradients are not reduced.
        clipping: the gradient clipping to apply if the plugin does not clip gradients.
        norm_is_logged: whether to compute the gradient norm only for the log, because the plugin clips the gradients.
        reduces_in_backward: whether gradients are only reduced if the backward pass is run by the engine, as with ZeRO.
    """

    def __init__(
        self,
        engine: OptimizerWrapper,
        param_shards: Mapping[nn.Parameter, ParamShard],
        settings: AccumulatingOptimWrapper,
        *,
        no_sync: Callable[[], AbstractContextManager[object]],
        clipping: Clipping | None,
        norm_is_logged: bool,
        reduces_in_backward: bool,
    ) -> None:
        super().__init__(engine.optim, accumulative_counts=settings.accumulative_counts, nonfinite=settings.nonfinite)
        self.engine = engine
        self.param_shards = param_shards
        self._no_sync = no_sync
        self.clipping = clipping
        self._norm_is_logged = norm_is_logged or clipping is not None or self.nonfinite is not None
        self._did_step = False
        self._reduces_in_backward = reduces_in_backward
        self._is_reduced = False
        self.optimizer.register_step_post_hook(self._record_step)
        if self.loss_scaler is not None:
            if self.nonfinite == "error":
                raise ConfigValueError(
                    'nonfinite="error" would stop at the first overflow, but overflows are normal in float16 while the loss '
                    "scale is adjusted. Omit it, or use mixed_precision='bf16'."
                )
            self.nonfinite = "skip"

    @property
    def has_loss_scale(self) -> bool:
        """Whether the booster scales losses for float16."""
        return self.loss_scaler is not None

    @property
    def loss_scaler(self) -> Any | None:
        """ColossalAI's loss scale in float16, otherwise None."""
        mixin = _precision_of(self.engine)
        return mixin.grad_scaler if isinstance(mixin, FP16MixedPrecisionMixin) else None

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        guard = self.gradient_policy.guard
        if guard is not None:
            # ColossalAI's backward() has no gradient argument, so multiply the loss by it, which is equivalent.
            options = dict(guard.begin(loss, kwargs))
            if "gradient" not in kwargs and "gradient" in options:
                loss = loss * options["gradient"]
        # ZeRO reduces gradients in the backward pass, outside the sync context of the forward pass.
        reduces = self.should_sync()
        with NO_CONTEXT if reduces else self._no_sync():
            self.engine.backward(loss, **kwargs)
        # ZeRO stage 2 reduces gradients in every micro-batch.
        self._is_reduced = reduces or self._no_sync is nullcontext
        self.inner_count += 1

    def step(self, **kwargs: Any) -> None:
        if self._reduces_in_backward and not self._is_reduced:
            raise StateError(
                f"step() was called after {self.pending_micro_batches} of {self.accumulative_counts} accumulated backward "
                "passes, but ColossalAI only reduces gradients in the last one. Run the backward passes with "
                "optim_wrapper.backward(loss) or update_params(loss), not loss.backward(), and call step() only if "
                "should_update() is True."
            )
        if self.gradient_policy.complete is not None:
            self.gradient_policy.complete()
        self._is_reduced = False
        micro_batches = self.pending_micro_batches
        self.window_start = self.inner_count
        self.num_steps_attempted += 1
        self._did_step = False
        # The engine is still called on an overflow: it skips the step and lowers its loss scale.
        inspects = self._norm_is_logged or self.weight is not None or self.gradient_policy.guard is not None
        if not inspects or self._settle_gradients(micro_batches) or self.loss_scaler is not None:
            self.engine.step(**kwargs)
        if self._did_step:
            self.num_steps_applied += 1

    def model_parameters(self) -> list[nn.Parameter]:
        return list(self.param_shards)

    def zero_grad(self, **kwargs: Any) -> None:
        self.engine.zero_grad(**kwargs)

    def state_dict(self) -> dict[str, Any]:
        scaler = self.loss_scaler
        return {**super().state_dict(), **({} if scaler is None else {"loss_scaler": _scaler_state(scaler)})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        scaler = self.loss_scaler
        # A state that was saved with a different precision contains no loss scale. In that case, the configured loss
        # scale is kept.
        if scaler is not None and "loss_scaler" in state_dict:
            _load_scaler(scaler, state_dict["loss_scaler"])

    def _settle_gradients(self, micro_batches: int) -> bool:
        gradients = gradients_of(self.param_shards.values(), self.engine)
        own = [gradient for _, gradient in gradients]
        if self.weight is not None:
            scale(own, self.weight_factor(micro_batches))
        # The value is equal on all ranks, so all ranks make the same decision.
        norm = _norm_over_ranks(gradients, own)
        if self._norm_is_logged:
            self.grad_norm = norm if self.loss_scaler is None else norm / self.loss_scaler.scale
        guard = self.gradient_policy.guard
        if guard is not None and not guard.allows_step(own, norm):
            return False
        if not self.allows_norm(norm):
            return False
        if self.clipping is not None:
            self.clipping.apply(own, norm)
        return True

    def _record_step(self, *_: Any) -> None:
        self._did_step = True


def _precision_of(engine: OptimizerWrapper) -> Any:
    """Return the mixed-precision component of the engine; None in float32."""
    # The attribute has different names in the optimizers with and without ZeRO.
    return getattr(engine, "mixed_precision_mixin", None) or getattr(engine, "mixed_precision", None)


@torch.no_grad()
def _norm_over_ranks(gradients: list[tuple[ParamShard, Tensor]], own: list[Tensor]) -> Tensor:
    """Return the global gradient norm. Shards held by several ranks are counted once. Collective."""
    device = own[0].device if own else torch.device("cpu")
    squares = torch.zeros((), device=device)
    if own:
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(own, 2.0, dtype=torch.float32)])
        num_copies = torch.tensor([float(shard.num_copies) for shard, _ in gradients], device=device)
        squares = (norms.square() / num_copies).sum()
    all_reduce(squares)
    return squares.sqrt()


def _scaler_state(scaler: Any) -> dict[str, Any]:
    """Return the state of ColossalAI's loss scale in the format of ``torch.amp.GradScaler``, with additional keys."""
    return {
        "scale": float(scaler.scale),
        "growth_factor": scaler._growth_factor,
        "backoff_factor": scaler._backoff_factor,
        "growth_interval": scaler._growth_interval,
        "_growth_tracker": scaler._growth_step,
        "hysteresis_tracker": scaler._hysteresis_step,
    }


def _load_scaler(scaler: Any, state: Mapping[str, Any]) -> None:
    scaler._scale = torch.full_like(scaler._scale, float(state["scale"]))
    scaler._growth_step = int(state.get("_growth_tracker", 0))
    scaler._hysteresis_step = int(state.get("hysteresis_tracker", 0))
