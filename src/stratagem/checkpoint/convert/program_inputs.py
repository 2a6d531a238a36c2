"""The inputs of an exported module: taken from a call of the model, with any number of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from stratagem.errors import CheckpointError
from stratagem.model import predict_step_of

__all__ = ["ModuleInputs", "captured_inputs"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleInputs:
    """The arguments of one call of a module.

    Attributes:
        args: the positional arguments.
        kwargs: the keyword arguments.
        size: the number of samples: the first dimension of the first tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        """Return the inputs of a call.

        Raises:
            CheckpointError: if they contain no tensor with a first dimension, which would be the number of samples.
        """
        tensors = [each for each in tree_leaves((args, dict(kwargs))) if isinstance(each, Tensor)]
        if not tensors or not tensors[0].ndim or not len(tensors[0]):
            raise CheckpointError(
                "The first input of the module is not a batch: expected a tensor whose first dimension counts the samples, got "
                f"{describe(tensors[0]) if tensors else 'no tensors'}. Select another module with module (--module), or pass "
                "inputs (--input)."
            )
        return cls(args=tuple(args), kwargs=dict(kwargs), size=len(tensors[0]))

    @classmethod
    def given(cls, inputs: Any) -> Self:
        """Return inputs that are a mapping (keyword arguments), a tuple or list (positional arguments), or a single value."""
        if isinstance(inputs, Mapping):
            return cls.of((), inputs)
        return cls.of(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {})

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the arguments."""
        return [each for each in tree_leaves((self.args, self.kwargs)) if isinstance(each, Tensor)]

    def resized(self, size: int) -> Self:
        """Return inputs with ``size`` samples: the first ones, which are repeated if there are too few."""
        rows = torch.arange(size) % self.size

        def resize(value: Any) -> Any:
            return value.index_select(0, rows.to(value.device)) if self._is_batch(value) else value

        return type(self)(args=tree_map(resize, self.args), kwargs=tree_map(resize, self.kwargs), size=size)

    def dynamic_shapes(self, dimension: Any) -> tuple[Any, dict[str, Any]]:
        """Return the dynamic shapes for ``torch.export``: the first dimension of each tensor with one row per sample."""

        def shape(value: Any) -> Any:
            return {0: dimension} if self._is_batch(value) else None

        return tree_map(shape, self.args), tree_map(shape, self.kwargs)

    def describe(self) -> str:
        """Return the shapes of the tensors as text, with ``batch`` for the number of samples."""
        return ", ".join(describe(each, batch=self._is_batch(each)) for each in self.tensors)

    def _is_batch(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == self.size


def describe(tensor: Tensor, *, batch: bool = False) -> str:
    """Return the dtype and the shape of a tensor, such as ``float32[batch, 3]``."""
    sizes = ["batch" if batch and not index else str(size) for index, size in enumerate(tensor.shape)]
    return f"{str(tensor.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"


class _Called(Exception):  # noqa: N818 -- ends the forward pass, and is not an error
    """The module was called."""


def captured_inputs(model: nn.Module, module: nn.Module, batch: Any) -> ModuleInputs:
    """Return the inputs of the first call of a module while the model predicts a batch.

    Args:
        model: the model with ``test_step`` or ``predict_step``, in evaluation mode.
        module: the model or one of its modules.
        batch: a batch of the data.

    Raises:
        CheckpointError: if the model does not call the module, or the prediction fails before.
    """
    found: list[ModuleInputs] = []

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is model:
            kwargs = {name: value for name, value in kwargs.items() if name != "mode"}
        found.append(ModuleInputs.of(args, kwargs))
        raise _Called

    handle = module.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad():
            predict_step_of(model)(batch)
    except _Called:
        pass
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"The model could not predict a batch of the data, which shows the inputs of {type(module).__name__}: "
            f"{type(error).__name__}: {error}. Correct the data, or pass inputs (--input 'float32[8,3,32,32]')."
        ) from error
    finally:
        handle.remove()
    if not found:
        raise CheckpointError(
            f"{type(model).__name__} predicts without calling {type(module).__name__}, so its inputs are unknown. Select another "
            "module with module (--module), or pass inputs (--input 'float32[8,3,32,32]')."
        )
    return found[0]
