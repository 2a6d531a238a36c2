"""Tests of dry runs: what they try, and that they leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from stratagem import Runner
from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.strategies import SingleDeviceStrategy
from stratagem.train import BaseMetric, EarlyStoppingHook, Hook
from stratagem.train.tools.dry_run import DryRun
from stratagem.train.trackers import Tracker
from tests.support.ranks import Ranks
from tests.train.toys import TEST, VALIDATION, Recorder, Samples, Toy, loader, settings

# Each dry run builds two runs.
pytestmark = pytest.mark.slow

MakeRunner = Callable[..., Runner]
HOOKS = {"runtime_info": None, "logger": None}
SKIPPED = {"validation": "there is no val_dataloader", "test": "there is no test_dataloader"}


class Failing(BaseMetric):
    """A metric that fails."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        raise ValueError("no metric")

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        return {}


class Endless(IterableDataset[Any]):
    """A stream of unknown length."""

    def __iter__(self) -> Iterator[Any]:
        samples = Samples()
        while True:
            yield samples[0]


class Seen(Hook):
    """Records the learning rates and the lengths of the run in all copies of the hook."""

    rates: ClassVar[list[float]] = []
    batches: ClassVar[list[str]] = []

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.rates.append(run.optim_wrapper.get_lr()["lr"][0])

    def _after_iter(
        self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = ""
    ) -> None:
        self.batches.append(mode)


class Loaded(Hook):
    """Records the iterations of the loaded checkpoints in all copies of the hook."""

    iterations: ClassVar[list[int]] = []

    def after_load_checkpoint(self, run: Any, checkpoint: dict[str, Any]) -> None:
        self.iterations.append(checkpoint["meta"]["iter"])


def files(folder: Path) -> list[str]:
    """Return all files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def skipped(tried: DryRun) -> dict[str, str]:
    """Return the parts that were skipped and why."""
    return {part.name: part.details for part in tried.parts if part.seconds is None}


def test_all_parts_are_tried_and_nothing_is_left(make_runner: MakeRunner, tmp_path: Path):
    """Each part has a time, and the files are those from before the dry run."""
    runner = make_runner(default_hooks={**HOOKS, "checkpoint": {"save_best": "accuracy"}}, **VALIDATION, **TEST)
    before = files(tmp_path)
    tried = runner.dry_run()
    assert files(tmp_path) == before
    assert (tried.strategy, tried.ranks, tried.iterations) == ("SingleDeviceStrategy", 1, 4)
    names = ["start-up", "training", "waiting for data", "validation", "saving", "test", "loading"]
    assert [part.name for part in tried.parts] == names
    assert skipped(tried) == {}
    details = {part.name: part.details for part in tried.parts}
    assert details["training"] == "4 iterations, 4 updates"
    assert details["validation"] == details["test"] == "metrics: accuracy"
    assert "(best_accuracy_epoch_1)" in details["saving"]
    assert details["loading"] == "resumed after iteration 4 in a new run"
    lines = tried.describe().splitlines()
    assert lines[0] == "The dry run with SingleDeviceStrategy in 1 process succeeded. Its files were removed."
    assert [line.split("  ")[1] for line in lines[1:]] == names


def test_a_dry_run_does_not_change_the_run(make_runner: MakeRunner, tmp_path: Path):
    """The training after a dry run has the bits of one without it, with a model, loader, hooks and generator as objects."""
    found = []
    for tries in (False, True):
        torch.manual_seed(0)
        recorder = Recorder()
        data = DataLoader(Samples(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))
        runner = make_runner(
            model=Toy(),
            train_dataloader=data,
            work_dir=tmp_path / str(tries),
            custom_hooks=[recorder, EarlyStoppingHook("accuracy", patience=9)],
            **VALIDATION,
        )
        if tries:
            runner.dry_run()
            assert recorder.rows == []
        runner.train()
        found.append((recorder.rows, recorder.metrics))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "details"),
    [
        ({"optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": 3}}, "6 iterations, 2 updates"),
        ({"train_cfg": {"max_iters": 300, "val_interval": 100}, **VALIDATION}, "4 iterations, 4 updates"),
        ({"train_cfg": {"max_iters": 3}}, "3 iterations, 3 updates"),
        (
            {
                "train_cfg": {"max_steps": 9},
                "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": 3},
            },
            "6 iterations, 2 updates",
        ),
        ({"train_dataloader": {"dataset": Endless(), "batch_size": 2}}, "4 iterations, 4 updates"),
        ({"overfit_batches": 2, **VALIDATION}, "2 iterations, 2 updates"),
        ({"limit_val_batches": 1, **VALIDATION}, "4 iterations, 4 updates"),
        ({"train_cfg": {"max_epochs": 30, "val_begin": 20, "val_interval": 7}, **VALIDATION}, "4 iterations, 4 updates"),
        ({"train_cfg": {"max_epochs": 30, "val_begin": 0}, **VALIDATION}, "4 iterations, 4 updates"),
        ({**VALIDATION, "val_dataloader": {"a": loader(5), "b": loader(1)}}, "4 iterations, 4 updates"),
    ],
    ids=["accumulation", "iterations", "short", "steps", "stream", "overfit", "limit", "late", "before", "sets"],
)  # fmt: skip
def test_a_few_iterations_are_trained(make_runner: MakeRunner, changes: dict[str, Any], details: str):
    """Two accumulation windows or 4 iterations are trained, and validations, saves and loads follow in any kind of run."""
    tried = make_runner(default_hooks=HOOKS, **changes).dry_run()
    assert next(part.details for part in tried.parts if part.name == "training").startswith(details)
    assert set(skipped(tried)) == {"test"} | (set() if "val_dataloader" in changes else {"validation"})


def test_schedules_are_those_of_the_whole_run(make_runner: MakeRunner):
    """A warmup that is longer than the dry run, and a schedule that begins after it, have the rates of the whole run."""
    schedules = [
        {"type": "LinearLR", "start_factor": 0.5, "by_epoch": False, "end": 11},
        {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 11},
    ]
    Seen.rates.clear()
    make_runner(param_scheduler=schedules, custom_hooks=[Seen()]).dry_run()
    assert Seen.rates == pytest.approx([0.1 * (0.5 + 0.5 * step / 10) for step in range(4)])


def test_evaluations_use_two_batches(make_runner: MakeRunner):
    """A validation of 3 batches is tried with 2 of them."""
    Seen.batches.clear()
    make_runner(custom_hooks=[Seen()], **VALIDATION).dry_run()
    assert Seen.batches == ["val"] * 2


def test_checkpoints_are_saved_in_the_temporary_folder(make_runner: MakeRunner, tmp_path: Path):
    """``out_dir`` is not used, and the last checkpoint is saved even if ``save_last`` is False."""
    hooks = {**HOOKS, "checkpoint": {"out_dir": tmp_path / "store", "save_last": False, "interval": 100}}
    assert set(skipped(make_runner(default_hooks=hooks).dry_run())) == {"validation", "test"}
    assert not (tmp_path / "store").exists()


def test_parts_that_the_run_does_not_have_are_skipped(make_runner: MakeRunner):
    """Without a CheckpointHook and evaluations, the summary contains the reasons."""
    tried = make_runner().dry_run()
    assert skipped(tried) == {
        **SKIPPED, "saving": "there is no CheckpointHook", "loading": "no checkpoint was saved"
    }  # fmt: skip
    assert "skipped  there is no CheckpointHook" in tried.describe()


class Started(Tracker):
    """A tracker that records whether it was started, in all copies."""

    calls: ClassVar[list[str]] = []

    def start(self, run: Any) -> None:
        self.calls.append("start")

    def log(self, record: Any) -> None: ...

    def finish(self, end: Any) -> None: ...


def test_trackers_are_not_started(make_runner: MakeRunner):
    """A tracker is started by the training and not by the dry run."""
    Started.calls.clear()
    runner = make_runner(trackers=[Started()], default_hooks=HOOKS, train_cfg={"max_iters": 1})
    runner.dry_run()
    assert Started.calls == []
    runner.train()
    assert Started.calls == ["start"]


@pytest.mark.parametrize(
    ("changes", "error", "message", "part"),
    [
        ({**VALIDATION, "val_evaluator": Failing()}, ValueError, "no metric", "validation"),
        ({**TEST, "test_evaluator": Failing()}, ValueError, "no metric", "test"),
        ({**VALIDATION, "default_hooks": {"checkpoint": {"save_best": "acc"}}}, ConfigKeyError, "save_best='acc'", "validation"),
        ({"train_dataloader": loader(collate_fn=len)}, Exception, None, "training"),
    ],
)  # fmt: skip
def test_a_failure_names_the_part_and_leaves_nothing(
    make_runner: MakeRunner,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str | None,
    part: str,
):
    """The error of the part is raised with a note, and the temporary folder is removed."""
    runner = make_runner(**changes)
    before = files(tmp_path)
    with pytest.raises(error, match=message) as raised:
        runner.dry_run()
    assert f"The dry run failed in this part: {part}. Its files were removed." in raised.value.__notes__
    assert files(tmp_path) == before


def test_the_weights_of_the_checkpoint_to_resume_are_loaded(make_runner: MakeRunner):
    """With ``resume=True``, the latest checkpoint of the work directory is loaded, and then that of the dry run."""
    loaded = Loaded.iterations
    loaded.clear()
    make_runner(default_hooks=HOOKS, train_cfg={"max_epochs": 1}).train()
    tried = make_runner(default_hooks=HOOKS, resume=True, custom_hooks=[Loaded()]).dry_run()
    assert tried.iterations == 4
    assert loaded == [7, 4]


def test_what_cannot_be_tried_is_rejected(make_runner: MakeRunner, tmp_path: Path):
    """A strategy that is already built cannot be built again, and without training there is nothing to try."""
    strategy = SingleDeviceStrategy(work_dir=tmp_path / "own")
    with pytest.raises(ConfigValueError, match="the strategy is already built"):
        make_runner(strategy=strategy, randomness=None, log_level=None).dry_run()
    with pytest.raises(ConfigValueError, match="there is no train_cfg"):
        make_runner(train_dataloader=None, train_cfg=None, optim_wrapper=None, **TEST).dry_run()


def try_on_rank(folder: str, strategy: Any, **changes: Any) -> tuple[DryRun, list[str]]:
    """Make a dry run on this rank; return the result and the files of the folder."""
    arguments = {"default_hooks": HOOKS, **VALIDATION, **TEST, **changes}
    runner = Runner(**settings(work_dir=f"{folder}/run", strategy=strategy, **arguments))
    try:
        before = files(Path(folder))
        return runner.dry_run(), [name for name in files(Path(folder)) if name not in before]
    finally:
        runner.close()


@pytest.mark.parametrize("strategy", ["ddp", {"type": "fsdp", "wrap_policy": "Linear"}], ids=["DDP", "FSDP"])
def test_two_ranks_try_the_run_together(ranks: Ranks, tmp_path: Path, strategy: Any):
    """The ranks use one temporary folder, and both return the same parts."""
    (first, left), (second, _) = ranks.run(try_on_rank, str(tmp_path), strategy)
    assert left == []
    assert (first.ranks, first.rank, second.rank) == (2, 0, 1)
    assert [part.name for part in first.parts] == [part.name for part in second.parts]
    assert skipped(first) == {}
