"""Directories of torch.distributed.checkpoint are read without executing code from them, and written for torch."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from stratagem.checkpoint import load_checkpoint
from stratagem.checkpoint.formats.dcp import DcpDirectory, is_dcp_directory, save_dcp
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from tests.support.ranks import Ranks

TREE = {
    "model": {"w": torch.arange(6.0).reshape(2, 3), "half": torch.tensor([1.5], dtype=torch.bfloat16)},
    "optim": {"state": {"w": {"step": torch.tensor(4.0)}}, "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99)}]},
    "epoch": 3,
}


def saved_by_torch(path: Path, tree: dict[str, Any]) -> Path:
    """Write a directory with torch alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, checkpoint_id=path, no_dist=True)
    return path


def test_a_directory_written_by_torch_is_read(tmp_path: Path) -> None:
    """Tensors, nested mappings, lists and plain values are restored at their paths."""
    tree = DcpDirectory(saved_by_torch(tmp_path / "d", TREE)).load()
    assert tree["model"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (tree["model"]["half"].dtype, tree["model"]["half"].item()) == (torch.bfloat16, 1.5)
    assert tree["optim"]["state"]["w"]["step"].item() == 4.0
    assert tree["optim"]["param_groups"] == [{"lr": 0.5, "betas": (0.9, 0.99)}]
    assert tree["epoch"] == 3


def test_only_requested_parts_are_read(tmp_path: Path) -> None:
    """Only the requested parts are loaded."""
    assert set(DcpDirectory(saved_by_torch(tmp_path / "d", TREE)).load(parts={"model"})) == {"model"}


def test_torch_reads_a_directory_written_by_stratagem(tmp_path: Path) -> None:
    """torch.distributed.checkpoint loads the same values from a directory written by Stratagem."""
    save_dcp(TREE, tmp_path / "d")
    back = {"model": {"w": torch.zeros(2, 3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(back, checkpoint_id=tmp_path / "d", no_dist=True)
    assert torch.equal(back["model"]["w"], TREE["model"]["w"])  # type: ignore[index]


def save_sharded(path: str) -> None:
    """Write this rank's rows of a matrix with 5 rows."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    matrix = distribute_tensor(torch.arange(15.0).reshape(5, 3), mesh, [Shard(0)])
    dcp.save({"w": matrix}, checkpoint_id=path)


def test_chunks_of_several_ranks_are_assembled(ranks: Ranks, tmp_path: Path) -> None:
    """Chunks of three and two rows from two ranks are assembled to one tensor."""
    ranks.run(save_sharded, str(tmp_path / "d"))
    assert DcpDirectory(tmp_path / "d").load()["w"].tolist() == torch.arange(15.0).reshape(5, 3).tolist()


class Evil:
    """Runs a command when it is unpickled by Python."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def test_metadata_that_would_run_code_is_rejected(tmp_path: Path) -> None:
    """Metadata that refers to anything but torch's classes raises an error, and no code is executed."""
    path = saved_by_torch(tmp_path / "d", TREE)
    (path / ".metadata").write_bytes(pickle.dumps(Metadata({}, Evil(tmp_path / "ran"), {})))
    with pytest.raises(CheckpointError, match=r"\.metadata: it refers to posix\.mkdir"):
        DcpDirectory(path).load()
    assert not (tmp_path / "ran").exists()


def test_a_value_that_would_run_code_is_rejected(tmp_path: Path) -> None:
    """A pickled object among the values raises an error, and no code is executed, because values use weights_only."""
    path = saved_by_torch(tmp_path / "d", {"evil": Evil(tmp_path / "ran"), "w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="evil contains objects that can only be created by executing code"):
        DcpDirectory(path).load()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 40, 700])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    """A truncated data file is reported as damage, with its name and the value that was read."""
    path = saved_by_torch(tmp_path / "d", {"w": torch.ones(3)})
    (file,) = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointDamagedError, match=rf"{file.name} cannot be read at w"):
        DcpDirectory(path).load()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A missing data file is reported as damage."""
    path = saved_by_torch(tmp_path / "d", {"w": torch.ones(3)})
    (file,) = path.glob("*.distcp")
    file.unlink()
    with pytest.raises(CheckpointDamagedError, match=rf"{file.name} is missing"):
        DcpDirectory(path).load()


def test_truncated_metadata_is_damage(tmp_path: Path) -> None:
    """Truncated metadata is reported as unreadable."""
    path = saved_by_torch(tmp_path / "d", {"w": torch.ones(3)})
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:100])
    with pytest.raises(CheckpointDamagedError, match=r"\.metadata cannot be read"):
        DcpDirectory(path)


def test_a_folder_without_metadata_is_rejected(tmp_path: Path) -> None:
    """A folder without metadata is rejected."""
    assert not is_dcp_directory(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"it does not contain \.metadata"):
        DcpDirectory(tmp_path)


def test_weights_are_loaded_from_a_dcp_directory(tmp_path: Path) -> None:
    """``load_from`` accepts a DCP directory; its part ``model`` is the model state."""
    model = nn.Linear(3, 2)
    saved_by_torch(tmp_path / "d", {"model": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}})
    _, report = load_checkpoint(model, tmp_path / "d", strict=True)
    assert report.exact
    assert model.weight.tolist() == [[1, 1, 1], [1, 1, 1]]
