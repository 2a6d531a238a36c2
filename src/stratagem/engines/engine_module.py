"""A model that trains through an engine, with the ``train_step`` of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast, final

import torch
from torch import Tensor, nn

from stratagem.errors import PlacementError
from stratagem.model import Trainable, predict_step_of
from stratagem.parallel.forward_redirection import redirect_forward
from stratagem.parallel.trainable import TrainableChange

__all__ = ["EngineModule", "refuse_empty_parameters", "refuse_trainable_change"]


def refuse_empty_parameters(engine: str, model: nn.Module, instead: str) -> None:
    """Require that every parameter has elements.

    Raises:
        PlacementError: if a parameter is empty.
    """
    empty = [name for name, each in model.named_parameters() if not each.numel()]
    if empty:
        raise PlacementError(
            f"{engine} does not support parameters without elements: {', '.join(empty)}. Remove them from the "
            f"model, or use {instead}."
        )


def refuse_trainable_change(engine: str, change: TrainableChange) -> NoReturn:
    """Raise an error, because an engine assigns the trainable parameters to its buffers once.

    Raises:
        PlacementError: always.
    """
    raise PlacementError(
        f"{change}, but {engine} determines the trainable parameters when it is created: parameters that were frozen then would "
        "never be trained, and parameters that are frozen now would still change. Use DDPStrategy or FSDPStrategy, which "
        "support changes during a run. Otherwise, set requires_grad before the run, and start a new run with load_from for "
        "each stage."
    )


@final
class EngineModule(nn.Module):
    """Runs the ``train_step``, ``val_step`` and ``test_step`` of a model; their calls to ``self(...)`` go to the engine.

    In all other respects, ``self`` is the model inside these methods. Attributes that this module lacks are looked up
    on the model.

    Args:
        unwrapped: the model.
        holder: the model, or the engine's wrapper around the model.
        engine: the name of the engine in error messages.
        training_forward: runs the forward pass when a training step calls ``self(...)``.
        eval_forward: runs the forward pass when an evaluation step calls ``self(...)``.
        before_train_step: runs at the start of each training step or, in a loop that does not call ``train_step``, before each
            forward pass.
    """

    def __init__(
        self,
        unwrapped: nn.Module,
        holder: nn.Module,
        *,
        engine: str,
        training_forward: Callable[..., Any],
        eval_forward: Callable[..., Any],
        before_train_step: Callable[[], None],
    ) -> None:
        super().__init__()
        self.holder = holder
        # Do not register the model as a submodule, because the holder is the model or contains it.
        self.__dict__["unwrapped"] = unwrapped
        self._engine = engine
        self._training_forward = training_forward
        self._eval_forward = eval_forward
        self._before_train_step = before_train_step
        self._is_in_train_step = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["unwrapped"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model through the engine."""
        if not self._is_in_train_step and torch.is_grad_enabled():
            self._before_train_step()
        return self._training_forward(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on one micro-batch; see the model's ``train_step``.

        Raises:
            PlacementError: if the model's step did not call ``self(...)``, so the engine did not run the forward pass.
        """
        self._before_train_step()
        self._is_in_train_step = True
        try:
            with redirect_forward(self.unwrapped, self) as redirection:
                outputs: dict[str, Tensor] = self._model.train_step(data, optim_wrapper=optim_wrapper)
        finally:
            self._is_in_train_step = False
        if not redirection.called:
            raise PlacementError(
                f"{type(self.unwrapped).__name__}.train_step used the model's parameters without calling self(...), so "
                f"{self._engine} did not run the forward pass. Call self(...) for the forward pass."
            )
        return outputs

    def val_step(self, data: Any) -> Any:
        """Return the model's predictions."""
        with redirect_forward(self.unwrapped, self._eval_forward):
            return self._model.val_step(data)

    def test_step(self, data: Any) -> Any:
        """Return the model's predictions."""
        with redirect_forward(self.unwrapped, self._eval_forward):
            return self._model.test_step(data)

    def predict_step(self, data: Any) -> Any:
        """Return the results of a batch."""
        with redirect_forward(self.unwrapped, self._eval_forward):
            return predict_step_of(self.unwrapped)(data)

    @property
    def _model(self) -> Trainable:
        return cast("Trainable", self.unwrapped)
