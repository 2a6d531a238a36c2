"""Runs whose batches are copied to the device one ahead: the same results as without, also after a resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stratagem import Runner
from stratagem.config import Config
from stratagem.config_schema import require_valid
from stratagem.data import build_dataloader
from stratagem.errors import ConfigError, ConfigValueError
from stratagem.model import BaseDataPreprocessor
from stratagem.train import BaseMetric, Hook
from stratagem.train.run import device_batches
from tests.support.copy_streams import DelayedStream, copying_ahead
from tests.support.ranks import Ranks
from tests.train.loader_kinds import run
from tests.train.test_uneven_data import Part
from tests.train.test_uneven_data import train as train_uneven
from tests.train.test_update_bn import train as train_with_batch_norm
from tests.train.toys import EPOCH, VALIDATION, At, Recorder, Samples, Toy, loader, stop, train_until_signal

MakeRunner = Callable[..., Runner]
LENGTHS: dict[str, dict[str, Any]] = {
    "epochs": {"train_cfg": {"by_epoch": True, "max_epochs": 3}},
    "iterations": {"train_cfg": {"by_epoch": False, "max_iters": 17, "val_interval": 5}},
}


def ahead(**changes: Any) -> dict[str, Any]:
    """Return the data of the small run, read ahead."""
    validation = {**VALIDATION, "val_dataloader": loader(5, device_prefetch=True)}
    return {"train_dataloader": loader(device_prefetch=True, **changes), **validation}


def outcome(runner: Runner, recorder: Recorder) -> tuple[Any, ...]:
    """Return the recorded iterations and metrics, and the final weights."""
    return recorder.rows, recorder.metrics, {k: v.tolist() for k, v in runner.strategy.model_state_dict().items()}


def whole(make_runner: MakeRunner, tmp_path: Path, **changes: Any) -> tuple[Any, ...]:
    """Train without reading ahead and without a stop."""
    recorder = Recorder()
    runner = make_runner(work_dir=tmp_path / "whole", custom_hooks=[recorder], **{**VALIDATION, **changes})
    runner.train()
    return outcome(runner, recorder)


@pytest.mark.parametrize("length", LENGTHS)
def test_reading_ahead_does_not_change_a_run(make_runner: MakeRunner, tmp_path: Path, length: str) -> None:
    """Samples, losses, metrics and weights are identical; each batch is copied once and waited for before it is used."""
    recorder = Recorder()
    with copying_ahead() as calls:
        runner = make_runner(custom_hooks=[recorder], **ahead(), **LENGTHS[length])
        runner.train()
    assert outcome(runner, recorder) == whole(make_runner, tmp_path, **LENGTHS[length])
    validations = len(recorder.metrics)
    trained = len(recorder.rows)
    # The validation has 3 batches. An epoch has no more batches, so nothing is copied in vain.
    waits = sum(name == "wait" for name, _ in calls)
    assert waits == trained + 3 * validations
    assert sum(name == "copy" for name, _ in calls) - waits == (1 if length == "iterations" else 0)


STOPS = [("epochs", (4,)), ("epochs", (EPOCH,)), ("iterations", (5,))]
MORE_STOPS = [
    ("epochs", (1,)),
    ("epochs", (EPOCH - 1,)),
    ("epochs", (3, 5, EPOCH + 1)),
    ("iterations", (EPOCH,)),
    ("iterations", (2, 9, 16)),
]


@pytest.mark.parametrize(
    ("length", "stops"), [*STOPS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_STOPS)]
)
def test_the_batch_that_was_read_ahead_is_trained_after_a_resume(
    make_runner: MakeRunner, tmp_path: Path, length: str, stops: tuple[int, ...]
) -> None:
    """An interrupted run, whose last copied batch was not trained, resumes with the same bits as a run without a stop."""
    pieces = Recorder()
    with copying_ahead():
        for iteration in stops:
            interrupt = At(iteration, lambda _: os.kill(os.getpid(), signal.SIGINT))
            made = make_runner(custom_hooks=[pieces, interrupt], resume=True, **ahead(), **LENGTHS[length])
            train_until_signal(made)
        runner = make_runner(custom_hooks=[pieces], resume=True, **ahead(), **LENGTHS[length])
        runner.train()
    assert outcome(runner, pieces) == whole(make_runner, tmp_path, **LENGTHS[length])


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_a_run_with_workers_resumes_the_batch_that_was_read_ahead(
    make_runner: MakeRunner, tmp_path: Path, persistent: bool
) -> None:
    """The same holds for the default, which reads loaders with workers ahead."""
    data = loader(num_workers=2, persistent_workers=persistent)
    pieces = Recorder()
    with copying_ahead() as calls:
        made = make_runner(custom_hooks=[pieces, At(4, stop)], train_dataloader=data, **VALIDATION)
        made.train()
        assert calls[-1] == ("copy", 4)
        made.train()
    assert outcome(made, pieces) == whole(make_runner, tmp_path)


class Batches(BaseMetric):
    """Records the batches that a metric receives."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(data_batch)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return {"count": len(results)}


class Seen(Toy):
    """Records the batches of the training and evaluation steps."""

    def __init__(self, batches: list[Any]) -> None:
        super().__init__()
        self.batches = batches

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        self.batches.append(data)
        return super().train_step(data, optim_wrapper)

    def val_step(self, data: Any) -> Any:
        self.batches.append(data)
        return super().val_step(data)


class Copies(DelayedStream):
    """Records the copies."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[Any] = []
        self.hosts: list[Any] = []

    def copy(self, host: Any) -> tuple[Any, int]:
        copied, event = super().copy(host)
        self.hosts.append(host)
        self.copies.append(copied)
        return copied, event


def test_steps_receive_the_copies_and_metrics_the_batches_of_the_loader(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A custom train_step receives the copy; a metric receives the batch on the host, which it can convert to NumPy."""
    stream, seen, metric = Copies(), [], Batches()
    monkeypatch.setattr(metric, "compute_metrics", lambda results: {"same": float(results == stream.hosts[2:])})
    with copying_ahead(stream):
        settings = {**ahead(), "val_evaluator": metric, "train_cfg": {"by_epoch": False, "max_iters": 1}}
        runner = make_runner(model=Seen(seen), **settings)
        runner.train()
    # Two training batches were copied and one was trained; three were evaluated.
    assert [id(batch) for batch in seen] == [id(batch) for batch in [stream.copies[0], *stream.copies[2:]]]
    assert runner.run.metrics == {"same": 1.0}


class Doubling(Hook):
    """Changes the features of each batch in place."""

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        data_batch[0].mul_(2.0)


@pytest.mark.slow
def test_a_hook_can_change_the_batch(make_runner: MakeRunner, tmp_path: Path) -> None:
    """Hooks receive the copy that is trained, so what they change in place is trained."""
    outcomes = []
    for prefetch in (True, False):
        recorder = Recorder()
        with copying_ahead():
            data = loader(device_prefetch=prefetch)
            runner = make_runner(
                work_dir=tmp_path / str(prefetch), custom_hooks=[Doubling(), recorder], train_dataloader=data
            )
            runner.train()
        outcomes.append(outcome(runner, recorder))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] != whole(make_runner, tmp_path)[0]


@pytest.mark.slow
def test_the_epoch_ends_with_the_shortest_rank(ranks: Ranks, tmp_path: Path) -> None:
    """If the ranks have 5 and 3 batches, 3 are trained on both, or all ranks raise the same error, as without reading ahead."""
    first, second = ranks.run(train_uneven_ahead, str(tmp_path))
    epoch = [[0, 1], [2, 3], [4, 5]]
    assert first[0] == epoch
    assert second[0] == [[number + 100 for number in batch] for batch in epoch]
    assert first[1] == second[1]
    assert first[1].startswith("Epoch 1: rank 1 ran out of training data after 3 batches, but rank 0 has more.")


def train_uneven_ahead(folder: str) -> list[Any]:
    """Train until the shortest rank ends, and until the error."""
    with copying_ahead() as calls:
        shortest = {"train_cfg": {"max_epochs": 1, "uneven_data": "shortest"}}
        results = train_uneven(f"{folder}/shortest", ["stream on request"], "DDPStrategy", shortest)
        results += train_uneven(f"{folder}/error", ["stream on request"], "DDPStrategy", {})
    assert calls
    return results


@pytest.mark.slow
def test_padding_forward_passes_work_with_batches_read_ahead(ranks: Ranks, tmp_path: Path) -> None:
    """If ranks have different numbers of batches under FSDP, metrics are the same with and without reading ahead."""
    ahead = ranks.run(evaluate, str(tmp_path / "ahead"), ahead=True)
    assert ahead == ranks.run(evaluate, str(tmp_path / "plain"), ahead=False)


def evaluate(folder: str, *, ahead: bool) -> list[Any]:
    """Train and evaluate with 3 and 2 batches on the two ranks, and with streams of unknown length; return the metrics."""
    data = DataLoader(torch.arange(4.0).unsqueeze(1), batch_size=2)  # type: ignore[arg-type]
    sized = DataLoader(torch.arange(5.0).unsqueeze(1))  # type: ignore[arg-type]
    stream = DataLoader(Part(torch.distributed.get_rank()), batch_size=2)
    with copying_ahead(always=True) if ahead else nullcontext():
        return [run(f"{folder}/{each}", "FSDPStrategy", data, val)[1] for each, val in enumerate((sized, stream))]


class Damaged(Samples):
    """The sixth sample cannot be loaded."""

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise ValueError("the sample is damaged")
        return super().__getitem__(index)


def test_an_error_names_its_iteration_and_the_copy(make_runner: MakeRunner) -> None:
    """Samples 4 and 5 form the third batch: the error is raised after two iterations, and not one earlier."""
    recorder = Recorder()
    data = {**loader(device_prefetch=True, shuffle=False), "dataset": Damaged()}
    with copying_ahead():
        runner = make_runner(custom_hooks=[recorder], train_dataloader=data)
        with pytest.raises(ValueError, match="damaged") as failure:
            runner.train()
    assert len(recorder.rows) == 2
    assert "In iteration 3, epoch 1" in failure.value.__notes__[0]
    assert "copied to cpu before the iteration (see device_prefetch)" in failure.value.__notes__[0]


def test_the_data_time_does_not_contain_the_time_for_starting_copies(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that blocks for five seconds is not booked as waiting for data."""
    clock = [0.0]

    class Blocking(DelayedStream):
        def copy(self, host: Any) -> tuple[Any, int]:
            clock[0] += 5.0
            return super().copy(host)

    for module in ("stratagem.train.loops", "stratagem.train.run.device_batches"):
        monkeypatch.setattr(f"{module}.perf_counter", lambda: clock[0])
    with copying_ahead(Blocking()):
        runner = make_runner(train_dataloader=loader(device_prefetch=True), train_cfg={"max_epochs": 1})
        runner.train()
    assert clock[0] == EPOCH * 5.0
    assert runner.run.step_timer.data_seconds == 0.0


@pytest.mark.parametrize(
    ("on", "non_blocking", "expected"), [("cuda", None, True), ("cuda", False, False), ("cpu", None, False)]
)
def test_batches_are_copied_to_the_device_of_the_preprocessor(
    monkeypatch: pytest.MonkeyPatch, on: str, non_blocking: bool | None, expected: bool
) -> None:
    """Nothing is copied ahead if the weights and thus the batches are on the CPU, or if blocking copies are configured."""
    model = Toy()
    preprocessor = BaseDataPreprocessor(non_blocking=non_blocking)
    preprocessor.device = torch.device(on)
    model.data_preprocessor = preprocessor
    devices = []
    monkeypatch.setattr(torch, "Stream", devices.append)
    strategy = SimpleNamespace(unwrap_model=lambda: model)
    run: Any = SimpleNamespace(world=SimpleNamespace(device=torch.device("cuda", 1)), strategy=strategy)
    assert (device_batches._new_stream(run) is not None) is expected
    assert devices == ([torch.device("cuda")] if expected else [])
    model.data_preprocessor = torch.nn.Identity()
    assert device_batches._new_stream(run) is not None
    assert devices[-1] == torch.device("cuda", 1)


def test_required_reading_ahead_conflicts_with_blocking_copies() -> None:
    """If the data preprocessor has ``non_blocking=False``, ``device_prefetch=True`` is an error instead of having no effect."""
    model = Toy()
    model.data_preprocessor = BaseDataPreprocessor(non_blocking=False)
    strategy = SimpleNamespace(unwrap_model=lambda: model)
    run: Any = SimpleNamespace(world=SimpleNamespace(device=torch.device("cuda")), strategy=strategy)
    options: dict[str, Any] = {"seed": 0, "training": True, "device": torch.device("cuda")}
    built = build_dataloader(loader(device_prefetch=True), **options)
    with pytest.raises(ConfigValueError, match="non_blocking=False. Remove one"):
        device_batches.device_batches(run, built, iter([]))
    built = build_dataloader(loader(), **options)
    built.reads_ahead = True
    assert list(device_batches.device_batches(run, built, iter([1]))) == [1]


@pytest.mark.slow
def test_recomputing_batch_norm_reads_ahead(tmp_path: Path) -> None:
    """The BatchNorm statistics of averaged weights are those of a run that does not read ahead."""
    with copying_ahead(always=True) as calls:
        found = train_with_batch_norm(str(tmp_path / "ahead"), hook={"update_bn": True})
    expected = train_with_batch_norm(str(tmp_path / "plain"), hook={"update_bn": True})
    assert calls
    assert found[4].keys() == expected[4].keys() != set()
    assert all(torch.equal(found[4][name], value) for name, value in expected[4].items())
    assert found[0] == expected[0]


def test_the_option_is_checked_with_the_configuration() -> None:
    """``config check`` accepts the option and rejects a wrong value and a conflict with pin_memory."""
    config = {
        "model": {"type": Toy},
        "train_cfg": {"max_epochs": 1},
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}},
    }
    require_valid(Config({**config, "train_dataloader": loader(device_prefetch=True)}))
    for wrong in ({"device_prefetch": "yes"}, {"device_prefetch": True, "pin_memory": False}, {"device_prefetc": True}):
        with pytest.raises(ConfigError, match="device_prefetch"):
            require_valid(Config({**config, "train_dataloader": loader(**wrong)}))
