"""The simulated disk loses only the data that real disks may lose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stratagem.storage import operations, write_fully
from tests.support.faults import between
from tests.support.power_loss import HALF, WHOLE, Recording


def record(folder: Path, work: Callable[[Path], None]) -> Recording:
    """Return the recorded operations of ``work`` in a folder that contains a file ``old`` with the text ``before``."""
    folder.mkdir()
    (folder / "old").write_text("before")
    recording = Recording(folder)
    with between(recording.act):
        work(folder)
    return recording


def found(
    recording: Recording, place: Path, kept: dict[int, float] | None = None, end: int | None = None
) -> dict[str, str]:
    """Return the files after a power loss, by default after the last operation."""
    recording.replay(len(recording) if end is None else end, kept or {}, place)
    return {str(file.relative_to(place)): file.read_text() for file in place.rglob("*") if file.is_file()}


def write(folder: Path, *, sync: bool = False, sync_name: bool = False) -> None:
    """Write ``new`` and optionally sync the file and its folder."""
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
def test_contents_and_names_must_be_synced(tmp_path: Path, sync: bool, sync_name: bool, left: dict[str, str]) -> None:
    """Without syncing the file, it is empty; without syncing the folder, it does not exist."""
    recording = record(tmp_path / "a", lambda folder: write(folder, sync=sync, sync_name=sync_name))
    assert found(recording, tmp_path / "b") == {"old": "before", **left}


def test_unsynced_changes_may_be_on_the_disk(tmp_path: Path) -> None:
    """Unsynced changes may be on the disk in any combination, and a write may be incomplete."""
    recording = record(tmp_path / "a", write)
    name, content = recording.pending(len(recording))
    assert found(recording, tmp_path / "b", {name: WHOLE}) == {"old": "before", "new": ""}
    assert found(recording, tmp_path / "c", {content: WHOLE}) == {"old": "before"}
    assert found(recording, tmp_path / "d", {name: WHOLE, content: HALF}) == {"old": "before", "new": "te"}


def test_a_rename_is_atomic(tmp_path: Path) -> None:
    """After an unsynced rename, the file has either the old or the new name."""
    recording = record(tmp_path / "a", lambda folder: operations.rename(folder / "old", folder / "new"))
    assert found(recording, tmp_path / "b") == {"old": "before"}
    assert found(recording, tmp_path / "c", {0: WHOLE}) == {"new": "before"}


def test_later_operations_have_no_effect(tmp_path: Path) -> None:
    """A power loss in the middle is not affected by later operations and syncs."""
    recording = record(tmp_path / "a", lambda folder: write(folder, sync=True, sync_name=True))
    assert found(recording, tmp_path / "b", end=2) == {"old": "before"}
    assert found(recording, tmp_path / "c", {0: WHOLE}, end=1) == {"old": "before", "new": ""}


def test_folders_are_exchanged_and_removed(tmp_path: Path) -> None:
    """Files remain in folders that are created, exchanged and removed."""

    def work(folder: Path) -> None:
        operations.create_folder(folder / "one")
        write(folder / "one", sync=True, sync_name=True)
        operations.create_folder(folder / "two")
        if not operations.exchange(folder / "one", folder / "two"):
            pytest.skip("this system cannot exchange names")
        operations.remove_folder(folder / "one")
        operations.remove_file(folder / "old")

    recording = record(tmp_path / "a", work)
    everything = dict.fromkeys(recording.pending(len(recording)), WHOLE)
    assert found(recording, tmp_path / "b", everything) == {"two/new": "text"}
    assert found(recording, tmp_path / "c") == {"old": "before"}
