"""Checkpoints at URLs that fsspec can open."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.checkpoint import CheckpointLoader, find_latest_remote, save_checkpoint, save_remote
from stratagem.checkpoint.remote.checkpoint_urls import _check_shared
from stratagem.dist import RankGroup
from stratagem.errors import CheckpointError, CheckpointNotFoundError
from tests.support.faulty_places import register
from tests.support.ranks import Ranks

fsspec = pytest.importorskip("fsspec")
RUN = "memory://runs/one"


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty in-memory file system and an empty cache."""
    monkeypatch.setenv("STRATAGEM_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    yield system
    for path in system.find("/runs"):
        system.rm_file(path)


def save(name: str, value: float) -> None:
    """Save a checkpoint with one weight."""
    tree = {"meta": {"iter": 3}, "state_dict": {"w": torch.full((2,), value)}}
    save_checkpoint(tree, f"{RUN}/{name}")


@pytest.mark.parametrize("name", ["iter_3", "iter_3.pth"])
def test_a_checkpoint_is_saved_and_loaded(name: str) -> None:
    """Both formats are published as a whole and can be loaded by URL."""
    save(name, 1.0)
    tree = CheckpointLoader.load_checkpoint(f"{RUN}/{name}")
    assert tree["state_dict"]["w"].tolist() == [1, 1]
    assert tree["meta"]["iter"] == 3
    save(name, 2.0)
    assert CheckpointLoader.load_checkpoint(f"{RUN}/{name}")["state_dict"]["w"].tolist() == [2, 2]


def save_together(folder: str) -> bool:
    """Save on all ranks to a file system without rename, load it, and return whether the state is the same."""
    register()
    rank_group = RankGroup.of()
    tree = {"meta": {"iter": 3}, "state_dict": {"w": torch.arange(1000.0)}}
    url = f"norename://{folder}/place/iter_3"
    save_remote(url, lambda path: save_checkpoint(tree, path, rank_group), rank_group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRATAGEM_CACHE", f"{folder}/cache")
        read = CheckpointLoader.load_checkpoint(url, rank_group=rank_group)
    return bool(torch.equal(read["state_dict"]["w"], tree["state_dict"]["w"]))


def test_ranks_save_together(ranks: Ranks, tmp_path: Path) -> None:
    """All ranks write to one local folder, the first uploads it, and all load it."""
    assert ranks.run(save_together, str(tmp_path)) == [True, True]


def test_a_staging_folder_that_is_not_shared_is_reported() -> None:
    """A rank that cannot access the staging folder raises an error that names the variable to set."""
    with pytest.raises(
        CheckpointError,
        match="With ranks on several machines, set STRATAGEM_STAGING to a folder that all machines share",
    ):
        _check_shared(Path("/not/here"))


def test_the_staging_folder_can_be_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """STRATAGEM_STAGING selects the staging folder, which is empty again afterwards, even after a failure."""
    monkeypatch.setenv("STRATAGEM_STAGING", str(tmp_path / "staging"))
    with pytest.raises(CheckpointError, match="Set STRATAGEM_STAGING to a different folder"):
        save("iter_3", 1.0)
    (tmp_path / "staging").mkdir()
    seen: list[Path] = []
    with pytest.raises(ZeroDivisionError):
        save_remote(f"{RUN}/iter_3", lambda path: seen.append(path) or 1 / 0)  # type: ignore[arg-type,return-value]
    assert seen[0].parent.parent == tmp_path / "staging"
    assert list((tmp_path / "staging").iterdir()) == []


def test_the_latest_is_found() -> None:
    """The URL of the latest publication is returned, or None."""
    assert find_latest_remote(RUN) is None
    for name in ("iter_9", "iter_3"):
        save(name, 1.0)
    assert find_latest_remote(RUN) == f"{RUN}/iter_3"


def test_the_latest_is_found_after_the_clock_was_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest publication is found even if the clock was set back, under the same or another name."""
    save("iter_9", 1.0)
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000)
    save("iter_12", 1.0)
    assert find_latest_remote(RUN) == f"{RUN}/iter_12"
    save("iter_9", 2.0)
    assert find_latest_remote(RUN) == f"{RUN}/iter_9"


@pytest.mark.parametrize("suffix", ["", ".pth"])
def test_the_latest_of_a_run_is_what_it_saved_last(tmp_path: Path, suffix: str) -> None:
    """The latest checkpoint of a run is the one saved last, even if others were uploaded later."""
    orders = {"iter_12": (1, 2), "iter_4": (2, 3), "iter_6": (2, 4), "iter_9": (1, 1)}
    for name, (session, number) in orders.items():
        meta = {"run_id": "a", "save_order": {"session": session, "save": number}}
        save_checkpoint({"meta": meta, "state_dict": {}}, tmp_path / f"{name}{suffix}")
    for path in sorted(tmp_path.glob(f"iter_*{suffix}")):
        copy = shutil.copyfile if path.is_file() else shutil.copytree
        save_remote(f"{RUN}/{path.name}", lambda target, path=path, copy=copy: copy(path, target))
    assert find_latest_remote(RUN) == f"{RUN}/iter_6{suffix}"
    # Checkpoints of different runs are ordered by publication.
    save("iter_1", 1.0)
    assert find_latest_remote(RUN) == f"{RUN}/iter_1"


def test_checkpoints_with_nan_or_inf_are_not_the_latest() -> None:
    """Checkpoints with NaN or Inf are skipped, as on a local disk."""
    save("iter_1", 1.0)
    tree = {"meta": {"iter": 2, "finite": False}, "state_dict": {"w": torch.tensor([float("nan")])}}
    save_checkpoint(tree, f"{RUN}/iter_2")
    assert find_latest_remote(RUN) == f"{RUN}/iter_1"


def test_a_plain_file_is_read(memory: Any, tmp_path: Path) -> None:
    """A plain file at the URL can be loaded, and is downloaded again after a change."""
    for value in (1.0, 2.0):
        torch.save({"w": torch.full((2,), value)}, tmp_path / "w.pth")
        memory.pipe_file("/runs/one/w.pth", (tmp_path / "w.pth").read_bytes())
        for _ in range(2):
            assert CheckpointLoader.load_checkpoint(f"{RUN}/w.pth")["state_dict"]["w"].tolist() == [value, value]
    assert len(list((tmp_path / "cache" / "checkpoints").iterdir())) == 2


def test_a_missing_remote_checkpoint_is_not_found() -> None:
    """Loading a URL without a publication raises a not-found error."""
    with pytest.raises(CheckpointNotFoundError, match="memory://runs/one/iter_1: there is no such checkpoint"):
        CheckpointLoader.fetch(f"{RUN}/iter_1")


def test_a_too_large_file_is_rejected(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download limit applies to plain files as well."""
    memory.pipe_file("/runs/one/w.pth", bytes(101))
    monkeypatch.setenv("STRATAGEM_DOWNLOAD_LIMIT_GB", "1e-7")
    with pytest.raises(CheckpointError, match="has 101 bytes; at most 100 bytes are downloaded"):
        CheckpointLoader.fetch(f"{RUN}/w.pth")


def test_a_failed_upload_is_reported(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed upload raises an error with the URL, and the older checkpoint stays available."""
    save("iter_3", 1.0)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "pipe_file", fail)
        with pytest.raises(
            CheckpointError, match=r"one/iter_3: the checkpoint could not be uploaded: .*No space.*unchanged"
        ):
            save("iter_3", 2.0)
    assert CheckpointLoader.load_checkpoint(f"{RUN}/iter_3")["state_dict"]["w"].tolist() == [1, 1]
