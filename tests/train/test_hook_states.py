"""Checkpoints contain the state of each hook under a key that does not depend on the other hooks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stratagem import Runner
from stratagem.config import Config
from stratagem.errors import ConfigValueError
from stratagem.train import EarlyStoppingHook, Hook
from stratagem.train.run.hook_states import match_states
from tests.train.toys import EPOCH, QUIET_HOOKS, VALIDATION

MakeRunner = Callable[..., Runner]


class Counter(Hook):
    """Counts iterations in steps of a given size."""

    def __init__(self, step: int, key: str | None = None) -> None:
        self.step, self.count = step, 0
        self.state_key = key

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.count += self.step

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: Any) -> None:
        self.count = state_dict["count"]


def train(make_runner: MakeRunner, hooks: list[Hook], epochs: int, **changes: Any) -> list[int]:
    """Train, resuming if there is a checkpoint, and return the counts."""
    default = {**QUIET_HOOKS, "checkpoint": {}}
    runner = make_runner(
        custom_hooks=hooks, train_cfg={"max_epochs": epochs}, resume=True, default_hooks=default, **changes
    )
    runner.train()
    return [hook.count for hook in hooks if isinstance(hook, Counter)]


@pytest.mark.slow
def test_hooks_of_one_class_keep_their_states_in_another_order(make_runner: MakeRunner):
    """The order of hooks in the configuration may change between sessions."""
    train(make_runner, [Counter(1, "one"), Counter(100, "many")], 1)
    counts = train(make_runner, [Counter(100, "many"), Counter(1, "one")], 2)
    assert counts == [200 * EPOCH, 2 * EPOCH]


@pytest.mark.slow
def test_a_hook_keeps_its_state_if_another_one_is_removed(make_runner: MakeRunner):
    """The state of the removed hook is not used, and a warning names it."""
    train(make_runner, [Counter(1, "one"), Counter(100, "many")], 1)
    assert train(make_runner, [Counter(100, "many")], 2) == [200 * EPOCH]


@pytest.mark.slow
def test_a_hook_keeps_its_state_if_another_one_is_added(make_runner: MakeRunner):
    """A further hook of the class starts from scratch, even with a higher priority."""
    train(make_runner, [Counter(100)], 1)
    first = Counter(1, "one")
    first.priority = 0
    assert train(make_runner, [first, Counter(100)], 2) == [EPOCH, 200 * EPOCH]


def test_two_hooks_with_the_same_key_are_refused_at_the_start(make_runner: MakeRunner):
    """The error suggests a ``state_key`` for the configuration."""
    with pytest.raises(ConfigValueError, match=r'Counter.*state_key="first"'):
        make_runner(custom_hooks=[Counter(1), Counter(100)])


def test_two_hooks_without_a_state_need_no_key(make_runner: MakeRunner):
    """Several hooks of one class are accepted if they do not override ``state_dict``."""
    make_runner(custom_hooks=[Hook(), Hook()])


def test_the_key_can_be_configured(make_runner: MakeRunner):
    """``state_key`` is a key of each hook's configuration, like ``priority``."""
    hooks = [{"type": Counter, "step": 1, "state_key": key} for key in ("a", "b")]
    assert set(make_runner(custom_hooks=hooks).run.events.named()) > {"Counter.a", "Counter.b"}


def test_a_key_in_a_configuration_passes_the_check():
    """The configuration check accepts ``state_key``."""
    model = {"type": "torch.nn.Linear", "in_features": 1, "out_features": 1}
    hook = {"type": "EarlyStoppingHook", "monitor": "loss", "state_key": "a"}
    Runner.from_cfg(Config({"model": model, "custom_hooks": [hook], "log_level": "ERROR"})).close()


def test_two_early_stops_are_told_apart_by_their_metric(make_runner: MakeRunner):
    """Built-in hooks whose purpose depends on a metric use its name as key."""
    hooks = [EarlyStoppingHook("loss"), EarlyStoppingHook("acc")]
    checkpoint = {"type": "CheckpointHook", "save_best": ["acc", "loss"], "interval": -1}
    named = make_runner(custom_hooks=[*hooks, checkpoint], **VALIDATION).run.events.named()
    assert {"EarlyStoppingHook.loss", "EarlyStoppingHook.acc", "CheckpointHook.acc,loss"} <= set(named)


def test_checkpoint_hooks_without_a_best_metric_have_no_state(make_runner: MakeRunner):
    """Several checkpoint hooks can save at different intervals, as before."""
    hooks = {**QUIET_HOOKS, "checkpoint": {"interval": 2}}
    make_runner(default_hooks=hooks, custom_hooks=[{"type": "CheckpointHook", "interval": 1}])


class Told:
    """Collects warnings instead of a logger."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str, *values: Any) -> None:
        self.texts.append(text % values)


def matched(saved: dict[str, Any], *hooks: Hook) -> tuple[dict[str, Any], list[str]]:
    """Match states of an earlier version with hooks; return them by ``state_key``, and the warnings."""
    logger = Told()
    by_key = {f"{type(hook).__name__}.{hook.state_key}": hook for hook in hooks}
    found = match_states(saved, by_key, by_position=True, logger=logger)  # type: ignore[arg-type]
    return {str(hook.state_key): found[key] for key, hook in by_key.items() if key in found}, logger.texts


def test_a_single_state_by_position_belongs_to_the_only_hook():
    """A checkpoint of an earlier version loads without a warning."""
    assert matched({"Counter": {"count": 3}}, Counter(1, "a")) == ({"a": {"count": 3}}, [])


def test_states_by_position_are_matched_by_their_metric():
    """A state of early stopping contains its metric, so the order does not matter."""
    states = {"EarlyStoppingHook": {"monitor": "acc", "waited": 1}, "EarlyStoppingHook_2": {"monitor": "loss"}}
    found, warnings = matched(states, EarlyStoppingHook("loss"), EarlyStoppingHook("acc"))
    assert found == {"loss": {"monitor": "loss"}, "acc": {"monitor": "acc", "waited": 1}}
    assert not warnings


def test_as_many_states_as_hooks_are_matched_by_position_with_a_warning():
    """A warning states that the order may have changed, because the checkpoint does not show this."""
    found, warnings = matched({"Counter": {"n": 1}, "Counter_2": {"n": 2}}, Counter(1, "a"), Counter(1, "b"))
    assert found == {"a": {"n": 1}, "b": {"n": 2}}
    assert "If that order has changed" in warnings[0]


def test_states_by_position_are_not_restored_if_a_hook_was_removed():
    """Neither of the two states is restored, because it is unknown which one belongs to the remaining hook."""
    found, warnings = matched({"Counter": {"n": 1}, "Counter_2": {"n": 2}}, Counter(1, "b"))
    assert found == {}
    assert "No state is restored" in warnings[0]


def test_a_class_whose_name_ends_with_a_number_is_not_a_position():
    """``Stage_2`` is a class of its own if the run has a hook of that class."""
    stage, second = type("Stage", (Counter,), {})(1, "s"), type("Stage_2", (Counter,), {})(1, "t")
    assert matched({"Stage": {"n": 1}, "Stage_2": {"n": 2}}, stage, second)[0] == {"s": {"n": 1}, "t": {"n": 2}}


def test_a_checkpoint_of_an_earlier_version_resumes(make_runner: MakeRunner, tmp_path: Path):
    """In an old checkpoint without the entry in ``meta``, a state under a class name belongs to the only hook of that class."""
    train(make_runner, [Counter(100)], 1)
    state = tmp_path / "run" / "epoch_1" / "state.json"
    assert json.loads(state.read_text())  # the states of hooks are in the checkpoint
    runner = make_runner(custom_hooks=[Counter(100, "named")])
    counter = runner.run.events.named()["Counter.named"]
    runner.run.load_hooks({"hooks": {"Counter": {"count": 7}}})
    assert counter.state_dict() == {"count": 7}
