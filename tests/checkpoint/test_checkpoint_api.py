"""Saving and loading without a strategy."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch import nn

from stratagem.checkpoint import get_model_state, load_checkpoint, save_checkpoint
from stratagem.errors import CheckpointError, CheckpointMismatchError, CheckpointNotFoundError


@pytest.mark.parametrize("name", ["epoch_1", "epoch_1.pth"])
def test_a_model_is_restored(tmp_path: Path, name: str) -> None:
    """A saved model can be loaded into another instance, in both formats, and the whole checkpoint is returned."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    checkpoint = MappingProxyType({"state_dict": model.state_dict(), "meta": {"epoch": 1}})
    save_checkpoint(checkpoint, tmp_path / "deep" / "down" / name)
    loaded, report = load_checkpoint(other, str(tmp_path / "deep" / "down" / name), strict=True)
    assert report.exact
    assert torch.equal(other.weight, model.weight)
    assert loaded["meta"] == {"epoch": 1}


def test_weights_are_loaded_into_a_wrapped_model(tmp_path: Path) -> None:
    """A wrapped model loads weights that were saved without the wrapper."""
    model = nn.Linear(3, 2)
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "c")
    wrapped = nn.DataParallel(nn.Linear(3, 2))
    assert load_checkpoint(wrapped, tmp_path / "c", strict=True)[1].exact
    assert torch.equal(wrapped.module.weight, model.weight)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    """Loading into tied weights keeps them tied."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    save_checkpoint({"state_dict": {key: value + 1 for key, value in model.state_dict().items()}}, tmp_path / "c")
    before = model[0].weight.tolist()
    load_checkpoint(model, tmp_path / "c", strict=True)
    assert model[1].weight is model[0].weight
    assert torch.allclose(model[0].weight, torch.tensor(before) + 1)


def test_a_checkpoint_of_another_model_is_reported(tmp_path: Path) -> None:
    """The first differing keys are listed, and the options are passed on."""
    save_checkpoint({"state_dict": {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}}, tmp_path / "c")
    model = nn.Linear(3, 2)
    with pytest.raises(
        CheckpointMismatchError, match=r"(?s)2 missing .*: weight, bias.*2 unexpected .*: a\.weight, a\.bias"
    ):
        load_checkpoint(model, tmp_path / "c")
    load_checkpoint(model, tmp_path / "c", strict=True, revise_keys=[(r"^a\.", "")])
    assert model.bias.tolist() == [1, 1]


def test_a_missing_checkpoint_is_reported(tmp_path: Path) -> None:
    """Loading a missing checkpoint raises an error with the path."""
    with pytest.raises(CheckpointNotFoundError, match=r"epoch_9\.pth: there is no such checkpoint"):
        load_checkpoint(nn.Linear(1, 1), tmp_path / "epoch_9.pth")


@pytest.mark.parametrize(
    ("checkpoint", "has"),
    [({"meta": {}, "model": 1}, "'meta', 'model'"), ({}, "nothing"), ({"state_dict": 3}, "'state_dict'")],
)
def test_a_checkpoint_without_a_model_lists_its_parts(checkpoint: dict[str, object], has: str) -> None:
    """If there is no model state, the error lists the existing parts and masks the URL's secrets."""
    with pytest.raises(CheckpointError, match=f"@host/x.pth has no model state .*; it contains {has}") as caught:
        get_model_state(checkpoint, "https://me:secret@host/x.pth")
    assert "secret" not in str(caught.value)


def test_read_only_urls_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving to a read-only URL raises an error without its secrets, and creates no folder of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"https://\*\*\*@host/c: cannot save checkpoints to this URL"):
        save_checkpoint({"state_dict": {}}, "https://me:secret@host/c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["c", "c.pth"])
def test_a_folder_that_cannot_be_created_is_a_checkpoint_error(tmp_path: Path, name: str) -> None:
    """A file in place of the parent folder raises an error with the path of the checkpoint."""
    (tmp_path / "runs").write_text("x")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint({"state_dict": {}}, tmp_path / "runs" / "deep" / name)
