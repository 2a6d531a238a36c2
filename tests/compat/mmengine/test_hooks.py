"""Hooks of the MMEngine layer that differ from MMEngine's on purpose, or hold what a run must not lose."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stratagem.compat.mmengine.hooks import CheckpointHook, EarlyStoppingHook, Hook, LoggerHook, NPUProfilerHook
from stratagem.compat.mmengine.logging import MessageHub, MMLogger
from stratagem.compat.mmengine.registry import HOOKS
from stratagem.compat.mmengine.runner.hook_calls import HookCalls


class FakeRunner(SimpleNamespace):
    """A runner whose checkpoints are text files with their ``keep_ckpt_ids``; ``fails`` lets saving fail."""

    def __init__(self, work_dir: Path, **facts: Any) -> None:
        name = str(work_dir)
        super().__init__(
            work_dir=name,
            epoch=0,
            iter=0,
            max_epochs=4,
            max_iters=40,
            fails=False,
            logger=MMLogger.get_instance(name),
            message_hub=MessageHub.get_instance(name),
            **facts,
        )

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **options: Any) -> None:
        if self.fails:
            raise OSError("the disk is full")
        Path(out_dir, filename).write_text(str(self.message_hub.get_info("keep_ckpt_ids")), encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def test_an_old_checkpoint_is_kept_if_the_new_one_cannot_be_saved(tmp_path: Path) -> None:
    """With ``max_keep_ckpts=1``, a run that fails in its second save still has its first checkpoint, and the pointer to it."""
    runner, hook = FakeRunner(tmp_path), CheckpointHook(interval=1, max_keep_ckpts=1)
    hook.before_train(runner)
    hook.after_train_epoch(runner)
    runner.epoch, runner.fails = 1, True
    with pytest.raises(OSError, match="the disk is full"):
        hook.after_train_epoch(runner)
    assert names(tmp_path) == ["epoch_1.pth"]
    assert (tmp_path / "last_checkpoint").read_text(encoding="utf-8") == str(tmp_path / "epoch_1.pth")


def test_the_best_checkpoint_is_kept_if_a_better_one_cannot_be_saved(tmp_path: Path) -> None:
    """The previous best checkpoint is deleted only after the new one is complete."""
    runner, hook = FakeRunner(tmp_path), CheckpointHook(save_best="accuracy")
    hook.before_train(runner)
    runner.epoch = 1
    hook.after_val_epoch(runner, {"accuracy": 0.5})
    runner.epoch, runner.fails = 2, True
    with pytest.raises(OSError, match="the disk is full"):
        hook.after_val_epoch(runner, {"accuracy": 0.6})
    assert names(tmp_path) == ["best_accuracy_epoch_1.pth"]


def test_a_checkpoint_that_a_killed_process_did_not_delete_is_deleted_at_resume(tmp_path: Path) -> None:
    """A process that is killed after a save and before the deletion leaves one checkpoint too many behind."""
    runner, hook = FakeRunner(tmp_path), CheckpointHook(interval=1, max_keep_ckpts=1)
    hook.before_train(runner)
    hook.after_train_epoch(runner)
    runner.epoch = 1
    hook._remove_steps = lambda steps: None  # type: ignore[method-assign]
    hook.after_train_epoch(runner)
    assert names(tmp_path) == ["epoch_1.pth", "epoch_2.pth"]
    # What the checkpoint of epoch 2 contains.
    runner.message_hub.update_info("outdated_ckpt_ids", [1])
    CheckpointHook(interval=1, max_keep_ckpts=1).before_train(runner)
    assert names(tmp_path) == ["epoch_2.pth"]


def test_a_metric_that_the_validation_lacks_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    """``save_best`` with a misspelled metric fails at the first validation."""
    runner, hook = FakeRunner(tmp_path), CheckpointHook(save_best="accurracy/top1", rule="greater")
    hook.before_train(runner)
    with pytest.raises(KeyError, match="accuracy/top1"):
        hook.after_val_epoch(runner, {"accuracy/top1": 0.5})


def test_nan_is_never_the_best_value(tmp_path: Path) -> None:
    """A validation whose metric is NaN saves no best checkpoint."""
    runner, hook = FakeRunner(tmp_path), CheckpointHook(save_best="loss")
    hook.before_train(runner)
    hook.after_val_epoch(runner, {"loss": float("nan")})
    assert names(tmp_path) == []


def test_only_overridden_stages_are_triggered() -> None:
    """A hook that overrides ``_after_iter`` acts after the iterations of all loops, and its own stages come in order."""

    class Counting(Hook):
        def after_run(self, runner: Any) -> None:
            pass

        def _after_iter(self, *args: Any, **kwargs: Any) -> None:
            pass

    expected = ["after_train_iter", "after_val_iter", "after_test_iter", "after_run"]
    assert Counting().get_triggered_stages() == expected


@pytest.mark.parametrize("name", ["after_train_iter", "_after_iter"])
def test_a_method_that_is_assigned_to_a_hook_is_called(name: str) -> None:
    """A hook acts at a stage whose method, or the method that the stages of all modes share, was assigned to the object."""
    called: list[Any] = []
    calls = HookCalls()
    calls._hooks = [Hook()]
    calls._session = SimpleNamespace(active_method=None, after_hooks=lambda stage: None)  # type: ignore[assignment]
    calls.call_hook("after_train_iter", batch_idx=0)
    setattr(calls._hooks[0], name, lambda *_, **arguments: called.append(arguments["batch_idx"]))
    calls.call_hook("after_train_iter", batch_idx=1)
    assert called == [1]


def test_early_stopping_stops_after_patience_validations() -> None:
    """With ``patience=2``, the second validation without an improvement by ``min_delta`` stops the training."""
    loop = SimpleNamespace(stop_training=False)
    runner = SimpleNamespace(
        train_loop=loop, logger=MMLogger.get_instance("stopping"), message_hub=MessageHub.get_instance("stopping")
    )
    hook = EarlyStoppingHook("accuracy", min_delta=0.1, patience=2)
    stopped = []
    for value in (0.5, 0.55, 0.59):
        hook.after_val_epoch(runner, {"accuracy": value})
        stopped.append(loop.stop_training)
    assert stopped == [False, False, True]


def test_early_stopping_continues_to_count_after_a_resume() -> None:
    """A hook of a new process takes the count from the message hub, which checkpoints contain."""
    loop = SimpleNamespace(stop_training=False)
    runner = SimpleNamespace(
        train_loop=loop, logger=MMLogger.get_instance("resumed"), message_hub=MessageHub.get_instance("resumed")
    )
    for value in (0.5, 0.55):
        hook = EarlyStoppingHook("accuracy", patience=2)
        hook.before_train(runner)
        hook.after_val_epoch(runner, {"accuracy": value})
    resumed = EarlyStoppingHook("accuracy", patience=2)
    resumed.before_train(runner)
    resumed.after_val_epoch(runner, {"accuracy": 0.52})
    assert loop.stop_training


def test_the_npu_profiler_states_what_to_use_instead() -> None:
    """It can be imported and named in a config, and is refused when it is built."""
    with pytest.raises(NotImplementedError, match="Use ProfilerHook"):
        HOOKS.build({"type": "NPUProfilerHook"})
    with pytest.raises(NotImplementedError, match="Use ProfilerHook"):
        NPUProfilerHook(begin=1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [({"interval": "10"}, TypeError), ({"interval": 0}, ValueError), ({"out_suffix": [1]}, TypeError)],
)
def test_invalid_arguments_of_the_logger_hook_are_refused(arguments: dict[str, Any], error: type[Exception]) -> None:
    """The types of the errors are MMEngine's."""
    with pytest.raises(error, match=next(iter(arguments))):
        LoggerHook(**arguments)
