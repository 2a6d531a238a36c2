"""Garbage collection at fixed iterations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stratagem import Runner
from stratagem.errors import ConfigValueError
from stratagem.train import Hook
from stratagem.train.hooks.garbage_collection import GarbageCollectionHook

MakeRunner = Callable[..., Runner]
COLLECT = {"type": "GarbageCollectionHook", "interval": 3}


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    """Enable garbage collection after the test."""
    yield
    gc.enable()


class Collections(Hook):
    """Records the iterations of collections, and fails in an iteration if requested."""

    def __init__(self, fail_at: int = 0) -> None:
        self.iterations: list[int] = []
        self.enabled: set[bool] = set()
        self._fail_at = fail_at
        self._run: Any = None

    def before_train(self, run: Any) -> None:
        self._run = run
        gc.callbacks.append(self._collected)

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.enabled.add(gc.isenabled())
        if run.iter + 1 == self._fail_at:
            raise RuntimeError("as requested")

    def after_train(self, run: Any) -> None:
        gc.callbacks.remove(self._collected)

    def _collected(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and self._run.progress.in_iteration:
            self.iterations.append(self._run.iter + 1)


@pytest.mark.slow
def test_garbage_is_collected_at_the_same_iterations_on_every_rank(make_runner: MakeRunner) -> None:
    """Automatic collection is off during training, collections follow every third iteration, and it is on again afterwards."""
    seen = Collections()
    make_runner(custom_hooks=[COLLECT, seen], train_cfg={"max_iters": 7}).train()
    assert seen.iterations == [3, 6]
    assert seen.enabled == {False}
    assert gc.isenabled()


@pytest.mark.slow
def test_a_run_that_fails_enables_the_garbage_collection_again(make_runner: MakeRunner) -> None:
    """If an iteration raises an error, automatic collection is enabled when the run is closed."""
    seen = Collections(fail_at=2)
    runner = make_runner(custom_hooks=[COLLECT, seen], train_cfg={"max_iters": 7})
    with pytest.raises(RuntimeError, match="as requested"):
        runner.train()
    gc.callbacks.remove(seen._collected)
    assert not gc.isenabled()
    runner.close()
    assert gc.isenabled()


def test_the_interval_must_be_positive() -> None:
    """An interval of 0 raises an error."""
    with pytest.raises(ConfigValueError, match="expected interval >= 1, got 0"):
        GarbageCollectionHook(interval=0)
