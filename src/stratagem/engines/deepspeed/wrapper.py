"""The optimizer wrapper of a model that DeepSpeed's engine trains."""

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
from stratagem.errors import ConfigValueError, PlacementError, StateError
from stratagem.optim import AccumulatingOptimWrapper, OptimWrapper

__all__ = ["DeepSpeedOptimWrapper", "OriginalGroup", "require_plain_wrapper"]

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, slots=True)
class OriginalGroup:
    """A group as it was before DeepSpeed put parts in the place of its parameters.

    Attributes:
        options: the optimizer's own mapping, which schedules change.
        parameters: the model's, frozen ones among them.
    """

    options: dict[str, Any]
    parameters: tuple[nn.Parameter, ...]


@final
class DeepSpeedOptimWrapper(AccumulatingOptimWrapper):
    """Computes gradients and updates by DeepSpeed's engine: exchange, accumulation, clipping and the loss scale are its own.

    Windows are counted here, so that the last and shorter one is divided by its own length.

    Args:
        engine: DeepSpeed's; it stays an attribute, like ``master_weights`` and ``groups``.
        master_weights: where the engine keeps gradients and what it updates.
        settings: the wrapper that was configured; its optimizer is the engine's.
        groups: the optimizer's groups as they were.
        dtype: what the model computes in; None for its own types.
    """

    def __init__(
        self,
        engine: Any,
        master_weights: MasterWeights,
        settings: OptimWrapper,
        groups: Sequence[OriginalGroup],
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
        self._scales = scales
        # Where DeepSpeed scales the loss itself, it does so in its backward pass.
        self._scales_here = scales and not master_weights.sharded
        # Whether the engine reduced the gradients of this window in the last backward pass, and needs its step next.
        self._is_reduced = False
        self._is_cleared = True
        self._show_flats()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups themselves, with those that have nothing to train."""
        return [group.options for group in self.groups]

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the gradient of a loss; of torch's options ``retain_graph`` alone is known to the engine.

        Raises:
            PlacementError: for another option, or if DeepSpeed would not add this gradient to those of the window.
        """
        self._require_next_pass()
        guard = self.gradient_policy.guard
        options = dict(kwargs if guard is None else guard.begin(loss, kwargs))
        if "gradient" in options:
            loss = loss * options.pop("gradient")
        if set(options) - {"retain_graph"}:
            raise PlacementError(f"DeepSpeed's backward pass does not know {', '.join(sorted(options))}. Leave it out.")
        if self._scales:
            # The product with the scale leaves the range of float16.
            loss = loss.float() * (self.engine.optimizer.loss_scale if self._scales_here else 1.0)
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
            raise PlacementError(f"DeepSpeed's step does not know {', '.join(sorted(kwargs))}. Leave it out.")
        if not self._is_reduced:
            raise StateError(
                f"step() was called after {self.pending_micro_batches} of {self.accumulative_counts} backward passes of an "
                "accumulation window, and DeepSpeed reduces gradients in the last one. "
                "Call step() only if should_update() is True, as "
                "update_params(loss) does."
            )
        micro_batches = self.pending_micro_batches
        if micro_batches > 1:
            self.master_weights.complete_gradients()
        self._is_reduced = False
        self.window_start = self.inner_count
        self.num_steps_attempted += 1
        if not self._admitted(micro_batches):
            self.zero_grad()
            return
        with self.engines_groups():
            self.engine.step()
        if self.engine.was_step_applied():
            self.num_steps_applied += 1
            return
        # The engine has dropped the gradients.
        logger.warning("Skipped update %d: the norm of its gradients is not finite.", self.num_steps_applied + 1)

    def zero_grad(self, **kwargs: Any) -> None:
        """Forget the gradients of every parameter."""
        self.master_weights.discard_gradients()
        self._is_reduced = False
        self._is_cleared = True

    def state_dict(self) -> dict[str, Any]:
        scaler = {"loss_scaler": read_loss_scale(self.engine.optimizer)} if self._scales else {}
        return {**super().state_dict(), **scaler}

    def load_counts(self, state_dict: Mapping[str, Any]) -> None:
        super().load_counts(state_dict)
        if self._scales and "loss_scaler" in state_dict:
            write_loss_scale(self.engine.optimizer, state_dict["loss_scaler"])

    def _require_next_pass(self) -> None:
        """Refuse a backward pass whose gradients DeepSpeed would keep instead of those before it, or misplace."""
        if not self.master_weights.accumulates_extra_backward and self._is_reduced:
            raise PlacementError(
                "A second backward pass began before the update, and this stage of DeepSpeed keeps the gradients of the last "
                "pass alone. Add the losses and call backward once: optim_wrapper.update_params(loss_1 + loss_2). To add up "
                "passes of several forward passes, set accumulative_counts."
            )
        if self.master_weights.needs_forward():
            raise PlacementError(
                "A second backward pass began without a forward pass after the first one, and ZeRO stage 3 frees the "
                "parameters in each. Add the losses and call backward once: optim_wrapper.update_params(loss_1 + loss_2)."
            )

    def _admitted(self, micro_batches: int) -> bool:
        """Weigh the window's gradients; tell whether the engine may step with them. Collective."""
        guard = self.gradient_policy.guard
        if self.weight is not None:
            self.master_weights.scale_gradients(self.weight_factor(micro_batches))
        if self.clipping is None and self.nonfinite is None and guard is None:
            return True
        norm = self.master_weights.norm()
        self.grad_norm = norm / self.engine.optimizer.loss_scale if self._scales else norm
        # First, since it says more of what it refuses. An overflow of float16 is the engine's to see: it lowers its scale.
        if guard is not None and not guard.allows_step([], norm) and not self._scales:
            return False
        if not self._scales and not self.allows_norm(norm):
            return False
        if self.clipping is not None and not self.master_weights.clips:
            self.clipping.apply(self.master_weights.gradients(), norm)
        return True

    @contextmanager
    def engines_groups(self) -> Iterator[None]:
        """Let the groups be as the engine left them, for the length of its step."""
        if self.master_weights.groups_empty_between_steps:
            for group in self.groups:
                group.options["params"] = []
        yield
        self._show_flats()

    def _show_flats(self) -> None:
        """Put what is stepped into groups that the engine keeps empty between steps: others ask them for a device."""
        for group in self.groups if self.master_weights.groups_empty_between_steps else ():
            shard_ranges = [
                self.master_weights.shard_ranges[each]
                for each in group.parameters
                if each in self.master_weights.shard_ranges
            ]
            group.options["params"] = list({id(each.flat): each.flat for each in shard_ranges}.values())


def require_plain_wrapper(optim: object) -> OptimWrapper:
    """Return the wrapper whose settings the engine takes over.

    Raises:
        PlacementError: if it is another kind, or clips in a way that the engine does not know.
    """
    if not isinstance(optim, OptimWrapper):
        raise PlacementError(
            f"DeepSpeed trains with one optimizer in an OptimWrapper, and this is {type(optim).__name__}. In the place of "
            "AmpOptimWrapper use type='OptimWrapper' with DeepSpeedStrategy(bf16=dict(enabled=True)) or "
            "fp16=dict(enabled=True); several optimizers need another strategy."
        )
    clipping = optim.clipping
    if clipping is not None and not (clipping.by_norm and clipping.norm_type == 2.0):
        raise ConfigValueError(
            "DeepSpeed clips by the 2-norm of all gradients alone. Give clip_grad=dict(max_norm=...), or leave it out."
        )
    return optim
