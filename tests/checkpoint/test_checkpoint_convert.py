"""Conversion to another format keeps all values."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stratagem.checkpoint import CheckpointLoader, save_checkpoint
from stratagem.checkpoint.convert import convert
from stratagem.checkpoint.convert.compare import compare
from stratagem.checkpoint.convert.convert import convert_checkpoint, open_checkpoint
from stratagem.checkpoint.formats.dcp import is_dcp_directory
from stratagem.errors import CheckpointError


def tree() -> dict[str, Any]:
    """Return a small checkpoint."""
    return {
        "state_dict": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2]), "none": torch.empty(0, 2)},
        "optimizer": {"state": {"w": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "meta": {"epoch": 2, "iter": 8},
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in the directory format."""
    save_checkpoint(tree(), tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(("name", "form"), [("c.pth", None), ("c", "dcp"), ("c", None), ("c", "pth")])
def test_conversion_back_and_forth_changes_nothing(source: Path, tmp_path: Path, name: str, form: str | None) -> None:
    """Conversion to a single file, to torch's DCP format or to a directory, and back, changes nothing."""
    (tmp_path / "there").mkdir()
    there = tmp_path / "there" / name
    assert convert_checkpoint(source, there, form) == []
    with open_checkpoint(there) as found:
        assert list(compare(found, tree())) == []
    convert_checkpoint(there, tmp_path / "back")
    assert list(compare(CheckpointLoader.load_checkpoint(tmp_path / "back"), tree())) == []


def every_kind() -> dict[str, Any]:
    """Return a tree with every kind of value and container that a checkpoint can hold."""
    return {
        "state_dict": {"w": torch.arange(6.0).reshape(2, 3), "empty": torch.empty(0, 2), "half": torch.tensor([1.5]).bfloat16()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["w"], "foreach": None}]},
        "accelerator": {},
        "empty": {"list": [], "tuple": (), "dict": {"inner": {}}, "set": set(), "none": None, "text": ""},
        "numbers": {"infinity": math.inf, "float": 1.5, "bool": True, "large": 2**70, "set": {1, 2}},
        "mixed": [torch.tensor(1.0), (torch.tensor(2.0), {"x": torch.tensor(3)}), [], {}, None, [1, [2, (3,)]]],
        "keys": {1: torch.tensor(1), "1": torch.tensor(2), 2.5: 3, "$x": 5, "a": {"b": torch.tensor(7)}, "a.b": torch.tensor(8)},
        "a.b": torch.tensor(9),
        "a": {"b": torch.tensor(10)},
        "prefixes": {1: 5, "1": {"x": torch.tensor(1), "y": 6}},
        "arrays": {"int16": np.arange(4, dtype=np.int16).reshape(2, 2), "complex": np.array([1 + 2j], dtype=np.complex64)},
        "complex": torch.tensor([1 + 2j]).conj(),
        "scalar": 3,
        "stratagem_tree": torch.tensor(11),
        "meta": {"iter": 3, "cfg": "a = 1"},
    }  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Return whether two trees are equal, including types, the order of keys, and dtypes."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return same(list(one), list(other)) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.slow
@pytest.mark.parametrize("formats", list(itertools.permutations(["stratagem", "pth", "dcp"])), ids="-".join)
def test_the_whole_tree_survives_every_chain_of_conversions(tmp_path: Path, formats: tuple[str, ...]) -> None:
    """Empty containers, None, tuples, keys of any type, NumPy arrays and tensors are the same in every format, in any order."""
    source = tmp_path / "source"
    save_checkpoint(every_kind(), source)
    for number, form in enumerate([*formats, formats[0]]):
        target = tmp_path / f"{number}{'.pth' if form == 'pth' else ''}"
        convert_checkpoint(source, target, form)
        with open_checkpoint(target) as found:
            assert {part for part, value in every_kind().items() if not same(found.get(part), value)} == set()
            assert list(found) == list(every_kind())
        source = target


def test_numpy_scalars_become_plain_numbers(tmp_path: Path) -> None:
    """NumPy scalars, such as a score kept by a hook, are stored as the numbers that they represent."""
    save_checkpoint({"score": {"a": np.float32(0.5), "b": np.int64(4), "c": np.bool_(True)}}, tmp_path / "c")
    found = CheckpointLoader.load_checkpoint(tmp_path / "c")["score"]
    assert same(found, {"a": 0.5, "b": 4, "c": True})


def test_the_name_selects_the_target_format(source: Path, tmp_path: Path) -> None:
    """``.pth`` selects a single file, ``.safetensors`` weights, and no extension a directory; ``--to`` overrides it."""
    for name in ("a.pth", "a.safetensors", "a"):
        convert_checkpoint(source, tmp_path / name)
    convert_checkpoint(source, tmp_path / "d", "dcp")
    assert (tmp_path / "a.pth").is_file()
    assert (tmp_path / "a" / "manifest.json").is_file()
    assert is_dcp_directory(tmp_path / "d")


def test_safetensors_contains_only_the_weights(source: Path, tmp_path: Path) -> None:
    """The names of the omitted parts are returned."""
    assert convert_checkpoint(source, tmp_path / "a.safetensors") == ["optimizer", "meta"]
    weights = load_file(tmp_path / "a.safetensors")
    assert {name: tensor.tolist() for name, tensor in weights.items()} == {
        "w": [[0, 1, 2], [3, 4, 5]],
        "b": [1, 2],
        "none": [],
    }


def test_a_large_model_is_split_into_files_with_an_index(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the weights exceed the size limit of a file, they are split, and an index lists the file of each tensor."""
    monkeypatch.setattr(convert, "_HF_FILE_BYTES", 30)
    convert_checkpoint(source, tmp_path / "hf", "huggingface")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["weight_map"] == {"w": first, "b": second, "none": second}
    assert index["metadata"] == {"total_size": 24 + 16}
    assert load_file(tmp_path / "hf" / second)["b"].tolist() == [1, 2]


def test_a_small_model_is_one_file_without_an_index(source: Path, tmp_path: Path) -> None:
    """A small model in Hugging Face format is a folder with model.safetensors."""
    convert_checkpoint(source, tmp_path / "hf", "huggingface")
    assert [file.name for file in (tmp_path / "hf").iterdir()] == ["model.safetensors"]


def test_an_existing_target_is_not_replaced(source: Path, tmp_path: Path) -> None:
    """An existing target raises an error and is not changed."""
    (tmp_path / "a.pth").write_text("mine")
    with pytest.raises(CheckpointError, match=r"a\.pth already exists"):
        convert_checkpoint(source, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_text() == "mine"


def test_an_unknown_format_is_rejected(source: Path, tmp_path: Path) -> None:
    """The error suggests the most similar format."""
    with pytest.raises(CheckpointError, match="Unknown checkpoint format 'safetensor'.*Did you mean 'safetensors'"):
        convert_checkpoint(source, tmp_path / "x", "safetensor")


def test_a_safetensors_file_becomes_a_checkpoint(tmp_path: Path) -> None:
    """A safetensors file of another tool becomes a checkpoint whose model can be loaded."""
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    convert_checkpoint(tmp_path / "w.safetensors", tmp_path / "c")
    assert CheckpointLoader.load_checkpoint(tmp_path / "c")["state_dict"]["w"].tolist() == [1, 1]
