"""Checkpoints at places that fsspec opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.checkpoint import CheckpointLoader, save_checkpoint
from stratagem.checkpoint.remote import latest_remote, save_remote
from stratagem.errors import CheckpointError, CheckpointNotFoundError

fsspec = pytest.importorskip("fsspec")
RUN = "memory://runs/one"


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty place in memory, and an empty cache."""
    monkeypatch.setenv("STRATAGEM_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    for path in system.find("/runs"):
        system.rm_file(path)


def save(name: str, value: float) -> None:
    """Save a checkpoint of one weight."""
    tree = {"meta": {"iter": 3}, "state_dict": {"w": torch.full((2,), value)}}
    save_remote(f"{RUN}/{name}", lambda path: save_checkpoint(tree, path))


@pytest.mark.parametrize("name", ["iter_3", "iter_3.pth"])
def test_a_checkpoint_is_saved_and_loaded(name: str) -> None:
    """Either form is published whole, and loaded by the URL."""
    save(name, 1.0)
    tree = CheckpointLoader.load_checkpoint(f"{RUN}/{name}")
    assert tree["state_dict"]["w"].tolist() == [1, 1]
    assert tree["meta"]["iter"] == 3
    save(name, 2.0)
    assert CheckpointLoader.load_checkpoint(f"{RUN}/{name}")["state_dict"]["w"].tolist() == [2, 2]


def test_the_latest_is_found() -> None:
    """The URL of what was published last is given, or None."""
    assert latest_remote(RUN) is None
    for name in ("iter_9", "iter_3"):
        save(name, 1.0)
    assert latest_remote(RUN) == f"{RUN}/iter_3"


def test_a_file_of_somebody_else_is_read(memory: Any, tmp_path: Path) -> None:
    """A single file that lies at the place is read as well, and anew when it was changed."""
    for value in (1.0, 2.0):
        torch.save({"w": torch.full((2,), value)}, tmp_path / "w.pth")
        memory.pipe_file("/runs/one/w.pth", (tmp_path / "w.pth").read_bytes())
        for _ in range(2):
            assert CheckpointLoader.load_checkpoint(f"{RUN}/w.pth")["state_dict"]["w"].tolist() == [value, value]
    assert len(list((tmp_path / "cache" / "checkpoints").iterdir())) == 2


def test_nothing_there_is_not_found() -> None:
    """A name under which nothing lies is not found."""
    with pytest.raises(CheckpointNotFoundError, match="memory://runs/one/iter_1: there is no such checkpoint"):
        CheckpointLoader.fetch(f"{RUN}/iter_1")


def test_a_file_that_is_too_large_is_refused(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of downloads holds here too."""
    memory.pipe_file("/runs/one/w.pth", bytes(101))
    monkeypatch.setenv("STRATAGEM_DOWNLOAD_LIMIT_GB", "1e-7")
    with pytest.raises(CheckpointError, match="has 101 bytes; at most 100 are downloaded"):
        CheckpointLoader.fetch(f"{RUN}/w.pth")


def test_a_failing_place_is_told(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the place refuses is an error with the URL, and the older checkpoint stays."""
    save("iter_3", 1.0)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "pipe_file", fail)
        with pytest.raises(
            CheckpointError, match=r"one/iter_3: the checkpoint could not be published: .*No space.*untouched"
        ):
            save("iter_3", 2.0)
    assert CheckpointLoader.load_checkpoint(f"{RUN}/iter_3")["state_dict"]["w"].tolist() == [1, 1]
