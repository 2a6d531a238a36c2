"""BatchNorm statistics of averaged weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset, TensorDataset

from stratagem.checkpoint import CheckpointLoader
from stratagem.errors import ConfigValueError
from stratagem.train import EMAHook
from tests.strategies.test_synced_buffers import Model, Trace, runner, same, samples
from tests.support.ranks import Ranks
from tests.train.toys import QUIET_HOOKS

STRATEGIES: dict[str, dict[str, Any]] = {
    "DDP": {"type": "DDPStrategy"},
    "FSDP": {"type": "FSDPStrategy"},
    "HSDP": {"type": "FSDPStrategy", "replicate": 2},
    "TP": {"type": "FSDPStrategy", "tp": 2, "tp_plan": {"body.2": "colwise_gather"}},
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Dropping(Model):
    """The model with BatchNorm and custom buffers, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(1, nn.Dropout(0.3))


def train(folder: str, strategy: Any = None, *, hook: Any, shuffle: bool = False, **changes: Any) -> Any:
    """Train for 12 iterations and validate every 3; return the metrics, the trace, the weights and the hook's average."""
    trace, ema = Trace(), EMAHook("StochasticWeightAverage", **hook)
    torch.manual_seed(0)
    made = runner(
        folder, strategy, model=Dropping(), custom_hooks=[ema, trace],
        train_dataloader={"batch_size": 4, "dataset": samples(), "shuffle": shuffle},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}}, train_cfg={"max_iters": 12, "val_interval": 3},
        default_hooks={**QUIET_HOOKS, "checkpoint": {"by_epoch": False, "interval": 6}}, **changes,
    )  # fmt: skip
    try:
        made.train()
        weights = {name: whole(value) for name, value in made.strategy.model_state_dict().items()}
        averages = {name: whole(value).clone() for name, value in ema.average.averages.items()}
        return trace.metrics, trace.buffers, weights, averages, ema.average.statistics
    finally:
        made.close()


def whole(value: Tensor) -> Tensor:
    """Return the whole tensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def by_hand(weights: dict[str, Tensor], averages: dict[str, Tensor], parts: int = 1) -> nn.Module:
    """Return the BatchNorm layer that torch's update_bn computes for the averages, with the batches of all ranks."""
    model = Dropping()
    model.load_state_dict({**weights, **averages})
    data = samples()
    shares = [Subset(data, range(rank, len(data), parts)) for rank in range(parts)]
    batches = [batch[0] for share in shares for batch in DataLoader(share, 4)]
    update_bn(batches, model.body)
    return model.body[0][0]


@pytest.mark.slow
def test_statistics_are_those_of_torch(tmp_path: Path):
    """At the end, the statistics are recomputed for the averaged weights, saved, and used by the last and later validations."""
    metrics, _, weights, averages, statistics = train(str(tmp_path), hook={"update_bn": True})
    expected = by_hand(weights, averages)
    for key in STATISTICS:
        assert torch.allclose(statistics[f"body.0.0.{key}"], getattr(expected, key))
    saved = CheckpointLoader.load_checkpoint(tmp_path / "iter_12", "cpu")
    assert same([saved["average"]["statistics"]], [statistics])
    assert "statistics" not in CheckpointLoader.load_checkpoint(tmp_path / "iter_6", "cpu")["average"]
    alone = runner(
        str(tmp_path / "alone"), None, model=Dropping(), custom_hooks=[EMAHook()], load_from=tmp_path / "iter_12"
    )
    assert alone.val()["meansquarederror"] == metrics[12]
    alone.close()


@pytest.mark.parametrize(
    "workers",
    [{}, pytest.param({"num_workers": 1, "persistent_workers": True}, marks=pytest.mark.slow)],
    ids=["main", "workers"],
)
def test_recomputing_does_not_change_the_training(tmp_path: Path, workers: dict[str, Any]):
    """With ``"eval"``, validations in the middle of an epoch read the data again; the trajectory is the same bit for bit."""
    plain = train(str(tmp_path / "plain"), hook={}, shuffle=True)
    hook = {"update_bn": "eval", "update_bn_batches": 2}
    data = {"batch_size": 4, "dataset": samples(), "shuffle": True, **workers}
    trace, ema = Trace(), EMAHook("StochasticWeightAverage", **hook)
    torch.manual_seed(0)
    made = runner(
        str(tmp_path / "eval"), None, model=Dropping(), custom_hooks=[ema, trace], train_dataloader=data,
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}}, train_cfg={"max_iters": 12, "val_interval": 3},
    )  # fmt: skip
    made.train()
    assert same(plain[1], trace.buffers)
    assert same([plain[2]], [made.strategy.model_state_dict()])
    assert trace.metrics[3] != plain[0][3]
    assert int(ema.average.statistics["body.0.0.num_batches_tracked"]) == 2
    made.close()


@pytest.mark.slow
def test_resumed_run_recomputes_the_same_statistics(tmp_path: Path):
    """A run that resumes from the middle ends with the same statistics and metrics."""
    hook = {"update_bn": "eval"}
    first = train(str(tmp_path), hook=hook, shuffle=True)
    second = train(str(tmp_path / "resumed"), hook=hook, shuffle=True, resume=str(tmp_path / "iter_6"))
    assert same([first[4]], [second[4]])
    assert first[0][9] == second[0][9]
    assert first[0][12] == second[0][12]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_statistics_cover_the_batches_of_all_ranks(ranks: Ranks, tmp_path: Path, strategy: str):
    """All ranks have the statistics over the batches of all ranks, and the checkpoint scores as logged."""
    found = ranks.run(train, str(tmp_path), STRATEGIES[strategy], hook={"update_bn": True})
    expected = by_hand(found[0][2], found[0][3], parts=1 if strategy == "TP" else 2)
    for metrics, _, _, _, statistics in found:
        assert metrics == found[0][0]
        for key in STATISTICS:
            assert torch.allclose(statistics[f"body.0.0.{key}"], getattr(expected, key), atol=1e-6)
    alone = runner(
        str(tmp_path / "alone"), None, model=Dropping(), custom_hooks=[EMAHook()], load_from=tmp_path / "iter_12"
    )
    assert alone.val()["meansquarederror"] == pytest.approx(found[0][0][12], rel=1e-5)
    alone.close()


class OwnStep(Dropping):
    """A model with its own training step."""

    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        """Train on one batch."""
        return super().train_step(data, optim_wrapper)


def test_runs_that_cannot_recompute_are_refused_at_the_start(tmp_path: Path):
    """A custom training step, or data that cannot be read twice, is an error before the first iteration."""
    with pytest.raises(ConfigValueError, match="OwnStep defines another train_step"):
        start(tmp_path / "step", OwnStep(), {"batch_size": 4, "dataset": samples()})
    stream = [copy.deepcopy(each) for each in TensorDataset(*samples().tensors)]
    with pytest.raises(ConfigValueError, match="requires a built-in sampler"):
        start(tmp_path / "data", Dropping(), DataLoader(stream, 4, generator=torch.Generator(), shuffle=True))
    with pytest.raises(ConfigValueError, match="update_bn must be True"):
        EMAHook(update_bn="val")
    with pytest.raises(ConfigValueError, match="requires update_bn"):
        EMAHook(update_bn_batches=3)


def start(folder: Path, model: Any, data: Any) -> None:
    """Start a training that recomputes the statistics."""
    made = runner(
        str(folder), None, model=model, custom_hooks=[EMAHook(update_bn=True)], train_dataloader=data,
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}}, train_cfg={"max_iters": 2},
    )  # fmt: skip
    try:
        made.train()
    finally:
        made.close()
