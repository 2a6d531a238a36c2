"""Count the operations of one operator in a traced graph. A multiplication with an addition counts as one operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from stratagem.compat.mmengine.checks import require

__all__ = [
    "Handle",
    "addmm_flop_jit",
    "batchnorm_flop_jit",
    "bmm_flop_jit",
    "conv_flop_jit",
    "einsum_flop_jit",
    "elementwise_flop_counter",
    "generic_activation_jit",
    "get_shape",
    "linear_flop_jit",
    "matmul_flop_jit",
    "norm_flop_counter",
]

# Called with the inputs and outputs of an operator; returns a number, or numbers by name.
Handle = Callable[[list[Any], list[Any]], Any]

# Operations for each element, with and without a scale and shift.
_NORM_AFFINE, _NORM = 5, 4
_FIXED_NORM_AFFINE, _FIXED_NORM = 2, 1
# The position of the argument `transposed` of a convolution, and of `training` of a batch normalization.
_TRANSPOSED, _TRAINING = 6, 5


def get_shape(val: Any) -> list[int] | None:
    """Return the shape of a value in the graph; None if it is not a tensor."""
    return list(val.type().sizes()) if val.isCompleteTensor() else None


def _shape(val: Any) -> list[int]:
    shape = get_shape(val)
    require(shape is not None, f"{val} in the traced graph is not a tensor of known shape.")
    return shape or []


def addmm_flop_jit(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001 -- a handle
    """Count a product of two matrices to which a third one is added."""
    return math.prod(_shape(inputs[1])) * _shape(inputs[2])[1]


def linear_flop_jit(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001 -- a handle
    """Count a linear layer."""
    return math.prod(_shape(inputs[0])) * _shape(inputs[1])[0]


def bmm_flop_jit(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001 -- a handle
    """Count a product of batches of matrices."""
    return math.prod(_shape(inputs[0])) * _shape(inputs[1])[-1]


def matmul_flop_jit(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001 -- a handle
    """Count a product of vectors, matrices or batches of matrices."""
    first, second = _shape(inputs[0]), _shape(inputs[1])
    first = [1, *first] if len(first) == 1 else first
    second = [*second, 1] if len(second) == 1 else second
    batch = torch.broadcast_shapes(first[:-2], second[:-2])
    return int(math.prod(batch)) * math.prod(first[-2:]) * second[-1]


def einsum_flop_jit(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001 -- a handle
    """Count an ``einsum``: with two operands one operation for each combination of indices, else those of pairs in order."""
    equation = inputs[0].toIValue().replace(" ", "")
    terms, _, result = equation.partition("->")
    operands = terms.split(",")
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    sizes = {
        letter: size
        for term, shape in zip(operands, shapes, strict=True)
        for letter, size in zip(term, shape, strict=True)
    }
    total, done = 0, set(operands[0])
    for position, term in enumerate(operands[1:], start=1):
        total += math.prod(sizes[letter] for letter in done | set(term))
        # Indices that no later operand and not the result have are summed over now.
        done = (done | set(term)) & set(result).union(*operands[position + 1 :])
    return total


def conv_flop_jit(inputs: list[Any], outputs: list[Any]) -> dict[str, int]:
    """Count a convolution, under the name ``conv``."""
    data, weight, result = _shape(inputs[0]), _shape(inputs[1]), _shape(outputs[0])
    positions = (data if inputs[_TRANSPOSED].toIValue() else result)[2:]
    return {"conv": data[0] * math.prod(weight) * math.prod(positions)}


def norm_flop_counter(affine_arg_index: int) -> Handle:
    """Return the handle of a normalization with statistics of its input.

    Args:
        affine_arg_index: the position of the argument that is None without a scale.
    """

    def count(inputs: list[Any], outputs: list[Any]) -> int:  # noqa: ARG001 -- a handle
        is_affine = get_shape(inputs[affine_arg_index]) is not None
        return math.prod(_shape(inputs[0])) * (_NORM_AFFINE if is_affine else _NORM)

    return count


def batchnorm_flop_jit(inputs: list[Any], outputs: list[Any]) -> int:
    """Count a batch normalization, which has fixed statistics unless it is in training mode."""
    if inputs[_TRAINING].toIValue():
        count: int = norm_flop_counter(1)(inputs, outputs)
        return count
    is_affine = get_shape(inputs[1]) is not None
    return math.prod(_shape(inputs[0])) * (_FIXED_NORM_AFFINE if is_affine else _FIXED_NORM)


def elementwise_flop_counter(input_scale: float = 1, output_scale: float = 0) -> Handle:
    """Return the handle of an operator with some operations for each element of its first input and output."""

    def count(inputs: list[Any], outputs: list[Any]) -> float:
        total: float = 0
        for values, scale in ((inputs, input_scale), (outputs, output_scale)):
            total += scale * math.prod(_shape(values[0])) if scale else 0
        return total

    return count


def generic_activation_jit(op_name: str | None = None) -> Handle:
    """Return the handle that counts the elements of the first output, under ``op_name`` if it is given."""

    def count(inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:  # noqa: ARG001 -- a handle
        number = math.prod(_shape(outputs[0]))
        return number if op_name is None else {op_name: number}

    return count
