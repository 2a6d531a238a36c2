"""The inputs of a model that computes in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["with_inputs_in"]


def with_inputs_in(
    dtype: torch.dtype | None, forward: Callable[..., Any], chosen: Collection[int | str] | None
) -> Callable[..., Any]:
    """Return ``forward`` with floating-point inputs cast to a type.

    Args:
        dtype: the type; None leaves them.
        forward: what is called.
        chosen: the positions and names of those that are cast; None for all.
    """
    if dtype is None:
        return forward

    def cast_first(*args: Any, **kwargs: Any) -> Any:
        return forward(
            *(_in_type(value, dtype) if _is_chosen(place, chosen) else value for place, value in enumerate(args)),
            **{name: _in_type(value, dtype) if _is_chosen(name, chosen) else value for name, value in kwargs.items()},
        )

    return cast_first


def _is_chosen(key: int | str, chosen: Collection[int | str] | None) -> bool:
    return chosen is None or key in chosen


def _in_type(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _in_type(each, dtype) for key, each in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_in_type(each, dtype) for each in value)
    return value
