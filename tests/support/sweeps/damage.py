"""Damage the files of the newest checkpoint: flip bits, truncate, zero and remove them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from stratagem.checkpoint import save_checkpoint
from tests.support.sweeps.trial import Lost, Trial, expect, recover, state

# The number of bit flips per file, evenly spaced; every byte if the file has fewer.
_FLIPS = 150
_LENGTHS = (0.0, 0.01, 0.5, 0.99)


def damages(folder: Path) -> Iterator[Trial]:
    """Yield trials for each file of the newest checkpoint, a directory or .pth file next to an intact older one."""
    for suffix in ("", ".pth"):
        kind = "a .pth file" if suffix else "a directory"
        sound = folder / f"damage{suffix}"
        for number in (1, 2):
            save_checkpoint(state(number), sound / f"iter_{number}{suffix}")
        newest = sound / f"iter_2{suffix}"
        for file in sorted(newest.iterdir()) if newest.is_dir() else [newest]:
            for fault, spoil in _ways(file.stat().st_size):
                yield Trial(
                    fault.split()[0],
                    kind,
                    f"{file.name} {fault}",
                    partial(_damage, sound, file.relative_to(sound), spoil),
                )


def _ways(size: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for offset in sorted({number * size // _FLIPS for number in range(_FLIPS)}):
        yield f"flipped at byte {offset}", partial(_flip, offset)
    for length in _LENGTHS:
        yield f"cut to {length:.0%}", partial(_cut, int(length * size))
    yield "removed", Path.unlink
    yield "emptied: zeros from the middle on", partial(_empty, size // 2)


def _damage(sound: Path, file: Path, spoil: Callable[[Path], None], place: Path) -> None:
    shutil.copytree(sound, place)
    spoil(place / file)
    found, messages = recover(place)
    if found == 2 and file.suffix == ".pth":
        # Timestamps and padding in a zip file are irrelevant: ``recover`` has verified that the state is equal.
        return
    expect(found, {1})
    # A missing .pth file cannot be reported.
    if (place / file).exists() and not any(file.name in message for message in messages):
        raise Lost(f"no message names {file.name}: {messages}")


def _flip(offset: int, file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << offset % 8
    file.write_bytes(data)


def _cut(size: int, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:size])


def _empty(begin: int, file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:begin] + bytes(len(data) - begin))
