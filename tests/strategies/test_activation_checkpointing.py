"""Activation checkpointing with a single process and DDP: the same numbers with less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.errors import ConfigKeyError, ConfigValueError, PlacementError
from stratagem.model import SupervisedModel
from stratagem.strategies import BaseStrategy, DDPStrategy, SingleDeviceStrategy
from tests.support.ranks import Ranks


class Block(nn.Module):
    """A residual block with dropout and batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.4), nn.Linear(64, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        return x + self.layers(x)


class Network(nn.Module):
    """Four blocks and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one value per sample."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class SavedBytes:
    """Counts the bytes of the tensors that a forward pass saves for the backward pass, once per storage."""

    def __init__(self) -> None:
        self.by_storage: dict[int, int] = {}
        self._kept: list[Tensor] = []

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a saved tensor; it is kept, so that no other tensor gets its address."""
        self._kept.append(tensor)
        storage = tensor.untyped_storage()
        self.by_storage[storage.data_ptr()] = storage.nbytes()
        return tensor


def train(kind: type[BaseStrategy], work_dir: Path | str, **options: Any) -> tuple[list[float], dict[str, Tensor], int]:
    """Train for three steps; return the losses, all gradients and the state of the model, and the saved bytes of a step."""
    compiled = {"compile": options.pop("compile", False)}
    env = {"randomness": {"seed": 0}}
    strategy = kind(work_dir=work_dir, env_kwargs=env, log_kwargs={"log_level": "WARNING"}, **options)
    try:
        torch.manual_seed(0)
        model, optim = strategy.prepare(
            SupervisedModel(Network(), nn.MSELoss()),
            optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.01}},
            **compiled,
        )
        losses, tensors = [], {}
        generator = torch.Generator().manual_seed(1 + strategy.rank)
        counter = SavedBytes()
        for step in range(3):
            x = torch.randn(32, 16, generator=generator)
            with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
                before = sum(counter.by_storage.values())
                losses.append(model.train_step((x, x.sum(1, keepdim=True)), optim_wrapper=optim)["loss"].item())
            saved = sum(counter.by_storage.values()) - before
            tensors |= {
                f"{step}/{name}": each.detach().clone() for name, each in strategy.unwrap_model().state_dict().items()
            }
        return losses, tensors, saved
    finally:
        strategy.close()


def assert_same(one: Any, other: Any) -> None:
    """Require equal losses, and equal states after each step, bit for bit."""
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [True, "Block", {"policy": "Block", "save_ops": ["addmm"]}, [nn.Linear, "BatchNorm1d"]]
)
def test_a_single_process_has_the_same_bits_with_checkpoints(tmp_path: Path, options: Any) -> None:
    """Losses, weights and buffers are equal, although dropout and batch normalization run twice."""
    plain = train(SingleDeviceStrategy, tmp_path / "plain")
    assert_same(train(SingleDeviceStrategy, tmp_path / "other", activation_checkpointing=options), plain)


@pytest.mark.slow
def test_checkpoints_save_fewer_bytes(tmp_path: Path) -> None:
    """Of a block, only the input of 32 x 16 floats is saved, instead of several tensors of 32 x 64 floats."""
    plain = train(SingleDeviceStrategy, tmp_path / "plain")[2]
    checkpointed = train(SingleDeviceStrategy, tmp_path / "other", activation_checkpointing=True)[2]
    block = 32 * 64 * 4
    # Without checkpoints, at least the input of GELU, that of the last layer and the mask of dropout are saved.
    assert plain > 4 * 3 * block
    assert checkpointed < 4 * block
    assert checkpointed < plain / 5


@pytest.mark.slow
def test_ddp_has_the_same_bits_with_checkpoints(ranks: Ranks, tmp_path: Path) -> None:
    """Under DDP, each rank has the same losses, weights and buffers, with whole and separate replicas and a static graph."""
    for name, ddp in {"whole": {}, "static": {"static_graph": True}}.items():
        plain = ranks.run(train, DDPStrategy, str(tmp_path / name), **ddp)
        other = ranks.run(train, DDPStrategy, str(tmp_path / f"{name}_other"), activation_checkpointing=True, **ddp)
        for rank in range(2):
            assert_same(other[rank], plain[rank])
            assert other[rank][2] < plain[rank][2] / 5


def test_a_policy_that_selects_nothing_is_rejected(tmp_path: Path) -> None:
    """A model without a ModuleList has no default, and the error says how to name the modules."""
    strategy = SingleDeviceStrategy(work_dir=tmp_path, log_kwargs={"log_level": "ERROR"}, activation_checkpointing=True)
    try:
        with pytest.raises(
            ConfigValueError, match=r"activation_checkpointing=True selects no module of SupervisedModel.*policy="
        ):
            strategy.prepare(SupervisedModel(nn.Linear(2, 2), nn.MSELoss()))
    finally:
        strategy.close()


def test_checkpoints_of_a_compiled_model_are_rejected(tmp_path: Path) -> None:
    """The compiler cannot trace the hooks, so the combination raises an error that names the alternative."""
    with pytest.raises(
        PlacementError, match=r"activation_checkpointing=True cannot be combined with compile.*use_reentrant=False"
    ):
        train(SingleDeviceStrategy, tmp_path, activation_checkpointing=True, compile=True)


@pytest.mark.parametrize("kind", [SingleDeviceStrategy, DDPStrategy])
def test_an_unknown_option_is_rejected_before_the_model_is_built(kind: type[BaseStrategy]) -> None:
    """The options are checked together with the configuration."""
    with pytest.raises(ConfigKeyError, match="savd_ops"):
        kind.check_arguments({"activation_checkpointing": {"policy": "Block", "savd_ops": ["mm"]}})
