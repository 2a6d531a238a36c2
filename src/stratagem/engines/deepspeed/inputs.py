"""Cast the inputs of a model that computes in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["cast_inputs"]


def cast_inputs(
    dtype: torch.dtype | None, forward: Callable[..., Any], selected: Collection[int | str] | None
) -> Callable[..., Any]:
    """Return a function that casts floating-point inputs to a dtype and calls ``forward``.

    Args:
        dtype: the dtype to cast to; None to return ``forward`` itself.
        forward: the function to call.
        selected: the indices of positional inputs and the names of keyword inputs to cast; None for all.
    """
    if dtype is None:
        return forward

    def forward_with_cast(*args: Any, **kwargs: Any) -> Any:
        return forward(
            *(
                _cast(value, dtype) if _is_selected(position, selected) else value
                for position, value in enumerate(args)
            ),
            **{name: _cast(value, dtype) if _is_selected(name, selected) else value for name, value in kwargs.items()},
        )

    return forward_with_cast


def _is_selected(key: int | str, selected: Collection[int | str] | None) -> bool:
    return selected is None or key in selected


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(each, dtype) for key, each in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_cast(each, dtype) for each in value)
    return value
