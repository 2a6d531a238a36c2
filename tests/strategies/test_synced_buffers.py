"""Evaluations and checkpoints of models with buffers that each rank updates from its own samples."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from stratagem import Runner
from stratagem.config import Config, check
from stratagem.config_schema import SECTIONS
from stratagem.errors import ConfigValueError, StateError
from stratagem.model import BaseModel
from stratagem.strategies import SingleDeviceStrategy
from stratagem.strategies.state import synced_buffers
from stratagem.train import EMAHook, Hook
from tests.support.ranks import Ranks
from tests.support.small_runs import Lines
from tests.train.toys import QUIET_HOOKS

# The number of iterations of a run: 32 samples in batches of 4 on each of two ranks.
ITERATIONS = 12


class Counter(nn.Module):
    """A layer with an integer, a floating-point and a non-persistent buffer that depend on the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positives", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add a value that depends on the buffers in evaluation; update them in training."""
        if self.training:
            self.positives += (x > 1).sum()
            self.seen.lerp_(x.detach().mean(0), 0.5)
            self.cache.copy_(x.detach()[0])
            return x
        return x + 0.01 * self.positives + self.seen


class Model(BaseModel):
    """A linear layer after BatchNorm and a custom layer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(nn.BatchNorm1d(width), Counter()), nn.Linear(width, 2))

    def forward(self, x: Tensor, y: Tensor, mode: str = "tensor") -> Any:
        """Return the loss, or the predictions and targets."""
        out = self.body(x)
        return {"loss": nn.functional.mse_loss(out, y)} if mode == "loss" else {"preds": out, "target": y}


def samples() -> TensorDataset:
    """Return 32 samples; those of the second rank have another mean."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=generator)
    x[1::2] += 3
    return TensorDataset(x, torch.randn(32, 2, generator=generator))


def data() -> dict[str, Any]:
    """Return the configuration of a loader whose ranks read different kinds of samples."""
    return {"batch_size": 4, "dataset": samples(), "shuffle": False}


class Trace(Hook):
    """Records the metrics of each validation, and the buffers after each iteration."""

    def __init__(self) -> None:
        self.metrics: dict[int, float] = {}
        self.buffers: list[dict[str, Tensor]] = []

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        model = run.strategy.unwrap_model()
        self.buffers.append({name: buffer.clone() for name, buffer in model.named_buffers()})

    def after_val_epoch(self, run: Any, metrics: Any = None) -> None:
        self.metrics[run.iter] = metrics["meansquarederror"]


def runner(work_dir: str, strategy: Mapping[str, Any] | None, **changes: Any) -> Runner:
    """Return the runner of the test model."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "model": Model(),
        "work_dir": work_dir,
        "val_dataloader": data(),
        "val_cfg": {},
        "val_evaluator": {"type": "MeanSquaredError"},
        "default_hooks": QUIET_HOOKS,
        "log_level": "WARNING",
        "randomness": {"seed": 0},
    }
    return Runner(**{**settings, "strategy": strategy, **changes})


def train(work_dir: str, strategy: Mapping[str, Any], *, interval: int = 4, saves: int = 4, **changes: Any) -> Any:
    """Train on this rank; return the metrics, the trace of this rank's buffers, the weights and the log."""
    trace = Trace()
    hooks = {**QUIET_HOOKS, "checkpoint": {"interval": saves, "by_epoch": False, **changes.pop("checkpoint", {})}}
    training = {
        "train_dataloader": data(),
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}},
        "train_cfg": {"max_iters": ITERATIONS, "val_interval": interval},
        "custom_hooks": [trace],
    }
    if not interval:
        training["train_cfg"] = {"max_iters": ITERATIONS}
        changes |= dict.fromkeys(("val_dataloader", "val_cfg", "val_evaluator"))
    made = runner(work_dir, strategy, **{**training, "log_level": "INFO", "default_hooks": hooks, **changes})
    lines = Lines(made.strategy)
    try:
        made.train()
        state = made.strategy.model_state_dict()
        weights = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()
        }
        return trace.metrics, trace.buffers, weights, lines.lines
    finally:
        made.close()


def evaluate_alone(work_dir: Path, checkpoint: Path) -> float:
    """Evaluate a checkpoint in a single process and return its metric."""
    made = runner(str(work_dir), None, load_from=checkpoint)
    try:
        return made.val()["meansquarederror"]
    finally:
        made.close()


STRATEGIES = {
    "DDP": {"type": "DDPStrategy"},
    "DDP broadcast": {"type": "DDPStrategy", "broadcast_buffers": True},
    "FSDP": {"type": "FSDPStrategy"},
    "HSDP": {"type": "FSDPStrategy", "replicate": 2},
    "TP": {"type": "FSDPStrategy", "tp": 2, "tp_plan": {"body.1": "colwise_gather"}},
}


def same(first: Any, second: Any) -> bool:
    """Return whether two lists of named tensors are equal bit for bit."""
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("source", ["rank0", "mean"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logged_metric_equals_the_metric_of_the_checkpoint(ranks: Ranks, tmp_path: Path, strategy: str, source: str):
    """A validation with several ranks gives the metric of the model in the checkpoint of the same iteration."""
    (metrics, *_), (others, *_) = ranks.run(train, str(tmp_path), {**STRATEGIES[strategy], "buffers": source})
    assert metrics == others
    for iteration in (4, 8, 12):
        alone = evaluate_alone(tmp_path / "alone", tmp_path / f"iter_{iteration}")
        assert alone == pytest.approx(metrics[iteration], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["DDP", "FSDP"])
def test_evaluations_and_saves_do_not_change_the_training(ranks: Ranks, tmp_path: Path, strategy: str):
    """The intervals of evaluations and saves do not affect the weights and the buffers of each rank, bit for bit."""
    runs = [
        ranks.run(train, str(tmp_path / str(number)), {**STRATEGIES[strategy], "buffers": source}, **intervals)
        for number, (source, intervals) in enumerate(
            [
                ("rank0", {"interval": 0, "saves": -1}),
                ("rank0", {"interval": 1, "saves": 3}),
                ("mean", {"interval": 7, "saves": 1}),
            ]
        )
    ]
    for rank in range(2):
        assert same(runs[0][rank][1], runs[1][rank][1])
        assert same(runs[0][rank][1], runs[2][rank][1])
    parameters = [[{name: value for name, value in run[0][2].items() if "1." in name}] for run in runs]
    assert same(parameters[0], parameters[1])
    assert same(parameters[0], parameters[2])
    assert not same(runs[0][0][1], runs[0][1][1])


@pytest.mark.slow
def test_resumed_run_has_the_buffers_of_each_rank(ranks: Ranks, tmp_path: Path):
    """A checkpoint with the mean of the statistics still restores the statistics of each rank."""
    strategy = {"type": "DDPStrategy", "buffers": "mean"}
    whole = ranks.run(train, str(tmp_path), strategy)
    resumed = ranks.run(train, str(tmp_path / "resumed"), strategy, resume=str(tmp_path / "iter_8"))
    for rank in range(2):
        kept = [
            [{name: value for name, value in each.items() if "cache" not in name} for each in run[rank][1]]
            for run in (whole, resumed)
        ]
        assert same(kept[0][8:], kept[1])


@pytest.mark.slow
def test_mean_applies_to_running_statistics_only(ranks: Ranks, tmp_path: Path):
    """With buffers="mean", the running mean and variance are averaged; counters and other buffers are those of rank 0."""
    (_, buffers, weights, _), (_, others, theirs, _) = ranks.run(
        train, str(tmp_path), {"type": "DDPStrategy", "buffers": "mean"}
    )
    assert same([weights], [theirs])
    for name in ("body.0.0.running_mean", "body.0.0.running_var"):
        assert torch.allclose(weights[name], (buffers[-1][name] + others[-1][name]) / 2)
    for name in ("body.0.0.num_batches_tracked", "body.0.1.positives", "body.0.1.seen"):
        assert torch.equal(weights[name], buffers[-1][name])
    assert not torch.equal(buffers[-1]["body.0.1.seen"], others[-1]["body.0.1.seen"])


@pytest.mark.slow
def test_best_checkpoint_contains_the_buffers_that_scored(ranks: Ranks, tmp_path: Path):
    """``save_best`` uses the score of the model that it saves."""
    best = {"save_best": "meansquarederror", "rule": "less"}
    (metrics, *_), _ = ranks.run(train, str(tmp_path), STRATEGIES["DDP"], interval=3, saves=-1, checkpoint=best)
    (path,) = tmp_path.glob("best_*")
    alone = evaluate_alone(tmp_path / "alone", path)
    assert alone == pytest.approx(min(metrics.values()), rel=1e-5)


@pytest.mark.slow
def test_log_names_the_buffers_once(ranks: Ranks, tmp_path: Path):
    """The log names BatchNorm layers before training, and other buffers once, when they first differ between ranks."""
    (*_, lines), _ = ranks.run(train, str(tmp_path), STRATEGIES["DDP"])
    reported = [line for line in lines if "from its own samples" in line]
    assert len(reported) == 2
    assert "running_mean" in reported[0]
    assert "running_var" in reported[0]
    assert "buffers='rank0'" in reported[0]
    assert "body.0.1.positives" in reported[1]
    assert "body.0.1.cache" in reported[1]


class Ragged(Model):
    """A model with a buffer whose shape depends on the rank."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        rank = torch.distributed.get_rank()
        self.register_buffer("table", torch.full((rank + 2,), float(rank)), persistent=persistent)


def shapes(work_dir: str, *, persistent: bool) -> Any:
    """Return the ragged buffer inside and after an evaluation, or the error."""
    made = runner(work_dir, {"type": "DDPStrategy"})
    try:
        strategy = made.strategy
        model = Ragged(persistent=persistent)
        sync = synced_buffers.SyncedBuffers(strategy.world, strategy.logger, "rank0")
        with sync.applied(model, None):
            inside = model.table.tolist()
        return inside, model.table.tolist()
    except StateError as error:
        return str(error)
    finally:
        made.close()


@pytest.mark.slow
def test_buffers_of_different_shapes_are_rejected_or_caches(ranks: Ranks, tmp_path: Path):
    """A persistent buffer must have the same shape on all ranks; a non-persistent one is a local cache and is unchanged."""
    for error in ranks.run(shapes, str(tmp_path), persistent=True):
        assert "'table'" in error
        assert "rank 0: float32[2], rank 1: float32[3]" in error
    assert ranks.run(shapes, str(tmp_path), persistent=False) == [
        ([0.0, 0.0], [0.0, 0.0]),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
    ]


def count_collectives(work_dir: str) -> list[str]:
    """Return the collectives that are run to synchronize equal buffers."""
    made = runner(work_dir, {"type": "DDPStrategy"})
    called: list[str] = []
    with contextlib.ExitStack() as stack:
        stack.callback(made.close)
        made.strategy.prepare(Model())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("all_gather_object", "all_reduce", "broadcast"):
            original = getattr(synced_buffers, name)

            def counting(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
                called.append(name)
                return original(*args, **kwargs)

            patch.setattr(synced_buffers, name, counting)
        with made.strategy.synchronized_buffers() as replaced:
            assert replaced == ()
    return called


@pytest.mark.slow
def test_equal_buffers_cost_one_comparison(ranks: Ranks, tmp_path: Path):
    """If all buffers are equal, an evaluation compares one digest and does not communicate the buffers."""
    assert ranks.run(count_collectives, str(tmp_path)) == [["all_gather_object"]] * 2


def test_single_process_evaluates_its_buffers(tmp_path: Path):
    """In a single process, both values of ``buffers`` select the buffers of that process."""
    strategy = SingleDeviceStrategy(work_dir=tmp_path, buffers="mean")
    try:
        model = strategy.prepare(Model())
        with strategy.synchronized_buffers() as replaced:
            assert replaced == ()
        assert strategy.unwrap_model() is model
    finally:
        strategy.close()


def test_unknown_source_is_rejected(tmp_path: Path):
    """The strategy and the check of the configuration both suggest the closest valid value."""
    with pytest.raises(ConfigValueError, match="Invalid value for buffers: 'rank'. Did you mean 'rank0'"):
        SingleDeviceStrategy(work_dir=tmp_path, buffers="rank")
    for kind in ("SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "DeepSpeedStrategy", "ColossalAIStrategy"):
        config = Config({"strategy": {"type": kind, "buffers": "rank"}})
        (problem,) = check(config, {"strategy": SECTIONS["strategy"]})
        assert "strategy.buffers" in str(problem)
        assert "Invalid value for buffers: 'rank'. Did you mean 'rank0'" in str(problem)
        assert not check(Config({"strategy": {"type": kind, "buffers": "mean"}}), {"strategy": SECTIONS["strategy"]})


class Tracked(nn.Linear):
    """A linear layer with a buffer that depends on the samples; a tensor-parallel plan converts it to a ``DTensor``."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs)
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Subtract the buffer, and update it in training."""
        y = super().forward(x - self.seen)
        if self.training:
            with torch.no_grad():
                self.seen.lerp_(x.detach().square().mean(0) + x.detach()[0], 0.1)
        return y


class TrackedModel(Model):
    """The model with a buffer in the layer that is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1] = Tracked(4, 2)


def train_tracked(work_dir: str, source: str, **changes: Any) -> Any:
    """Train with FSDP and tensor parallelism; return the metrics, the whole buffers and the averages of this rank."""
    plan = {"body.1": "colwise_gather"}
    strategy = {"type": "FSDPStrategy", "tp": 2, "tp_plan": plan, "buffers": source}
    trace, ema = Trace(), EMAHook(update_buffers=True)
    torch.manual_seed(0)
    hooks = [ema, trace] if changes.pop("average", False) else [trace]
    train(work_dir, strategy, model=TrackedModel(), custom_hooks=hooks, **changes)
    averages = [] if len(hooks) == 1 else [{name: whole(each) for name, each in ema.average.averages.items()}]
    buffers = [
        {name: whole(each) for name, each in buffers.items() if "cache" not in name} for buffers in trace.buffers
    ]
    return trace.metrics, buffers, averages


def whole(value: Tensor) -> Tensor:
    """Return a copy of the whole tensor."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["rank0", "mean"])
def test_buffers_of_tensor_parallel_layers_are_evaluated_and_resumed_as_others(
    four: Ranks, tmp_path: Path, source: str
):
    """Each rank resumes with its buffers, evaluations use those of the checkpoint and do not change the training."""
    found = four.run(train_tracked, str(tmp_path), source)
    assert not torch.equal(found[0][1][-1]["body.1.seen"], found[2][1][-1]["body.1.seen"])
    alone = runner(str(tmp_path / "alone"), None, load_from=tmp_path / "iter_12", model=TrackedModel())
    assert alone.val()["meansquarederror"] == pytest.approx(found[0][0][12], rel=1e-5)
    alone.close()
    without = four.run(train_tracked, str(tmp_path / "without"), source, interval=0)
    resumed = four.run(train_tracked, str(tmp_path / "resumed"), source, resume=str(tmp_path / "iter_8"))
    for rank in range(4):
        assert found[rank][0] == found[0][0]
        assert same(found[rank][1], without[rank][1])
        assert same(found[rank][1][8:], resumed[rank][1])


@pytest.mark.slow
def test_averaged_buffers_of_tensor_parallel_layers_are_saved_and_resumed(four: Ranks, tmp_path: Path):
    """The averages of buffers that differ between ranks are those of the uninterrupted run."""
    found = four.run(train_tracked, str(tmp_path), "rank0", average=True)
    resumed = four.run(train_tracked, str(tmp_path / "resumed"), "rank0", average=True, resume=str(tmp_path / "iter_8"))
    for rank in range(4):
        assert same(found[rank][2], resumed[rank][2])
