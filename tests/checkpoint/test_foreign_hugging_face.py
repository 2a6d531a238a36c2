"""Weights in the formats of Hugging Face libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stratagem.checkpoint import CheckpointLoader, load_checkpoint
from stratagem.checkpoint.remote.sources import read_any
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def write(file: Path, state: dict[str, Tensor]) -> None:
    """Write weights in the format that the file name selects."""
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)


def shards(folder: Path, name: str) -> Path:
    """Write the weights to two files with an index; return the index."""
    stem, suffix = Path(name).stem, Path(name).suffix
    files = {key: f"{stem}-0000{number}-of-00002{suffix}" for number, key in enumerate(STATE, 1)}
    for key, file in files.items():
        write(folder / file, {key: STATE[key]})
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": files}))
    return index


def check(tree: dict[str, Any]) -> None:
    """Check that the tree contains all weights and nothing else."""
    assert list(tree) == ["state_dict"]
    assert {key: tensor.tolist() for key, tensor in tree["state_dict"].items()} == {
        "a.weight": [[0, 1, 2], [3, 4, 5]],
        "b": [1, 2],
    }


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_weights_is_read(tmp_path: Path, name: str) -> None:
    """The weights can be loaded from a folder and from the file in it."""
    write(tmp_path / name, STATE)
    check(CheckpointLoader.load_checkpoint(tmp_path))
    check(CheckpointLoader.load_checkpoint(tmp_path / name))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_merged(tmp_path: Path, name: str) -> None:
    """Several files with an index are loaded as one checkpoint, by the folder or by the index."""
    index = shards(tmp_path, name)
    check(CheckpointLoader.load_checkpoint(tmp_path))
    check(CheckpointLoader.load_checkpoint(index))


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    """If a folder has both, safetensors files are preferred, because they contain only tensors."""
    write(tmp_path / "model.safetensors", STATE)
    write(tmp_path / "pytorch_model.bin", {"other": torch.ones(1)})
    check(read_any(tmp_path))


def test_weights_can_be_loaded_into_a_model(tmp_path: Path) -> None:
    """A model can be loaded from a safetensors file with any name."""
    model = nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "adapter.safetensors")
    other = nn.Linear(3, 2)
    _, report = load_checkpoint(other, tmp_path / "adapter.safetensors", strict=True)
    assert report.exact
    assert torch.equal(other.weight, model.weight)


def test_an_optimizer_next_to_the_weights_is_read(tmp_path: Path) -> None:
    """A checkpoint of the Trainer includes the state of torch's optimizer."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    tree = read_any(tmp_path)
    assert tree["optimizer"]["param_groups"][0]["lr"] == 0.25
    assert list(read_any(tmp_path, parts={"state_dict"})) == ["state_dict"]


def test_an_optimizer_with_objects_is_skipped(tmp_path: Path) -> None:
    """An optimizer file that contains objects is skipped, and raises an error only if it is requested."""
    write(tmp_path / "model.safetensors", STATE)
    torch.save({"state": Path("x"), "param_groups": []}, tmp_path / "optimizer.pt")
    check(read_any(tmp_path))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: root/state is an object of type pathlib\.PosixPath"):
        read_any(tmp_path, parts={"optimizer"})


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """A missing file, or a missing key in a file, is reported as damage with its name."""
    index = shards(tmp_path, "model.safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"model-00002-of-00002\.safetensors is missing"):
        read_any(index)
    write(tmp_path / "model-00002-of-00002.safetensors", {"c": torch.ones(1)})
    with pytest.raises(CheckpointDamagedError, match=r"00002\.safetensors does not contain \['b'\]"):
        read_any(index)


@pytest.mark.parametrize(
    "name", ["../secret.bin", "/etc/x.bin", "sub/x.bin", "model.safetensors.index.json", ".x.bin", 3]
)
def test_an_index_cannot_lead_outside_its_folder(tmp_path: Path, name: Any) -> None:
    """An index that refers to a file in another folder is rejected."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointDamagedError, match="not a valid shard in the same folder"):
        read_any(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000])
def test_an_invalid_index_is_rejected(tmp_path: Path, text: str) -> None:
    """An index with arbitrary contents raises only CheckpointErrors."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointDamagedError, match=r"index\.json"):
        read_any(index)


@pytest.mark.parametrize("length", [0, 7, 50, -1])
def test_a_truncated_safetensors_file_is_damaged(tmp_path: Path, length: int) -> None:
    """A truncated safetensors file is reported by name."""
    file = tmp_path / "model.safetensors"
    save_file(STATE, file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointDamagedError, match=r"model\.safetensors cannot be read"):
        read_any(tmp_path)


def test_other_folders_are_reported(tmp_path: Path) -> None:
    """A folder without weights, a missing file and pickled objects raise errors."""
    with pytest.raises(CheckpointError, match="is not a Stratagem checkpoint"):
        read_any(tmp_path)
    with pytest.raises(CheckpointNotFoundError):
        read_any(tmp_path / "x.safetensors")
    torch.save({"weight": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="values other than tensors"):
        read_any(tmp_path)
