"""Activation checkpointing of modules that update buffers, under strategies with several ranks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.dist import get_rank
from stratagem.model import SupervisedModel
from stratagem.strategies import BaseStrategy, DDPStrategy, FSDPStrategy
from tests.model.test_recomputation import Network, equal, non_reentrant, reentrant
from tests.support.ranks import Ranks

pytestmark = pytest.mark.slow


def train(
    kind: type[BaseStrategy], work_dir: str, options: Mapping[str, Any], call: Any = None, *, custom: bool = True
) -> Any:
    """Train for three iterations on this rank; return the parameters and the buffers."""
    torch.manual_seed(0)
    network = Network(call)
    if not custom:
        for block in network.blocks:
            del block.layers[2]
    strategy = kind(work_dir=work_dir, log_kwargs={"log_level": "WARNING"}, **options)
    try:
        model, optim = strategy.prepare(
            SupervisedModel(network, nn.MSELoss()), optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}}
        )
        generator = torch.Generator().manual_seed(get_rank())
        for _ in range(3):
            x = torch.randn(8, 6, generator=generator).requires_grad_()
            model.train_step((x, x.detach().sum(1, keepdim=True)), optim_wrapper=optim)
        model = strategy.unwrap_model()
        parameters = {name: _whole(each.detach()) for name, each in model.named_parameters()}
        return parameters, {name: each.clone() for name, each in model.named_buffers()}
    finally:
        strategy.close()


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": {"policy": "Block", "save_ops": ["mm", "addmm"]}},
        {"activation_checkpointing": {"policy": {"classes": "BatchNorm1d"}, "preserve_rng_state": False}},
    ],
    ids=["all", "save_ops", "one layer"],
)
def test_fsdp_checkpoints_train_as_without(ranks: Ranks, tmp_path: Path, options: Mapping[str, Any]):
    """With the option activation_checkpointing, parameters and buffers of each rank are equal bit for bit."""
    wrapped = {"wrap_policy": "Block"}
    plain = ranks.run(train, FSDPStrategy, str(tmp_path / "plain"), wrapped)
    checkpointed = ranks.run(train, FSDPStrategy, str(tmp_path / "checkpointed"), {**wrapped, **options})
    for rank in range(2):
        assert equal(plain[rank][0], checkpointed[rank][0])
        assert equal(plain[rank][1], checkpointed[rank][1])
    assert not equal(plain[0][1], plain[1][1])


@pytest.mark.parametrize("call", [reentrant, non_reentrant])
@pytest.mark.parametrize("kind", [DDPStrategy, FSDPStrategy])
def test_checkpoints_in_the_model_keep_batch_norm(ranks: Ranks, tmp_path: Path, kind: type[BaseStrategy], call: Any):
    """If a model calls torch's checkpoint, BatchNorm is updated on each rank as it would be without the call."""
    plain = ranks.run(train, kind, str(tmp_path / "plain"), {}, custom=False)
    checkpointed = ranks.run(train, kind, str(tmp_path / "checkpointed"), {}, call, custom=False)
    for rank in range(2):
        assert equal(plain[rank][0], checkpointed[rank][0])
        assert equal(plain[rank][1], checkpointed[rank][1])
