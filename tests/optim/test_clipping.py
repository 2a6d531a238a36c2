"""Clipping many gradients: the same bits as one tensor at a time, without Python calls for each tensor."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from stratagem.optim import OptimWrapper
from stratagem.optim.gradients import global_norm, scale

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def count_calls(function: Callable[[], object]) -> int:
    """Return the number of calls of Python and C functions that the interpreter makes."""
    calls = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def calls_to_clip(tensors: int) -> int:
    parameters = [nn.Parameter(torch.ones(16)) for _ in range(tensors)]
    wrapper = OptimWrapper(SGD(parameters, lr=0.1), clip_grad={"max_norm": 0.5})
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)

    def clip() -> None:
        gradients = wrapper.collect_grads(1)
        assert wrapper.clipping is not None
        wrapper.clipping.apply(gradients, wrapper.compute_grad_norm(gradients))

    clip()
    return count_calls(clip)


def test_clipping_makes_no_python_calls_for_each_tensor() -> None:
    """Clipping 500 tensors makes as many calls as clipping 20."""
    assert calls_to_clip(500) == calls_to_clip(20) < 60


@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in FLOATS), FLOATS, (torch.float32, torch.complex64)])
@pytest.mark.parametrize("numel", [1, 17, 5000])
@pytest.mark.parametrize("special", [1.0, math.nan, math.inf, -0.0, 1e-41])
def test_scaled_gradients_equal_those_scaled_one_at_a_time(
    dtypes: tuple[torch.dtype, ...], numel: int, special: float
) -> None:
    """All bits are those of a multiplication of each tensor, whichever kernel multiplies them."""
    generator = torch.Generator().manual_seed(numel)
    values = [torch.randn(numel, generator=generator).to(dtypes[i % len(dtypes)]) for i in range(24)]
    values[3].view(-1)[0] = special
    factor = torch.tensor(0.7371123)
    expected = []
    for value in values:
        wide = value.dtype in (torch.float64, torch.complex128)
        expected.append(value * (factor.double() if wide else factor))
    scale(values, factor)
    assert [bits(value) for value in values] == [bits(value) for value in expected]


def bits(value: Tensor) -> bytes:
    return bytes(value.contiguous().view(torch.uint8).numpy())


def test_the_norm_of_mixed_dtypes_is_that_of_the_norms() -> None:
    """The norm of float32 and float64 gradients is computed in float64 from the norms of the tensors."""
    norm = global_norm([torch.full((4,), 1.5), torch.full((9,), 2.0, dtype=torch.float64)])
    assert norm.dtype == torch.float64
    assert norm.item() == math.sqrt(3.0**2 + 6.0**2)


def test_scaling_keeps_strided_gradients_apart_from_their_neighbors() -> None:
    """Only the elements of a view are multiplied, not those between them."""
    whole = torch.ones(24, 4)
    scale([row[::2] for row in whole], torch.tensor(0.5))
    assert whole[:, ::2].eq(0.5).all()
    assert whole[:, 1::2].eq(1.0).all()


def test_no_gradients_are_scaled() -> None:
    """An empty list is accepted."""
    scale([], torch.tensor(0.5))
