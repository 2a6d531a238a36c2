"""Read boxes of tensors from a file and compare them with their digests."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from stratagem.checkpoint.directory.box_io import WrittenBox
from stratagem.checkpoint.directory.integrity import Digest
from stratagem.checkpoint.directory.tensor_layout import FileLayout
from stratagem.errors import CheckpointDamagedError
from stratagem.storage import closing_descriptor, open_for_reading, read_at

__all__ = ["read_tensors", "verify_boxes"]

# The digest of this many bytes is computed at a time, while they are in the cache of the processor.
_CHUNK_BYTES: Final = 1 << 20


def verify_boxes(file: Path, layout: FileLayout, boxes: Sequence[WrittenBox]) -> None:
    """Compare boxes in a file with their digests.

    Raises:
        CheckpointDamagedError: if a digest differs or the file cannot be read; the message names the tensor.
    """
    _read_and_compare(file, layout, boxes, {})


def read_tensors(file: Path, layout: FileLayout, boxes: Sequence[WrittenBox]) -> dict[str, Tensor]:
    """Read all tensors of a file to new memory; return them once all of them were compared with their digests.

    Args:
        file: the safetensors file.
        layout: its layout.
        boxes: boxes that cover all tensors of the file.

    Raises:
        CheckpointDamagedError: if a digest differs or the file cannot be read; the message names the tensor.
    """
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in layout.specs.items()}
    _read_and_compare(file, layout, boxes, {name: _memory_of(tensor) for name, tensor in tensors.items()})
    return tensors


def _read_and_compare(
    file: Path, layout: FileLayout, boxes: Sequence[WrittenBox], targets: Mapping[str, memoryview]
) -> None:
    """Read boxes to ``targets``, or to a buffer without them, and compare them with their digests."""
    # Read in file order, which is fastest for disks and benefits from readahead.
    ordered = sorted(boxes, key=lambda written_box: (layout.starts[written_box.name], written_box.box))
    try:
        # While one thread reads, the other computes a digest of the data that it has just read.
        with (
            closing_descriptor(open_for_reading(file)) as descriptor,
            ThreadPoolExecutor(2, "checkpoint check") as pool,
        ):
            digests = pool.map(lambda box: _read_box(descriptor, layout, box, targets.get(box.name)), ordered)
            for written_box, digest in zip(ordered, digests, strict=True):
                if digest != written_box.digest:
                    raise CheckpointDamagedError(
                        f"{file}: the tensor {written_box.name!r} is corrupted: its digest does not match the manifest."
                    )
    except OSError as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error


def _read_box(descriptor: int, layout: FileLayout, written_box: WrittenBox, target: memoryview | None) -> str:
    """Read a box to ``target``, the memory of its tensor, or to a buffer; return its digest."""
    name, digest = written_box.name, Digest()
    start, spec = layout.starts[name], layout.specs[name]
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, spec.nbytes))) if target is None else memoryview(b"")
    for offset, length in layout.chunks(name, written_box.box.runs(spec.shape)):
        position, end = offset, offset + length
        while position < end:
            size = min(end - position, _CHUNK_BYTES)
            memory = buffer[:size] if target is None else target[position - start :][:size]
            count = read_at(descriptor, memory, position)
            if count == 0:
                break  # The file ends here, so the digest does not match.
            digest.update(memory[:count])
            position += count
    return digest.text()


def _memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, which must exist as long as the memory is used.

    ``Tensor.numpy`` would mark the storage as one that cannot be resized.
    """
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
