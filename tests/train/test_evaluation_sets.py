"""Tests of several validation and test sets, and of a validation before the first update."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from stratagem import Runner
from stratagem.config import Config
from stratagem.config_schema import check_run
from stratagem.errors import ConfigKeyError, ConfigValueError, StratagemError
from stratagem.train import BaseMetric, Hook
from stratagem.train.hooks.best_scores import infer_rule
from tests.support.ranks import Ranks
from tests.train.toys import QUIET_HOOKS, At, Recorder, Samples, Toy, loader, settings, stop, train_until_signal

MakeRunner = Callable[..., Runner]
ACCURACY = {"type": "Accuracy", "task": "multiclass", "num_classes": 3, "average": "micro"}
# With two ranks, one rank has no sample of the second set.
SETS = {"clean": loader(5), "noisy": loader(1)}


class Numbers(BaseMetric):
    """Collects the numbers of the samples."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += data_samples["numbers"].tolist()

    def compute_metrics(self, results: list[int]) -> dict[str, Any]:
        return {"numbers": results}


class Loss(BaseMetric):
    """The number of validations so far, so that the best loss is the first one."""

    count = 0

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += data_samples["numbers"].tolist()

    def compute_metrics(self, results: list[int]) -> dict[str, Any]:
        type(self).count += 1
        return {"loss": float(self.count)}


def sets(evaluator: Any = ACCURACY, loaders: Any = SETS, mode: str = "val") -> dict[str, Any]:
    return {f"{mode}_dataloader": loaders, f"{mode}_evaluator": evaluator, f"{mode}_cfg": {}}


def checkpoints(runner: Runner) -> list[str]:
    return sorted(path.name for path in Path(runner.strategy.work_dir).iterdir() if path.name.startswith("best_"))


@pytest.mark.parametrize("mode", ["val", "test"])
@pytest.mark.parametrize("built", [False, True], ids=["configurations", "DataLoader objects"])
def test_metrics_of_named_sets_are_those_of_each_set_alone(make_runner: MakeRunner, mode: str, built: bool):
    """The metrics of a set have its name as prefix, and the values of an evaluation of this set alone."""
    given = {"clean": DataLoader(Samples(5), batch_size=2), "noisy": DataLoader(Samples(1))} if built else SETS
    alone = {
        name: getattr(make_runner(**sets(loaders=each, mode=mode)), mode)()["accuracy"] for name, each in SETS.items()
    }
    found = getattr(make_runner(**sets(loaders=given, mode=mode)), mode)()
    assert found == {"clean/accuracy": alone["clean"], "noisy/accuracy": alone["noisy"]}


def test_each_set_can_have_its_own_evaluator(make_runner: MakeRunner):
    """A mapping whose keys are the names of the sets specifies the metrics of each of them, here with names in one set."""
    evaluator = {"clean": {"right": ACCURACY, "seen": Numbers()}, "noisy": Numbers()}
    found = make_runner(**sets(evaluator)).val()
    assert {**found, "clean/right": None} == {
        "clean/right": None, "clean/numbers": [0, 1, 2, 3, 4], "noisy/numbers": [0]
    }  # fmt: skip


def test_a_metric_object_is_shared_by_the_sets(make_runner: MakeRunner):
    """A metric that is an object evaluates one set after the other and does not mix their results."""
    assert make_runner(**sets(Numbers())).val() == {"clean/numbers": [0, 1, 2, 3, 4], "noisy/numbers": [0]}


def test_hooks_know_which_set_is_evaluated(make_runner: MakeRunner):
    """``run.evaluated_set`` is the name of the set in the hooks of its batches, and None outside of evaluations."""
    seen: list[Any] = []

    class Names(Hook):
        def after_val_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            seen.append((run.evaluated_set, batch_idx))

    runner = make_runner(custom_hooks=[Names()], **sets())
    runner.val()
    assert seen == [("clean", 0), ("clean", 1), ("clean", 2), ("noisy", 0)]
    assert runner.run.evaluated_set is None


@pytest.mark.slow
def test_the_best_checkpoint_of_a_set_is_kept_and_resumed(make_runner: MakeRunner):
    """``save_best="noisy/loss"`` keeps the first validation, whose loss of 1 is the lowest, also after resuming."""
    Loss.count = 0
    hooks = {**QUIET_HOOKS, "checkpoint": {"interval": 1, "save_best": "noisy/loss"}}
    arguments = {"default_hooks": hooks, **sets({"clean": ACCURACY, "noisy": Loss()})}
    first = make_runner(train_cfg={"max_epochs": 2}, **arguments)
    first.train()
    assert first.run.metrics.keys() == {"clean/accuracy", "noisy/loss"}
    runner = make_runner(train_cfg={"max_epochs": 3}, resume=True, **arguments)
    runner.train()
    # The checkpoint of an epoch is saved before its validation, which the resumed run repeats.
    assert runner.run.metrics["noisy/loss"] == 4
    assert checkpoints(runner) == ["best_noisy_loss_epoch_1"]


def test_early_stopping_and_plateau_schedules_follow_the_metric_of_a_set(make_runner: MakeRunner):
    """The loss of a set grows in every validation: the rate is reduced after the third one, and training stops after it."""
    Loss.count = 0
    recorder = Recorder()
    schedule = {"type": "ReduceOnPlateauLR", "monitor": "noisy/loss", "patience": 0, "factor": 0.5}
    stopping = {"type": "EarlyStoppingHook", "monitor": "noisy/loss", "patience": 2}
    runner = make_runner(
        train_cfg={"max_epochs": 9}, custom_hooks=[stopping, recorder], param_scheduler=schedule,
        **sets({"clean": ACCURACY, "noisy": Loss()}),
    )  # fmt: skip
    runner.train()
    assert runner.run.epoch == 3
    assert sorted(set(recorder.rates), reverse=True) == [0.1, 0.05]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (sets(loaders={"clean": loader(5), "batch_size": 2}), ConfigValueError, "is ambiguous.*'clean'.*'batch_size'"),
        (sets(loaders={"dataset": loader(5), "clean": loader(5)}), ConfigValueError, "cannot have the name 'dataset'"),
        (sets(loaders={"a/b": loader(5)}), ConfigValueError, "name 'a/b' is not allowed.*'<set>/<metric>'"),
        (sets(loaders={"a.b": loader(5)}), ConfigValueError, "name 'a.b' is not allowed"),
        (sets({"clean": ACCURACY}), ConfigValueError, "the sets 'noisy' have no evaluator"),
        (sets({"clean": ACCURACY, "noisy": ACCURACY, "third": ACCURACY}), ConfigValueError, "'third' is not a set"),
        (
            {**sets(), "default_hooks": {"checkpoint": {"save_best": "accuracy"}}},
            ConfigKeyError,
            "save_best='accuracy' does not begin with the name of a validation set.*'clean', 'noisy'.*'clean/accuracy'",
        ),
        (
            {**sets(), "custom_hooks": [{"type": "EarlyStoppingHook", "monitor": "clear/accuracy"}]},
            ConfigKeyError,
            "monitor='clear/accuracy' does not begin.*Did you mean 'clean/accuracy'",
        ),
        (
            {**sets(), "param_scheduler": {"type": "ReduceOnPlateauLR", "monitor": "loss"}},
            ConfigKeyError,
            "ReduceOnPlateauLR: monitor='loss' does not begin",
        ),
        (
            {**sets(), "default_hooks": {"checkpoint": {"save_best": ["clean/accuracy", "clean_accuracy"]}}},
            ConfigValueError,
            "'clean/accuracy' and 'clean_accuracy' would have the same name",
        ),
    ],
)  # fmt: skip
def test_an_ambiguous_configuration_of_sets_is_rejected(
    make_runner: MakeRunner, changes: dict[str, Any], error: type[StratagemError], message: str
):
    """The check of a configuration and the start of the training reject it with the same message."""
    problems = check_run(Config(settings(**changes)))
    with pytest.raises(error, match=message) as raised:
        make_runner(**changes).train()
    assert [str(raised.value) in each.message for each in problems] == [True]


def test_an_unknown_metric_of_a_set_lists_the_metrics(make_runner: MakeRunner):
    """If a set does not have the monitored metric, the error after the first validation names the metrics."""
    hooks = {**QUIET_HOOKS, "checkpoint": {"save_best": "noisy/acuracy", "rule": "greater"}}
    with pytest.raises(ConfigKeyError, match="save_best='noisy/acuracy'.*Did you mean 'noisy/accuracy'"):
        make_runner(default_hooks=hooks, **sets()).train()


def test_the_rule_of_a_metric_does_not_depend_on_the_name_of_its_set():
    """The last part of the name decides: a set whose name contains a key of the other rule does not change it."""
    assert infer_rule("accents/loss") == "less"
    assert infer_rule("lossless/top1") == "greater"
    assert infer_rule("acc/overall") == "greater"


def test_a_validation_before_the_first_update_evaluates_the_initial_weights(make_runner: MakeRunner):
    """With ``val_begin=0``, the first metrics are those of the model before training."""
    recorder = Recorder()
    arguments = {"model": Toy(), "randomness": {"seed": 3}, **sets(ACCURACY, loader(13))}
    initial = make_runner(**arguments).val()
    make_runner(custom_hooks=[recorder], train_cfg={"max_epochs": 1, "val_begin": 0}, **arguments).train()
    assert [iteration for iteration, _ in recorder.metrics] == [0, 7]
    assert recorder.metrics[0][1] == initial != recorder.metrics[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("train_cfg", [{"max_epochs": 2}, {"max_iters": 9, "val_interval": 5}])
def test_a_resumed_run_does_not_repeat_the_validation_before_the_first_update(make_runner: MakeRunner, train_cfg: dict):
    """Whether the run resumes from the checkpoint of that validation or from a later one, it validates once at iteration 0."""
    recorder = Recorder()
    save = At(3, lambda run: run.save_checkpoint(Path(run.work_dir) / "third", run.progress.after_this_iteration()))
    arguments = {
        "train_cfg": {**train_cfg, "val_begin": 0},
        "default_hooks": {
            **QUIET_HOOKS,
            "checkpoint": {"save_best": "accuracy", "by_epoch": "max_epochs" in train_cfg},
        },
        **sets(ACCURACY, loader(5)),
    }
    runner = make_runner(custom_hooks=[recorder, save, At(4, stop)], **arguments)
    runner.train()
    whole = [iteration for iteration, _ in recorder.metrics]
    assert whole[0] == 0
    unit = "epoch" if "max_epochs" in train_cfg else "iter"
    for name in (f"best_accuracy_{unit}_0", "third"):
        again = Recorder()
        make_runner(custom_hooks=[again], resume=Path(runner.strategy.work_dir) / name, **arguments).train()
        assert [iteration for iteration, _ in again.metrics] == ([7, 14] if unit == "epoch" else [5, 9])


def test_averaged_weights_without_updates_are_evaluated_before_training(make_runner: MakeRunner):
    """Before the first update the average is empty, so the initial weights are evaluated, and nothing fails."""
    recorder = Recorder()
    hooks = [recorder, {"type": "EMAHook", "update_bn": "eval"}]
    make_runner(custom_hooks=hooks, train_cfg={"max_epochs": 1, "val_begin": 0}, **sets()).train()
    assert [iteration for iteration, _ in recorder.metrics] == [0, 7]


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_the_second_set_repeats_the_validation(make_runner: MakeRunner, tmp_path: Path):
    """The aborted validation returns no metrics of the first set, and the resumed run has those of an uninterrupted one."""

    class Interrupting(Hook):
        sent = False

        def after_val_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            if run.evaluated_set == "noisy" and not Interrupting.sent:
                Interrupting.sent = True
                os.kill(os.getpid(), signal.SIGINT)

    whole, parts = Recorder(), Recorder()
    arguments = {"train_cfg": {"max_epochs": 2}, **sets(Numbers())}
    make_runner(work_dir=tmp_path / "whole", custom_hooks=[whole], **arguments).train()
    assert train_until_signal(make_runner(custom_hooks=[parts, Interrupting()], **arguments)) == 130
    assert parts.metrics == []
    make_runner(custom_hooks=[parts], resume=True, **arguments).train()
    assert (
        parts.metrics
        == whole.metrics
        == [(7 * n, {"clean/numbers": list(range(5)), "noisy/numbers": [0]}) for n in (1, 2)]
    )


def test_metrics_of_sets_are_logged_and_recorded(make_runner: MakeRunner):
    """The log line and the records of a validation have the names of the sets."""
    runner = make_runner(default_hooks={"runtime_info": None, "checkpoint": None}, log_level="INFO", **sets())
    runner.val()
    folder = Path(runner.strategy.log_dir)
    record = json.loads((folder / "vis_data" / "scalars.json").read_text().splitlines()[-1])
    assert {"clean/accuracy", "noisy/accuracy"} <= record.keys()
    log = next(folder.glob("*.log")).read_text()
    assert re.search(r"Epoch\(val\) \[0\]\[4/4\]    clean/accuracy: \d.\d{4}  noisy/accuracy: \d", log)
    assert "Validation data 'noisy': 1 samples of Samples" in log


def run_with_sets(folder: str, strategy: Any) -> tuple[list[Any], dict[str, Any]]:
    """Train and validate named sets, also before the first update; return all metrics and those of a test."""
    recorder = Recorder()
    runner = Runner(
        **settings(
            work_dir=folder,
            strategy=strategy,
            custom_hooks=[recorder],
            train_cfg={"max_epochs": 1, "val_begin": 0},
            default_hooks={**QUIET_HOOKS, "checkpoint": {"save_best": "noisy/accuracy"}},
            **sets({"clean": {"acc": ACCURACY, "own": Numbers()}, "noisy": ACCURACY}),
            **sets(Numbers(), mode="test"),
        )
    )
    try:
        runner.train()
        return recorder.metrics, runner.test()
    finally:
        runner.close()


@pytest.mark.parametrize("strategy", ["ddp", {"type": "FSDPStrategy", "wrap_policy": "Linear"}], ids=["DDP", "FSDP"])
def test_two_ranks_evaluate_every_sample_of_each_set_once(ranks: Ranks, tmp_path: Path, strategy: Any):
    """Ranks with different numbers of batches, also none, get the same metrics over all samples of each set."""
    (metrics, tested), (others, tested_too) = ranks.run(run_with_sets, str(tmp_path), strategy)
    assert metrics == others
    assert [iteration for iteration, _ in metrics] == [0, 4]
    assert [each["clean/numbers"] for _, each in metrics] == [[0, 1, 2, 3, 4]] * 2
    assert tested == tested_too == {"clean/numbers": [0, 1, 2, 3, 4], "noisy/numbers": [0]}
    assert {path.name for path in tmp_path.glob("best_*")} <= {
        "best_noisy_accuracy_epoch_0",
        "best_noisy_accuracy_epoch_1",
    }
