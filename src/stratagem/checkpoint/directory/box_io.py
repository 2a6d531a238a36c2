"""Write pieces of tensors into their places in a file, and check them there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from stratagem.checkpoint.directory.integrity import Digest
from stratagem.checkpoint.directory.tensor_layout import FileLayout
from stratagem.checkpoint.tree.boxes import TensorBox
from stratagem.errors import CheckpointDamagedError
from stratagem.storage import begin_writeback, opened, operations, write_fully

__all__ = ["WrittenBox", "verify_boxes", "create_file", "digest_of_tensor", "write_boxes"]

# Below this, handing bytes to another thread costs more than their digest.
_WORTH_A_THREAD = 1 << 20
_READ_AT_ONCE = 4 << 20
_WRITE_AT_ONCE = 32 << 20


@final
@dataclass(frozen=True, slots=True)
class WrittenBox:
    """A piece of a tensor in a file, with the digest of its bytes in the order of the piece."""

    name: str
    box: TensorBox
    digest: str


def create_file(file: Path, layout: FileLayout) -> None:
    """Make the file, or fill an empty one, in its full size and with the header."""
    with opened(operations.open_file(file) if file.exists() else operations.create_file(file)) as descriptor:
        operations.truncate(descriptor, layout.size)
        write_fully(descriptor, layout.header, 0)


def write_boxes(file: Path, layout: FileLayout, pieces: Iterable[tuple[str, TensorBox, Tensor]]) -> list[WrittenBox]:
    """Write pieces (name, box, its content) into a file that :func:`create_file` made, durably.

    Besides the tensors themselves one piece is in memory at a time, and only if it lies on another device.
    """
    written = []
    waiting = 0
    with opened(operations.open_file(file)) as descriptor, ThreadPoolExecutor(1, "checkpoint digest") as side:
        for name, box, content in pieces:
            data = _bytes_of(content)
            # Two threads read the same memory at once: the digest costs no time where there is a second core.
            digest = side.submit(_digest, data) if len(data) >= _WORTH_A_THREAD else None
            begin = 0
            for place, length in layout.chunks(name, box.runs(layout.specs[name].shape)):
                for start, size in _cut(place, length, _WRITE_AT_ONCE):
                    write_fully(descriptor, data[begin : begin + size], start)
                    begin += size
                    waiting += size
                    if waiting >= _WRITE_AT_ONCE:
                        # The disk works from now on, and not only in the fsync at the end.
                        begin_writeback(descriptor)
                        waiting = 0
            written.append(WrittenBox(name, box, digest.result() if digest else _digest(data)))
        operations.fsync(descriptor)
    return written


def verify_boxes(file: Path, layout: FileLayout, pieces: Sequence[WrittenBox]) -> None:
    """Compare the pieces in a file with their digests.

    Raises:
        CheckpointDamagedError: if one differs or cannot be read; it names the tensor.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _compare(file, descriptor, layout, pieces)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error


def digest_of_tensor(tensor: Tensor) -> str:
    """Return the digest of a tensor's bytes, as they would be in a file."""
    return _digest(_bytes_of(tensor))


def _compare(file: Path, descriptor: int, layout: FileLayout, pieces: Sequence[WrittenBox]) -> None:
    # In the order of the file, which is what disks and the system's reading ahead are fastest at.
    ordered = sorted(pieces, key=lambda piece: (layout.starts[piece.name], piece.box))
    # One thread waits for the disk while another computes.
    with ThreadPoolExecutor(2, "checkpoint check") as pool:
        digests = pool.map(lambda piece: _digest_in_file(descriptor, layout, piece), ordered)
        for piece, digest in zip(ordered, digests, strict=True):
            if digest != piece.digest:
                raise CheckpointDamagedError(
                    f"{file}: the tensor {piece.name!r} is not what was written: its digest differs."
                )


def _digest_in_file(descriptor: int, layout: FileLayout, piece: WrittenBox) -> str:
    digest = Digest()
    buffer = memoryview(bytearray(min(_READ_AT_ONCE, max(1, layout.specs[piece.name].nbytes))))
    for place, length in layout.chunks(piece.name, piece.box.runs(layout.specs[piece.name].shape)):
        for begin, size in _cut(place, length, len(buffer)):
            count = os.preadv(descriptor, [buffer[:size]], begin)
            digest.update(buffer[:count])
    return digest.text()


def _cut(place: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    for done in range(0, length, most):
        yield place + done, min(most, length - done)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as they lie in a file; on the CPU without a copy, unless it is a view with gaps."""
    # Views that are conjugated or negated when they are read would be written as they lie in memory.
    # A tensor of one element may have any stride, and still counts as dense.
    dense = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return memoryview(torch.as_strided(dense, (dense.numel(),), (1,)).view(torch.uint8).numpy())  # type: ignore[arg-type]  # it is a buffer


def _digest(data: memoryview) -> str:
    digest = Digest()
    digest.update(data)
    return digest.text()
