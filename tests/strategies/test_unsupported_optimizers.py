"""Combinations of optimizers, gradients and options of a strategy that are rejected or need special handling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.dist import get_rank
from stratagem.errors import ConfigValueError, PlacementError
from stratagem.model import SupervisedModel
from stratagem.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from tests.support.ranks import Ranks, seed_generators
from tests.support.small_runs import Mlp, batch

QUIET = {"log_kwargs": {"log_level": "ERROR"}}


def test_lbfgs_is_refused_before_training_with_the_default_train_step(tmp_path: Path) -> None:
    """The error explains that a closure is needed; torch would only report a missing argument in the first step."""
    strategy = SingleDeviceStrategy(work_dir=str(tmp_path), **QUIET)
    with pytest.raises(ConfigValueError, match="LBFGS calls a closure several times per update"):
        strategy.prepare(Mlp(), optim_wrapper={"optimizer": {"type": "LBFGS"}})
    strategy.close()


class WithClosure(Mlp):
    """A model whose step passes a closure."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Update with LBFGS."""

        def closure() -> Tensor:
            optim_wrapper.zero_grad()
            loss: Tensor = self(*data, mode="loss")["loss"]
            loss.backward()
            return loss

        loss = closure()
        optim_wrapper.step(closure=closure)
        return {"loss": loss.detach()}


def test_lbfgs_works_with_a_closure(tmp_path: Path) -> None:
    """A train_step that passes a closure trains."""
    strategy = SingleDeviceStrategy(work_dir=str(tmp_path), **QUIET)
    model, optim = strategy.prepare(WithClosure(), optim_wrapper={"optimizer": {"type": "LBFGS"}})
    losses = [model.train_step(batch(), optim)["loss"].item() for _ in range(2)]
    strategy.close()
    assert losses[1] < losses[0]


def static_graph(folder: str, accumulative_counts: int) -> Tensor:
    """Return the weights after two updates with a static graph."""
    strategy = DDPStrategy(work_dir=folder, static_graph=True, env_kwargs={"launcher": "pytorch"}, **QUIET)
    seed_generators(4)
    optim = {"optimizer": {"type": "SGD", "lr": 0.5}, "accumulative_counts": accumulative_counts}
    model, wrapper = strategy.prepare(Mlp(), optim_wrapper=optim, dispatch_kwargs={"max_iters": 4})
    inputs, targets = batch(16)
    for part in range(4):
        mine = slice(4 * part + 2 * get_rank(), 4 * part + 2 * get_rank() + 2)
        model.train_step((inputs[mine], targets[mine]), wrapper)
    weights = strategy.unwrap_model().layers[0].weight.detach().clone()
    strategy.close()
    return weights


def test_a_static_graph_works_with_accumulation(ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks with two micro-batches per update equal plain torch with both batches at once."""
    found = ranks.run(static_graph, str(tmp_path), 2)
    seed_generators(4)
    model = Mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs, targets = batch(16)
    model.init_weights()
    for part in (slice(0, 8), slice(8, 16)):
        optimizer.zero_grad()
        model(inputs[part], targets[part], mode="loss")["loss"].backward()
        optimizer.step()
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], model.layers[0].weight.detach())


def sharded(folder: str) -> tuple[str, str]:
    """Return the error for a sparse embedding, and the log of a model in bfloat16."""
    strategy = FSDPStrategy(work_dir=folder, env_kwargs={"launcher": "pytorch"}, **QUIET)
    with pytest.raises(PlacementError) as error:
        strategy.prepare(SupervisedModel(nn.Sequential(nn.Embedding(4, 2, sparse=True)), nn.MSELoss()))
    strategy.close()
    strategy = FSDPStrategy(work_dir=folder, mixed_precision="bfloat16", env_kwargs={"launcher": "pytorch"})
    strategy.prepare(SupervisedModel(nn.Linear(2, 2), nn.MSELoss()))
    file = strategy.logger.log_file
    log = file.read_text() if file else ""
    strategy.close()
    return str(error.value), log


def test_fsdp_names_sparse_embeddings_and_logs_the_cast_of_targets(ranks: Ranks, tmp_path: Path) -> None:
    """Sparse gradients are refused by name; the log states once that targets are rounded and how to avoid it."""
    error, log = ranks.run(sharded, str(tmp_path))[0]
    assert "'network.0' has sparse gradients (sparse=True), which FSDP cannot reduce" in error
    assert log.count("including regression targets") == 1
    assert "cast_forward_inputs=False" in log
