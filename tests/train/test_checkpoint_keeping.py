"""Tests of the checkpoints that a run keeps and removes."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Runner
from stratagem.checkpoint import CheckpointLoader, find_latest_checkpoint, read_manifest
from stratagem.errors import CheckpointError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.train import BaseMetric, CheckpointHook
from stratagem.train.hooks import checkpoint
from stratagem.train.hooks.best_scores import BestScores, infer_rule
from tests.support import faults
from tests.support.ranks import Ranks
from tests.train.toys import (
    EPOCH,
    QUIET_HOOKS,
    TRAINING,
    VALIDATION,
    At,
    Toy,
    loader,
    settings,
    stop,
    train_until_signal,
)

MakeRunner = Callable[..., Runner]


class Scripted(BaseMetric):
    """Returns the next score of a list at each validation."""

    def __init__(self, scores: Sequence[Any], name: str = "acc") -> None:
        super().__init__()
        self.scores, self.name = list(scores), name

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {self.name: self.scores.pop(0)}


def train(make_runner: MakeRunner, hook: dict, epochs: int = 3, **changes: Any) -> Runner:
    """Train with the given checkpoint hook and return the runner."""
    runner = make_runner(
        default_hooks={**QUIET_HOOKS, "checkpoint": hook}, **{"train_cfg": {"max_epochs": epochs}, **changes}
    )
    train_until_signal(runner)
    return runner


def scored(*scores: Any, name: str = "acc") -> dict[str, Any]:
    """Return the settings of a validation after each epoch that yields these scores."""
    return {**VALIDATION, "val_evaluator": Scripted(scores, name)}


def names(runner: Runner) -> set[str]:
    """Return the names of the checkpoints in the run's directory."""
    found = {path.name for path in Path(runner.strategy.work_dir).iterdir()} - {"last_checkpoint", ".training.json"}
    # Each start has a directory named after its start time.
    return {name for name in found if not re.fullmatch(r"\d{8}_\d{6}(_\d+)?", name)}


WAYS = [
    {},
    {"async_save": True},
    {"filename_tmpl": "epoch_{}.pth"},
    {"filename_tmpl": "epoch_{}.pth", "async_save": True},
]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_only_the_last_checkpoints_are_kept(make_runner: MakeRunner, way: dict):
    """Only the last checkpoints are kept, whether saved in the background or not, as a directory or a single file."""
    suffix = ".pth" if "filename_tmpl" in way else ""
    runner = train(make_runner, {"max_keep_ckpts": 2, **way}, 4)
    assert names(runner) == {f"epoch_3{suffix}", f"epoch_4{suffix}"}
    folder = Path(runner.strategy.work_dir)
    assert (folder / "last_checkpoint").read_text() == f"epoch_4{suffix}\n"
    assert runner.latest_checkpoint() == folder / f"epoch_4{suffix}"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[:2])
def test_a_run_resumes_exactly_from_either_way_of_saving(make_runner: MakeRunner, tmp_path: Path, way: dict):
    """Saving does not change the run, and the checkpoint holds the state of its own step."""
    whole = train(make_runner, {}, 3, work_dir=tmp_path / "whole")
    train(make_runner, {**way, "interval": -1, "save_last": False, "every_minutes": 1e-9}, custom_hooks=[At(10, stop)])
    runner = train(make_runner, {**way, "interval": -1, "save_last": False}, resume=True)
    for name, value in whole.strategy.unwrap_model().state_dict().items():
        assert torch.equal(runner.strategy.unwrap_model().state_dict()[name], value), name


@pytest.mark.slow
def test_every_nth_checkpoint_is_kept_permanently(make_runner: MakeRunner):
    """``keep_every`` keeps every nth checkpoint in addition to the last one."""
    assert names(train(make_runner, {"max_keep_ckpts": 1, "keep_every": 2}, 5)) == {"epoch_2", "epoch_4", "epoch_5"}


@pytest.mark.slow
def test_the_best_checkpoint_of_a_run_is_found(make_runner: MakeRunner):
    """``best_checkpoint`` returns the checkpoint with the best score, the earlier one of two equal ones."""
    hook = {"save_best": "acc", "keep_best": 3}
    runner = train(make_runner, hook, 4, **scored(0.25, 0.5, 0.5, 0.125))
    best = Path(runner.strategy.work_dir) / "best_acc_epoch_2"
    assert runner.best_checkpoint() == runner.best_checkpoint("acc") == best
    assert "best_acc_epoch_2 (0.5000)" in runner.summary()
    assert runner.summary().startswith("Trained 4 epochs (")
    with pytest.raises(ConfigValueError, match="There is no best checkpoint for the metric 'top'"):
        runner.best_checkpoint("top")


def test_a_run_without_a_monitored_metric_has_no_best_checkpoint(make_runner: MakeRunner):
    """Without ``save_best``, ``best_checkpoint`` returns None."""
    assert train(make_runner, {}, 1).best_checkpoint() is None


def test_the_best_checkpoint_of_several_metrics_needs_a_name(make_runner: MakeRunner):
    """If there are best checkpoints for two metrics, their names are in the error."""

    class Two(Scripted):
        def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
            return {"acc": 0.5, "loss": 0.25}

    evaluated = {**VALIDATION, "val_evaluator": Two([])}
    runner = train(make_runner, {"save_best": ["acc", "loss"]}, 1, **evaluated)
    with pytest.raises(ConfigValueError, match="Specify one of acc, loss"):
        runner.best_checkpoint()
    best = runner.best_checkpoint("loss")
    assert best is not None
    assert best.name == "best_loss_epoch_1"


@pytest.mark.slow
def test_another_run_in_the_folder_does_not_have_the_best_checkpoint(make_runner: MakeRunner, tmp_path: Path):
    """The best checkpoints of an earlier run in the same work directory do not belong to this run."""
    train(make_runner, {"save_best": "acc"}, 1, work_dir=tmp_path / "one", **scored(0.75))
    second = train(make_runner, {"save_best": "acc"}, 2, work_dir=tmp_path / "one", **scored(0.25, 0.5))
    assert second.best_checkpoint() == tmp_path / "one" / "best_acc_epoch_2"


@pytest.mark.slow
def test_a_resumed_run_continues_to_remove_old_checkpoints(make_runner: MakeRunner):
    """A resumed run recognizes its own checkpoints by the run's id and continues to remove them."""
    train(make_runner, {"max_keep_ckpts": 2}, 2)
    assert names(train(make_runner, {"max_keep_ckpts": 2}, 4, resume=True)) == {"epoch_3", "epoch_4"}


@pytest.mark.slow
def test_the_checkpoints_of_another_run_are_kept(make_runner: MakeRunner):
    """A new run in the directory of an old one does not remove the old run's checkpoints."""
    train(make_runner, {}, 2)
    assert names(train(make_runner, {"max_keep_ckpts": 1, "filename_tmpl": "new_{}"}, 3)) == {
        "epoch_1",
        "epoch_2",
        "new_3",
    }


@pytest.mark.slow
def test_a_checkpoint_saved_by_the_user_is_kept(make_runner: MakeRunner):
    """A checkpoint that the user saved with ``run.save_checkpoint`` is never removed."""
    own = At(2, lambda run: run.save_checkpoint(Path(run.work_dir) / "mine", run.progress.after_this_iteration()))
    assert names(train(make_runner, {"max_keep_ckpts": 1}, 3, custom_hooks=[own])) == {"mine", "epoch_3"}


@pytest.mark.slow
def test_the_next_start_removes_what_a_killed_run_left(make_runner: MakeRunner):
    """Checkpoints that a killed run did not remove are removed at the next start, even before the next save."""
    train(make_runner, {}, 3)
    hook = {"max_keep_ckpts": 1, "interval": -1, "save_last": False}
    assert names(train(make_runner, hook, 4, resume=True, custom_hooks=[At(22, stop)])) == {"epoch_3"}


@pytest.mark.slow
def test_a_checkpoint_saved_on_an_interrupt_is_removed_like_the_others(make_runner: MakeRunner):
    """A checkpoint saved on an interrupt is removed once a newer one is durable."""
    interrupt = At(3, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    assert names(train(make_runner, {"max_keep_ckpts": 1}, 2, custom_hooks=[interrupt])) == {"iter_3"}
    assert names(train(make_runner, {"max_keep_ckpts": 1}, 2, resume=True)) == {"epoch_2"}


@pytest.mark.slow
@pytest.mark.parametrize("by_epoch", [True, False])
def test_every_minutes_saves_after_an_iteration(make_runner: MakeRunner, *, by_epoch: bool):
    """``every_minutes`` saves after an iteration; with gradient accumulation, only after an optimizer step."""
    hook = {"every_minutes": 1e-9, "interval": -1, "save_last": False, "by_epoch": by_epoch}
    train_cfg = {"by_epoch": False, "max_iters": 6}
    assert names(train(make_runner, hook, train_cfg=train_cfg)) == {f"iter_{number}" for number in range(1, 7)}
    optim = {**TRAINING["optim_wrapper"], "accumulative_counts": 2}
    runner = train(make_runner, {**hook, "max_keep_ckpts": 9}, train_cfg=train_cfg, optim_wrapper=optim, work_dir=None)
    assert names(runner) >= {"iter_2", "iter_4", "iter_6"}


@pytest.mark.slow
def test_a_checkpoint_by_time_is_the_default_and_the_next_checkpoint_replaces_it(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
):
    """By default, a run saves by time too; of these checkpoints, only one exists, and that of the epoch replaces it."""
    assert checkpoint._AUTO_MINUTES == 15
    monkeypatch.setattr(checkpoint, "_AUTO_MINUTES", 1e-9)
    runner = train(make_runner, {}, custom_hooks=[At(EPOCH + 3, stop)])
    assert names(runner) == {"epoch_1", f"iter_{EPOCH + 3}"}
    # The next session removes what a killed run left behind.
    assert names(train(make_runner, {}, 2, resume=True)) == {"epoch_1", "epoch_2"}


@pytest.mark.parametrize("hook", [{"every_minutes": None}, {"interval": -1, "save_last": False}])
def test_checkpoints_by_time_can_be_disabled(make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, hook: dict):
    """``every_minutes=None`` disables them, and so does a hook that saves nothing else."""
    monkeypatch.setattr(checkpoint, "_AUTO_MINUTES", 1e-9)
    assert "after_train_iter" not in CheckpointHook(**hook).get_triggered_stages()
    assert not any(name.startswith("iter") for name in names(train(make_runner, hook, 1)))


@pytest.mark.slow
def test_checkpoints_by_time_do_not_count_as_the_last_ones(make_runner: MakeRunner):
    """``max_keep_ckpts`` counts the checkpoints of epochs; those that ``keep_timed`` limits are extra."""
    hook = {"max_keep_ckpts": 2, "every_minutes": 1e-9, "keep_timed": 2}
    runner = train(make_runner, hook, 5, custom_hooks=[At(2 * EPOCH + 3, stop)])
    assert names(runner) == {"epoch_1", "epoch_2", f"iter_{2 * EPOCH + 2}", f"iter_{2 * EPOCH + 3}"}


# ---- the best checkpoint
# -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_in_addition_to_the_last(make_runner: MakeRunner):
    """A better checkpoint replaces the previous best one; an equal or worse one does not."""
    runner = train(make_runner, {"save_best": "acc", "max_keep_ckpts": 1}, 4, **scored(0.1, 0.9, 0.9, 0.3))
    assert names(runner) == {"best_acc_epoch_2", "epoch_4"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "name", "scores", "best"),
    [
        ({"save_best": "auto"}, "loss", (3.0, 1.0, 2.0), {2}),
        ({"save_best": "val/F1", "rule": "greater"}, "val/F1", (3.0, 1.0, 2.0), {1}),
        ({"save_best": ["F1"], "rule": ["less"]}, "F1", (3.0, 1.0, 2.0), {2}),
        ({"save_best": "F1", "less_keys": ["f1"]}, "F1", (3.0, 1.0, 2.0), {2}),
        ({"save_best": "acc", "keep_best": 2}, "acc", (3.0, 1.0, 2.0), {1, 3}),
        ({"save_best": "acc"}, "acc", (float("nan"), float("inf"), 0.5), {3}),
        ({"save_best": "acc"}, "acc", (torch.tensor(0.5), 0, 1), {3}),
    ],
)
def test_the_rule_determines_which_score_is_better(
    make_runner: MakeRunner, hook: dict, name: str, scores: tuple, best: set[int]
):
    """The rule is given or inferred from the metric's name; NaN and Inf are never the best value."""
    runner = train(make_runner, {**hook, "interval": -1, "save_last": False}, **scored(*scores, name=name))
    assert names(runner) == {f"best_{name.replace('/', '_')}_epoch_{number}" for number in best}


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        *[("acc", True), ("coco/bbox_mAP", True), ("top1", True), ("ACCURACY", True), ("multiclassauroc", True)],
        *[("binaryf1score", True), ("r2score", True), ("jaccard_iou", True), ("mDice", True)],
        *[("loss", False), ("val_loss", False), ("perplexity", False), ("meansquarederror", False), ("val/mae", False)],
        *[("top1_error", False), ("acc_loss", False), ("error_free_accuracy", True)],
    ],
)
def test_the_rule_is_inferred_from_the_name(metric: str, *, greater: bool):
    """The rule is inferred from a part of the name, regardless of its case."""
    assert infer_rule(metric) == ("greater" if greater else "less")


def test_the_same_name_counts_before_a_part_of_it():
    """With custom keys, smaller values of 'loss_acc' are better if it is a key."""
    assert infer_rule("loss_acc", ["acc"], ["loss_acc"]) == "less"
    assert infer_rule("loss_acc", ["acc"], ["loss"]) == "greater"


@pytest.mark.slow
def test_the_best_survives_a_resume(make_runner: MakeRunner):
    """A worse score after the resume does not replace the best checkpoint."""
    hook = {"save_best": "auto", "max_keep_ckpts": 1}
    train(make_runner, hook, 2, **scored(0.5, 0.9))
    assert names(train(make_runner, hook, 3, resume=True, **scored(0.7))) == {"best_acc_epoch_2", "epoch_3"}


@pytest.mark.slow
def test_the_best_score_is_restored_from_the_manifest(make_runner: MakeRunner, tmp_path: Path):
    """The best score is read from the manifest of the best checkpoint, even if the resumed checkpoint is older."""
    hook = {"save_best": "acc"}
    train(make_runner, hook, 2, **scored(0.5, 0.9))
    expected = read_manifest(tmp_path / "run" / "best_acc_epoch_2")["purpose"]
    assert expected == {"series": "", "number": 2, "metric": "acc", "score": 0.9, "greater": True}
    runner = train(make_runner, hook, 3, resume=tmp_path / "run" / "epoch_1", **scored(0.4, 0.6, 0.7))
    assert {name for name in names(runner) if name.startswith("best")} == {"best_acc_epoch_2"}


def test_validation_outside_of_training_saves_nothing(make_runner: MakeRunner):
    """``runner.val()`` outside training saves no best checkpoint."""
    hook = {"save_best": "acc", "interval": -1, "save_last": False}
    runner = train(make_runner, hook, 1, **scored(0.5, 0.9))
    assert names(runner) == {"best_acc_epoch_1"}
    runner.val()
    assert names(runner) == {"best_acc_epoch_1"}


@pytest.mark.parametrize(
    ("hook", "name", "value", "error", "text"),
    [
        ({"save_best": "accuracy"}, "acc", 0.5, ConfigKeyError, r"did not return this metric.*acc"),
        ({"save_best": "auto"}, "speed", 0.5, ConfigValueError, r"rule='greater' or rule='less'"),
        ({"save_best": "acc"}, "acc", [0.5], ConfigTypeError, r"a list; expected a number"),
    ],
)
def test_a_metric_that_cannot_be_compared_is_rejected(
    make_runner: MakeRunner, hook: dict, name: str, value: Any, error: type[Exception], text: str
):
    """An unsuitable metric is rejected at the first validation, and the message lists the metrics that exist."""
    with pytest.raises(error, match=text):
        train(make_runner, hook, 1, **scored(value, name=name))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"max_keep_ckpts": 0}, ConfigValueError, "expected max_keep_ckpts >= 1, or -1 to keep all, got 0"),
        ({"keep_every": 0}, ConfigValueError, "expected keep_every >= 1, got 0"),
        ({"every_minutes": -1}, ConfigValueError, "expected every_minutes > 0, got -1"),
        ({"every_minutes": "hourly"}, ConfigValueError, "'hourly'. Use a number of minutes, 'auto' for 15 minutes"),
        ({"keep_timed": 0}, ConfigValueError, "expected keep_timed >= 1, got 0"),
        ({"keep_timed": 1, "every_minutes": None}, ConfigValueError, "keep_timed needs every_minutes"),
        ({"save_best": "acc", "keep_best": 0}, ConfigValueError, "expected keep_best >= 1, got 0"),
        ({"save_best": "acc", "rule": "grater"}, ConfigKeyError, "grater.*greater"),
        ({"save_best": ["acc", "loss"], "rule": ["greater"]}, ConfigValueError, "1 rules for 2 metrics"),
        ({"save_best": ["auto", "acc"]}, ConfigValueError, "cannot be combined with other names"),
        ({"save_best": "speed"}, ConfigValueError, "'speed'.*rule="),
        ({"rule": "less"}, ConfigValueError, "need save_best"),
    ],
)
def test_wrong_arguments_are_rejected(arguments: dict, error: type[Exception], text: str):
    """Invalid arguments raise an error in the constructor."""
    with pytest.raises(error, match=text):
        CheckpointHook(**arguments)


def test_only_the_best_scores_are_kept():
    """Only the best ``count`` scores are kept."""
    scores = BestScores("acc", count=2)
    assert [bool(scores.update({"acc": score}, number)) for number, score in enumerate((3.0, 1.0, 2.0, 0.5))] == [
        True, True, True, False,
    ]  # fmt: skip
    assert scores.state_dict() == {"scores": {"acc": {0: 3.0, 2: 2.0}}}


@pytest.mark.slow
def test_parts_are_published_after_training(make_runner: MakeRunner, tmp_path: Path):
    """``published_keys`` of the last and the best checkpoint are saved after training unless it was interrupted."""
    hook = {"save_best": "acc", "published_keys": ["meta", "state_dict"], "max_keep_ckpts": 1, "async_save": True}
    train(make_runner, hook, 2, **scored(0.9, 0.1))
    published = sorted((tmp_path / "run").glob("*.pth"))
    assert [path.name.rpartition("-")[0] for path in published] == ["best_acc_epoch_1", "epoch_2"]
    assert {key for path in published for key in CheckpointLoader.load_checkpoint(path)} == {"meta", "state_dict"}
    interrupt = At(3, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    runner = train(make_runner, hook, 2, custom_hooks=[interrupt], work_dir=tmp_path / "other", **scored(0.9, 0.1))
    assert names(runner) == {"iter_3"}


# ---- saving in the background
# ------------------------------------------------------------------------------------------


def test_a_failed_save_stops_the_run_and_names_the_path(make_runner: MakeRunner, tmp_path: Path):
    """A failed save stops the run at a later iteration, or at the end; earlier checkpoints are intact."""

    def full(name: str, operation: Any, arguments: tuple[Any, ...]) -> Any:
        if name == "create_folder" and "epoch_2" in arguments[0].name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return operation(*arguments)

    with faults.between(full), pytest.raises(CheckpointError, match=r"epoch_2: the checkpoint .*No space left"):
        train(make_runner, {"async_save": True}, 3)
    assert find_latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "epoch_1"


def test_a_failing_run_waits_for_its_pending_save(make_runner: MakeRunner, tmp_path: Path):
    """When training raises an error, the pending save completes before the error is raised."""

    def fail(run: Any) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        train(make_runner, {"async_save": True}, 2, custom_hooks=[At(EPOCH + 1, fail)])
    assert find_latest_checkpoint(tmp_path / "run") == tmp_path / "run" / "epoch_1"


def test_an_interrupted_run_waits_for_its_pending_save(make_runner: MakeRunner, tmp_path: Path):
    """An interrupted run completes the pending save and saves its last checkpoint in the background too."""
    interrupt = At(EPOCH + 2, lambda run: os.kill(os.getpid(), signal.SIGTERM))
    runner = train(make_runner, {"async_save": True}, 2, custom_hooks=[interrupt])
    assert names(runner) == {"epoch_1", f"iter_{EPOCH + 2}"}
    assert runner.latest_checkpoint() == tmp_path / "run" / f"iter_{EPOCH + 2}"


def test_a_strategy_without_background_saving_is_rejected(make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch):
    """A strategy that cannot save in the background is rejected, and the message names the missing argument."""
    runner = make_runner(default_hooks={**QUIET_HOOKS, "checkpoint": {"async_save": True}})
    monkeypatch.setattr(type(runner.strategy), "save_checkpoint", lambda self, filename, **kwargs: None)
    with pytest.raises(ConfigValueError, match="has no argument `write`"):
        runner.train()


# ---- multiple ranks
# ----------------------------------------------------------------------------------------------------


def train_on_ranks(folder: str, hook: dict, validation: dict, **changes: Any) -> tuple[list[str], str]:
    """Train on all ranks; return the checkpoints in the directory and the newest one as seen by each rank."""
    hooks = {**QUIET_HOOKS, "checkpoint": hook}
    runner = Runner(
        **settings(
            model={"type": Toy},
            train_dataloader=loader(),
            work_dir=folder,
            default_hooks=hooks,
            **validation,
            **changes,
        )
    )
    try:
        runner.train()
        return sorted(names(runner)), str(runner.latest_checkpoint())
    finally:
        runner.close()


@pytest.mark.parametrize("way", WAYS[:2])
def test_all_ranks_keep_the_same_checkpoints(ranks: Ranks, tmp_path: Path, way: dict):
    """The last, best, timed and permanently kept checkpoints are the same on all ranks, for both ways of saving."""
    hook = {"max_keep_ckpts": 1, "keep_every": 2, "save_best": "acc", "every_minutes": 1e-9, **way}
    reported = ranks.run(train_on_ranks, str(tmp_path / "run"), hook, scored(0.1, 0.9, 0.3))
    assert reported == [(["best_acc_epoch_2", "epoch_2", "epoch_3"], str(tmp_path / "run" / "epoch_3"))] * 2
    resumed = ranks.run(
        train_on_ranks, str(tmp_path / "run"), hook, scored(0.3, 0.5), resume=True, train_cfg={"max_epochs": 4}
    )
    assert resumed[0] == resumed[1] == (["best_acc_epoch_2", "epoch_2", "epoch_4"], str(tmp_path / "run" / "epoch_4"))


@pytest.mark.slow
def test_a_run_with_out_dir_resumes_from_it(make_runner: Any, tmp_path: Path):
    """``resume=True`` finds the checkpoints in ``out_dir``; a URL as ``out_dir`` is rejected."""
    hooks = {**QUIET_HOOKS, "checkpoint": {"interval": 1, "out_dir": tmp_path / "big"}}
    make_runner(default_hooks=hooks, train_cfg={"max_epochs": 1}).train()
    again = make_runner(default_hooks=hooks, train_cfg={"max_epochs": 2}, resume=True)
    again.prepare()
    assert again.run.epoch == 1
    with pytest.raises(ConfigValueError, match=r"out_dir='s3://\*\*\*@bucket/runs' is a URL"):
        make_runner(default_hooks={"checkpoint": {"out_dir": "s3://key:secret@bucket/runs"}})
