"""Write boxes of tensors to a safetensors file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from stratagem.checkpoint.directory.integrity import Digest
from stratagem.checkpoint.directory.tensor_layout import FileLayout
from stratagem.checkpoint.tree.boxes import TensorBox
from stratagem.storage import (
    begin_writeback,
    closing_descriptor,
    operations,
    write_fully,
)

__all__ = ["WrittenBox", "create_file", "digest_of_tensor", "write_boxes"]

# Below this size, passing the data to another thread costs more than computing its digest.
_WORTH_A_THREAD = 1 << 20
_WRITE_AT_ONCE = 32 << 20


@final
@dataclass(frozen=True, slots=True)
class WrittenBox:
    """A box of a tensor in a file, with the digest of its bytes in row-major order."""

    name: str
    box: TensorBox
    digest: str


def create_file(file: Path, layout: FileLayout) -> None:
    """Create the file, or use an existing empty one; set its full size and write the header."""
    with closing_descriptor(
        operations.open_file(file) if file.exists() else operations.create_file(file)
    ) as descriptor:
        operations.truncate(descriptor, layout.size)
        write_fully(descriptor, layout.header, 0)


def write_boxes(file: Path, layout: FileLayout, boxes: Iterable[tuple[str, TensorBox, Tensor]]) -> list[WrittenBox]:
    """Write boxes, given as (tensor name, box, values), to a file made by :func:`create_file`, and sync it.

    At most one box at a time is copied to the CPU, and only if it is on another device.
    """
    written = []
    waiting = 0
    with (
        closing_descriptor(operations.open_file(file)) as descriptor,
        ThreadPoolExecutor(1, "checkpoint digest") as executor,
    ):
        for name, box, content in boxes:
            data = _as_memoryview(content)
            # Compute the digest in a second thread while this thread writes the data to the file.
            digest = executor.submit(_digest, data) if len(data) >= _WORTH_A_THREAD else None
            begin = 0
            for offset, length in layout.chunks(name, box.runs(layout.specs[name].shape)):
                for start, size in _split_range(offset, length, _WRITE_AT_ONCE):
                    write_fully(descriptor, data[begin : begin + size], start)
                    begin += size
                    waiting += size
                    if waiting >= _WRITE_AT_ONCE:
                        # Start writeback to disk now, so that little is left for the final fsync.
                        begin_writeback(descriptor)
                        waiting = 0
            written.append(WrittenBox(name, box, digest.result() if digest else _digest(data)))
        operations.fsync(descriptor)
    return written


def digest_of_tensor(tensor: Tensor) -> str:
    """Return the digest of a tensor's bytes as they are stored in a file."""
    return _digest(_as_memoryview(tensor))


def _split_range(offset: int, length: int, max_length: int) -> Iterator[tuple[int, int]]:
    for done in range(0, length, max_length):
        yield offset + done, min(max_length, length - done)


def _as_memoryview(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as stored in a file; a contiguous CPU tensor is not copied."""
    # Materialize lazy conjugation and negation, which torch stores only as flags on the tensor. as_strided() normalizes
    # the strides, because a tensor with one element is contiguous regardless of its strides.
    dense = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return memoryview(torch.as_strided(dense, (dense.numel(),), (1,)).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer


def _digest(data: memoryview) -> str:
    digest = Digest()
    digest.update(data)
    return digest.text()
