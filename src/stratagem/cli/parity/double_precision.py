"""Train a model in float64, as a reference for the rounding errors of other dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from stratagem.train import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run

__all__ = ["DoublePrecision"]


@final
class DoublePrecision(Hook):
    """Convert the model to float64 before training, with equal initial values, and the inputs of each forward pass.

    Tensors that the model creates in the forward pass have dtype float64 by default. Data loading is unchanged, because
    random numbers in float64 would be different ones.
    """

    # The average must be built from the converted parameters.
    priority = Priority.VERY_HIGH

    def before_run(self, run: Run) -> None:
        model = run.strategy.unwrap_model()
        # Keeps the identity of the parameters, which the optimizer refers to.
        model.double()
        default = torch.get_default_dtype()

        def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            torch.set_default_dtype(torch.float64)
            return _to_double(args), _to_double(kwargs)

        def end(*_: Any) -> None:
            torch.set_default_dtype(default)

        handles = (
            model.register_forward_pre_hook(start, with_kwargs=True),
            model.register_forward_hook(end, always_call=True),
        )
        run.at_close.extend(handle.remove for handle in handles)


def _to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _to_double(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_to_double(each) for each in value]
    if type(value) is tuple:
        return tuple(_to_double(each) for each in value)
    return value
