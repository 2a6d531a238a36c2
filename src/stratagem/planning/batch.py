"""The batch of a planned step: the first batch of the data, or tensors that a string describes."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from stratagem.data import build_dataloader
from stratagem.errors import ConfigValueError, StateError
from stratagem.planning.fake_world import replaced

__all__ = ["BatchSpec", "describe_batch", "first_batch", "parse_batch", "without_network"]

_TENSOR: Final = re.compile(r"(?:(?P<name>\w+)=)?(?P<dtype>[a-z]+\d*)\[(?P<shape>\d+(?:,\d+)*)\]")
_EXAMPLE: Final = "'tokens=int64[8,1024],targets=int64[8,1024]' or 'float32[32,3,224,224],int64[32]'"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    """A batch on the meta device, and how it was obtained.

    Attributes:
        batch: a batch whose tensors are on the meta device.
        size: the number of samples; None if no dimension is known to count samples.
        source: where the batch comes from.
    """

    batch: Any
    size: int | None
    source: str

    @classmethod
    def of(cls, batch: Any, size: int | None = None, source: str = "the given batch") -> BatchSpec:
        """Return the specification of a batch. If ``size`` is None, it is the first dimension of the first tensor."""
        tensors = [each for each in tree_leaves(batch) if isinstance(each, Tensor)]
        if size is None and tensors and tensors[0].ndim:
            size = tensors[0].shape[0]
        return cls(batch=tree_map(_to_meta, batch), size=size, source=source)

    def resized(self, size: int) -> Any:
        """Return the batch with another number of samples: the first dimension of all tensors that had ``self.size``."""

        def resize(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == self.size:
                return value.new_empty((size, *value.shape[1:]))
            if isinstance(value, list) and len(value) == self.size:
                return (value * (size // len(value) + 1))[:size]
            return value

        return tree_map(resize, self.batch, is_leaf=lambda each: isinstance(each, list) and not _has_tensors(each))


def _has_tensors(value: Any) -> bool:
    return any(isinstance(each, Tensor) for each in tree_leaves(value))


def _to_meta(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def fake_batch(batch: Any, device: torch.device) -> Any:
    """Return a batch with new tensors on a device; inside a fake tensor mode, they have no memory."""
    return tree_map(lambda each: torch.empty_like(each, device=device) if isinstance(each, Tensor) else each, batch)


def parse_batch(text: str) -> BatchSpec:
    """Return the batch that a string describes, such as ``"tokens=int64[8,1024]"``: a mapping if there are names, else a tuple.

    Raises:
        ConfigValueError: if the text cannot be parsed.
    """
    found = list(_TENSOR.finditer(text))
    names = [match["name"] for match in found]
    if (
        not found
        or ",".join(match[0] for match in found) != text.replace(" ", "")
        or 0 < names.count(None) < len(names)
    ):
        raise ConfigValueError(f"batch={text!r} is not a list of tensors such as {_EXAMPLE}.")
    for match in found:
        if "0" in match["shape"].split(","):
            raise ConfigValueError(f"batch: {match[0]} has no elements. All dimensions of a tensor must be at least 1.")
    tensors = [_meta_tensor(match["dtype"], match["shape"]) for match in found]
    if names[0] is not None:
        return BatchSpec.of(dict(zip(names, tensors, strict=True)), source="the option batch")
    return BatchSpec.of(tuple(tensors) if len(tensors) > 1 else tensors[0], source="the option batch")


def _meta_tensor(dtype: str, shape: str) -> Tensor:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ConfigValueError(f"batch: torch has no dtype {dtype!r}. Describe tensors as in {_EXAMPLE}.")
    return torch.empty([int(each) for each in shape.split(",")], dtype=kind, device="meta")


def first_batch(dataloader: Any, *, seed: int = 0) -> BatchSpec:
    """Return the first batch of a data loader or its configuration, read in this process and without network access.

    Raises:
        StateError: if the dataset opens a network connection, such as to download files.
    """
    if isinstance(dataloader, Mapping):
        dataloader = {**dataloader, "num_workers": 0}
        for name in ("persistent_workers", "prefetch_factor", "multiprocessing_context"):
            dataloader.pop(name, None)
    with without_network("train_dataloader", "Describe the batch instead: --batch 'tokens=int64[8,1024]'."):
        loader = build_dataloader(dataloader, seed=seed, training=True)
        batch = next(loader.batches(0))
    return BatchSpec.of(batch, loader.batch_size, "the first batch of train_dataloader")


@contextmanager
def without_network(what: str, advice: str) -> Iterator[None]:
    """Refuse network connections of this process inside the ``with`` block.

    Raises:
        StateError: if the block opens a connection.
    """

    def refuse(_: socket.socket, address: Any) -> None:
        raise StateError(f"{what} opened a connection to {address!r}, and planning downloads nothing. {advice}")

    with replaced(socket.socket, "connect", refuse), replaced(socket.socket, "connect_ex", refuse):
        yield


def describe_batch(batch: Any) -> tuple[str, ...]:
    """Return a description of each tensor, such as ``"int64[16, 128]"``."""
    tensors: Sequence[Tensor] = [each for each in tree_leaves(batch) if isinstance(each, Tensor)]
    return tuple(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in tensors)
