import pytest

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.train import EVENTS, Events, Hook, IterTimerHook, LoggerHook, Priority, get_priority
from stratagem.train.building import build_events
from tests.train.toys import Recorder


class Named(Hook):
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def before_train(self, run: object) -> None:
        self.calls.append(self.name)


def test_hooks_run_in_the_order_of_their_priority_numbers():
    """A lower priority number runs first; hooks of equal priority run in the order of registration."""
    calls: list[str] = []
    hooks = [Named(name, calls) for name in ("late", "early", "normal", "normal too")]
    hooks[0].priority = 90
    hooks[1].priority = "very_high"
    Events(hooks).call("before_train", None)
    assert calls == ["early", "normal", "normal too", "late"]


def test_an_event_without_hooks_calls_nothing():
    """Only overridden methods are called, so an event that no hook overrides costs nothing."""
    events = Events([Named("only", []), Hook()])
    assert [event for event in EVENTS if events[event]] == ["before_train"]


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        ("_before_iter", ["before_test_iter", "before_train_iter", "before_val_iter"]),
        ("_after_iter", ["after_test_iter", "after_train_iter", "after_val_iter"]),
        ("_before_epoch", ["before_test_epoch", "before_train_epoch", "before_val_epoch"]),
        ("_after_epoch", ["after_test_epoch", "after_train_epoch", "after_val_epoch"]),
    ],
)
def test_a_shared_method_handles_the_event_of_each_mode(shared: str, expected: list[str]):
    """A hook that overrides ``_after_iter`` is called after each training, validation, and test iteration."""
    modes: list[str] = []

    def note(_: Hook, __: object, batch_idx: int = 0, mode: str = "?", **___: object) -> None:
        modes.append(mode)

    events = Events([type("Shared", (Hook,), {shared: note})()])
    assert sorted(event for event in EVENTS if events[event]) == expected
    for event in expected:
        events.call(event, None, **({"batch_idx": 0} if event.endswith("iter") else {}))
    assert modes == ["test", "train", "val"]


def test_a_hook_can_choose_its_events():
    """``get_triggered_stages`` can leave out events that a hook does not need."""

    class Chosen(Named):
        def get_triggered_stages(self) -> list[str]:
            return []

    assert not Events([Chosen("quiet", [])])["before_train"]


@pytest.mark.parametrize(("given", "number"), [("HIGH", 30), ("lowest", 100), (Priority.LOW, 70), (0, 0), (100, 100)])
def test_a_priority_is_a_name_in_any_case_or_a_number(given: object, number: int):
    """The names of priorities map to MMEngine's numbers."""
    assert get_priority(given) == number


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (101, ConfigValueError, "from 0 to 100, got 101"),
        (-1, ConfigValueError, "from 0 to 100, got -1"),
        ("higher", ConfigValueError, "'HIGHEST'|'HIGH'"),
        (1.5, ConfigTypeError, "1.5"),
        (True, ConfigTypeError, "True"),
    ],
)
def test_a_wrong_priority_is_rejected(given: object, error: type[Exception], text: str):
    """A wrong priority is rejected, and the message shows the value and the valid names."""
    with pytest.raises(error, match=text):
        get_priority(given)


def test_the_default_hooks_are_ordered_by_priority():
    """Of the default hooks, ``runtime_info`` is called first and ``checkpoint`` last."""
    names = [type(hook).__name__ for hook in build_events(None, None).hooks]
    assert names == [
        "RuntimeInfoHook", "IterTimerHook", "DistSamplerSeedHook", "LoggerHook", "NonFiniteHook",
        "ParamSchedulerHook", "CheckpointHook",
    ]  # fmt: skip


def test_none_removes_a_default_hook():
    """A default hook that is set to ``None`` is not built."""
    names = [type(hook).__name__ for hook in build_events({"checkpoint": None, "logger": None}, None).hooks]
    assert "CheckpointHook" not in names
    assert "LoggerHook" not in names
    assert len(names) == 5


def test_default_hooks_keep_their_type_when_only_arguments_are_given():
    """``default_hooks=dict(logger=dict(interval=7))`` only changes the interval."""
    with pytest.raises(ConfigValueError, match="expected interval >= 1, got 0"):
        build_events({"logger": {"interval": 0}}, None)


def test_another_type_for_a_default_hook_gets_only_its_own_arguments():
    """The default arguments of the replaced hook are not passed to the other type."""
    hooks = build_events({"checkpoint": {"type": "IterTimerHook"}}, None).hooks
    assert sum(isinstance(hook, IterTimerHook) for hook in hooks) == 2


def test_an_unknown_default_hook_is_rejected_with_the_closest_name():
    """A misspelled name is rejected, because the run would otherwise save no checkpoints."""
    with pytest.raises(ConfigKeyError, match=r"'checkpoints'.*'checkpoint'") as caught:
        build_events({"checkpoints": {"interval": 2}}, None)
    assert "custom_hooks" in str(caught.value)


@pytest.mark.parametrize("wrong", ["Recorder", 3, Recorder, object()])
def test_other_objects_are_not_hooks(wrong: object):
    """A class or a name raises an error, because it is not a hook."""
    with pytest.raises(ConfigTypeError, match="Expected a subclass of stratagem"):
        build_events(None, [wrong])


def test_a_type_that_does_not_build_a_hook_is_rejected():
    """The ``type`` of a hook's configuration must build a hook."""
    with pytest.raises(ConfigTypeError, match="Expected a subclass of stratagem"):
        build_events(None, [{"type": dict}])


def test_a_custom_hook_can_give_its_priority():
    """The key ``priority`` is not passed to the hook, and the given mapping is not modified."""
    given = {"type": Recorder, "priority": "HIGHEST"}
    events = build_events({"logger": None}, [given, LoggerHook()])
    assert isinstance(events.hooks[0], Recorder)
    assert given == {"type": Recorder, "priority": "HIGHEST"}


def test_the_interval_helpers_count_from_one():
    """``every_n_...`` refer to the iteration or epoch that is ending; n <= 0 is never true."""

    class At:
        iter, epoch, max_iters, max_epochs = 5, 1, 6, 2

    hook = Hook()
    assert [n for n in range(-1, 8) if hook.every_n_train_iters(At, n)] == [1, 2, 3, 6]
    assert [n for n in range(-1, 8) if hook.every_n_train_iters(At, n, start=2)] == [1, 2, 4]
    assert [n for n in range(-1, 4) if hook.every_n_epochs(At, n)] == [1, 2]
    assert [n for n in range(-1, 8) if hook.every_n_inner_iters(3, n)] == [1, 2, 4]
    assert hook.is_last_train_iter(At)
    assert hook.is_last_train_epoch(At)
