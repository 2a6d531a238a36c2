"""Copies of a model on the meta device, which are faster than building it again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from stratagem.errors import ConfigValueError
from stratagem.parallel.deferred_init.materialize import named_tensors

__all__ = ["ModelCopies", "meta_copy"]


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with parameters and buffers on the meta device; shared ones stay shared.

    Raises:
        ConfigValueError: if the shape of a tensor is unknown.
    """
    known: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        if is_lazy(tensor):
            raise ConfigValueError(
                f"The shape of {name!r} is unknown until the first forward pass, because its module is lazy, and planning needs "
                "it. Specify the number of its inputs (such as Linear instead of LazyLinear), or pass a model to "
                "stratagem.plan() that has run once."
            )
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            parameter = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            vars(parameter).update(vars(tensor))
            empty = parameter
        known[id(tensor)] = empty
    return copy.deepcopy(model, known)


@final
class ModelCopies:
    """Returns a new model in each call. The model is built once if a copy of it is equal to another one that is built.

    A function with a closure, such as a hook, may refer to the model that it was made for, so a model with one is built in each
    call.

    Args:
        build: returns a new model on the meta device.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self._build = build
        self._template: nn.Module | None = None
        self._is_copied = True

    def __call__(self) -> nn.Module:
        if self._is_copied and self._template is None:
            built = self._build()
            self._is_copied = not any(_refers_to_other_objects(vars(module).values()) for module in built.modules())
            if not self._is_copied:
                return built
            self._template = built
        if self._template is None:
            return self._build()
        try:
            return meta_copy(self._template)
        except Exception:  # noqa: BLE001 -- an attribute of the user's model cannot be copied
            self._is_copied, self._template = False, None
            return self._build()


def _refers_to_other_objects(values: Iterable[Any]) -> bool:
    return any(
        _refers_to_other_objects(value.values())
        if isinstance(value, Mapping)
        else isinstance(value, FunctionType) and value.__closure__ is not None
        for value in values
    )
