"""The disk of the tests forgets what real disks may forget, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from faults import between
from power_loss import HALF, WHOLE, Recording
from stratagem.storage import operations, write_fully


def record(folder: Path, work: Callable[[Path], None]) -> Recording:
    """Return what the work did in a folder that holds ``old``, with ``before`` in it."""
    folder.mkdir()
    (folder / "old").write_text("before")
    recording = Recording(folder)
    with between(recording.act):
        work(folder)
    return recording


def found(
    recording: Recording, place: Path, kept: dict[int, float] | None = None, end: int | None = None
) -> dict[str, str]:
    """Return the files after a power loss, at the end if not told otherwise."""
    recording.replay(len(recording) if end is None else end, kept or {}, place)
    return {str(file.relative_to(place)): file.read_text() for file in place.rglob("*") if file.is_file()}


def write(folder: Path, *, sync: bool = False, sync_name: bool = False) -> None:
    """Write ``new``, and sync what is asked for."""
    descriptor = operations.create_file(folder / "new")
    write_fully(descriptor, b"text", 0)
    if sync:
        operations.fsync(descriptor)
    operations.close(descriptor)
    if sync_name:
        descriptor = operations.open_folder(folder)
        operations.fsync(descriptor)
        operations.close(descriptor)


@pytest.mark.parametrize(
    ("sync", "sync_name", "left"),
    [(False, False, {}), (True, False, {}), (False, True, {"new": ""}), (True, True, {"new": "text"})],
)
def test_content_needs_its_sync_and_a_name_that_of_its_folder(
    tmp_path: Path, sync: bool, sync_name: bool, left: dict[str, str]
) -> None:
    """Without the one the file is empty, without the other there is none."""
    recording = record(tmp_path / "a", lambda folder: write(folder, sync=sync, sync_name=sync_name))
    assert found(recording, tmp_path / "b") == {"old": "before", **left}


def test_what_was_not_synced_may_have_come_all_the_same(tmp_path: Path) -> None:
    """Any part of it, and a write by half."""
    recording = record(tmp_path / "a", write)
    name, content = recording.pending(len(recording))
    assert found(recording, tmp_path / "b", {name: WHOLE}) == {"old": "before", "new": ""}
    assert found(recording, tmp_path / "c", {content: WHOLE}) == {"old": "before"}
    assert found(recording, tmp_path / "d", {name: WHOLE, content: HALF}) == {"old": "before", "new": "te"}


def test_a_rename_comes_as_a_whole(tmp_path: Path) -> None:
    """The old name or the new one, never both or neither."""
    recording = record(tmp_path / "a", lambda folder: operations.rename(folder / "old", folder / "new"))
    assert found(recording, tmp_path / "b") == {"old": "before"}
    assert found(recording, tmp_path / "c", {0: WHOLE}) == {"new": "before"}


def test_what_is_done_later_is_not_there_yet(tmp_path: Path) -> None:
    """A loss in the middle knows nothing of the end, also not of its syncs."""
    recording = record(tmp_path / "a", lambda folder: write(folder, sync=True, sync_name=True))
    assert found(recording, tmp_path / "b", end=2) == {"old": "before"}
    assert found(recording, tmp_path / "c", {0: WHOLE}, end=1) == {"old": "before", "new": ""}


def test_folders_swap_and_go(tmp_path: Path) -> None:
    """Folders that are made, swapped and removed are followed by what is in them."""

    def work(folder: Path) -> None:
        operations.create_folder(folder / "one")
        write(folder / "one", sync=True, sync_name=True)
        operations.create_folder(folder / "two")
        if not operations.exchange(folder / "one", folder / "two"):
            pytest.skip("names cannot be swapped here")
        operations.remove_folder(folder / "one")
        operations.remove_file(folder / "old")

    recording = record(tmp_path / "a", work)
    everything = dict.fromkeys(recording.pending(len(recording)), WHOLE)
    assert found(recording, tmp_path / "b", everything) == {"two/new": "text"}
    assert found(recording, tmp_path / "c") == {"old": "before"}
