"""A boosted model that trains through its own steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast, final

from colossalai.interface import ModelWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stratagem.errors import PlacementError
from stratagem.model import Trainable
from stratagem.parallel.detour import calls_go_to

__all__ = ["Boosted"]


@final
class Boosted(nn.Module):
    """What the booster made of a model, with the steps of the model itself.

    While a training step runs, the calls of ``self(...)`` in it go through ColossalAI. An evaluation calls the model
    itself, with inputs in its type: nothing is exchanged between replicas, so ranks may have different numbers of batches.

    Args:
        engine: the wrapped model.
        bare: the model in it.
    """

    def __init__(self, engine: ModelWrapper, bare: nn.Module) -> None:
        super().__init__()
        self.engine = engine
        # Not a child of its own: it is one of the engine's already.
        self.__dict__["bare"] = bare
        self._passed = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["bare"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model through ColossalAI."""
        self._passed = True
        return self.engine(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Learn from one micro-batch; see the model's ``train_step``.

        Raises:
            PlacementError: if the model's step did not call ``self(...)``.
        """
        self._passed = False
        with self._calls_go_to(self):
            outputs: dict[str, Tensor] = cast("Trainable", self.bare).train_step(data, optim_wrapper=optim_wrapper)
        if not self._passed:
            raise PlacementError(
                f"{type(self.bare).__name__}.train_step reached the model's parameters without calling self(...), so "
                "ColossalAI saw nothing of it. Call self(...) for the forward pass."
            )
        return outputs

    def val_step(self, data: Any) -> Any:
        """Return the model's predictions."""
        with self._calls_go_to(self._cast):
            return cast("Trainable", self.bare).val_step(data)

    def test_step(self, data: Any) -> Any:
        """Return the model's predictions."""
        with self._calls_go_to(self._cast):
            return cast("Trainable", self.bare).test_step(data)

    def _cast(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model itself, with floating-point inputs in the type that its plugin computes in."""
        convert = getattr(self.engine, "convert_fn", None)
        if convert is not None:
            args, kwargs = tree_map(convert, args), tree_map(convert, kwargs)
        return self.bare(*args, **kwargs)

    def _calls_go_to(self, target: Callable[..., Any]) -> AbstractContextManager[None]:
        """Let the model's calls of itself go to ``target``, within which they are its own again."""
        own = self.bare._compiled_call_impl

        def instead(*args: Any, **kwargs: Any) -> Any:
            with calls_go_to(self.bare, own):
                return target(*args, **kwargs)

        return calls_go_to(self.bare, instead)
