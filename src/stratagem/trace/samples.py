"""Digests of the samples of a batch and of the states of the random number generators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from stratagem.trace.values import bytes_of
from stratagem.utils import generator_state

__all__ = ["generator_digest", "sample_digests"]


def sample_digests(batch: Any) -> tuple[str, ...] | None:
    """Return the digest of the contents of each sample in a batch; None if it has no tensor with samples.

    A batch is a nested structure of mappings, sequences and dataclasses. Its size is the length of the first dimension of its
    first tensor or array. The digest of sample ``i`` covers row ``i`` of all tensors, arrays and sequences of strings or
    numbers of this length. Everything else, such as a number that belongs to the whole batch, is not covered.
    """
    leaves = list(_leaves(batch))
    size = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)
    if size is None:
        return None
    columns = [_rows(leaf) for leaf in leaves if not (isinstance(leaf, Tensor) and not leaf.ndim) and len(leaf) == size]
    digests = []
    for rows in zip(*columns, strict=True):
        content = blake3()
        for row in rows:
            # The length separates the rows, so that moving bytes from one to the next changes the digest.
            content.update(len(row).to_bytes(8, "little"))
            content.update(row)
        digests.append(content.hexdigest(length=16))
    return tuple(digests)


def generator_digest() -> str:
    """Return the digest of the states of torch's generators on the CPU and on this process's accelerator."""
    state = generator_state()
    content = blake3()
    for each in (state["torch"], *state["accelerator"].values()):
        content.update(bytes_of(each.cpu().contiguous()))
    return content.hexdigest(length=16)


def _leaves(batch: Any) -> Iterator[Tensor | Sequence[Any]]:
    """Yield the tensors, and the sequences of strings or numbers, in a batch. Arrays are returned as tensors."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, np.ndarray):
        if batch.dtype.kind in "biufc":
            yield torch.from_numpy(np.ascontiguousarray(batch))
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _leaves(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for each in fields(batch):
            yield from _leaves(getattr(batch, each.name))
    elif isinstance(batch, list | tuple):
        if batch and all(isinstance(item, str | int | float | bytes) for item in batch):
            yield batch
        else:
            for value in batch:
                yield from _leaves(value)


def _rows(column: Tensor | Sequence[Any]) -> list[Any]:
    """Return the bytes of each row."""
    if isinstance(column, Tensor):
        host = column.detach().to_dense() if column.layout is not torch.strided else column.detach()
        return [bytes_of(row.contiguous()) for row in host.cpu()]
    return [item if isinstance(item, bytes) else repr(item).encode() for item in column]
