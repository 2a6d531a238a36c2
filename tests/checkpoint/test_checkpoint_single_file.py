"""Single files in torch's format."""

from __future__ import annotations

import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stratagem.checkpoint import SingleFileFormat, format_for
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError
from stratagem.storage import files

FORMAT = SingleFileFormat()


def sample() -> dict[str, Any]:
    """Return a small checkpoint with the usual parts."""
    return {
        "meta": {"epoch": 3, "cfg": "lr = 1", "best": math.inf, "none": None, "pair": (1, [True, 2.5])},
        "state_dict": {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(4)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}},
    }


def test_a_single_file_is_restored(tmp_path: Path) -> None:
    """A .pth file is restored with its types and values."""
    FORMAT.save(sample(), tmp_path / "a.pth")
    tree = FORMAT.load(tmp_path / "a.pth")
    assert tree["meta"] == sample()["meta"]
    assert tree["state_dict"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tree["state_dict"]["n"].dtype == torch.int64
    assert tree["optimizer"] == sample()["optimizer"]


def test_torch_reads_the_file_with_weights_only(tmp_path: Path) -> None:
    """torch.load with weights_only=True reads every file, even if the state contained instances of subclasses."""
    tree = {
        "meta": OrderedDict(loss=np.float64(0.5)),
        "state_dict": nn.Sequential(nn.BatchNorm1d(2)).state_dict(),
        "w": nn.Parameter(torch.ones(1)),
    }
    FORMAT.save(tree, tmp_path / "a.pth")
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert loaded["meta"] == {"loss": 0.5}
    assert type(loaded["meta"]["loss"]) is float
    assert loaded["state_dict"]._metadata["0"] == {"version": 2}
    assert type(loaded["w"]) is torch.Tensor


def test_parts_can_be_selected(tmp_path: Path) -> None:
    """``parts`` selects the parts to load."""
    FORMAT.save(sample(), tmp_path / "a.pth")
    assert list(FORMAT.load(tmp_path / "a.pth", parts={"meta"})) == ["meta"]


def test_map_location_selects_the_device_of_a_single_file(tmp_path: Path) -> None:
    """``map_location`` selects the device of the tensors."""
    FORMAT.save(sample(), tmp_path / "a.pth")
    assert FORMAT.load(tmp_path / "a.pth", map_location="meta")["state_dict"]["w"].is_meta


def test_a_plain_state_dict_is_the_model(tmp_path: Path) -> None:
    """A file that contains a plain state dict is loaded as the model state."""
    state = nn.Linear(2, 1).state_dict()
    torch.save(state, tmp_path / "a.pth")
    assert list(FORMAT.load(tmp_path / "a.pth")) == ["state_dict"]
    assert list(FORMAT.load(tmp_path / "a.pth")["state_dict"]) == ["weight", "bias"]


def test_the_legacy_format_is_read(tmp_path: Path) -> None:
    """Files in torch's legacy format, older than the zip format, can be read."""
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert FORMAT.load(tmp_path / "a.pth")["state_dict"]["w"].tolist() == [1, 1]


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("form", ["zip", "old", "bare pickle"])
def test_a_file_that_would_run_code_is_rejected(tmp_path: Path, form: str) -> None:
    """A pickle that calls a function is not executed, and the error suggests what to do."""
    file, proof = tmp_path / "evil.pth", tmp_path / "proof"
    if form == "bare pickle":
        file.write_bytes(pickle.dumps({"state_dict": Evil(proof)}))
    else:
        torch.save({"state_dict": Evil(proof)}, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        FORMAT.load(file)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists()  # the attack works with Python's unpickler


def test_a_file_with_objects_is_rejected_with_advice(tmp_path: Path) -> None:
    """An intact file that contains objects is rejected as such, and not reported as damaged."""
    torch.save({"meta": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"a\.pth: meta is an object of type pathlib\.PosixPath, .* If you trust"
    ) as caught:
        FORMAT.load(tmp_path / "a.pth")
    assert type(caught.value) is CheckpointError


@pytest.mark.parametrize("length", [0, 4, 30, 300, 0.5, 0.9, -1])
def test_a_truncated_file_is_damaged(tmp_path: Path, length: float) -> None:
    """A truncated file is reported as damaged."""
    file = tmp_path / "a.pth"
    FORMAT.save(sample(), file)
    data = file.read_bytes()
    file.write_bytes(data[: int(length * len(data))] if 0 < length < 1 else data[:length])
    with pytest.raises(CheckpointDamagedError, match=r"a\.pth cannot be read"):
        FORMAT.load(file)


@pytest.mark.slow
def test_a_changed_byte_is_never_another_exception(tmp_path: Path) -> None:
    """A changed byte raises a CheckpointError or has no effect, although torch raises many other exceptions."""
    file = tmp_path / "a.pth"
    FORMAT.save({"meta": {"iter": 7}, "state_dict": {"w": torch.arange(3.0)}}, file)
    data = file.read_bytes()
    errors = 0
    for offset in range(len(data)):
        changed = bytearray(data)
        changed[offset] ^= 1 << offset % 8
        file.write_bytes(changed)
        try:
            FORMAT.load(file)
        except CheckpointError as error:
            assert "a.pth" in str(error)
            errors += 1
    assert errors > 100


@pytest.mark.parametrize("content", [b"hello, world", b"\x80\x02garbage", b"<html>Not found</html>"])
def test_a_file_with_other_content_is_reported(tmp_path: Path, content: bytes) -> None:
    """A file with unrelated content raises an error."""
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        FORMAT.load(tmp_path / "a.pth")


def test_a_file_without_a_dict_is_reported(tmp_path: Path) -> None:
    """A file that contains only a tensor raises an error that says so."""
    torch.save(torch.ones(1), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="contains a Tensor; expected a dict"):
        FORMAT.load(tmp_path / "a.pth")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """A missing file raises a not-found error, and a folder of that name is reported as a folder."""
    with pytest.raises(CheckpointNotFoundError, match="no such checkpoint"):
        FORMAT.load(tmp_path / "a.pth")
    (tmp_path / "a.pth").mkdir()
    with pytest.raises(CheckpointError, match=r"a\.pth is a folder") as caught:
        FORMAT.load(tmp_path / "a.pth")
    assert type(caught.value) is CheckpointError


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk is full, the old file is intact and nothing else is left."""

    def full_disk(_: Path) -> None:
        raise OSError(28, "No space left on device")

    FORMAT.save(sample(), tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("stratagem.storage.atomic.fsync_file", full_disk)
        with pytest.raises(CheckpointError, match=r"a\.pth: the checkpoint could not be written: .*No space left"):
            FORMAT.save({"meta": 1}, tmp_path / "a.pth")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pth"]
    assert (tmp_path / "a.pth").read_bytes() == before
    assert files.tree_bytes(tmp_path) == len(before)


def test_an_object_is_rejected_before_writing(tmp_path: Path) -> None:
    """A value that could not be loaded is rejected with its path, and no file is created."""
    with pytest.raises(CheckpointError, match="meta/where is PosixPath"):
        FORMAT.save({"meta": {"where": Path("/x")}}, tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    """A folder at the target path is kept."""
    (tmp_path / "a.pth").mkdir()
    with pytest.raises(CheckpointError, match="Cannot write a file where a directory exists"):
        FORMAT.save(sample(), tmp_path / "a.pth")
    assert (tmp_path / "a.pth").is_dir()


@pytest.mark.parametrize(
    ("name", "single"),
    [("a.pth", True), ("a.pt", True), ("a.ckpt", True), ("a.bin", True), ("a", False), ("a.1", False)],
)
def test_the_name_selects_the_format(name: str, single: bool) -> None:
    """Names with torch's extensions are single files, all others directories."""
    assert isinstance(format_for(Path(name)), SingleFileFormat) == single
