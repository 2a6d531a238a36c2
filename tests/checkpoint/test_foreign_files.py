"""Single files written by other programs."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem.checkpoint import CheckpointLoader, SingleFileFormat, load_checkpoint
from stratagem.errors import CheckpointError, CheckpointMismatchError
from stratagem.model import BaseModel
from stratagem.strategies import BaseStrategy
from tests.support.small_runs import make, train

FILES = Path(__file__).parent / "files"
LIGHTNING = FILES / "lightning_2.6.6_accumulate_2.ckpt"
PLAIN = nn.Linear(2, 1)


def mmengine(epoch: int) -> Path:
    """Return the checkpoint that MMEngine wrote after this epoch."""
    return FILES / f"mmengine_0.10.7_epoch_{epoch}.pth"


class Network(BaseModel):
    """The network in the files."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, inputs: Any, targets: Any = None, mode: str = "tensor") -> Any:
        outputs = self.layers(inputs)
        return {"loss": nn.functional.cross_entropy(outputs, targets)} if mode == "loss" else outputs


@pytest.fixture
def strategy(tmp_path: Path) -> Iterator[BaseStrategy]:
    """A strategy prepared like MMEngine's run."""
    made = make("single", tmp_path, seed=None)
    made.prepare(
        Network(),
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01}},
        param_scheduler=[
            {"type": "OneCycleLR", "eta_max": 0.01, "total_steps": 6, "by_epoch": False},
            {"type": "CosineAnnealingMomentum", "T_max": 2, "by_epoch": True},
        ],
        dispatch_kwargs={"max_epochs": 2, "max_iters": 6, "epoch_length": 3},
    )
    yield made
    made.close()


def test_a_run_of_mmengine_can_be_resumed(strategy: BaseStrategy) -> None:
    """A run resumed from MMEngine's first epoch ends with the weights that MMEngine saved after the second epoch."""
    rest = strategy.resume(mmengine(1))
    assert (rest["meta"]["epoch"], rest["meta"]["iter"]) == (1, 3)
    features = torch.sin(torch.arange(48.0)).reshape(12, 4)
    classes = torch.arange(12) % 3
    for start in (0, 4, 8):
        strategy.model.train_step(
            (features[start : start + 4], classes[start : start + 4]), optim_wrapper=strategy.optim_wrapper
        )
        strategy.param_schedulers[0].step()
    strategy.param_schedulers[1].step()
    due = SingleFileFormat().load(mmengine(2))
    for name, tensor in strategy.model_state_dict().items():
        torch.testing.assert_close(tensor, due["state_dict"][name], msg=name)
    moments = strategy.optim_wrapper.optimizer.state_dict()["state"]
    for index, slots in due["optimizer"]["state"].items():
        torch.testing.assert_close(moments[index]["exp_avg"], slots["exp_avg"])
    assert strategy.scheduler_state_dict()[0]["_global_step"] == due["param_schedulers"][0]["_global_step"] == 6


def test_histories_of_mmengine_are_ignored() -> None:
    """The message hub and the functions in scheduler states are ignored and never created."""
    tree = SingleFileFormat().load(mmengine(2))
    assert sorted(tree) == ["meta", "optimizer", "param_schedulers", "state_dict"]
    assert tree["param_schedulers"] == [{"last_step": 5, "_global_step": 6}, {"last_step": 1, "_global_step": 2}]
    assert tree["meta"]["mmengine_version"] == "0.10.7"


def test_averaged_weights_of_mmengine_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A warning states that the file contains averaged weights, because resuming from them is usually a mistake."""
    average = {f"module.{name}": tensor for name, tensor in PLAIN.state_dict().items()}
    content = {"meta": {"mmengine_version": "0.10.7"}, "state_dict": PLAIN.state_dict(), "ema_state_dict": average}
    torch.save(content, tmp_path / "weights.pth")
    torch.save({**content, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "run.pth")
    caplog.set_level("INFO", logger="stratagem")
    SingleFileFormat().load(tmp_path / "weights.pth")
    assert not caplog.records
    assert "ema_state_dict" in SingleFileFormat().load(tmp_path / "run.pth")
    assert "contains averaged weights" in caplog.text


def test_weights_of_lightning_are_found_by_their_prefix() -> None:
    """The error for Lightning's key prefix suggests ``revise_keys``, which is not applied automatically."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(CheckpointMismatchError, match=r"revise_keys=\[\('\^model\\\\\.', ''\)\]"):
        load_checkpoint(model, LIGHTNING)
    _, report = load_checkpoint(model, LIGHTNING, revise_keys=[(r"^model\.", "")])
    assert report.exact


def test_position_and_optimizer_of_lightning_are_read() -> None:
    """Lightning's counters are converted to the numbers of completed epochs and iterations."""
    tree = SingleFileFormat().load(LIGHTNING)
    assert tree["meta"] == {"epoch": 2, "iter": 6, "batch_in_epoch": 0}
    assert tree["optimizer"]["state"][0]["step"] == 4
    assert tree["hyper_parameters"] == {"lr": 0.1, "width": 8}
    assert not {"loops", "callbacks", "lr_schedulers"} & set(tree)


def test_the_position_in_an_epoch_of_lightning_is_read(tmp_path: Path) -> None:
    """A checkpoint in the middle of an epoch records how many of its batches are finished."""
    loop = {
        "epoch_progress": {"current": {"ready": 3, "processed": 2}},
        "epoch_loop.batch_progress": {"total": {"processed": 25}, "current": {"processed": 5}},
    }
    torch.save(
        {"state_dict": PLAIN.state_dict(), "pytorch-lightning_version": "2", "loops": {"fit_loop": loop}},
        tmp_path / "a.ckpt",
    )
    tree = SingleFileFormat().load(tmp_path / "a.ckpt")
    assert tree["meta"] == {"epoch": 2, "iter": 25, "batch_in_epoch": 5}


def test_several_optimizers_of_lightning_are_numbered(tmp_path: Path) -> None:
    """Several optimizers of Lightning are numbered, and the state of a single one is used directly."""
    states = [torch.optim.SGD(PLAIN.parameters(), lr=lr).state_dict() for lr in (0.1, 0.2)]
    torch.save(
        {"state_dict": PLAIN.state_dict(), "pytorch-lightning_version": "2", "optimizer_states": states},
        tmp_path / "a.ckpt",
    )
    optimizer = SingleFileFormat().load(tmp_path / "a.ckpt")["optimizer"]
    assert {name: state["param_groups"][0]["lr"] for name, state in optimizer.items()} == {"0": 0.1, "1": 0.2}


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "network", "module", None])
def test_weights_of_scripts_are_found(tmp_path: Path, key: str | None) -> None:
    """Weights are found under common names, or if the file contains nothing else."""
    state = PLAIN.state_dict()
    torch.save(state if key is None else {key: state, "epoch": 3, "best": torch.ones(1)}, tmp_path / "a.pt")
    _, report = load_checkpoint(nn.Linear(2, 1), tmp_path / "a.pt", strict=True)
    assert report.exact


@pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict", "optim", "optimizer_state"])
def test_optimizers_of_scripts_are_resumed(tmp_path: Path, key: str) -> None:
    """A script's optimizer state is resumed by index if the parameter groups match."""
    source = make("single", tmp_path / "one")
    model = Network()
    batch = (torch.randn(4, 4), torch.arange(4) % 3)
    source.prepare(model, optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01}})
    train(source, [batch])
    torch.save({"model": model.state_dict(), key: source.optim_wrapper.optimizer.state_dict()}, tmp_path / "a.pt")
    expected = train(source, [batch, batch])
    source.close()
    target = make("single", tmp_path / "two")
    target.prepare(Network(), optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.5}})
    target.resume(tmp_path / "a.pt")
    assert train(target, [batch, batch]) == expected
    target.close()


def test_two_possible_sets_of_weights_are_an_error(tmp_path: Path) -> None:
    """If two entries could be the weights, the error lists both."""
    torch.save({"model": PLAIN.state_dict(), "net": PLAIN.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: it contains weights under 'model' and 'net'"):
        SingleFileFormat().load(tmp_path / "a.pt")


def test_objects_next_to_the_weights_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Arguments that a script saved as an object are skipped, and the log lists them."""
    content = {"model": PLAIN.state_dict(), "args": argparse.Namespace(lr=1), "epoch": 3}
    torch.save(content, tmp_path / "a.pt")
    with caplog.at_level(logging.INFO, "stratagem"):
        tree = SingleFileFormat().load(tmp_path / "a.pt")
    assert sorted(tree) == ["epoch", "state_dict"]
    assert "Skipped in the checkpoint: 'args'. args is an object of type argparse.Namespace" in caplog.text
    with pytest.raises(CheckpointError, match="args is an object of type argparse.Namespace"):
        SingleFileFormat().load(tmp_path / "a.pt", parts={"args"})


@pytest.mark.parametrize("whole", [True, False])
def test_the_error_for_a_pickled_model_explains_how_to_convert_it(tmp_path: Path, whole: bool) -> None:
    """A pickled module raises an error with its class and how to convert it if the file is trusted."""
    torch.save(PLAIN if whole else {"model": PLAIN, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"object of (type )?torch\.nn\.modules\.linear\.Linear.*If you trust"):
        load_checkpoint(nn.Linear(2, 1), tmp_path / "a.pt")


def test_an_object_among_the_weights_is_named(tmp_path: Path) -> None:
    """Weights that contain an object are rejected with the key."""
    torch.save({"state_dict": {**PLAIN.state_dict(), "extra": Path("x")}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt: state_dict/extra is an object of type pathlib\.PosixPath"):
        CheckpointLoader.load_checkpoint(tmp_path / "a.pt")


def test_map_location_selects_the_device() -> None:
    """``map_location`` applies to weights and moments."""
    tree = SingleFileFormat().load(mmengine(1), map_location="meta")
    assert tree["state_dict"]["layers.0.weight"].is_meta
    assert tree["optimizer"]["state"][0]["exp_avg"].is_meta
