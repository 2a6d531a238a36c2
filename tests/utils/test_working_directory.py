"""What is searched for modules while a library is imported for a data file."""

import sys
from pathlib import Path

import pytest

from stratagem.utils.imports import drop_working_directory, without_working_directory


@pytest.mark.parametrize("entry", ["", ".", "here", "link"])
def test_the_working_directory_is_left_out_however_it_is_written(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty, relative, absolute or through a link: it is the same folder. Afterwards the search path is as before."""
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


def test_folders_of_libraries_are_searched_even_from_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is started in the folder of installed packages finds them."""
    folder = Path(pytest.__file__).parents[1]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    before = list(sys.path)
    drop_working_directory()
    assert sys.path == before


def test_a_removed_working_directory_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to import from it."""
    folder = tmp_path / "removed"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    before = list(sys.path)
    drop_working_directory()
    assert sys.path == before
