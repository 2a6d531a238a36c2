"""Loaders built by the user are used as they are in one process and split across multiple ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from stratagem.train import Hook
from tests.support.ranks import RankError, Ranks, seed_generators
from tests.train.loader_kinds import KINDS, PACKAGES, Counted, UndeclaredStream, run, stateful_by_rank

TRAINED, VALIDATED = 12, 11


def installed(kinds: Iterable[str] = KINDS) -> list[str]:
    """Return the kinds of loaders whose packages are installed."""
    return [kind for kind in kinds if kind not in PACKAGES or importlib.util.find_spec(PACKAGES[kind])]


def run_all(folder: str, strategy: str, kinds: list[str], workers: int) -> dict[str, tuple[Any, Any]]:
    """Train and validate with each kind of loader on this rank."""
    return {
        kind: run(folder, strategy, KINDS[kind](TRAINED, workers), KINDS[kind](VALIDATED, workers)) for kind in kinds
    }


def counts_each_once(metrics: dict[str, Any]) -> bool:
    """Return whether a BaseMetric subclass and a torchmetrics metric both counted every sample once."""
    # The mean of the squares of 0 to 10 is 385 / 11 = 35.
    return sorted(metrics["ids"]) == list(range(VALIDATED)) and metrics["square"] == pytest.approx(35.0)


@pytest.mark.parametrize(("strategy", "workers"), [("DDPStrategy", 2), ("FSDPStrategy", 0)])
def test_two_ranks_see_each_sample_once_with_every_kind_of_loader(
    ranks: Ranks, tmp_path: Path, strategy: str, workers: int
) -> None:
    """Over both ranks, training and validation cover each sample once with an equal number of steps."""
    first, second = ranks.run(run_all, str(tmp_path), strategy, installed(), workers)
    wrong = {}
    for kind, (batches, metrics) in first.items():
        other, _ = second[kind]
        trained = sorted(number for batch in [*batches, *other] for number in batch)
        if (trained, len(batches)) != (list(range(TRAINED)), len(other)) or not counts_each_once(metrics):
            wrong[kind] = (batches, other, metrics)
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_one_process_sees_each_sample_once_with_every_kind_of_loader(tmp_path: Path, workers: int) -> None:
    """An epoch of training and a validation cover each sample once."""
    found = run_all(str(tmp_path), "SingleDeviceStrategy", installed(), workers)
    for kind, (batches, metrics) in found.items():
        assert sorted(number for batch in batches for number in batch) == list(range(TRAINED)), kind
        assert counts_each_once(metrics), kind


def test_a_stream_that_differs_between_ranks_is_rejected(ranks: Ranks, tmp_path: Path) -> None:
    """A stream that differs between ranks raises an error that names the attributes to set."""
    with pytest.raises(RankError, match=r"UndeclaredStream yields different data on different ranks.*`num_replicas`"):
        ranks.run(run_undeclared, str(tmp_path))


def run_undeclared(folder: str) -> Any:
    """Train on a stream that gives each rank its own part without declaring it."""
    data = {"dataset": UndeclaredStream(TRAINED), "batch_size": 2}
    return run(folder, "DDPStrategy", data, data)


def test_a_torchdata_sampler_that_differs_between_ranks_is_rejected(ranks: Ranks, tmp_path: Path) -> None:
    """Its states are equal, since they contain only the number of samples, but the error shows the different indices."""
    pytest.importorskip("torchdata")
    with pytest.raises(
        RankError, match=r"BatchSampler yields different indices on different ranks.*Seed its generator"
    ):
        ranks.run(run_differing_sampler, str(tmp_path))


def run_differing_sampler(folder: str) -> Any:
    """Train with a ``StatefulDataLoader`` whose sampler has a different seed on each rank."""
    return run(folder, "DDPStrategy", stateful_by_rank(TRAINED), KINDS["own sampler"](VALIDATED, 0))


def run_counted(folder: str, kinds: list[str]) -> list[list[int]]:
    """Validate with a metric that appends three results per sample; return them for each kind of loader."""
    return [
        run(folder, "DDPStrategy", KINDS[kind](2, 0), KINDS[kind](VALIDATED, 0), val_evaluator=Counted(3))[1]["ids"]
        for kind in kinds
    ]


def test_all_results_of_a_metric_are_kept_in_the_order_of_the_batches(ranks: Ranks, tmp_path: Path) -> None:
    """Three results per sample make 33; none is dropped, and results of batches dealt in turn are in order."""
    kinds = ["stream", "subclass with its own iteration", "own sampler"]
    expected = [number for number in range(VALIDATED) for _ in range(3)]
    for stream, subclass, sampler in ranks.run(run_counted, str(tmp_path), kinds):
        assert stream == subclass == expected
        assert sorted(sampler) == expected


def run_pieces(folder: str, kinds: list[str]) -> dict[str, tuple[Any, Any]]:
    """Train two epochs with each kind of loader, without a stop and stopped and resumed; return both records."""
    found = {}
    for kind in kinds:
        seed_generators()
        whole, _ = run(f"{folder}/{kind}/whole", "DDPStrategy", KINDS[kind](TRAINED, 0), KINDS[kind](2, 0), epochs=2)
        pieces = []
        for hooks in ([StopAfter(4)], []):
            seed_generators()
            batches, _ = run(
                f"{folder}/{kind}/pieces", "DDPStrategy", KINDS[kind](TRAINED, 0), KINDS[kind](2, 0), epochs=2,
                hooks=hooks, resume=True,
            )  # fmt: skip
            pieces += batches
        found[kind] = (whole, pieces)
    return found


class StopAfter(Hook):
    """Saves a checkpoint after an iteration and stops the run."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if run.iter + 1 == self.iteration:
            run.save_checkpoint(Path(run.work_dir) / "stopped", run.progress.after_this_iteration())
            run.progress.stop_training = True


def test_a_divided_epoch_resumes_exactly(ranks: Ranks, tmp_path: Path) -> None:
    """After a stop within the second epoch, both ranks train on the same batches as without the stop."""
    kinds = installed(
        ["sampler without a length", "weighted", "stream", "subclass with its own iteration", "StatefulDataLoader"]
    )
    for found in ranks.run(run_pieces, str(tmp_path), kinds):
        for kind, (whole, pieces) in found.items():
            assert pieces == whole, kind
            assert len(whole) == 6
