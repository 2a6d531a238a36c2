"""Exports of the user's own module, and the refusals of exports for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem import BaseModel, ModelWithLoss, SupervisedModel
from stratagem.checkpoint import save_checkpoint
from stratagem.checkpoint.convert.hugging_face import export_hugging_face
from stratagem.checkpoint.convert.plain import export_state_dict
from stratagem.errors import CheckpointError


def network() -> nn.Module:
    """The user's own module."""
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


class Own(BaseModel):
    """A model of the user, whose checkpoints have the user's own names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Any, mode: str = "tensor") -> Any:
        return self.head(self.body(x))


def saved(model: nn.Module, folder: Path, **parts: Any) -> Path:
    """Save a checkpoint with the weights of a model."""
    save_checkpoint({"state_dict": model.state_dict(), "meta": {"iter": 1}, **parts}, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.parametrize("kind", ["supervised", "loss_with_weights", "model_with_loss", "compiled"])
def test_the_users_own_module_loads_the_state_dict_strictly(tmp_path: Path, kind: str) -> None:
    """The names of SupervisedModel, ModelWithLoss and torch.compile are not in the file."""
    own = network()
    model: nn.Module = {
        "supervised": lambda: SupervisedModel(own, nn.MSELoss()),
        "loss_with_weights": lambda: SupervisedModel(own, nn.CrossEntropyLoss(weight=torch.ones(3))),
        "model_with_loss": lambda: ModelWithLoss(own),
        # The names that torch.compile adds; checkpoints of earlier versions have them.
        "compiled": lambda: SupervisedModel(nn.ModuleDict({"_orig_mod": own}), nn.MSELoss()),
    }[kind]()
    written = export_state_dict(saved(model, tmp_path), tmp_path / "own.pth")
    assert written.module == "network"
    assert written.left_out == (["loss.weight"] if kind == "loss_with_weights" else [])
    again = network()
    again.load_state_dict(torch.load(tmp_path / "own.pth", weights_only=True), strict=True)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_model_of_the_user_is_written_whole(tmp_path: Path) -> None:
    """A subclass of BaseModel loads its own names strictly, and a part of it can be selected."""
    own = Own()
    source = saved(own, tmp_path)
    assert export_state_dict(source, tmp_path / "own.pth").module == "."
    Own().load_state_dict(torch.load(tmp_path / "own.pth", weights_only=True), strict=True)
    written = export_state_dict(source, tmp_path / "head.pth", module="head")
    assert written.left_out == ["body.weight", "body.bias"]
    head = torch.load(tmp_path / "head.pth", weights_only=True)
    assert torch.equal(head["weight"], own.head.weight)
    with pytest.raises(CheckpointError, match=r"no weights of the module 'haed'.*Did you mean 'head'"):
        export_state_dict(source, tmp_path / "other.pth", module="haed")


def test_the_state_dict_has_the_averaged_weights(tmp_path: Path) -> None:
    """The averaged weights replace the trained weights unless ``raw`` is set."""
    own = SupervisedModel(nn.Linear(1, 1, bias=False), nn.MSELoss())
    source = saved(own, tmp_path, average={"averages": {"network.weight": torch.tensor([[7.0]])}})
    assert export_state_dict(source, tmp_path / "averaged.pth").averaged
    assert torch.load(tmp_path / "averaged.pth", weights_only=True)["weight"].item() == 7.0
    assert not export_state_dict(source, tmp_path / "raw.pth", raw=True).averaged
    assert torch.load(tmp_path / "raw.pth", weights_only=True)["weight"].item() == own.network.weight.item()


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    """The file has the size of the module, not of the whole checkpoint."""
    own = nn.ModuleDict({"large": nn.Linear(300, 300), "small": nn.Linear(1, 1)})
    export_state_dict(saved(own, tmp_path), tmp_path / "small.pth", module="small")
    assert (tmp_path / "small.pth").stat().st_size < 10_000


def test_a_model_without_transformers_is_refused_as_a_hugging_face_folder(tmp_path: Path) -> None:
    """The error states which formats contain only the weights, and nothing is written."""
    model = SupervisedModel(network(), nn.MSELoss())
    source = saved(model, tmp_path)
    with pytest.raises(CheckpointError, match="SupervisedModel contains no model of transformers or PEFT"):
        export_hugging_face(source, tmp_path / "folder", model)
    assert not (tmp_path / "folder").exists()
