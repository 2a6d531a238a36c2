"""Files of the layer: atomic writes, safe YAML, and object stores through fsspec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import stratagem.compat.mmengine  # noqa: F401
from stratagem.compat.mmengine import fileio
from stratagem.compat.mmengine.fileio.backends import PetrelBackend, prefix_to_backends
from stratagem.storage import operations


def test_an_interrupted_write_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MMEngine truncates the file first, so that nothing is left."""
    file = tmp_path / "folder" / "last_checkpoint"
    fileio.put_text("epoch_1", file)

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(operations, "write", fail)
    with pytest.raises(OSError, match="the disk is full"):
        fileio.put_text("epoch_2", file)
    monkeypatch.undo()
    assert fileio.get_text(file) == "epoch_1"
    assert [path.name for path in file.parent.iterdir()] == ["last_checkpoint"]


def test_yaml_does_not_call_what_the_file_names(tmp_path: Path) -> None:
    """MMEngine's loader executes such a file."""
    file = tmp_path / "data.yaml"
    file.write_text(f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{tmp_path}/x]]")
    with pytest.raises(yaml.YAMLError):
        fileio.load(file)
    fileio.dump({"a": (1, 2)}, file)
    assert fileio.load(file) == {"a": (1, 2)}
    assert not (tmp_path / "x").exists()


@pytest.fixture
def memory_store() -> Iterator[PetrelBackend]:
    """Return a back end for object stores that uses fsspec's store in memory, with files in a folder."""
    store = PetrelBackend(path_mapping={"data/": "memory://bucket/data/"})
    for name in ("a.txt", "b.jpg", "sub/c.txt"):
        store.put(name.encode(), f"data/{name}")
    yield store
    store.rmtree("memory://bucket")


def test_object_stores_have_the_operations_of_local_files(memory_store: PetrelBackend, tmp_path: Path) -> None:
    """Paths are mapped to addresses, and listed relative to the folder."""
    assert memory_store.get_text("data/sub/c.txt") == "sub/c.txt"
    assert sorted(memory_store.list_dir_or_file("data/", recursive=True)) == ["a.txt", "b.jpg", "sub", "sub/c.txt"]
    assert sorted(memory_store.list_dir_or_file("data/", list_dir=False, suffix=".txt")) == ["a.txt"]
    assert (memory_store.isdir("data/sub"), memory_store.isfile("data/sub")) == (True, False)
    with memory_store.get_local_path("data/a.txt") as path:
        assert Path(path).read_text() == "a.txt"
    assert not Path(path).exists()
    memory_store.copytree_to_local("data/", tmp_path / "copy")
    assert (tmp_path / "copy" / "sub" / "c.txt").read_text() == "sub/c.txt"
    memory_store.copytree_from_local(tmp_path / "copy", "memory://bucket/back")
    assert memory_store.exists("memory://bucket/back/b.jpg")
    memory_store.remove("data/a.txt")
    with pytest.raises(FileNotFoundError):
        memory_store.remove("data/a.txt")


def test_addresses_of_petrel_are_those_of_s3() -> None:
    """Configurations written for MMEngine's client have a prefix for the cluster, or the scheme ``petrel``."""
    store = PetrelBackend(path_mapping={"./data/": "openmmlab:s3://bucket/data/"})
    assert store._address("./data/x.jpg") == "s3://bucket/data/x.jpg"
    assert store._address("petrel://bucket/x.jpg") == "s3://bucket/x.jpg"
    assert prefix_to_backends["s3"] is PetrelBackend


def test_a_back_end_that_is_unknown_is_refused_with_the_closest_name() -> None:
    """MMEngine raises a bare KeyError."""
    with pytest.raises(ValueError, match=r"Unknown back end 'locl'. Did you mean 'local'\?"):
        fileio.get("x", backend_args={"backend": "locl"})


def test_lines_of_a_mapping_without_a_value_are_errors_with_their_number(tmp_path: Path) -> None:
    """The file and the line are in the message."""
    file = tmp_path / "classes.txt"
    file.write_text("1 cat\n2\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"classes.txt:2: expected a key and a value, got '2'"):
        fileio.dict_from_file(file)
