"""Folders of ColossalAI's Booster, created here in the format of version 0.5.0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.checkpoint import CheckpointLoader, DirectoryFormat, read_any
from stratagem.checkpoint.convert.convert import convert_checkpoint
from stratagem.errors import CheckpointDamagedError, CheckpointError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
MOMENTS = {
    0: {"step": torch.tensor(3.0), "exp_avg": torch.full((2, 3), 0.5)},
    1: {"step": torch.tensor(3.0), "exp_avg": torch.full((2,), 0.25)},
}
GROUPS = [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with weights in two files and an optimizer in two more."""
    root = tmp_path / "boosted"
    for part in ("model", "optimizer"):
        (root / part).mkdir(parents=True)
    names = {}
    for number, (name, value) in enumerate(WEIGHTS.items(), 1):
        names[name] = f"pytorch_model-{number:05}.bin"
        torch.save({name: value}, root / "model" / names[name])
    _write_index(root / "model" / "pytorch_model.bin.index.json", {"total_size": 32}, names)
    shards = {}
    for number, slots in MOMENTS.items():
        shards[str(number)] = f"pytorch_optim-{number + 1:05}.bin"
        torch.save({number: slots}, root / "optimizer" / shards[str(number)])
    torch.save(GROUPS, root / "optimizer" / "pytorch_optim_group.bin")
    metadata = {"param_groups": "pytorch_optim_group.bin", "total_size": 32}
    _write_index(root / "optimizer" / "pytorch_optim.bin.index.json", metadata, shards)
    return root


class Evil:
    """Would create a file if it were unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def _write_index(file: Path, metadata: dict[str, Any], names: dict[str, str]) -> None:
    file.write_text(json.dumps({"metadata": metadata, "weight_map": names}))


def test_weights_and_optimizer_are_read_without_colossalai(folder: Path) -> None:
    """Weights are read by name, and the optimizer state by index, as it was written."""
    tree = CheckpointLoader.load_checkpoint(folder)
    assert {name: value.tolist() for name, value in tree["state_dict"].items()} == {
        name: value.tolist() for name, value in WEIGHTS.items()
    }
    assert tree["optimizer"]["param_groups"] == GROUPS
    assert torch.equal(tree["optimizer"]["state"][1]["exp_avg"], MOMENTS[1]["exp_avg"])


def test_only_requested_values_are_read(folder: Path) -> None:
    """The weights can be read from a folder whose optimizer is damaged."""
    (folder / "optimizer" / "pytorch_optim-00001.bin").write_bytes(b"")
    assert list(read_any(folder, parts=["state_dict"])) == ["state_dict"]
    with pytest.raises(CheckpointError, match=r"pytorch_optim-00001.bin"):
        read_any(folder)


def test_the_position_of_mmengine_is_read(folder: Path) -> None:
    """The position is read from meta.pth and the folder of schedulers, as MMEngine's strategy writes them."""
    torch.save({"meta": {"epoch": 2, "iter": 40, "mmengine": "0.10"}, "message_hub": {}}, folder / "meta.pth")
    (folder / "scheduler").mkdir()
    for number in range(2):
        state = {"_global_step": 40 + number, "last_step": 41, "gamma": 0.1}
        torch.save(state, folder / "scheduler" / f"scheduler_{number}.pth")
    tree = CheckpointLoader.load_checkpoint(folder)
    assert (tree["meta"]["epoch"], tree["meta"]["iter"]) == (2, 40)
    assert [state["_global_step"] for state in tree["param_schedulers"]] == [40, 41]


def test_the_stratagem_checkpoint_adds_names_and_master_weights(folder: Path, tmp_path: Path) -> None:
    """With a Stratagem checkpoint in the folder, the optimizer state is keyed by name and tied names are restored."""
    around = tmp_path / "epoch_1"
    engine_part = {"order": ["a.weight", "a.bias"], "tied": {"b.weight": "a.weight"}}
    stratagem_parts = {
        "optimizer": {
            "state": {},
            "param_groups": [{"lr": 0.2, "params": ["a.weight", "a.bias"]}],
            "counts": {"updates": 3},
        },
        "colossalai": engine_part,
        "meta": {"iter": 6},
    }
    DirectoryFormat().save(stratagem_parts, around, write_extra_files=lambda temporary: _copy(folder, temporary))
    convert_checkpoint(around, tmp_path / "converted")
    tree = CheckpointLoader.load_checkpoint(tmp_path / "converted")
    assert sorted(tree) == ["meta", "optimizer", "state_dict"]
    assert torch.equal(tree["state_dict"]["b.weight"], WEIGHTS["a.weight"])
    assert torch.equal(tree["optimizer"]["state"]["a.bias"]["exp_avg"], MOMENTS[1]["exp_avg"])
    assert tree["optimizer"]["counts"] == {"updates": 3}


def _copy(source: Path, target: Path) -> None:
    for file in source.rglob("*"):
        if file.is_file():
            there = target / file.relative_to(source)
            there.parent.mkdir(exist_ok=True)
            there.write_bytes(file.read_bytes())


def test_no_code_in_the_folder_is_executed(folder: Path, tmp_path: Path) -> None:
    """A malicious pickle is rejected in the parameter groups and in the state."""
    for name in ("pytorch_optim_group.bin", "pytorch_optim-00001.bin"):
        whole = (folder / "optimizer" / name).read_bytes()
        evil = Evil(tmp_path / "touched")
        torch.save([evil] if "group" in name else {0: evil}, folder / "optimizer" / name)
        with pytest.raises(CheckpointError, match=r"can only be created by executing code"):
            CheckpointLoader.load_checkpoint(folder)
        assert not (tmp_path / "touched").exists()
        (folder / "optimizer" / name).write_bytes(whole)


def test_an_index_to_another_folder_is_rejected(folder: Path) -> None:
    """The file of the parameter groups must be in the same folder as its index."""
    index = folder / "optimizer" / "pytorch_optim.bin.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["param_groups"] = "../model/pytorch_model-00001.bin"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointDamagedError, match=r"does not refer to a file with parameter groups"):
        CheckpointLoader.load_checkpoint(folder)
