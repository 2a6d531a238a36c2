"""The module search path while a library is imported for a data file."""

import sys
from pathlib import Path

import pytest

from stratagem.utils.imports import drop_working_directory, without_working_directory


@pytest.mark.parametrize("entry", ["", ".", "here", "link"])
def test_the_working_directory_is_removed_in_any_notation(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory is removed from sys.path in any notation and restored afterwards."""
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    monkeypatch.chdir(folder)
    entry = {"here": str(folder), "link": str(link)}.get(entry, entry)
    others = list(sys.path)
    monkeypatch.setattr(sys, "path", [entry, *others])
    with without_working_directory():
        assert sys.path == others
        sys.path.append("added by an import")
    assert sys.path == [entry, *others, "added by an import"]


def test_a_library_folder_is_searched_even_as_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is started in site-packages can still import the packages there."""
    folder = Path(pytest.__file__).parents[1]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    before = list(sys.path)
    drop_working_directory()
    assert sys.path == before


def test_a_deleted_working_directory_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the working directory no longer exists, the search path is unchanged."""
    folder = tmp_path / "removed"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    before = list(sys.path)
    drop_working_directory()
    assert sys.path == before
