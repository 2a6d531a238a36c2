"""A copy stream without an accelerator, whose copies contain no values until the consumer waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stratagem import runner
from stratagem.data import build_dataloader
from stratagem.train.run import device_batches


class DelayedStream:
    """Copies batches into tensors of zeros; waiting for the event of a batch fills in the values.

    Attributes:
        calls: the calls of all streams in order: ("copy", number) and ("wait", number).
    """

    def __init__(self, calls: list[tuple[str, int]] | None = None) -> None:
        self.calls = [] if calls is None else calls
        self._pending: dict[int, list[tuple[Any, Any]]] = {}

    def copy(self, host: Any) -> tuple[Any, int]:
        """Return the batch with zeros, and the number of the copy as the event."""
        number = sum(name == "copy" for name, _ in self.calls)
        self.calls.append(("copy", number))
        leaves, structure = pytree.tree_flatten(host)
        copies = [torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._pending[number] = list(zip(leaves, copies, strict=True))
        return pytree.tree_unflatten(copies, structure), number

    def wait(self, event: int) -> None:
        """Fill in the values of a copy."""
        self.calls.append(("wait", event))
        for leaf, copy in self._pending.pop(event):
            if isinstance(copy, Tensor):
                copy.copy_(leaf)


@contextmanager
def copying_ahead(stream: DelayedStream | None = None, *, always: bool = False) -> Iterator[list[tuple[str, int]]]:
    """Build loaders as for an accelerator, and copy their batches with a :class:`DelayedStream`; yield its calls.

    Args:
        stream: copies all batches; by default, each iteration has a new stream.
        always: whether to read all loaders ahead, whatever their options.
    """
    calls: list[tuple[str, int]] = []

    def build(*args: Any, **kwargs: Any) -> Any:
        loader = build_dataloader(*args, **{**kwargs, "device": torch.device("cuda")})
        # Torch warns of pinned memory without an accelerator.
        object.__setattr__(loader.loader, "pin_memory", False)
        loader.reads_ahead = loader.reads_ahead or always
        return loader

    with (
        mock.patch.object(runner, "build_dataloader", build),
        mock.patch.object(device_batches, "_new_stream", side_effect=lambda _: stream or DelayedStream(calls)),
    ):
        yield calls
