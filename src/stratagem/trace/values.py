"""Values of tensors in a trace: all elements of small tensors, and a summary of large ones.

A summary is a vector of float64 numbers that depends linearly on the tensor, so that the mean of the summaries of several ranks
is the summary of the mean:

- the sum of all elements,
- 64 sums of elements with fixed pseudorandom signs, each over every 64th element (a count sketch). The squares of the differences
  between two such sketches sum, in expectation, to the squared norm of the difference between the tensors,
- 256 elements at evenly spaced positions.

The signs and positions depend only on the number of elements, so that summaries of different runs can be compared.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from blake3 import blake3
from torch import Tensor

__all__ = ["Value", "bytes_of", "digest_of", "summarize"]

_NUM_SUMS: Final = 64
_NUM_SAMPLES: Final = 256
# Bounds the temporary tensors of a summary.
_CHUNK: Final = 1 << 22


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """The recorded value of a tensor.

    Attributes:
        shape: the shape of the full tensor.
        dtype: the name of its dtype, such as ``"float32"``.
        digest: the BLAKE3 digest of its bytes. Equal digests mean that all bits are equal.
        norm: the 2-norm; 0.0 if the tensor is empty.
        largest: the largest absolute value.
        is_summary: whether ``numbers`` is a summary.
        numbers: all elements, flattened, in the dtype of the tensor, or a summary in float64.
    """

    shape: tuple[int, ...]
    dtype: str
    digest: str
    norm: float
    largest: float
    is_summary: bool
    numbers: Tensor

    @classmethod
    def of(cls, tensor: Tensor, *, full: bool) -> Value:
        """Return the value of a tensor.

        Args:
            tensor: a full tensor; sparse tensors are recorded as dense ones.
            full: whether to keep all elements even if the tensor has more elements than a summary.
        """
        tensor = tensor.detach()
        dense = tensor.to_dense() if tensor.layout is not torch.strided else tensor
        host = dense.resolve_conj().resolve_neg().cpu().contiguous()
        numbers = host.reshape(-1)
        is_summary = not full and numbers.numel() > 1 + _NUM_SUMS + _NUM_SAMPLES and not host.is_complex()
        norm, largest = _sizes(numbers)
        return cls(
            shape=tuple(host.shape),
            dtype=str(host.dtype).removeprefix("torch."),
            digest=digest_of(host),
            norm=norm,
            largest=largest,
            is_summary=is_summary,
            # A copy: the tensor is usually changed in place later.
            numbers=summarize(numbers) if is_summary else numbers.clone(),
        )

    def exact(self) -> Tensor:
        """Return the numbers as float64, or complex128."""
        return self.numbers.to(torch.complex128 if self.numbers.is_complex() else torch.float64)

    def difference_norm(self, difference: Tensor) -> float:
        """Return the norm of a difference between two such values, estimated if they are summaries."""
        if self.is_summary:
            difference = difference[1 : 1 + _NUM_SUMS]
        return float(torch.linalg.vector_norm(difference))

    def largest_difference(self, difference: Tensor) -> float:
        """Return the largest absolute difference of an element; of summaries, the larger one of two estimates.

        The estimates are the differences at the sampled positions and the root mean square of the difference.
        """
        if not difference.numel():
            return 0.0
        if not self.is_summary:
            return float(difference.abs().max())
        sampled = float(difference[1 + _NUM_SUMS :].abs().max())
        return max(sampled, self.difference_norm(difference) / math.sqrt(math.prod(self.shape)))

    def typical_difference(self, difference: Tensor) -> float:
        """Return the largest absolute difference of an element, without the tenth of the elements that differ most.

        Of fewer than ten elements, this is the largest difference.
        """
        elements = (difference[1 + _NUM_SUMS :] if self.is_summary else difference).abs()
        if not elements.numel():
            return 0.0
        return float(elements.kthvalue(math.ceil(0.9 * elements.numel())).values)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without copying them."""
    view: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(view)


def digest_of(tensor: Tensor) -> str:
    """Return the BLAKE3 digest of the bytes of a tensor on the CPU."""
    return blake3(bytes_of(tensor.contiguous())).hexdigest(length=16)


def summarize(flat: Tensor) -> Tensor:
    """Return the summary of a flattened tensor of real numbers."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    sums = torch.zeros(_NUM_SUMS, dtype=torch.float64, device="cpu")
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].double()
        total += chunk.sum()
        sign = int(_mixed(torch.tensor(start // _CHUNK, device="cpu"))) * 2 - 1
        signed = chunk * _signs()[: chunk.numel()]
        padding = -signed.numel() % _NUM_SUMS
        sums += sign * torch.nn.functional.pad(signed, (0, padding)).view(-1, _NUM_SUMS).sum(0)
    positions = torch.arange(_NUM_SAMPLES, device="cpu") * flat.numel() // _NUM_SAMPLES
    return torch.cat([total.reshape(1), sums, flat[positions].double()])


@functools.cache
def _signs() -> Tensor:
    """Return a pseudorandom sign, 1 or -1, for each index in a chunk. Every chunk is multiplied by a sign in addition."""
    return (_mixed(torch.arange(_CHUNK, device="cpu")) * 2 - 1).to(torch.int8)


def _mixed(bits: Tensor) -> Tensor:
    """Return a pseudorandom bit for each integer."""
    # Two rounds of multiply and shift mix the integers well enough; int64 multiplication wraps around.
    for factor in (0x2545F4914F6CDD1D, 0x369DEA0F31A53F85):
        bits = (bits + 1) * factor
        bits = bits ^ (bits >> 29)
    return (bits >> 32) & 1


def _sizes(flat: Tensor) -> tuple[float, float]:
    if not flat.numel():
        return 0.0, 0.0
    numbers = flat.to(torch.complex128 if flat.is_complex() else torch.float64)
    return float(torch.linalg.vector_norm(numbers)), float(numbers.abs().max())
