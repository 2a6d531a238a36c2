"""The loader that a user builds: respected in one process, and divided among the ranks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from loader_kinds import KINDS, PACKAGES, UndeclaredStream, run

from ranks import RankError, Ranks

TRAINED, VALIDATED = 12, 11
# One for each way to divide the data; starting workers takes long.
WITH_WORKERS = [
    "own sampler", "own batch sampler", "stream with a length", "subclass with its own iteration",
    "Hugging Face datasets", "StatefulDataLoader",
]  # fmt: skip


def installed(kinds: Iterable[str] = KINDS) -> list[str]:
    """Return the kinds of loaders whose packages are installed."""
    return [kind for kind in kinds if kind not in PACKAGES or importlib.util.find_spec(PACKAGES[kind])]


def run_all(folder: str, strategy: str, kinds: list[str], workers: int) -> dict[str, tuple[Any, Any]]:
    """Train and validate with each kind of loader on this rank."""
    return {
        kind: run(folder, strategy, KINDS[kind](TRAINED, workers), KINDS[kind](VALIDATED, workers)) for kind in kinds
    }


@pytest.mark.parametrize(
    ("strategy", "workers", "kinds"),
    [
        ("DDPStrategy", 0, KINDS),
        ("FSDPStrategy", 0, KINDS),
        ("DDPStrategy", 2, WITH_WORKERS),
        ("FSDPStrategy", 2, ["generator", "stream"]),
    ],
    ids=["DDP", "FSDP", "DDP with workers", "FSDP with workers"],
)
def test_two_ranks_see_each_sample_once_with_every_kind_of_loader(
    ranks: Ranks, tmp_path: Path, strategy: str, workers: int, kinds: Iterable[str]
) -> None:
    """Over both ranks, an epoch of training and a validation have each sample once, and both make as many steps."""
    first, second = ranks.run(run_all, str(tmp_path), strategy, installed(kinds), workers)
    wrong = {}
    for kind, (batches, counted) in first.items():
        other, _ = second[kind]
        trained = sorted(number for batch in [*batches, *other] for number in batch)
        if (trained, len(batches)) != (list(range(TRAINED)), len(other)) or sorted(counted) != list(range(VALIDATED)):
            wrong[kind] = (batches, other, counted)
    assert not wrong


@pytest.mark.parametrize(("workers", "kinds"), [(0, KINDS), pytest.param(2, WITH_WORKERS, marks=pytest.mark.slow)])
def test_one_process_sees_each_sample_once_with_every_kind_of_loader(
    tmp_path: Path, workers: int, kinds: Iterable[str]
) -> None:
    """An epoch of training and a validation have each sample once."""
    found = run_all(str(tmp_path), "SingleDeviceStrategy", installed(kinds), workers)
    for kind, (batches, counted) in found.items():
        assert sorted(number for batch in batches for number in batch) == list(range(TRAINED)), kind
        assert sorted(counted) == list(range(VALIDATED)), kind


def test_a_stream_that_differs_between_ranks_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """Whether each rank reads a part of its own or shuffles differently cannot be seen; the error says what to declare."""
    with pytest.raises(RankError, match=r"UndeclaredStream gives different data on different ranks.*`num_replicas`"):
        ranks.run(run_undeclared, str(tmp_path))


def run_undeclared(folder: str) -> Any:
    """Train on a stream that every rank reads a part of, without declaring it."""
    data = {"dataset": UndeclaredStream(TRAINED), "batch_size": 2}
    return run(folder, "DDPStrategy", data, data)
