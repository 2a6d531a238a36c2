"""A model that trains by its own steps, through an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, final

from torch import Tensor, nn

from stratagem.errors import PlacementError
from stratagem.model import Trainable
from stratagem.parallel.forward_redirection import calls_go_to

__all__ = ["Driven"]


@final
class Driven(nn.Module):
    """Runs the model's own ``train_step``, ``val_step`` and ``test_step``; what they call as ``self(...)`` is the engine.

    In all else ``self`` is the model there, and an attribute that this module does not have is the model's.

    Args:
        bare: the model.
        holder: what holds it: the model itself, or the engine's wrapper of it.
        engine: what errors call the engine.
        learning: what a call of the model becomes in a training step; it calls the model.
        evaluating: the same in an evaluation.
    """

    def __init__(
        self,
        bare: nn.Module,
        holder: nn.Module,
        *,
        engine: str,
        learning: Callable[..., Any],
        evaluating: Callable[..., Any],
    ) -> None:
        super().__init__()
        self.holder = holder
        # Not a child of its own: it is the holder's, or that itself.
        self.__dict__["bare"] = bare
        self._engine = engine
        self._learning = learning
        self._evaluating = evaluating
        self._passed = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["bare"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model through the engine."""
        self._passed = True
        return self._learning(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Learn from one micro-batch; see the model's ``train_step``.

        Raises:
            PlacementError: if the model's step did not call ``self(...)``, which the engine would not see.
        """
        self._passed = False
        with calls_go_to(self.bare, self):
            outputs: dict[str, Tensor] = self._model.train_step(data, optim_wrapper=optim_wrapper)
        if not self._passed:
            raise PlacementError(
                f"{type(self.bare).__name__}.train_step reached the model's parameters without calling self(...), so "
                f"{self._engine} saw no forward pass. Call self(...) for it."
            )
        return outputs

    def val_step(self, data: Any) -> Any:
        """Return the model's predictions."""
        with calls_go_to(self.bare, self._evaluating):
            return self._model.val_step(data)

    def test_step(self, data: Any) -> Any:
        """Return the model's predictions."""
        with calls_go_to(self.bare, self._evaluating):
            return self._model.test_step(data)

    @property
    def _model(self) -> Trainable:
        return cast("Trainable", self.bare)
