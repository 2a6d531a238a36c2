"""A model whose training goes through DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from stratagem.errors import PlacementError
from stratagem.model import Trainable
from stratagem.parallel.detour import calls_go_to

__all__ = ["Driven"]


@final
class Driven(nn.Module):
    """Trains through the model's own ``train_step``, in which the calls of ``self(...)`` go through the engine.

    In all else ``self`` is the model, and an attribute that this module does not have is the model's.

    Args:
        module: the bare model.
        forward: the engine's; it calls the model.
        dtype: what floating-point inputs of the model are cast to; None leaves them.
        half_inputs: the positions and names of those that are cast; None for all.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        *,
        dtype: torch.dtype | None,
        half_inputs: tuple[int | str, ...] | None,
    ) -> None:
        super().__init__()
        self.module = module
        self._through_engine = forward
        self._dtype = dtype
        self._half_inputs = half_inputs
        self._passed = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model through the engine, with inputs in its type."""
        self._passed = True
        return self._through_engine(
            *(self._cast(place, value) for place, value in enumerate(args)),
            **{name: self._cast(name, value) for name, value in kwargs.items()},
        )

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Learn from one micro-batch; see the model's ``train_step``.

        Raises:
            PlacementError: if the model's step did not call ``self(...)``, which the engine would not see.
        """
        self._passed = False
        outputs: dict[str, Tensor] = self._run(
            cast("Trainable", self.module).train_step, data, optim_wrapper=optim_wrapper
        )
        if not self._passed:
            raise PlacementError(
                f"{type(self.module).__name__}.train_step reached the model's parameters without calling self(...), so "
                "DeepSpeed saw no forward pass. Call self(...) for it."
            )
        return outputs

    def val_step(self, data: Any) -> Any:
        """Return the model's predictions."""
        return self._run(cast("Trainable", self.module).val_step, data)

    def test_step(self, data: Any) -> Any:
        """Return the model's predictions."""
        return self._run(cast("Trainable", self.module).test_step, data)

    def _run(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        own = self.module._compiled_call_impl

        def through_engine(*inputs: Any, **named: Any) -> Any:
            # What the engine calls in turn is the model itself.
            with calls_go_to(self.module, own):
                return self(*inputs, **named)

        with calls_go_to(self.module, through_engine):
            return step(*args, **kwargs)

    def _cast(self, key: int | str, value: Any) -> Any:
        if self._dtype is None or not (self._half_inputs is None or key in self._half_inputs):
            return value
        return _in_type(value, self._dtype)


def _in_type(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _in_type(each, dtype) for key, each in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_in_type(each, dtype) for each in value)
    return value
