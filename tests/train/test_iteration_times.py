"""The logged times of an iteration: its duration, and the time that the loop waited for data."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from stratagem import Runner
from stratagem.train import Hook
from tests.train.toys import QUIET_HOOKS, Samples, Toy, loader

MakeRunner = Callable[..., Runner]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only advances when a test adds seconds to it."""
    seconds = [100.0]

    def now() -> float:
        seconds[0] += 1e-6
        return seconds[0]

    for module in ("stratagem.train.loops", "stratagem.train.hooks.iter_timer"):
        monkeypatch.setattr(f"{module}.perf_counter", now)
    monkeypatch.setattr(time, "perf_counter", now)
    return seconds


class SlowSamples(Samples):
    """Takes a quarter of a second per sample."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.clock = clock

    def __getitem__(self, index: int) -> Any:
        self.clock[0] += 0.25
        return super().__getitem__(index)


class SlowHook(Hook):
    """Takes one second before and four seconds after an iteration."""

    def __init__(self, priority: int, clock: list[float]) -> None:
        self.priority, self.clock = priority, clock

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.clock[0] += 1.0

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.clock[0] += 4.0


def records(make_runner: MakeRunner, hook: Hook, **changes: Any) -> list[dict[str, Any]]:
    """Train with a log line for each iteration and return the records."""
    hooks = {**QUIET_HOOKS, "logger": {"interval": 1}}
    runner = make_runner(custom_hooks=[hook], default_hooks=hooks, **changes)
    runner.train()
    lines = (Path(runner.strategy.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["mode"] == "train"]


@pytest.mark.parametrize("priority", [0, 40, 60, 100])
@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_iters": 14}])
def test_the_data_time_does_not_contain_the_time_of_hooks(
    make_runner: MakeRunner, clock: list[float], priority: int, length: dict[str, int]
):
    """Two samples take 0.5 s per batch, whatever the priority of a slow hook."""
    loading = loader(drop_last=True)
    loading["dataset"] = SlowSamples(clock)
    found = records(make_runner, SlowHook(priority, clock), train_dataloader=loading, train_cfg=length)
    assert [record["data_time"] for record in found] == [pytest.approx(0.5, abs=0.01)] * len(found)
    # After the first iteration: loading, the hook before and after it.
    assert found[2]["time"] == pytest.approx(5.5, abs=0.01)


class OnBusyDevice(Tensor):
    """A tensor whose value is available after three seconds, as on a device that is still computing it."""

    clock: list[float]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.item, Tensor.__float__):
            cls.clock[0] += 3.0
        return super().__torch_function__(func, types, args, kwargs or {})


class OnDevice(Toy):
    """A model that computes on such a device."""

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        outputs = super().train_step(data, optim_wrapper)
        return {name: value.as_subclass(OnBusyDevice) for name, value in outputs.items()}


def test_the_wait_for_the_device_in_a_log_line_is_not_data_time(
    make_runner: MakeRunner, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log line waits 3 s for the losses of two iterations. This is part of the time of the next one, and not of its data."""
    monkeypatch.setattr(OnBusyDevice, "clock", clock, raising=False)
    loading = loader(drop_last=True)
    loading["dataset"] = SlowSamples(clock)
    runner = make_runner(
        model=OnDevice(),
        default_hooks={**QUIET_HOOKS, "logger": {"interval": 2}, "nonfinite": None},
        train_dataloader=loading,
        train_cfg={"max_iters": 6},
    )
    runner.train()
    lines = (Path(runner.strategy.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["mode"] == "train"]
    assert [record["data_time"] for record in found] == [pytest.approx(0.5, abs=0.01)] * 3
    assert [record["time"] for record in found[1:]] == [pytest.approx(0.5 + 3.0 / 2, abs=0.01)] * 2
