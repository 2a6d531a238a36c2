"""The optimizer wrapper for DeepSpeed's engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from stratagem.engines.deepspeed.loss_scale import read_loss_scale, write_loss_scale
from stratagem.engines.deepspeed.master_weights import MasterWeights
from stratagem.engines.deepspeed.unused_parameters import UnusedParameters
from stratagem.errors import ConfigValueError, PlacementError, StateError
from stratagem.optim import AccumulatingOptimWrapper, OptimWrapper

__all__ = ["DeepSpeedEngineOptimWrapper", "OriginalGroup", "require_plain_wrapper"]

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class OriginalGroup:
    """A parameter group as it was before DeepSpeed replaced its parameters with flat tensors.

    Attributes:
        options: the group's dict in the optimizer, which schedules modify.
        parameters: the model's parameters, including frozen ones.
    """

    options: dict[str, Any]
    parameters: tuple[nn.Parameter, ...]


@final
class DeepSpeedEngineOptimWrapper(AccumulatingOptimWrapper):
    """Compute gradients and updates with DeepSpeed's engine, which reduces, accumulates, clips and scales gradients.

    This class counts the micro-batches of each update, so that the gradients of a shorter last update are averaged over
    its actual number of micro-batches.

    Args:
        engine: the DeepSpeed engine.
        master_weights: the master weights and gradients in the engine.
        settings: the configured optimizer wrapper, whose optimizer the engine uses.
        groups: the original parameter groups of the optimizer.
        unused_parameters: reports parameters without a gradient in the first update.
        dtype: the dtype that the model computes in; None for the dtype of its parameters.
    """

    def __init__(
        self,
        engine: Any,
        master_weights: MasterWeights,
        settings: OptimWrapper,
        groups: Sequence[OriginalGroup],
        unused_parameters: UnusedParameters,
        *,
        dtype: torch.dtype | None,
    ) -> None:
        scales = dtype == torch.float16
        super().__init__(
            settings.optimizer,
            accumulative_counts=settings.accumulative_counts,
            nonfinite="skip" if scales else settings.nonfinite,
        )
        self.groups = tuple(groups)
        self.master_weights = master_weights
        self.engine = engine
        self.clipping = settings.clipping
        self._unused_parameters = unused_parameters
        self._uses_loss_scale = scales
        # From stage 1 on, DeepSpeed multiplies the loss by the loss scale in its backward pass.
        self._scales_loss = scales and not master_weights.sharded
        # Whether the last backward pass reduced the accumulated gradients, so that step() may be called.
        self._is_reduced = False
        self._is_cleared = True
        self._expose_flats()

    @property
    def has_loss_scale(self) -> bool:
        """Whether the engine scales losses for float16."""
        return self._uses_loss_scale

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, including groups without trainable parameters."""
        return [group.options for group in self.groups]

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Accumulate the gradients of a loss.

        Args:
            loss: the loss of one micro-batch.
            kwargs: options of ``Tensor.backward``, of which only ``retain_graph`` is supported.

        Raises:
            PlacementError: for other options, or if DeepSpeed would not add these gradients to the accumulated ones.
        """
        self._require_next_pass()
        guard = self.gradient_policy.guard
        options = dict(kwargs if guard is None else guard.begin(loss, kwargs))
        if "gradient" in options:
            loss = loss * options.pop("gradient")
        if set(options) - {"retain_graph"}:
            raise PlacementError(f"DeepSpeed's backward pass has no option {', '.join(sorted(options))}. Omit it.")
        if self._uses_loss_scale:
            # Use float32, because the product with the loss scale would overflow in float16.
            loss = loss.float() * (self.engine.optimizer.loss_scale if self._scales_loss else 1.0)
        if not self.pending_micro_batches and not self._is_cleared:
            self.zero_grad()
        self._is_cleared = False
        reduces = self.should_sync()
        self.engine.set_gradient_accumulation_boundary(reduces)
        self.engine.backward(loss, scale_wrt_gas=False, **options)
        self._is_reduced = reduces
        self.inner_count += 1

    def step(self, **kwargs: Any) -> None:
        if kwargs:
            raise PlacementError(f"DeepSpeed's step has no option {', '.join(sorted(kwargs))}. Omit it.")
        if not self._is_reduced:
            raise StateError(
                f"step() was called after {self.pending_micro_batches} of {self.accumulative_counts} accumulated backward "
                "passes, but DeepSpeed only reduces gradients in the last one. Call step() only if should_update() is True, "
                "as update_params(loss) does."
            )
        self._unused_parameters.report()
        micro_batches = self.pending_micro_batches
        if micro_batches > 1:
            self.master_weights.complete_gradients()
        self._is_reduced = False
        self.window_start = self.inner_count
        self.num_steps_attempted += 1
        if not self._check_and_clip(micro_batches):
            self.zero_grad()
            return
        with self.engine_groups():
            self.engine.step()
        if self.engine.was_step_applied():
            self.num_steps_applied += 1
            return
        # The engine has discarded the gradients.
        logger.warning("Skipped update %d: the gradient norm is NaN or Inf.", self.num_steps_applied + 1)

    def zero_grad(self, **kwargs: Any) -> None:
        """Discard the gradients of all parameters."""
        self.master_weights.discard_gradients()
        self._is_reduced = False
        self._is_cleared = True

    def state_dict(self) -> dict[str, Any]:
        scaler = {"loss_scaler": read_loss_scale(self.engine.optimizer)} if self._uses_loss_scale else {}
        return {**super().state_dict(), **scaler}

    def load_counts(self, state_dict: Mapping[str, Any]) -> None:
        super().load_counts(state_dict)
        if self._uses_loss_scale and "loss_scaler" in state_dict:
            write_loss_scale(self.engine.optimizer, state_dict["loss_scaler"])

    def _require_next_pass(self) -> None:
        """Reject a backward pass whose gradients DeepSpeed would not add to the previous ones.

        Raises:
            PlacementError: if this stage does not support another backward pass before the update or forward pass.
        """
        if not self.master_weights.accumulates_extra_backward and self._is_reduced:
            raise PlacementError(
                "A second backward pass began before the update, but this ZeRO stage only keeps the gradients "
                "of the last backward pass. Add the losses and call backward once: optim_wrapper.update_params(loss_1 "
                "+ loss_2). To accumulate over several forward passes, set accumulative_counts."
            )
        if self.master_weights.needs_forward():
            raise PlacementError(
                "A second backward pass began without another forward pass, but ZeRO stage 3 frees the parameters in each "
                "backward pass. Add the losses and call backward once: optim_wrapper.update_params(loss_1 + loss_2)."
            )

    def _check_and_clip(self, micro_batches: int) -> bool:
        """Scale, check and clip the gradients of the accumulation window.

        Return whether the engine may step with them. Collective.
        """
        guard = self.gradient_policy.guard
        if self.weight is not None:
            self.master_weights.scale_gradients(self.weight_factor(micro_batches))
        if self.clipping is None and self.nonfinite is None and guard is None:
            return True
        norm = self.master_weights.norm()
        self.grad_norm = norm / self.engine.optimizer.loss_scale if self._uses_loss_scale else norm
        # The guard comes first because its report is more detailed. The engine handles float16 overflows.
        if guard is not None and not guard.allows_step([], norm) and not self._uses_loss_scale:
            return False
        if not self._uses_loss_scale and not self.allows_norm(norm):
            return False
        if self.clipping is not None and not self.master_weights.clips:
            self.clipping.apply(self.master_weights.gradients(), norm)
        return True

    @contextmanager
    def engine_groups(self) -> Iterator[None]:
        """Inside the ``with`` block, restore the groups to what the engine expects during its step."""
        if self.master_weights.groups_empty_between_steps:
            for group in self.groups:
                group.options["params"] = []
        yield
        self._expose_flats()

    def _expose_flats(self) -> None:
        """Add the flat tensors to groups that the engine leaves empty, because other code reads devices from the groups."""
        for group in self.groups if self.master_weights.groups_empty_between_steps else ():
            shard_ranges = [
                self.master_weights.shard_ranges[each]
                for each in group.parameters
                if each in self.master_weights.shard_ranges
            ]
            group.options["params"] = list({id(each.flat): each.flat for each in shard_ranges}.values())


def require_plain_wrapper(optim: object) -> OptimWrapper:
    """Return the configured optimizer wrapper, whose settings the engine uses.

    Raises:
        PlacementError: if it is not an ``OptimWrapper``.
        ConfigValueError: if the engine does not support its type of clipping.
    """
    if not isinstance(optim, OptimWrapper):
        raise PlacementError(
            f"DeepSpeedStrategy requires an OptimWrapper with a single optimizer, got {type(optim).__name__}. Instead of "
            "AmpOptimWrapper use type='OptimWrapper' with DeepSpeedStrategy(bf16=dict(enabled=True)) or "
            "fp16=dict(enabled=True). For several optimizers use a different strategy."
        )
    clipping = optim.clipping
    if clipping is not None and not (clipping.by_norm and clipping.norm_type == 2.0):
        raise ConfigValueError(
            "DeepSpeed only clips by the 2-norm of all gradients. Use clip_grad=dict(max_norm=...), or omit it."
        )
    return optim
