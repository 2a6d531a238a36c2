"""Read boxes of tensors from a file and compare them with their digests, while the next ones are read."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from torch import Tensor

from stratagem.checkpoint.directory.box_io import WrittenBox
from stratagem.checkpoint.directory.integrity import Digest
from stratagem.checkpoint.directory.tensor_layout import FileLayout
from stratagem.errors import CheckpointDamagedError
from stratagem.storage import closing_descriptor, open_for_reading, read_at
from stratagem.tensors.huge_pages import empty_in_huge_pages

__all__ = ["read_tensors", "verify_boxes"]

# The thread that computes digests receives this many bytes at a time, so that they are still in the cache of the processor.
_BATCH_BYTES: Final = 1 << 20
# The number of batches that are read ahead, so that the disk is busy while the system runs other threads.
_AHEAD: Final = 16


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
    tensors = {name: empty_in_huge_pages(spec.shape, spec.dtype) for name, spec in layout.specs.items()}
    _read_and_compare(file, layout, boxes, {name: _memory_of(tensor) for name, tensor in tensors.items()})
    return tensors


@final
@dataclass(slots=True)
class _Batch:
    """Data for the thread that computes digests: (digest, bytes to add), and the boxes that are complete after them."""

    updates: list[tuple[Digest, memoryview]] = field(default_factory=list)
    complete: list[tuple[Digest, WrittenBox]] = field(default_factory=list)
    nbytes: int = 0


@final
class _DigestThread:
    """A thread that computes digests of the data that the caller reads, in order. It is faster than most disks."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._executor = ThreadPoolExecutor(1, "checkpoint digest")
        self._buffers: list[memoryview] = []
        self._waiting: deque[Future[None]] = deque()
        self._batch = _Batch()
        self._next = 0

    def memory(self, length: int, target: memoryview | None) -> memoryview:
        """Return memory for at most ``length`` bytes that are read next: the start of ``target`` if given, or a buffer."""
        if self._batch.nbytes == _BATCH_BYTES:
            self._submit()
        used = self._batch.nbytes
        size = min(length, _BATCH_BYTES - used)
        if target is not None:
            return target[:size]
        if self._next == len(self._buffers):
            self._buffers.append(memoryview(bytearray(_BATCH_BYTES)))
        return self._buffers[self._next][used : used + size]

    def add(self, digest: Digest, data: memoryview) -> None:
        """Add data that was read to the memory that :meth:`memory` returned."""
        self._batch.updates.append((digest, data))
        self._batch.nbytes += len(data)

    def complete(self, digest: Digest, box: WrittenBox) -> None:
        """Compare a digest, all of whose data has been added, with the digest of a box."""
        self._batch.complete.append((digest, box))

    def finish(self) -> None:
        """Wait until all data has been compared.

        Raises:
            CheckpointDamagedError: if a digest differs.
        """
        self._submit()
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Stop the thread."""
        self._executor.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        batch, self._batch = self._batch, _Batch()
        self._waiting.append(self._executor.submit(self._compare, batch))
        self._next = (self._next + 1) % _AHEAD
        if len(self._waiting) == _AHEAD:
            # The buffer that is read next is that of the oldest batch.
            self._waiting.popleft().result()

    def _compare(self, batch: _Batch) -> None:
        for digest, data in batch.updates:
            digest.update(data)
        for digest, box in batch.complete:
            if digest.text() != box.digest:
                raise CheckpointDamagedError(
                    f"{self._file}: the tensor {box.name!r} is corrupted: its digest does not match the manifest."
                )


def _read_and_compare(
    file: Path, layout: FileLayout, boxes: Sequence[WrittenBox], targets: Mapping[str, memoryview]
) -> None:
    """Read boxes to ``targets``, or to buffers without them, and compare them with their digests."""
    # Read in file order, which is fastest for disks and benefits from readahead.
    ordered = sorted(boxes, key=lambda written_box: (layout.starts[written_box.name], written_box.box))
    try:
        with closing_descriptor(open_for_reading(file)) as descriptor, closing(_DigestThread(file)) as thread:
            for written_box in ordered:
                _read_box(descriptor, layout, written_box, targets.get(written_box.name), thread)
            thread.finish()
    except OSError as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error


def _read_box(
    descriptor: int, layout: FileLayout, written_box: WrittenBox, target: memoryview | None, thread: _DigestThread
) -> None:
    name, digest = written_box.name, Digest()
    start = layout.starts[name]
    for offset, length in layout.chunks(name, written_box.box.runs(layout.specs[name].shape)):
        done = 0
        while done < length:
            position = offset + done
            memory = thread.memory(length - done, None if target is None else target[position - start :])
            count = read_at(descriptor, memory, position)
            if count == 0:
                break  # The file ends here, so the digest does not match.
            thread.add(digest, memory[:count])
            done += count
    thread.complete(digest, written_box)


def _memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, which must exist as long as the memory is used.

    ``Tensor.numpy`` would mark the storage as one that cannot be resized.
    """
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
