"""What every optimizer wrapper offers.

A wrapper owns the arithmetic between a loss and an update: gradient accumulation, weighted means, clipping. It counts
micro-batches (``inner_count``), windows of them (``attempts``) and updates really taken (``updates``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from stratagem.errors import CheckpointMismatchError, ConfigTypeError

__all__ = ["NOTHING", "BaseOptimWrapper", "momentum_of", "without_exchange"]

# One object for every iteration that needs no context: entering it costs nothing worth measuring.
NOTHING: Final = nullcontext()

_COUNTS: Final = ("inner_count", "attempts", "updates")
# How the update is computed belongs to the machine at hand, not to a checkpoint.
_IMPLEMENTATION_KEYS: Final = ("fused", "foreach")
# Where a schedule-free optimizer's saved state has the weight that trains: the model's state has the one to evaluate.
_TRAINING_WEIGHT: Final = "training_weight"


class BaseOptimWrapper(ABC):
    """One way to train with an optimizer, the same for models and loops whatever the precision or the engine.

    Attributes:
        optimizer: the optimizer that is wrapped.
        accumulative_counts: micro-batches per update.
        inner_count: micro-batches whose gradient has been computed.
        attempts: accumulation windows completed, those included whose update was skipped.
        updates: updates of the weights really taken.
        accumulation_context: called with the model and whether ranks must exchange gradients; a strategy puts its
            placement's here.
        always_says_sync: whether ``accumulation_context`` is called also for windows of one micro-batch: another
            optimizer of the same model may have said otherwise.
        forget_waiting: called where a window is dropped, for gradients that wait for their exchange elsewhere.
        complete_gradients: called at the start of each step if set: averages gradients that backward passes left on
            this rank. Collective.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise ConfigTypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}: {optimizer!r}. "
                "Build configurations with build_optim_wrapper(model, cfg)."
            )
        self.optimizer = optimizer
        self.accumulative_counts = 1
        self.inner_count = 0
        self.attempts = 0
        self.updates = 0
        self.accumulation_context: Callable[[nn.Module, bool], AbstractContextManager[object]] = without_exchange
        self.always_says_sync = False
        self.forget_waiting: Callable[[], None] = _nothing_waits
        self.complete_gradients: Callable[[], None] | None = None
        self._training_weights: list[Tensor] | None = None
        self.train()

    @abstractmethod
    def update_params(
        self,
        loss: Tensor,
        *,
        weight: float | Tensor | None = None,
        step_kwargs: Mapping[str, Any] | None = None,
        zero_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Compute the gradient of one micro-batch and, where its window is complete, update the parameters.

        Args:
            loss: a scalar, the mean over the micro-batch.
            weight: how much of the step this micro-batch is, such as its number of samples or tokens. Given to every
                micro-batch of a step on every rank, the step's gradient is that of
                ``sum(loss * weight) / sum(weight)``; given to none, each micro-batch counts the same.
            step_kwargs: passed on to ``step``.
            zero_kwargs: passed on to ``zero_grad``.
        """

    @abstractmethod
    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the gradient of a loss, which ``scale_loss`` has scaled, and count the micro-batch."""

    @abstractmethod
    def step(self, **kwargs: Any) -> None:
        """Update the parameters with the gradients that have been added, and count it."""

    @abstractmethod
    def zero_grad(self, **kwargs: Any) -> None:
        """Forget the gradients of every parameter of the optimizer."""

    @abstractmethod
    def optim_context(self, model: nn.Module) -> AbstractContextManager[object]:
        """Return the context in which the forward of one micro-batch runs."""

    @abstractmethod
    def should_update(self) -> bool:
        """Tell whether the last micro-batch completed its window."""

    @abstractmethod
    def should_sync(self) -> bool:
        """Tell whether the coming micro-batch completes its window, so that ranks must exchange gradients."""

    @abstractmethod
    def scale_loss(self, loss: Tensor) -> Tensor:
        """Return the loss divided by the number of micro-batches of its window."""

    @abstractmethod
    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Say where the run stands: micro-batches done, and in all (-1 where that is not known)."""

    @property
    def loss_scale(self) -> float | None:
        """The factor that gradients carry until the update; None without a loss scaler. Waits for the device."""
        return None

    @property
    @abstractmethod
    def pending(self) -> int:
        """How many micro-batches of an unfinished window wait for their update."""

    @abstractmethod
    def drop_window(self) -> int:
        """Forget an unfinished window's gradients, as at an early stop; return how many micro-batches it had."""

    def train(self) -> None:
        """Let the parameters hold the weights that train; only schedule-free optimizers keep others for evaluation."""
        _switch(self.optimizer, "train")

    def eval(self) -> None:
        """Let the parameters hold the weights to evaluate and to save; call ``train`` before the next update."""
        _switch(self.optimizer, "eval")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let the parameters hold the weights to evaluate and to save for the length of a block.

        The weights that train are kept aside meanwhile and come back with the same bits, which ``eval`` and ``train``
        alone do not give: they compute the ones from the others.
        """
        if not _is_schedule_free(self.optimizer) or self._training_weights is not None:
            yield
            return
        self._training_weights = [parameter.detach().clone() for parameter in self._parameters()]
        self.eval()
        try:
            yield
        finally:
            self.train()
            self._restore(dict(enumerate(self._training_weights)))
            self._training_weights = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups themselves, not copies."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's default options."""
        return self.optimizer.defaults

    def get_lr(self) -> dict[str, list[float]]:
        """Return ``{"lr": [...]}``, the learning rate that each group really uses."""
        return {"lr": [group["lr"] for group in self.param_groups]}

    def get_momentum(self) -> dict[str, list[float]]:
        """Return ``{"momentum": [...]}`` per group: ``momentum``, else the first of ``betas``, else 0."""
        return {"momentum": [momentum_of(group) for group in self.param_groups]}

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state with the counts of this wrapper under ``counts``."""
        state = self.optimizer.state_dict()
        if self._training_weights is not None:
            weights = self._training_weights
            slots = {index: {**own, _TRAINING_WEIGHT: weights[index]} for index, own in state["state"].items()}
            state = {**state, "state": slots}
        return {**state, "counts": {name: getattr(self, name) for name in _COUNTS}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned; its tensors are taken over, not copied, as torch does.

        The state of a bare optimizer is taken too. How updates are computed (fused, foreach) stays as this process
        chose it. The weights of a schedule-free optimizer become those that train, so load the model's before.

        Raises:
            CheckpointMismatchError: if the groups or their sizes differ.
        """
        groups = [
            {**saved, **{key: own[key] for key in _IMPLEMENTATION_KEYS if key in own}}
            for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=False)
        ]
        if len(groups) != len(state_dict["param_groups"]) or len(groups) != len(self.param_groups):
            raise CheckpointMismatchError(
                f"The saved optimizer has {len(state_dict['param_groups'])} parameter groups, this run has "
                f"{len(self.param_groups)}. Build the same groups, or resume without the optimizer."
            )
        slots = {
            index: {key: value for key, value in saved.items() if key != _TRAINING_WEIGHT}
            for index, saved in state_dict["state"].items()
        }
        try:
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        except ValueError as error:
            raise CheckpointMismatchError(
                f"The saved state does not fit {type(self.optimizer).__name__} of this run: {error}. "
                "Build the same groups, or resume without the optimizer."
            ) from error
        self.load_counts(state_dict)
        self.train()
        self._restore(
            {
                index: saved[_TRAINING_WEIGHT]
                for index, saved in state_dict["state"].items()
                if _TRAINING_WEIGHT in saved
            }
        )

    def load_counts(self, state_dict: Mapping[str, Any]) -> None:
        """Take up of a saved state what this wrapper has counted; what is not there stays as it is."""
        counts = state_dict.get("counts", {})
        for name in _COUNTS:
            setattr(self, name, int(counts.get(name, getattr(self, name))))

    def model_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that learn by it, as the model has them: an engine's optimizer may update copies."""
        return self._parameters()

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _restore(self, weights: Mapping[int, Tensor]) -> None:
        """Give parameters, by their running index, the weights that train."""
        parameters = self._parameters() if weights else []
        with torch.no_grad():
            for index, weight in weights.items():
                parameters[index].copy_(weight)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(accumulative_counts={self.accumulative_counts}, optimizer={self.optimizer!r})"


def _nothing_waits() -> None:
    """Do nothing: gradients lie in the parameters alone."""


def _is_schedule_free(optimizer: Optimizer) -> bool:
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def _switch(optimizer: Optimizer, mode: str) -> None:
    if _is_schedule_free(optimizer):
        getattr(optimizer, mode)()


def momentum_of(group: Mapping[str, Any]) -> float:
    """Return the momentum of a group: ``momentum``, else the first of ``betas``, else 0."""
    if "momentum" in group:
        return group["momentum"]  # type: ignore[no-any-return]  # groups are untyped
    return group["betas"][0] if "betas" in group else 0.0


def without_exchange(model: nn.Module, sync: bool) -> AbstractContextManager[object]:
    """Return the context of one micro-batch in which a ``DistributedDataParallel`` exchanges gradients only on sync."""
    if not sync and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return NOTHING
