"""Tests of resuming the data: random number generators, a different number of ranks, and stateful loaders."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from stratagem import Runner
from tests.train.toys import EPOCH, SAMPLES, VALIDATION, At, Recorder, Samples, loader, settings, train_until_signal

MakeRunner = Callable[..., Runner]
WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]


def interrupt(run: Any) -> None:
    """Send SIGINT, as Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


class Augmented(Samples):
    """Samples with noise drawn from all three random number generators."""

    def __getitem__(self, index: int) -> Any:
        features, label, number = super().__getitem__(index)
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return features + noise, label, number


class Numbers(IterableDataset):
    """A stateful stream of the samples in order."""

    def __init__(self) -> None:
        self.samples = Samples()
        self.place = 0
        self.reads = 0

    def __iter__(self) -> Iterator[Any]:
        while self.place < SAMPLES:
            self.place += 1
            self.reads += 1
            yield self.samples[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        """Return the number of samples already yielded."""
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after that number of samples."""
        self.place = state["place"]


class Bare(IterableDataset):
    """The same stream without ``state_dict``."""

    def __iter__(self) -> Iterator[Any]:
        samples = Samples()
        return (samples[index] for index in range(SAMPLES))


class Prefetching(DataLoader):
    """A loader that prefetches a whole epoch; as in torchdata, its state counts only the batches already yielded."""

    def __init__(self) -> None:
        super().__init__(Samples(), batch_size=2, generator=torch.Generator())
        self.given = self.start = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        fetched = list(super().__iter__())
        self.given, self.start = self.start, 0
        for batch in fetched[self.given :]:
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches already yielded."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that number of batches."""
        self.start = state["given"]


def outcome(runner: Runner, recorder: Recorder) -> tuple[Any, ...]:
    """Return the recorded iterations and metrics, and the final weights."""
    return recorder.rows, recorder.metrics, {k: v.tolist() for k, v in runner.strategy.model_state_dict().items()}


def whole_and_pieces(
    make_runner: MakeRunner, tmp_path: Path, stops: tuple[int, ...], data: Callable[[], Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Train once without a stop, and once stopped at the given iterations; ``data`` builds the loader of each start."""
    recorder = Recorder()
    runner = make_runner(work_dir=tmp_path / "whole", custom_hooks=[recorder], train_dataloader=data(), **VALIDATION)
    runner.train()
    whole = outcome(runner, recorder)
    pieces = Recorder()
    for stop in stops:
        hooks = [pieces, At(stop, interrupt)]
        train_until_signal(make_runner(custom_hooks=hooks, resume=True, train_dataloader=data(), **VALIDATION))
    runner = make_runner(custom_hooks=[pieces], resume=True, train_dataloader=data(), **VALIDATION)
    runner.train()
    return outcome(runner, pieces), whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
def test_a_run_with_augmentation_resumes_bit_for_bit(make_runner: MakeRunner, tmp_path: Path, workers: int) -> None:
    """A run with dropout that is stopped within and between epochs, and resumed with other workers, is bit-identical."""
    counts = iter([0, workers, 0, workers, workers])
    found, whole = whole_and_pieces(
        make_runner,
        tmp_path,
        (2, EPOCH, EPOCH + 3),
        lambda: loader(dataset=Augmented(), num_workers=next(counts)),
    )
    assert found == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": {"type": "WeightedSampler", "weights": [1.0 + index % 3 for index in range(SAMPLES)]}},
        {"batch_sampler": {"type": "GroupedBatchSampler", "groups": [index % 2 for index in range(SAMPLES)]}},
        {"sampler": {"type": "InfiniteSampler"}},
    ],
    ids=["weighted", "grouped", "infinite"],
)
def test_every_sampler_resumes_bit_for_bit(make_runner: MakeRunner, tmp_path: Path, sampling: dict[str, Any]) -> None:
    """A weighted, a grouped, and an infinite sampler resume bit for bit."""
    found, whole = whole_and_pieces(
        make_runner, tmp_path, (3, EPOCH + 1), lambda: loader(dataset=Augmented(), **sampling)
    )
    assert found == whole


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(3,), (EPOCH,), (1, EPOCH + 2, 2 * EPOCH)], ids=str)
def test_a_stateful_stream_resumes_without_rereading(
    make_runner: MakeRunner, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """A stateful stream reads no sample twice; losses and weights are bit-identical."""
    streams: list[Numbers] = []

    def data() -> dict[str, Any]:
        streams.append(Numbers())
        return loader(dataset=streams[-1])

    found, whole = whole_and_pieces(make_runner, tmp_path, stops, data)
    assert found == whole
    assert sum(stream.reads for stream in streams[1:]) == streams[0].reads == 3 * SAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(3,), (EPOCH,), (1, EPOCH + 2)], ids=str)
def test_the_state_of_a_loader_is_that_of_the_batches_trained_on(
    make_runner: MakeRunner, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """The saved state does not include prefetched batches: the run resumes with the next batch to train on."""
    found, whole = whole_and_pieces(make_runner, tmp_path, stops, Prefetching)
    assert found == whole
    assert [row[:2] for row in found[0]] == [(epoch, batch) for epoch in range(3) for batch in range(EPOCH)]


def test_a_stateful_loader_continues_in_the_same_process(make_runner: MakeRunner) -> None:
    """A second ``train()`` after an interrupt continues with the next sample."""
    recorder = Recorder()
    data = loader(dataset=Numbers())
    runner = make_runner(custom_hooks=[recorder, At(4, interrupt)], train_dataloader=data, train_cfg={"max_epochs": 1})
    train_until_signal(runner)
    runner.train()
    assert [number for row in recorder.rows for number in row[2]] == list(range(SAMPLES))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_torchdata_loader_resumes_exactly(make_runner: MakeRunner, tmp_path: Path, workers: int) -> None:
    """Runs with and without workers resume exactly, stopped within an epoch and after its last batch."""
    module = pytest.importorskip("torchdata.stateful_dataloader")

    def data() -> Any:
        generator = torch.Generator().manual_seed(1)
        return module.StatefulDataLoader(
            Samples(), batch_size=2, shuffle=True, num_workers=workers, generator=generator
        )

    found, whole = whole_and_pieces(make_runner, tmp_path, (3, EPOCH), data)
    assert found[0][:EPOCH] == whole[0][:EPOCH]
    # Without workers, torchdata 0.11 itself shuffles later epochs differently after a restart, because its state does
    # not contain the random number drawn at the start of an iteration.
    for epoch in range(3):
        assert sorted(number for row in found[0] if row[0] == epoch for number in row[2]) == list(range(SAMPLES))


def warnings_of(make_runner: MakeRunner, capfd: pytest.CaptureFixture[str], data: Any) -> str:
    """Return the warnings that a run prints before training."""
    runner = make_runner(train_dataloader=data, log_level="WARNING")
    runner.prepare()
    runner.close()
    return capfd.readouterr().err


def shuffled() -> Any:
    """Return a Hugging Face stream that shuffles in a buffer of 6 of its 24 samples."""
    rows = [dict(zip(("x", "y", "number"), each, strict=True)) for each in Samples()]
    table = datasets.Dataset.from_list(
        [{key: np.asarray(value).tolist() for key, value in row.items()} for row in rows]
    )
    return table.to_iterable_dataset(num_shards=2).shuffle(seed=4, buffer_size=6)


def as_samples(rows: list[dict[str, Any]]) -> Any:
    """Collate the rows of a table."""
    return default_collate([(torch.tensor(row["x"]), torch.tensor(row["y"]), row["number"]) for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
def test_a_stream_with_a_shuffle_buffer_resumes_exactly(make_runner: MakeRunner, tmp_path: Path, workers: int) -> None:
    """The state of a stream with a shuffle buffer lacks the samples in the buffer, so the epoch is read again instead."""
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    pieces, whole = whole_and_pieces(
        make_runner, tmp_path, (3, EPOCH + 2), lambda: DataLoader(shuffled(), 2, collate_fn=as_samples, **options)
    )
    assert pieces == whole


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_stateful_loader_of_a_shuffle_buffer_warns(
    make_runner: MakeRunner, capfd: pytest.CaptureFixture[str]
) -> None:
    """With StatefulDataLoader and a shuffle buffer, a warning states which samples are lost and suggests an alternative."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    text = warnings_of(make_runner, capfd, StatefulDataLoader(shuffled(), 2, collate_fn=as_samples))
    assert text.count("shuffles its samples in a buffer of 6, which its state_dict does not contain") == 1
    assert "use a plain DataLoader instead of StatefulDataLoader" in text


def test_a_stateful_loader_is_trusted_with_a_note(make_runner: MakeRunner, capfd: pytest.CaptureFixture[str]) -> None:
    """The log names the state on which an exact resume depends; a built-in sampler has no such condition."""
    cases = {"Prefetching": Prefetching(), "Numbers": loader(dataset=Numbers()), None: loader()}
    for name, data in cases.items():
        runner = make_runner(train_dataloader=data, log_level="INFO")
        runner.prepare()
        runner.close()
        text = capfd.readouterr().err
        assert text.count("The position in the training data is saved with") == (name is not None)
        assert name is None or f"saved with {name}.state_dict()" in text


def test_inexact_resuming_warns_once_before_training(
    make_runner: MakeRunner, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stateless stream, a stream with workers, and a custom sampler warn once; exact loaders do not warn."""
    cases = {
        "Bare is a stream without state_dict": loader(dataset=Bare()),
        "with num_workers=2 each worker iterates over its own copy": loader(dataset=Numbers(), num_workers=2),
        "has a custom loader or sampler": loader(sampler=[1, 2, 3, 4]),
    }
    for words, data in cases.items():
        assert warnings_of(make_runner, capfd, data).count(words) == 1
    for data in (loader(), loader(dataset=Numbers()), Prefetching(), DataLoader(Samples(), shuffle=True)):
        assert warnings_of(make_runner, capfd, data) == ""


def test_a_checkpoint_of_another_loader_is_rejected(make_runner: MakeRunner) -> None:
    """A state that the loader of this run cannot load raises an error."""
    train_until_signal(make_runner(train_dataloader=loader(dataset=Numbers()), custom_hooks=[At(2, interrupt)]))
    runner = make_runner(train_dataloader=loader(), resume=True)
    with pytest.raises(ValueError, match="state of a data loader, but the loader of this run has no load_state_dict"):
        runner.train()


@pytest.mark.slow
def test_an_epoch_continues_with_a_batch_size_that_does_not_divide_the_samples_seen(make_runner: MakeRunner) -> None:
    """After four samples, batches of three start with the fifth, and each sample is seen exactly once."""
    seen = Recorder()
    train_until_signal(make_runner(custom_hooks=[seen, At(2, interrupt)]))
    again = [seen, At(4, interrupt)]
    train_until_signal(make_runner(custom_hooks=again, resume=True, train_dataloader=loader(batch_size=3)))
    train_until_signal(
        make_runner(custom_hooks=[seen, At(9, interrupt)], resume=True, train_dataloader=loader(batch_size=4))
    )
    first = [row for row in seen.rows if row[0] == 0]
    assert sorted(number for row in first for number in row[2]) == list(range(SAMPLES))
    assert [len(row[2]) for row in first] == [2, 2, 3, 3, 3]
    second = [number for row in seen.rows if row[0] == 1 for number in row[2]]
    assert sorted(second) == list(range(SAMPLES))


def train_piece(folder: str, stop: int | None, samples: int = 23) -> list[tuple[int, ...]]:
    """Train on this rank until iteration ``stop``, or to the end; return the samples of each iteration."""
    recorder = Recorder()
    hooks = [recorder] if stop is None else [recorder, At(stop, interrupt)]
    data = loader(dataset=Augmented(samples))
    cfg = settings(work_dir=folder, custom_hooks=hooks, resume=True, train_dataloader=data, train_cfg={"max_epochs": 1})
    runner = Runner(**cfg)
    train_until_signal(runner)
    runner.close()
    return [row[2] for row in recorder.rows]


def test_an_epoch_continues_on_fewer_ranks(ranks: Any, tmp_path: Path, make_runner: MakeRunner) -> None:
    """Two ranks stop within an epoch of 23 samples, and one rank trains on the rest in order."""
    recorder = Recorder()
    data = loader(dataset=Augmented(23))
    make_runner(custom_hooks=[recorder], train_dataloader=data, train_cfg={"max_epochs": 1}).train()
    order = [number for row in recorder.rows for number in row[2]]

    folder = str(tmp_path / "moved")
    of_rank = ranks.run(train_piece_of_two, folder)
    done = [number for step in zip(*of_rank, strict=True) for pair in zip(*step, strict=True) for number in pair]
    rest = [number for row in train_piece(folder, None) for number in row]
    assert done + rest == order
    assert len(done) == 12


class SaveAt(At):
    """Saves a checkpoint after an iteration and stops the run, on every rank."""

    def __init__(self, iteration: int) -> None:
        super().__init__(iteration, self.save)

    def save(self, run: Any) -> None:
        """Save the state as of the end of this iteration."""
        run.save_checkpoint(Path(run.work_dir) / "iter_3", run.progress.after_this_iteration())
        run.progress.stop_training = True


def train_piece_of_two(folder: str) -> list[tuple[int, ...]]:
    """Train three iterations on this rank of two; return the samples of each."""
    recorder = Recorder()
    data = loader(dataset=Augmented(23))
    cfg = settings(
        work_dir=folder, custom_hooks=[recorder, SaveAt(3)], train_dataloader=data, train_cfg={"max_epochs": 1},
        launcher="pytorch",
    )  # fmt: skip
    runner = Runner(**cfg)
    runner.train()
    runner.close()
    return [row[2] for row in recorder.rows]
