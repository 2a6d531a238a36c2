"""Tests of limits of the number of batches, and of training on a few batches for debugging."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from stratagem import Runner
from stratagem.config import Config
from stratagem.config_schema import check_run
from stratagem.data import BatchLimit, BatchLimits, build_dataloader
from stratagem.errors import ConfigTypeError, ConfigValueError, StratagemError, TrainingError
from stratagem.train import BaseMetric
from stratagem.train.tools.schedule_preview import preview_run
from tests.support.ranks import Ranks
from tests.train.toys import (
    QUIET_HOOKS,
    TEST,
    TRAINING,
    VALIDATION,
    At,
    Recorder,
    Samples,
    Toy,
    loader,
    settings,
    train_until_signal,
)

MakeRunner = Callable[..., Runner]


class Numbers(BaseMetric):
    """Collects the numbers of the samples."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += data_samples["numbers"].tolist()

    def compute_metrics(self, results: list[int]) -> dict[str, Any]:
        return {"numbers": results}


class Stream(IterableDataset[Any]):
    """A stream of unknown length with 13 samples; with ``forever``, it starts over at the end."""

    def __init__(self, forever: bool = False) -> None:
        self.samples, self.forever = Samples(), forever

    def __iter__(self) -> Iterator[Any]:
        yield from (self.samples[index] for index in range(13))
        while self.forever:
            yield from (self.samples[index] for index in range(13))


NUMBERS = {"val_dataloader": loader(5), "val_evaluator": Numbers(), "val_cfg": {}}


def numbers_by_epoch(recorder: Recorder) -> list[list[int]]:
    """Return the numbers of the samples of each epoch."""
    last = recorder.rows[-1][0]
    return [
        [n for epoch, _, numbers, *_ in recorder.rows if epoch == wanted for n in numbers] for wanted in range(last + 1)
    ]


@pytest.mark.parametrize(("limit", "batches"), [(3, 3), (0.5, 3), (1, 1), (1.0, 7), (0.01, 1), (100, 7)])
def test_an_epoch_ends_at_the_limit(make_runner: MakeRunner, limit: float, batches: int):
    """An integer is a number of batches, a float the fraction of the 7 batches rounded down, but at least one batch."""
    recorder = Recorder()
    runner = make_runner(limit_train_batches=limit, custom_hooks=[recorder])
    runner.train()
    assert (runner.run.iter, runner.run.max_iters, runner.run.progress.epoch_length) == (
        3 * batches,
        3 * batches,
        batches,
    )
    assert [len(each) for each in numbers_by_epoch(recorder)] == [min(2 * batches, 13)] * 3


def test_a_limited_epoch_begins_with_the_order_of_a_whole_epoch(make_runner: MakeRunner):
    """Each epoch is shuffled as without the limit, and its first batches are used."""
    whole, limited = Recorder(), Recorder()
    make_runner(custom_hooks=[whole]).train()
    make_runner(custom_hooks=[limited], limit_train_batches=2).train()
    assert numbers_by_epoch(limited) == [each[:4] for each in numbers_by_epoch(whole)]


def test_a_fraction_is_computed_in_decimal_arithmetic():
    """29 % of 100 batches are 29 batches, although 0.29 * 100 is less than 29 in binary."""
    assert BatchLimit(option="limit_train_batches", value=0.29).count(100) == 29


def test_schedules_use_the_length_of_limited_epochs(make_runner: MakeRunner):
    """A schedule over the whole run ends after 3 epochs of 2 batches, and the preview shows the same."""
    recorder = Recorder()
    schedule = {"type": "LinearLR", "start_factor": 1.0, "end_factor": 0.5, "by_epoch": False}
    make_runner(limit_train_batches=2, param_scheduler=schedule, custom_hooks=[recorder]).train()
    expected = [0.1 * (1 - 0.5 * step / 5) for step in range(6)]
    assert recorder.rates == pytest.approx(expected)
    preview = preview_run(
        {"type": Toy}, param_scheduler=schedule, limits=BatchLimits(limit_train_batches=2), **TRAINING
    )
    assert (preview.max_iters, preview.epoch_length) == (6, 2)


def test_iteration_loops_repeat_limited_epochs(make_runner: MakeRunner):
    """A run of 5 iterations has epochs of 2 batches, also with a sampler that has no end, whose order continues."""
    recorder, endless, whole = Recorder(), Recorder(), Recorder()
    arguments = {"train_cfg": {"max_iters": 5}, "limit_train_batches": 2}
    make_runner(custom_hooks=[recorder], **arguments).train()
    assert [row[:2] for row in recorder.rows] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    infinite = loader(sampler={"type": "InfiniteSampler"})
    make_runner(custom_hooks=[endless], train_dataloader=infinite, **arguments).train()
    make_runner(custom_hooks=[whole], train_dataloader=infinite, train_cfg={"max_iters": 5}).train()
    assert [row[2] for row in endless.rows] == [row[2] for row in whole.rows]


def test_evaluations_use_the_first_batches(make_runner: MakeRunner):
    """Validation and test use the first 2 and 1 of their 3 batches of 2 samples."""
    runner = make_runner(
        limit_val_batches=2, limit_test_batches=0.34, **NUMBERS, **{**TEST, "test_evaluator": Numbers()}
    )
    assert runner.val() == {"numbers": [0, 1, 2, 3]}
    assert runner.test() == {"numbers": [0, 1]}


def test_each_validation_set_has_the_limit(make_runner: MakeRunner):
    """A limit applies to each of several validation sets."""
    runner = make_runner(limit_val_batches=1, **{**NUMBERS, "val_dataloader": {"a": loader(5), "b": loader(1)}})
    assert runner.val() == {"a/numbers": [0, 1], "b/numbers": [0]}


def interrupt(run: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def opaque_loader() -> DataLoader[Any]:
    """Return a loader with a sampler that Stratagem does not replace."""
    return DataLoader(Samples(), sampler=WeightedRandomSampler([1.0] * 13, 13), batch_size=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        {},
        {"train_dataloader": loader(sampler={"type": "InfiniteSampler"})},
        {"train_dataloader": {"dataset": Stream(forever=True), "batch_size": 2}},
        {"train_dataloader": opaque_loader()},
    ],
    ids=["shuffled", "infinite", "stream", "sampler"],
)
@pytest.mark.parametrize("option", ["limit_train_batches", "overfit_batches"])
def test_a_limited_run_resumes_exactly(make_runner: MakeRunner, tmp_path: Path, data: dict[str, Any], option: str):
    """A run that is interrupted within an epoch and at its end has the bits of an uninterrupted one."""
    whole, parts = Recorder(), Recorder()
    arguments = {option: 3, **data, **NUMBERS}
    runner = make_runner(custom_hooks=[whole], work_dir=tmp_path / "whole", **arguments)
    runner.train()
    for iteration in (2, 3, 7):
        train_until_signal(make_runner(custom_hooks=[parts, At(iteration, interrupt)], resume=True, **arguments))
    resumed = make_runner(custom_hooks=[parts], resume=True, **arguments)
    resumed.train()
    assert len(whole.rows) == 9
    assert parts.rows == whole.rows
    assert parts.metrics == whole.metrics
    weights = runner.strategy.model_state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.strategy.model_state_dict().items())


def test_a_limit_that_changes_between_sessions_ends_the_current_epoch(make_runner: MakeRunner):
    """A run that resumes after 4 batches of an epoch with a limit of 3 continues with the next epoch."""
    recorder = Recorder()
    train_until_signal(make_runner(custom_hooks=[At(4, interrupt)]))
    runner = make_runner(custom_hooks=[recorder], resume=True, limit_train_batches=3)
    runner.train()
    assert [row[:2] for row in recorder.rows] == [(epoch, batch) for epoch in (1, 2) for batch in range(3)]
    assert runner.run.iter == runner.run.max_iters == 10


def test_a_stream_of_unknown_length_has_the_limit_as_its_length(make_runner: MakeRunner):
    """A stream without a length trains for the limit in each epoch, and schedules by epoch length can be used."""
    recorder = Recorder()
    runner = make_runner(
        train_dataloader={"dataset": Stream(), "batch_size": 2}, limit_train_batches=4, custom_hooks=[recorder]
    )
    runner.train()
    assert runner.run.max_iters == 12
    assert numbers_by_epoch(recorder) == [list(range(8))] * 3


def test_a_stream_that_ends_before_the_limit_is_an_error(make_runner: MakeRunner):
    """The length of the epoch would be wrong, so the error names the number of batches that the stream has."""
    runner = make_runner(train_dataloader={"dataset": Stream(), "batch_size": 2}, limit_train_batches=8)
    with pytest.raises(TrainingError, match=r"limit_train_batches=8, but the data ended after 7 batches.*at most 7"):
        runner.train()


def test_an_evaluated_stream_may_end_before_the_limit(make_runner: MakeRunner):
    """A validation of a stream that is shorter than the limit evaluates all of it."""
    stream = {"dataset": Stream(), "batch_size": 2}
    assert make_runner(limit_val_batches=9, **{**NUMBERS, "val_dataloader": stream}).val() == {
        "numbers": list(range(13))
    }
    assert make_runner(limit_val_batches=2, **{**NUMBERS, "val_dataloader": stream}).val() == {"numbers": [0, 1, 2, 3]}


def test_overfitting_trains_and_validates_on_the_first_batches(make_runner: MakeRunner):
    """Every epoch has the first 2 batches of the dataset in the same order, and so have the validations, without shuffling."""
    recorder = Recorder()
    make_runner(overfit_batches=2, custom_hooks=[recorder], **NUMBERS).train()
    assert numbers_by_epoch(recorder) == [[0, 1, 2, 3]] * 3
    assert [each for _, each in recorder.metrics] == [{"numbers": [0, 1, 2, 3]}] * 3


def test_overfitting_with_a_sampler_repeats_its_first_epoch(make_runner: MakeRunner):
    """A loader with a custom sampler keeps its order: that of the first epoch, in training and validation."""
    recorder = Recorder()
    data = loader(sampler={"type": "WeightedSampler", "weights": [1.0] * 13})
    make_runner(overfit_batches=2, train_dataloader=data, custom_hooks=[recorder], **NUMBERS).train()
    first = numbers_by_epoch(recorder)[0]
    assert numbers_by_epoch(recorder) == [first] * 3
    assert [each for _, each in recorder.metrics] == [{"numbers": first}] * 3


def test_overfitting_is_reported(make_runner: MakeRunner, capfd: pytest.CaptureFixture[str]):
    """A warning at the start states that the run is for debugging, and the description of the data has the limit."""
    runner = make_runner(overfit_batches=2, log_level="INFO", **NUMBERS)
    runner.prepare()
    log = next(Path(runner.strategy.log_dir).glob("*.log")).read_text()
    assert "overfit_batches=2: every epoch trains on the same batches in the same order" in log
    assert "limited to the first 2 of 7 batches per rank (overfit_batches=2)" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"limit_train_batches": 0}, ConfigValueError, "limit_train_batches must be at least 1, got 0"),
        ({"limit_train_batches": 1.5}, ConfigValueError, "limit_train_batches=1.5 is a fraction"),
        ({"limit_train_batches": True}, ConfigTypeError, "limit_train_batches must be a number of batches.*got True"),
        ({"limit_val_batches": "2", **VALIDATION}, ConfigTypeError, "limit_val_batches must be .* got '2'"),
        ({"limit_val_batches": 2}, ConfigValueError, "limit_val_batches=2 has no effect without val_dataloader"),
        ({"limit_test_batches": 2}, ConfigValueError, "limit_test_batches=2 has no effect without test_dataloader"),
        ({"overfit_batches": 0}, ConfigValueError, "overfit_batches must be at least 1, got 0"),
        ({"overfit_batches": 0.5}, ConfigTypeError, "overfit_batches must be a number of batches, got 0.5"),
        (
            {"overfit_batches": 2, "limit_train_batches": 3},
            ConfigValueError,
            "overfit_batches=2 determines .* so limit_train_batches=3 would be ignored",
        ),
        (
            {"overfit_batches": 2, **VALIDATION, "val_dataloader": {"a": loader(5), "b": loader(5)}},
            ConfigValueError,
            "overfit_batches=2 validates on the training batches, but val_dataloader has the sets a, b",
        ),
    ],
)
def test_an_invalid_limit_is_rejected(
    make_runner: MakeRunner, changes: dict[str, Any], error: type[StratagemError], message: str
):
    """The check of a configuration and building the run reject it with the same message."""
    problems = check_run(Config(settings(**changes)))
    with pytest.raises(error, match=message) as raised:
        make_runner(**changes)
    assert [str(raised.value) in each.message for each in problems] == [True]


def test_data_that_cannot_be_limited_is_rejected(make_runner: MakeRunner):
    """Too few batches for overfitting, and a fraction of a stream of unknown length, are rejected before training."""
    with pytest.raises(ConfigValueError, match="overfit_batches=8, but each rank has 7 training batches"):
        make_runner(overfit_batches=8).train()
    stream = {"dataset": Stream(), "batch_size": 2}
    with pytest.raises(
        ConfigValueError, match="limit_train_batches=0.5 is a fraction, but the number of batches is unknown"
    ):
        make_runner(train_dataloader=stream, limit_train_batches=0.5).train()


def test_a_loader_with_a_state_is_not_limited():
    """The state of a loader does not show whether it continues after the limit, so it is rejected for training."""

    class WithState(DataLoader[Any]):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    limit = BatchLimits(limit_train_batches=2).of("train")
    with pytest.raises(ConfigValueError, match="limit_train_batches=2: WithState saves its position with state_dict"):
        build_dataloader(WithState(Samples()), seed=0, training=True, limit=limit)


def run_limited(folder: str, strategy: Any, **changes: Any) -> tuple[list[Any], list[Any], int | None]:
    recorder = Recorder()
    arguments = {"custom_hooks": [recorder], "default_hooks": QUIET_HOOKS, **NUMBERS, **changes}
    runner = Runner(**settings(work_dir=folder, strategy=strategy, **arguments))
    try:
        runner.train()
        return numbers_by_epoch(recorder), [each["numbers"] for _, each in recorder.metrics], runner.run.max_iters
    finally:
        runner.close()


@pytest.mark.parametrize("strategy", ["ddp", {"type": "FSDPStrategy", "wrap_policy": "Linear"}], ids=["DDP", "FSDP"])
def test_two_ranks_share_the_limited_batches(ranks: Ranks, tmp_path: Path, strategy: Any):
    """The limit counts the batches of each rank: one batch of each rank contains the first 4 samples of the validation."""
    limits = {"limit_train_batches": 2, "limit_val_batches": 1}
    first, second = ranks.run(run_limited, str(tmp_path / "a"), strategy, **limits)
    assert first[1] == second[1] == [[0, 1, 2, 3]] * 3
    assert first[2] == second[2] == 6
    assert all(len({*a, *b}) == 8 for a, b in zip(first[0], second[0], strict=True))
    first, second = ranks.run(run_limited, str(tmp_path / "b"), strategy, overfit_batches=2)
    assert (first[0], second[0]) == ([[0, 2, 4, 6]] * 3, [[1, 3, 5, 7]] * 3)
    assert first[1] == [list(range(8))] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_the_length_of_a_limited_stream_is_the_same_on_every_rank(rank: int):
    """Of 5 batches, the ranks have 3 and 2, and 70 % of 3 rounds are 2 batches on both."""
    limit = BatchLimits(limit_val_batches=0.7).of("val")
    stream = {"dataset": SizedStream(), "batch_size": 3}
    assert build_dataloader(stream, seed=0, rank=rank, world_size=2, training=False, limit=limit).length == 2


@pytest.mark.parametrize("limit", [0.7, 1])
def test_two_ranks_limit_a_stream_that_both_read(ranks: Ranks, tmp_path: Path, limit: float):
    """Ranks with different numbers of batches stop after the same round, so that a collective forward pass does not hang."""
    stream = {"dataset": SizedStream(), "batch_size": 3}
    strategy = {"type": "FSDPStrategy", "wrap_policy": "Linear"}
    first, second = ranks.run(
        run_limited, str(tmp_path), strategy, val_dataloader=stream, limit_val_batches=limit, limit_train_batches=1
    )
    # Of 5 batches, the ranks have 3 and 2. 70 % of 3 rounds are 2 rounds.
    assert first[1] == second[1] == [list(range(12 if limit == 0.7 else 6))] * 3


def test_two_ranks_train_on_a_limited_stream(ranks: Ranks, tmp_path: Path):
    """Each rank trains on 2 batches of an endless stream, which are distributed in turn, in every epoch."""
    stream = {"dataset": Stream(forever=True), "batch_size": 2}
    first, second = ranks.run(run_limited, str(tmp_path), "ddp", train_dataloader=stream, limit_train_batches=2)
    assert (first[0], second[0]) == ([[0, 1, 4, 5]] * 3, [[2, 3, 6, 7]] * 3)
    assert first[2] == second[2] == 6


class SizedStream(Stream):
    """A stream with a length."""

    def __len__(self) -> int:
        return 13
