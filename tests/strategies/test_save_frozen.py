"""Checkpoints without frozen parameters (``save_frozen=False``), as for LoRA: small, exact, and safe."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader, load_checkpoint
from stratagem.cli.ckpt.convert import convert
from stratagem.cli.ckpt.show import show
from stratagem.dist import get_rank
from stratagem.errors import CheckpointMismatchError, ConfigValueError
from stratagem.model import SupervisedModel
from stratagem.storage import tree_bytes
from stratagem.strategies import BaseStrategy, DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from stratagem.train.building import check_hooks
from tests.support.ranks import Ranks
from tests.train.toys import At, train_until_signal

WIDTH = 256


class Adapted(nn.Module):
    """A frozen linear layer with a trainable low-rank adapter, and batch normalization with frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        for part in (self.base, self.norm):
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        return self.norm(self.base(x)) + self.up(self.down(x))


FROZEN = {"base.weight", "base.bias", "norm.weight", "norm.bias"}


def model(seed: int = 0) -> SupervisedModel:
    """Return the model, whose initial weights depend on the seed."""
    torch.manual_seed(seed)
    return SupervisedModel(Adapted(), nn.MSELoss())


def prepared(kind: type[BaseStrategy], folder: Path | str, seed: int = 0) -> BaseStrategy:
    """Return a strategy that is ready to train."""
    options = {"wrap_policy": "Linear"} if kind is FSDPStrategy else {}
    strategy = kind(
        work_dir=folder,
        env_kwargs={"randomness": {"seed": 0}},
        log_kwargs={"log_level": "ERROR"},
        **options,
    )
    strategy.prepare(model(seed), optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01}})
    return strategy


def train(strategy: BaseStrategy, steps: range) -> list[float]:
    """Train on batches that depend on the step only, split across ranks; return the losses."""
    losses = []
    for step in steps:
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step)).chunk(strategy.world_size)[
            strategy.rank
        ]
        outputs = strategy.model.train_step((x, x.flip(1)), optim_wrapper=strategy.optim_wrapper)
        losses.append(outputs["loss"].item())
    return losses


def keys(path: Path | str) -> set[str]:
    """Return the names of the model's tensors in a checkpoint, without the prefix of the wrapper."""
    return {key.partition(".")[2] for key in CheckpointLoader.load_checkpoint(path)["state_dict"]}


@pytest.mark.slow
def test_a_checkpoint_without_frozen_parameters_resumes_exactly(tmp_path: Path) -> None:
    """It has the adapter, its moments and all buffers in a tenth of the size, and the losses after it are the same."""
    strategy = prepared(SingleDeviceStrategy, tmp_path)
    train(strategy, range(3))
    strategy.save_checkpoint(tmp_path / "whole")
    strategy.save_checkpoint(tmp_path / "part", save_frozen=False)
    expected = train(strategy, range(3, 6))
    strategy.close()
    assert keys(tmp_path / "whole") - keys(tmp_path / "part") == FROZEN
    assert {"up.weight", "down.weight", "norm.running_mean"} <= keys(tmp_path / "part")
    assert tree_bytes(tmp_path / "part") < tree_bytes(tmp_path / "whole") / 5
    resumed = prepared(SingleDeviceStrategy, tmp_path)
    resumed.resume(tmp_path / "part")
    assert train(resumed, range(3, 6)) == expected
    # The resumed run omits the same parameters.
    resumed.save_checkpoint(tmp_path / "again", save_frozen=False)
    resumed.close()
    assert keys(tmp_path / "again") == keys(tmp_path / "part")


def test_other_frozen_weights_are_rejected(tmp_path: Path) -> None:
    """With other base weights, resuming and loading raise an error that names them, and the model is unchanged."""
    strategy = prepared(SingleDeviceStrategy, tmp_path)
    train(strategy, range(1))
    strategy.save_checkpoint(tmp_path / "part", save_frozen=False)
    strategy.close()
    other = prepared(SingleDeviceStrategy, tmp_path, seed=1)
    before = {name: each.clone() for name, each in other.unwrap_model().state_dict().items()}
    text = r"part omits 4 frozen parameters .*, and 2 of them have other values in this model.*base.weight, .*base.bias"
    for read in (other.resume, other.load_checkpoint, lambda path: load_checkpoint(other.unwrap_model(), path)):
        with pytest.raises(CheckpointMismatchError, match=text):
            read(tmp_path / "part")
    assert all(torch.equal(each, before[name]) for name, each in other.unwrap_model().state_dict().items())
    other.close()


def test_weights_are_loaded_without_a_strategy(tmp_path: Path) -> None:
    """``load_checkpoint`` with ``strict=True`` accepts the omitted parameters if the model has their values."""
    strategy = prepared(SingleDeviceStrategy, tmp_path)
    train(strategy, range(2))
    strategy.save_checkpoint(tmp_path / "part", save_frozen=False)
    expected = strategy.model_state_dict()
    strategy.close()
    loaded = model()
    load_checkpoint(loaded, tmp_path / "part", strict=True)
    assert all(torch.equal(each, expected[name]) for name, each in loaded.state_dict().items())


def test_parameters_that_were_changed_are_saved_although_they_are_frozen(tmp_path: Path) -> None:
    """A parameter that was trained and frozen again, or written to, is no longer that of the base model."""
    strategy = prepared(SingleDeviceStrategy, tmp_path)
    adapted: Any = strategy.unwrap_model()
    bias = next(each for name, each in adapted.named_parameters() if name.endswith("base.bias"))
    bias.requires_grad_(True)
    train(strategy, range(2))
    bias.requires_grad_(False)
    train(strategy, range(2, 3))
    with torch.no_grad():
        next(each for name, each in adapted.named_parameters() if name.endswith("norm.weight")).mul_(2)
    strategy.save_checkpoint(tmp_path / "part", save_frozen=False)
    strategy.close()
    assert FROZEN - keys(tmp_path / "part") == {"base.weight", "norm.bias"}


def test_commands_report_what_is_omitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``ckpt show`` has the number of omitted parameters, and converting states that the file does not contain them."""
    strategy = prepared(SingleDeviceStrategy, tmp_path)
    strategy.save_checkpoint(tmp_path / "part", save_frozen=False)
    strategy.close()
    show(str(tmp_path / "part"), tensors=False, config=False)
    assert "4 frozen parameters (save_frozen=False)" in capsys.readouterr().out
    convert(str(tmp_path / "part"), tmp_path / "weights.safetensors", None, raw=False)
    assert "The checkpoint omits 4 frozen parameters" in capsys.readouterr().out


def test_averaged_weights_are_rejected() -> None:
    """The averages would contain the omitted parameters, so the combination is rejected with the configuration."""
    with pytest.raises(ConfigValueError, match="save_frozen=False cannot be combined with EMAHook"):
        check_hooks({"checkpoint": {"save_frozen": False}}, [{"type": "EMAHook"}])


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_run_saves_and_resumes_without_frozen_parameters(tmp_path: Path, *, background: bool) -> None:
    """The option of CheckpointHook applies to all its checkpoints, and a resumed run ends with the same weights."""
    data = torch.utils.data.TensorDataset(torch.randn(12, WIDTH), torch.randn(12, WIDTH))

    def trained(folder: Path, epochs: int, **changes: Any) -> dict[str, Tensor]:
        runner = Runner(
            model(),
            folder,
            train_dataloader={"dataset": data, "batch_size": 4},
            optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01}},
            train_cfg={"max_epochs": epochs},
            default_hooks={"checkpoint": {"save_frozen": False, "async_save": background}, "logger": None},
            randomness={"seed": 0},
            log_level="ERROR",
            **changes,
        )
        try:
            train_until_signal(runner)
            return runner.strategy.model_state_dict()
        finally:
            runner.close()

    expected = trained(tmp_path / "one", 2)
    interrupt = At(4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    trained(tmp_path / "other", 2, custom_hooks=[interrupt])
    result = trained(tmp_path / "other", 2, resume=True)
    assert all(torch.equal(each, expected[name]) for name, each in result.items())
    for name in ("epoch_1", "iter_4", "epoch_2"):
        assert not FROZEN & keys(tmp_path / "other" / name)


def save_and_resume(folder: str) -> list[tuple[str, bool, set[str]]]:
    """Save under DDP and FSDP, and resume under both; return whether the following losses are equal, and what was saved."""
    found = []
    for kind in (DDPStrategy, FSDPStrategy):
        path = f"{folder}/{kind.__name__}"
        strategy = prepared(kind, folder)
        train(strategy, range(2))
        strategy.save_checkpoint(path, save_frozen=False)
        expected = train(strategy, range(2, 4))
        strategy.close()
        for other in (DDPStrategy, FSDPStrategy):
            resumed = prepared(other, folder)
            resumed.resume(path)
            losses = train(resumed, range(2, 4))
            resumed.close()
            found.append(
                (
                    f"{kind.__name__} {other.__name__} {get_rank()}",
                    losses == pytest.approx(expected, rel=1e-5),
                    keys(path),
                )
            )
    return found


@pytest.mark.slow
def test_ddp_and_fsdp_resume_checkpoints_of_each_other(ranks: Ranks, tmp_path: Path) -> None:
    """The digests do not depend on how parameters are sharded, and frozen parameters are omitted under both."""
    for rank in ranks.run(save_and_resume, str(tmp_path)):
        for name, same, saved in rank:
            assert same, name
            assert not FROZEN & saved, name
    single = prepared(SingleDeviceStrategy, tmp_path)
    single.resume(tmp_path / "FSDPStrategy")
    single.close()
