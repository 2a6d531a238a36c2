"""The directory format with safetensors and JSON."""

from __future__ import annotations

import builtins
import errno
import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stratagem.checkpoint import DirectoryFormat, read_manifest
from stratagem.errors import CheckpointError
from tests.support.faults import between, failing, passing

FORMAT = DirectoryFormat()
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
]


def sample() -> dict[str, Any]:
    """Return a small checkpoint with the usual parts."""
    return {
        "meta": {"epoch": 3, "iter": 12, "stratagem": "1.2.3"},
        "state_dict": {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.zeros(2)},
        "optimizer": {"state": {"0.weight": {"step": torch.tensor(12.0)}}, "param_groups": [{"lr": 0.1}]},
    }


def kept(tensor: Tensor, folder: Path) -> Tensor:
    """Save and load a tensor."""
    FORMAT.save({"state_dict": {"x": tensor}}, folder / "c")
    return FORMAT.load(folder / "c")["state_dict"]["x"]


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    """A checkpoint contains one file for each part with tensors, state.json and the manifest, and nothing else."""
    FORMAT.save(sample(), tmp_path / "c")
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_other_tools_can_read_the_model_file(tmp_path: Path) -> None:
    """The safetensors library alone reads the model file, with the model's own names."""
    FORMAT.save({"state_dict": nn.Sequential(nn.Linear(3, 2)).state_dict()}, tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"0.weight": (2, 3), "0.bias": (2,)}


def test_the_manifest_contains_the_position(tmp_path: Path) -> None:
    """The manifest contains the position, file sizes and the version, so that they can be read without loading."""
    FORMAT.save(sample(), tmp_path / "c")
    manifest = read_manifest(tmp_path / "c")
    assert manifest["position"] == {"epoch": 3, "iter": 12}
    assert manifest["stratagem"] == "1.2.3"
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    names = ("state.json", "model.safetensors", "optimizer.safetensors")
    assert sizes == {name: (tmp_path / "c" / name).stat().st_size for name in names}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_restored(dtype: torch.dtype, tmp_path: Path) -> None:
    """Every dtype that safetensors supports is restored bit for bit."""
    size = torch.empty((), dtype=dtype).element_size()
    bits = torch.tensor([0, 1] * (2 * size), dtype=torch.uint8)
    tensor = bits.view(dtype) if dtype != torch.bool else bits.bool()
    back = kept(tensor, tmp_path)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(2.5),
        torch.empty(0),
        torch.empty(0, 3, dtype=torch.int64),
        torch.arange(6).reshape(2, 3).T,
        torch.arange(9)[::2],
        torch.tensor([1.0]).expand(3),
        torch.arange(100)[98:],
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        nn.Parameter(torch.ones(2)),
    ],
    ids=["0-dim", "empty", "empty matrix", "transposed", "strided", "expanded", "view", "conj", "neg", "parameter"],
)
def test_every_memory_layout_is_restored(tensor: Tensor, tmp_path: Path) -> None:
    """Scalars, empty tensors and all kinds of views are restored with their values."""
    back = kept(tensor, tmp_path)
    assert back.shape == tensor.shape
    assert back.dtype == tensor.dtype
    assert back.tolist() == tensor.tolist()


def test_a_view_does_not_store_its_base(tmp_path: Path) -> None:
    """A view of two elements of a large tensor needs the space of two elements."""
    kept(torch.zeros(100_000)[:2], tmp_path)
    assert (tmp_path / "c" / "model.safetensors").stat().st_size < 1000


def test_tied_weights_are_stored_under_each_name(tmp_path: Path) -> None:
    """Weights that share all or part of their memory are each stored completely."""
    whole = torch.arange(4.0)
    FORMAT.save({"state_dict": {"a": whole, "b": whole, "half": whole[2:], "none": whole[:0]}}, tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "a": [0, 1, 2, 3],
        "b": [0, 1, 2, 3],
        "half": [2, 3],
        "none": [],
    }


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    """Saving does not move, untie or detach the tensors of the model."""
    weight = nn.Parameter(torch.ones(2, 2))
    state = {"a": weight, "b": weight}
    FORMAT.save({"state_dict": state}, tmp_path / "c")
    assert state["a"] is state["b"] is weight
    assert weight.requires_grad


def test_only_requested_parts_are_read(tmp_path: Path) -> None:
    """Loading only the weights without verification needs no file of the optimizer."""
    FORMAT.save(sample(), tmp_path / "c")
    (tmp_path / "c" / "optimizer.safetensors").unlink()
    tree = FORMAT.load(tmp_path / "c", parts={"state_dict", "meta"}, verify=False)
    assert list(tree) == ["meta", "state_dict"]


def test_map_location_selects_the_device(tmp_path: Path) -> None:
    """``map_location``, a string or a device, applies to all tensors."""
    FORMAT.save(sample(), tmp_path / "c")
    for place in ("meta", torch.device("meta")):
        tree = FORMAT.load(tmp_path / "c", map_location=place)
        assert tree["state_dict"]["0.weight"].device.type == "meta"
        assert tree["optimizer"]["state"]["0.weight"]["step"].device.type == "meta"


def test_an_empty_checkpoint_is_restored(tmp_path: Path) -> None:
    """A tree without parts, and empty parts, can be saved and loaded."""
    FORMAT.save({}, tmp_path / "c")
    assert FORMAT.load(tmp_path / "c") == {}
    FORMAT.save({"state_dict": {}, "meta": None}, tmp_path / "c")
    assert FORMAT.load(tmp_path / "c") == {"state_dict": {}, "meta": None}


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """A second save leaves nothing of the first one, in the directory or next to it."""
    FORMAT.save(sample(), tmp_path / "c")
    FORMAT.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "c")
    assert FORMAT.load(tmp_path / "c") == {"state_dict": {"x": torch.ones(1)}}
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "state.json",
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_all_files_have_the_permissions_of_the_user(tmp_path: Path) -> None:
    """Files get the default permissions, so that other users may read them as far as the umask allows."""
    before = os.umask(0o027)
    try:
        FORMAT.save(sample(), tmp_path / "c")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "c").iterdir()} == {0o640}


@pytest.mark.parametrize("operation", ["write", "fsync"])
@pytest.mark.parametrize("old", [True, False])
def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path, operation: str, old: bool) -> None:
    """If the disk is full, the old checkpoint is intact, nothing else is left, and the error contains the reason."""
    if old:
        FORMAT.save(sample(), tmp_path / "c")
    full = failing(errno.ENOSPC)
    with (
        between(lambda name, act, arguments: (full if name == operation else passing)(name, act, arguments)),
        pytest.raises(
            CheckpointError, match=r"c: the checkpoint could not be written: .*No space left.* bytes are free"
        ),
    ):
        FORMAT.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "c")
    assert [entry.name for entry in tmp_path.iterdir()] == (["c"] if old else [])
    if old:
        assert set(FORMAT.load(tmp_path / "c")) == set(sample())


def test_a_rejected_value_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """A value that cannot be stored raises an error with its part, and nothing is changed."""
    FORMAT.save(sample(), tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"optimizer/a/0 is set"):
        FORMAT.save({"optimizer": {"a": [{1.5}]}}, tmp_path / "c")
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert set(FORMAT.load(tmp_path / "c")) == set(sample())


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(2).to_mkldnn(), "_mkldnn"),
        (torch.empty(2, dtype=torch.uint1), "uint1"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.empty(2, device="meta"), "on the meta device"),
    ],
)
def test_unsupported_tensors_are_named(tensor: Tensor, kind: str, tmp_path: Path) -> None:
    """A tensor with an unsupported dtype or layout is rejected by its path."""
    with pytest.raises(CheckpointError, match=f"state_dict/x is a tensor .*{kind}"):
        kept(tensor, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".", "..", ".hidden", "a\\b", "c:d", 1, None])
def test_parts_stay_inside_the_directory(name: Any, tmp_path: Path) -> None:
    """A part whose name is not a valid file name is rejected before anything is written."""
    with pytest.raises(CheckpointError, match=r"is not a valid name for a part of a checkpoint"):
        FORMAT.save({name: {"x": torch.ones(1)}}, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_two_parts_never_share_a_file(tmp_path: Path) -> None:
    """``model`` and ``state_dict`` would use the same file, so having both is rejected."""
    with pytest.raises(CheckpointError, match="'state_dict' and 'model', which would be saved to the same file"):
        FORMAT.save({"state_dict": {"x": torch.ones(1)}, "model": {"x": torch.zeros(1)}}, tmp_path / "c")
    FORMAT.save({"model": {"x": torch.ones(1)}, "state": {"x": torch.zeros(1)}, "manifest": 1}, tmp_path / "c")
    assert FORMAT.load(tmp_path / "c") == {"model": {"x": torch.ones(1)}, "state": {"x": torch.zeros(1)}, "manifest": 1}


@pytest.mark.parametrize("content", ["notes.txt", "manifest.json"])
def test_a_folder_with_other_content_is_not_replaced(tmp_path: Path, content: str) -> None:
    """Saving to a folder that contains other files raises an error, and the content is kept."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / content).write_text('{"format": "somebody else\'s"}')
    with pytest.raises(CheckpointError, match=r"work is a folder that contains other files"):
        FORMAT.save(sample(), tmp_path / "work")
    assert [entry.name for entry in (tmp_path / "work").iterdir()] == [content]


@pytest.mark.parametrize("left", [["state.json", "manifest.json"], ["state.json"], []])
def test_a_damaged_checkpoint_can_be_saved_again(tmp_path: Path, left: list[str]) -> None:
    """Saving replaces a damaged checkpoint or an empty folder."""
    (tmp_path / "c").mkdir()
    for name in left:
        (tmp_path / "c" / name).write_text("{")
    FORMAT.save(sample(), tmp_path / "c")
    assert set(FORMAT.load(tmp_path / "c")) == set(sample())


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path) -> None:
    """A file at the target path is kept."""
    (tmp_path / "c").write_text("mine")
    with pytest.raises(CheckpointError, match="Cannot write a directory where a file exists"):
        FORMAT.save(sample(), tmp_path / "c")
    assert (tmp_path / "c").read_text() == "mine"


def reject(name: str) -> Callable[..., Any]:
    """Return a function that must not be called."""

    def rejected(*_: object, **__: object) -> Any:
        raise AssertionError(f"{name} was called")

    return rejected


def test_loading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a checkpoint calls neither pickle nor eval nor exec."""
    FORMAT.save(sample(), tmp_path / "c")
    FORMAT.load(tmp_path / "c")  # do the lazy imports first
    with monkeypatch.context() as patch:
        for name in ("Unpickler", "load", "loads", "_Unpickler", "_load", "_loads"):
            patch.setattr(pickle, name, reject(name))
        for name in ("eval", "exec"):
            patch.setattr(builtins, name, reject(name))
        for action in (lambda: pickle.loads(b""), lambda: eval("1")):
            with pytest.raises(AssertionError, match="was called"):
                action()
        tree = FORMAT.load(tmp_path / "c")
    assert tree["meta"] == sample()["meta"]
    assert json.loads((tmp_path / "c" / "state.json").read_text())["meta"] == sample()["meta"]
