from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset

from stratagem import Runner
from stratagem.errors import ConfigTypeError, ConfigValueError, TrainingError
from tests.train.toys import EPOCH, VALIDATION, At, EventLog, Recorder, loader, settings, stop

MakeRunner = Callable[..., Runner]


class Stream(IterableDataset):
    """A stream without a length."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        samples = loader()["dataset"]
        return (samples[index] for index in range(2 * self.batches))


class Shortened(Stream):
    """A stream that is shorter than its ``__len__``."""

    def __len__(self) -> int:
        return 2 * self.batches + 4


def stream(dataset: IterableDataset) -> DataLoader:
    """Return a loader of a stream in batches of two."""
    return DataLoader(dataset, batch_size=2)


def validated_after(make_runner: MakeRunner, **train_cfg: Any) -> list[int]:
    """Return the iterations after which a full run validates."""
    recorder = Recorder()
    make_runner(train_cfg=train_cfg, custom_hooks=[recorder], **VALIDATION).train()
    return [iteration for iteration, _ in recorder.metrics]


def test_an_epoch_loop_calls_the_events_in_order(make_runner: MakeRunner):
    """Hooks see one training epoch of two batches and a validation of three in this order."""
    log = EventLog()
    make_runner(train_cfg={"max_epochs": 1}, train_dataloader=loader(4), custom_hooks=[log], **VALIDATION).train()
    assert log.names == [
        "before_run", "before_train", "before_train_epoch",
        *["before_train_iter", "after_train_iter"] * 2,
        "after_train_epoch",
        "before_val", "before_val_epoch", *["before_val_iter", "after_val_iter"] * 3, "after_val_epoch", "after_val",
        "after_train", "after_run",
    ]  # fmt: skip


def test_an_iteration_loop_is_one_epoch_for_hooks(make_runner: MakeRunner):
    """The loop repeats the data as often as needed and validates in between."""
    log = EventLog()
    make_runner(
        train_cfg={"max_iters": 3, "val_interval": 2}, train_dataloader=loader(4), custom_hooks=[log], **VALIDATION
    ).train()
    val = ["before_val", "before_val_epoch", *["before_val_iter", "after_val_iter"] * 3, "after_val_epoch", "after_val"]
    step = ["before_train_iter", "after_train_iter"]
    assert log.names == [
        "before_run", "before_train", "before_train_epoch", *step * 2, *val, *step, *val,
        "after_train_epoch", "after_train", "after_run",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("train_cfg", "epochs"),
    [
        ({"max_epochs": 5}, [1, 2, 3, 4, 5]),
        ({"max_epochs": 5, "val_interval": 2}, [2, 4, 5]),
        ({"max_epochs": 5, "val_interval": 2, "val_begin": 3}, [4, 5]),
        ({"max_epochs": 5, "val_interval": 9}, [5]),
        ({"max_epochs": 5, "val_begin": 6}, []),
        ({"max_epochs": 4, "val_begin": 0, "val_interval": 3}, [0, 3, 4]),
        ({"max_epochs": 9, "val_interval": 4, "dynamic_intervals": [(5, 2), (8, 1)]}, [4, 6, 8, 9]),
    ],
)
def test_an_epoch_loop_validates_on_schedule(make_runner: MakeRunner, train_cfg: dict, epochs: list[int]):
    """Validation runs every ``val_interval`` epochs from ``val_begin``; ``dynamic_intervals`` change the interval."""
    assert validated_after(make_runner, **train_cfg) == [EPOCH * epoch for epoch in epochs]


@pytest.mark.parametrize(
    ("train_cfg", "expected"),
    [
        ({"max_iters": 10, "val_interval": 4}, [4, 8, 10]),
        ({"max_iters": 10}, [10]),
        ({"max_iters": 10, "val_interval": 2, "val_begin": 5}, [6, 8, 10]),
        ({"max_iters": 10, "val_interval": 2, "val_begin": 11}, []),
        ({"max_iters": 9, "val_interval": 4, "val_begin": 0}, [0, 4, 8, 9]),
        ({"max_iters": 12, "val_interval": 5, "dynamic_intervals": [(6, 3)]}, [5, 6, 9, 12]),
    ],
)
def test_an_iteration_loop_validates_on_schedule(make_runner: MakeRunner, train_cfg: dict, expected: list[int]):
    """In an iteration-based run, validation runs every ``val_interval`` iterations from ``val_begin``."""
    assert validated_after(make_runner, **train_cfg) == expected


def test_the_model_is_in_training_mode_after_a_validation(make_runner: MakeRunner):
    """Validation puts the model into eval mode; the next iteration is in training mode."""
    modes = []
    hook = At(3, lambda run: modes.append(run.model.training))
    make_runner(train_cfg={"max_iters": 4, "val_interval": 2}, custom_hooks=[hook], **VALIDATION).train()
    assert modes == [True]


def test_an_epoch_sees_every_sample_once(make_runner: MakeRunner):
    """Thirteen samples in batches of two give seven batches, the last of one sample, in a new order in each epoch."""
    recorder = Recorder()
    make_runner(custom_hooks=[recorder]).train()
    orders = [[n for epoch, _, numbers, *_ in recorder.rows if epoch == wanted for n in numbers] for wanted in range(3)]
    assert [sorted(order) for order in orders] == [list(range(13))] * 3
    assert len({tuple(order) for order in orders}) == 3


def test_iterations_continue_across_epochs(make_runner: MakeRunner):
    """``max_iters`` need not be a multiple of the epoch length; the position gives the epoch and the batch in it."""
    recorder = Recorder()
    runner = make_runner(train_cfg={"max_iters": 10}, custom_hooks=[recorder])
    runner.train()
    assert len(recorder.rows) == 10
    assert [row[1] for row in recorder.rows] == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    here = runner.run.progress.here()
    assert (here.epoch, here.iter, here.batch) == (1, 10, 3)


def test_an_infinite_sampler_continues_across_epochs(make_runner: MakeRunner):
    """Two epochs of 7 batches of 2 are the first 28 samples of the infinite sampler."""
    recorder = Recorder()
    endless = loader(sampler={"type": "InfiniteSampler"})
    make_runner(train_cfg={"max_epochs": 2}, train_dataloader=endless, custom_hooks=[recorder]).train()
    seen = [number for *_, numbers, _, _ in recorder.rows for number in numbers]
    assert len(recorder.rows) == 14
    assert sorted(seen[:13]) == sorted(seen[13:26]) == list(range(13))


def test_a_stream_without_a_length_ends_its_epochs(make_runner: MakeRunner):
    """Each epoch is as long as the stream, and the total number of iterations is unknown."""
    runner = make_runner(train_cfg={"max_epochs": 2}, train_dataloader=stream(Stream(3)))
    runner.train()
    assert (runner.run.epoch, runner.run.iter, runner.run.max_iters) == (2, 6, None)


def test_data_that_ends_before_its_length_ends_the_epoch(make_runner: MakeRunner):
    """A stream that claims 5 batches but yields 3 has epochs of 3."""
    runner = make_runner(train_cfg={"max_epochs": 2}, train_dataloader=stream(Shortened(3)))
    runner.train()
    assert (runner.run.epoch, runner.run.iter) == (2, 6)


@pytest.mark.parametrize("train_cfg", [{"max_epochs": 2}, {"max_iters": 2}])
def test_an_empty_stream_is_an_error(make_runner: MakeRunner, train_cfg: dict):
    """An empty stream raises an error; the run would otherwise train nothing or never end."""
    runner = make_runner(train_cfg=train_cfg, train_dataloader=stream(Stream(0)))
    with pytest.raises(TrainingError, match="yields no batch"):
        runner.train()


def test_data_smaller_than_a_batch_is_rejected_before_training(make_runner: MakeRunner):
    """With ``drop_last``, a dataset of one sample has no batch."""
    runner = make_runner(train_dataloader=loader(1, drop_last=True))
    with pytest.raises(ConfigValueError, match="no batch"):
        runner.train()


@pytest.mark.parametrize(("train_cfg", "done"), [({"max_epochs": 3}, (1, 10, 3)), ({"max_iters": 20}, (1, 10, 3))])
def test_a_hook_stops_training_after_its_iteration(make_runner: MakeRunner, train_cfg: dict, done: tuple):
    """``stop_training`` ends either loop after the current iteration, and ``after_train`` still runs."""
    log = EventLog()
    runner = make_runner(train_cfg=train_cfg, custom_hooks=[At(10, stop), log])
    runner.train()
    here = runner.run.progress.here()
    assert (here.epoch, here.iter, here.batch) == done
    assert log.names.count("after_train_iter") == 10
    assert log.names[-2:] == ["after_train", "after_run"]


def test_an_epoch_that_is_stopped_midway_does_not_end(make_runner: MakeRunner):
    """``after_train_epoch``, and with it schedules and checkpoints by epoch, runs only for complete epochs."""
    log = EventLog()
    make_runner(custom_hooks=[At(10, stop), log], **VALIDATION).train()
    assert log.names.count("after_train_epoch") == log.names.count("before_val") == 1


def test_a_stop_at_the_last_batch_of_an_epoch_ends_the_epoch(make_runner: MakeRunner):
    """If a hook stops the run in the last iteration of an epoch, the epoch is counted and validated."""
    log = EventLog()
    runner = make_runner(custom_hooks=[At(EPOCH, stop), log], **VALIDATION)
    runner.train()
    assert (runner.run.epoch, runner.run.progress.batch) == (1, 0)
    assert log.names.count("after_train_epoch") == log.names.count("before_val") == 1


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
@pytest.mark.parametrize("name", ["max_epochs", "max_iters"])
def test_a_length_is_a_whole_number(make_runner: MakeRunner, name: str, value: object):
    """Any other length is rejected, and the message names the key and the value."""
    runner = make_runner(train_cfg={name: value})
    with pytest.raises(ConfigValueError, match=f"{name} must be a positive integer, got {value!r}"):
        runner.train()


def test_an_interval_of_zero_is_rejected(make_runner: MakeRunner):
    """An interval of zero, which would divide by zero during the run, is rejected."""
    runner = make_runner(train_cfg={"max_epochs": 2, "val_interval": 0})
    with pytest.raises(ConfigValueError, match="val_interval must be a positive integer, got 0"):
        runner.train()


@pytest.mark.parametrize("value", [-1, True, 1.0, "0"])
def test_a_first_validation_that_is_not_a_number_is_rejected(make_runner: MakeRunner, value: object):
    """``val_begin`` must be an integer that is not negative, and the message explains the value 0."""
    runner = make_runner(train_cfg={"max_epochs": 2, "val_begin": value})
    with pytest.raises(ConfigValueError, match=f"val_begin must be .* or 0 to validate before.*, got {value!r}"):
        runner.train()


@pytest.mark.parametrize(("by_epoch", "missing"), [(True, "max_epochs"), (False, "max_iters")])
def test_a_train_cfg_without_a_length_is_rejected(make_runner: MakeRunner, by_epoch: bool, missing: str):
    """A ``train_cfg`` without a length is rejected, and the message names the missing key."""
    runner = make_runner(train_cfg={"by_epoch": by_epoch})
    with pytest.raises(ConfigValueError, match=f"the length is missing: set {missing}"):
        runner.train()


def test_a_train_cfg_that_is_not_a_mapping_is_rejected(make_runner: MakeRunner):
    """A ``train_cfg`` that is not a mapping is rejected, and the message shows the value."""
    with pytest.raises(ConfigTypeError, match="Expected train_cfg to be a mapping, got 3"):
        make_runner(train_cfg=3).train()


def test_a_loop_can_be_given_by_name(make_runner: MakeRunner):
    """``train_cfg`` can name the loop by its type, as in MMEngine configurations."""
    runner = make_runner(train_cfg={"type": "IterBasedTrainLoop", "max_iters": 3})
    runner.train()
    assert (runner.run.iter, runner.run.max_epochs) == (3, None)


def test_the_arguments_are_not_modified(make_runner: MakeRunner):
    """Building a run changes none of the mappings passed to it."""
    given = settings(train_cfg={"by_epoch": True, "max_epochs": 1}, **VALIDATION)
    texts = {key: repr(value) for key, value in given.items()}
    make_runner(**given).train()
    assert {key: repr(value) for key, value in given.items()} == texts
