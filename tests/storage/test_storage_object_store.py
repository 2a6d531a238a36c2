"""Publication to storage without rename."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError, MissingDependencyError
from stratagem.storage import (
    clean_unpublished,
    fetch_published,
    is_remote_scheme,
    list_published,
    publish,
    remove_published,
)
from stratagem.storage.publication import Generation, PublicationRecord, StoredFile
from tests.support.faulty_places import Dead, Faulty, register

register()


@pytest.fixture(params=["memory", "norename"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty folder, in memory or on a disk without rename."""
    fsspec = pytest.importorskip("fsspec")
    if request.param == "norename":
        yield f"norename://{tmp_path}/place"
        return
    system = fsspec.filesystem("memory")
    yield "memory://bucket/runs"
    system.rm("/bucket", recursive=True) if system.exists("/bucket") else None


def folder(path: Path, text: str) -> Path:
    """Create a folder with a file, an empty file and a nested file, with contents derived from ``text``."""
    (path / "inner").mkdir(parents=True)
    (path / "a.txt").write_text(text)
    (path / "empty").write_text("")
    (path / "inner" / "b.txt").write_text(text * 1000)
    return path


def content(path: Path) -> dict[str, str]:
    """Return the contents of all files below a folder."""
    return {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*") if file.is_file()}


def stored(place: str) -> list[str]:
    """Return the paths of all files in remote storage."""
    import fsspec

    system, path = fsspec.core.url_to_fs(place)
    return sorted(name.split(path.strip("/") + "/", 1)[1] for name in system.find(path))


def test_a_published_folder_can_be_fetched(place: str, tmp_path: Path) -> None:
    """A fetched folder has the published contents and name."""
    local = folder(tmp_path / "local", "one")
    publish(local, f"{place}/epoch_1")
    fetched = fetch_published(f"{place}/epoch_1", tmp_path / "cache")
    assert fetched.name == "epoch_1"
    assert content(fetched) == content(local)


def test_a_published_file_can_be_fetched(place: str, tmp_path: Path) -> None:
    """A fetched file has the published contents and the name in its URL."""
    (tmp_path / "x.pth").write_text("weights")
    publish(tmp_path / "x.pth", f"{place}/epoch_1.pth")
    fetched = fetch_published(f"{place}/epoch_1.pth", tmp_path / "cache")
    assert fetched.name == "epoch_1.pth"
    assert fetched.read_text() == "weights"


def test_publications_are_listed_latest_last(place: str, tmp_path: Path) -> None:
    """The list contains names, sizes and times, latest last, and a replaced publication only once."""
    assert list_published(place) == []
    for name in ("epoch_1", "epoch_2", "epoch_1"):
        publish(folder(tmp_path / name / str(len(list(tmp_path.rglob("a.txt")))), "xy"), f"{place}/{name}")
    found = list_published(f"{place}/")
    assert [each.name for each in found] == ["epoch_2", "epoch_1"]
    assert [each.size for each in found] == [2002, 2002]
    assert found[0].published_at <= found[1].published_at
    assert found[0].url == f"{place}/epoch_2"


def test_publishing_replaces_only_the_same_name(place: str, tmp_path: Path) -> None:
    """Publishing under an existing name removes the old publication and no other."""
    publish(folder(tmp_path / "one", "1"), f"{place}/a")
    publish(folder(tmp_path / "two", "2"), f"{place}/a.b")
    before = stored(place)
    publish(folder(tmp_path / "three", "3"), f"{place}/a")
    after = stored(place)
    assert len(after) == len(before) == 8
    assert {name for name in after if name.startswith("a.b.g-")} < set(before)
    assert fetch_published(f"{place}/a", tmp_path / "cache").joinpath("a.txt").read_text() == "3"


def test_a_removed_publication_is_gone(place: str, tmp_path: Path) -> None:
    """Removal deletes all files, and removing a missing publication is not an error."""
    publish(folder(tmp_path / "one", "1"), f"{place}/a")
    remove_published(f"{place}/a")
    remove_published(f"{place}/a")
    assert list_published(place) == []
    assert stored(place) == []
    with pytest.raises(CheckpointNotFoundError, match="/a: nothing is published under this name"):
        fetch_published(f"{place}/a", tmp_path / "cache")


def test_a_local_copy_is_reused_unless_it_was_modified(place: str, tmp_path: Path) -> None:
    """A second fetch uses the local copy if its digests match, and downloads a modified one again."""
    publish(folder(tmp_path / "one", "1"), f"{place}/a")
    copy = fetch_published(f"{place}/a", tmp_path / "cache")
    inode = (copy / "a.txt").stat().st_ino
    assert (fetch_published(f"{place}/a", tmp_path / "cache") / "a.txt").stat().st_ino == inode
    (copy / "a.txt").write_text("2")
    assert (fetch_published(f"{place}/a", tmp_path / "cache") / "a.txt").read_text() == "1"


def test_a_modified_remote_file_is_reported_as_damaged(place: str, tmp_path: Path) -> None:
    """A remote file that differs from the publication is reported, and nothing remains in the cache."""
    import fsspec

    publish(folder(tmp_path / "one", "1"), f"{place}/a")
    system, path = fsspec.core.url_to_fs(place)
    [victim] = [name for name in system.find(path) if name.endswith("a.txt")]
    for change in (b"2", b"11", b""):
        system.pipe_file(victim, change)
        with pytest.raises(CheckpointDamagedError, match=r"a\.txt is corrupted"):
            fetch_published(f"{place}/a", tmp_path / "cache")
    system.rm_file(victim)
    with pytest.raises(CheckpointDamagedError, match="a file is missing"):
        fetch_published(f"{place}/a", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Create three folders to publish."""
    Faulty.clear()
    return {text: folder(tmp_path / text, text) for text in ("old", "new", "next")}


def faults() -> Iterator[tuple[int, bool]]:
    """Yield the number of an operation and whether the process is killed there, until a number is not reached."""
    for kills in (False, True):
        for number in itertools.count(1):
            yield number, kills
            if Faulty.operations < number:
                break


def survives(action: Callable[[], object]) -> bool:
    """Run an action that may fail or be killed; return whether it completed."""
    try:
        action()
    except (OSError, Dead):
        return False
    return True


def seen(cache: Path) -> str | None:
    """Return the contents that are published under the name, after checking that they are complete."""
    Faulty.reset()
    found = list_published("faulty://place")
    if not found:
        return None
    assert [each.name for each in found] == ["a"]
    files = content(fetch_published("faulty://place/a", cache))
    assert files == {"a.txt": files["a.txt"], "empty": "", "inner/b.txt": files["a.txt"] * 1000}
    return files["a.txt"]


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.slow
def test_a_failed_publication_leaves_the_old_or_the_new_contents(
    sources: dict[str, Path], tmp_path: Path, replaces: bool
) -> None:
    """Wherever a publication fails or is killed, complete contents remain: the new ones if the call returned."""
    count = 0
    for number, kills in faults():
        Faulty.clear()
        if replaces:
            publish(sources["old"], "faulty://place/a")
        Faulty.reset(fail_at=number, kills=kills)
        done = survives(lambda: publish(sources["new"], "faulty://place/a"))
        reached = Faulty.operations
        found = seen(tmp_path / "cache")
        assert found in ({"new"} if done else {"old" if replaces else None, "new"})
        publish(sources["next"], "faulty://place/a")
        assert seen(tmp_path / "cache") == "next"
        # The next publication removes everything that the failed one left.
        assert len(Faulty.store) == 4
        Faulty.operations = reached
        count += 1
    # A publication consists of 17 operations; each of them fails once and is killed once.
    assert count > 2 * 17


@pytest.mark.slow
def test_a_failed_removal_never_restores_old_contents(sources: dict[str, Path], tmp_path: Path) -> None:
    """A failed or killed removal leaves the newest publication or nothing, but never an older one."""
    for number, kills in faults():
        Faulty.clear()
        publish(sources["old"], "faulty://place/a")
        # Keep the old publication next to the new one, as after a kill.
        kept = dict(Faulty.store)
        publish(sources["new"], "faulty://place/a")
        Faulty.store.update(kept)
        Faulty.reset(fail_at=number, kills=kills)
        done = survives(lambda: remove_published("faulty://place/a"))
        reached = Faulty.operations
        assert seen(tmp_path / "cache") in ({None} if done else {None, "new"})
        clean_unpublished("faulty://place")
        Faulty.operations = reached


@pytest.mark.slow
def test_a_failed_fetch_leaves_the_cache_intact(sources: dict[str, Path], tmp_path: Path) -> None:
    """A failed fetch raises an error, and the next fetch succeeds."""
    publish(sources["old"], "faulty://place/a")
    for number, kills in faults():
        cache = tmp_path / "cache" / f"{number}{kills}"
        Faulty.reset(fail_at=number, kills=kills)
        survives(lambda cache=cache: fetch_published("faulty://place/a", cache))  # type: ignore[misc]
        reached = Faulty.operations
        assert seen(cache) == "old"
        Faulty.operations = reached


def test_leftovers_of_a_killed_process_are_cleaned_up(sources: dict[str, Path]) -> None:
    """Cleanup removes files without a record, and only from folders with the name of a publication."""
    Faulty("x").pipe_file("/place/notes.txt", b"mine")
    publish(sources["old"], "faulty://place/a")
    Faulty.reset(fail_at=12, kills=True)
    assert not survives(lambda: publish(sources["new"], "faulty://place/b"))
    Faulty.reset()
    before = len(Faulty.store)
    [left] = clean_unpublished("faulty://place")
    assert left.startswith("b.g-")
    assert before > len(Faulty.store) == 5
    assert clean_unpublished("faulty://place") == []


# ---- records -------------------------------------------------------------------------------------------------------

OUTSIDE = ("../a", "/a", "a//b", ".a", "a/..", "a\\b", "c:a", "published.json", "")
SAMPLE = PublicationRecord(files={"a/b.txt": StoredFile(3, "00" * 32)}, is_folder=True, published_at=1.5)


def test_an_incomplete_record_is_ignored() -> None:
    """A record that is truncated at any byte or has any changed bit is ignored."""
    data = SAMPLE.encode()
    assert PublicationRecord.parse(data) == SAMPLE
    assert not any(PublicationRecord.parse(data[:length]) for length in range(len(data)))
    assert not any(PublicationRecord.parse(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]) for i in range(len(data)))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"format": "x"},
        {"kind": "link"},
        {"kind": "file", "files": {}},
        {"published_at": "now"},
        {"files": []},
        {"files": {"a": {"bytes": -1, "sha256": ""}}},
        {"files": {"a": {"bytes": 1}}},
        {"files": {"a": 1}},
        *({"files": {path: {"bytes": 0, "sha256": ""}}} for path in OUTSIDE),
    ],
)
def test_an_invalid_record_is_ignored(changes: dict[str, object]) -> None:
    """A record with paths outside the folder, or with unknown contents, is ignored."""
    line = json.dumps({**json.loads(SAMPLE.encode().partition(b"\n")[0]), **changes}).encode()
    assert PublicationRecord.parse(line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n") is None


def test_a_later_generation_is_greater_regardless_of_the_clock() -> None:
    """A publication after one from a machine whose clock is ahead is still the later one."""
    ahead = Generation("a", 1 << 62, "ffffffff")
    later = Generation.after("a", [ahead])
    assert later > ahead
    assert Generation.parse(later.folder_name) == later
    assert later.folder_name > ahead.folder_name
    assert Generation.parse("a.g-12-34") is None


# ---- errors --------------------------------------------------------------------------------------------------------


def test_unsupported_urls_are_rejected(tmp_path: Path) -> None:
    """A URL without a folder or with chained file systems is rejected; unknown schemes are not remote."""
    for url in ("memory://a", "simplecache::memory://a/b", "memory://"):
        with pytest.raises(CheckpointError, match="is not a valid location"):
            publish(tmp_path, url)
    with pytest.raises(CheckpointError, match="fsspec cannot open"):
        list_published("unheard://x")
    assert is_remote_scheme("memory")
    assert is_remote_scheme("norename")  # registered by a program
    assert is_remote_scheme("s3")  # even if its package is not installed
    assert not is_remote_scheme("unheard")


def test_a_missing_fsspec_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without fsspec, the error contains the install command, and no scheme is remote."""
    for name in ("fsspec", "fsspec.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install stratagem\[remote\]"):
        publish(tmp_path, "memory://a/b")
    assert not is_remote_scheme("memory")


def test_invalid_names_are_rejected_before_publishing(tmp_path: Path) -> None:
    """A hidden file is not published, because fetching it would be rejected."""
    Faulty.clear()
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(ValueError, match="cannot be published"):
        publish(tmp_path, "faulty://place/a")
    assert Faulty.store == {}
