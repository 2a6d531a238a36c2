"""A training job that uses third-party packages, and its results compared with those of a hand-written loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

import tests.foreign.torchvision_ops  # noqa: F401 -- before timm and transformers, which import torchvision
from stratagem import Hook, Runner

# The strategies under which every job runs: the value of the key, and the number of processes.
STRATEGIES: Mapping[str, tuple[Any, int]] = {
    "one process": (None, 1),
    "DDP x2": ("DDPStrategy", 2),
    "FSDP x2": ("FSDPStrategy", 2),
}


def sample_ids(batch: Any) -> list[str]:
    """Return an ID of each sample of a batch: a digest of its data, without trailing zeros (padding)."""
    rows = list(_arrays(batch))
    return [
        hashlib.sha256(b"".join(_unpadded(row[index]) for row in rows)).hexdigest() for index in range(len(rows[0]))
    ]


def _arrays(batch: Any) -> Iterator[np.ndarray]:
    for value in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(value, Tensor):
            yield value.numpy()
        elif isinstance(value, Mapping):
            yield from _arrays(value)


def _unpadded(values: np.ndarray) -> bytes:
    return values.tobytes().rstrip(b"\0")


@final
class Recorder(Hook):
    """Records the IDs of the samples of every iteration, and the metrics of every validation."""

    def __init__(self) -> None:
        self.samples: list[list[str]] = []
        self.metrics: list[dict[str, float]] = []

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.samples.append(sample_ids(data_batch))

    def after_val_epoch(self, run: Any, metrics: Any = None) -> None:
        self.metrics.append({name: float(value) for name, value in metrics.items()})


@final
@dataclass(frozen=True, slots=True)
class Result:
    """The results that a job must have in common with its hand-written loop.

    Attributes:
        samples: the IDs of the samples of every iteration, sorted.
        metrics: the metrics of every validation.
        weights: the parameters and buffers at the end, gathered from all ranks.
    """

    samples: list[list[str]]
    metrics: list[dict[str, float]]
    weights: dict[str, Tensor]


@final
class ByHand:
    """Records the results of a hand-written loop: call ``samples`` with every batch and ``metrics`` after every validation."""

    def __init__(self) -> None:
        self._samples: list[list[str]] = []
        self._metrics: list[dict[str, float]] = []

    def samples(self, batch: Any) -> None:
        """Record the samples of one optimizer step."""
        self._samples.append(sorted(sample_ids(batch)))

    def metrics(self, **values: Any) -> None:
        """Record the metrics of a validation."""
        self._metrics.append({name: float(value) for name, value in values.items()})

    def result(self, network: nn.Module) -> Result:
        """Return the result with the weights of a network."""
        return Result(self._samples, self._metrics, _weights(network))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training job that uses third-party packages.

    Attributes:
        packages: the names of the distributions that the job uses.
        summary: what is trained, for the documentation.
        train: called with the batch size per rank and further arguments of the runner. Returns a runner that has trained, and
            the user's own network.
        by_hand: runs the same training without Stratagem, in one process.
        by_hand_on_two: a hand-written loop, also in one process, with the results of two ranks, if they differ from those of one
            process; None otherwise.
        batch: the number of samples of an iteration over all ranks.
        tolerance: the largest absolute difference of the weights on two ranks. In one process, they must be equal.
        metric_tolerance: the largest absolute difference of the metrics on two ranks.
        refused: for each strategy that rejects the job, a part of the error message.
        faults: for each strategy under which the job gives wrong results so far, what is wrong.
    """

    packages: tuple[str, ...]
    summary: str
    train: Callable[..., tuple[Runner, nn.Module]]
    by_hand: Callable[[ByHand], nn.Module]
    batch: int
    tolerance: float
    metric_tolerance: float = 0.0
    by_hand_on_two: Callable[[ByHand], nn.Module] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)


def run(job: Job, strategy: str, folder: Path | str) -> Result:
    """Run a job under a strategy, in this process or on one of its ranks; return its result on this rank."""
    kind, size = STRATEGIES[strategy]
    recorder = Recorder()
    runner, network = job.train(
        job.batch // size,
        work_dir=folder,
        strategy=kind,
        custom_hooks=[recorder],
        log_level="ERROR",
        default_hooks={"checkpoint": None},
    )
    try:
        # Ranks may have different buffers, such as the statistics of BatchNorm. Take those of a checkpoint.
        with runner.strategy.synchronized_buffers():
            return Result(recorder.samples, recorder.metrics, _weights(network))
    finally:
        runner.close()


def combined(results: list[Result]) -> Result:
    """Return the result of all ranks: the samples of an iteration are those of all ranks; the rest must be equal."""
    first = results[0]
    for result in results[1:]:
        assert result.metrics == first.metrics
        assert all(torch.equal(value, first.weights[name]) for name, value in result.weights.items())
    samples = [
        sorted(chain.from_iterable(of_ranks)) for of_ranks in zip(*(result.samples for result in results), strict=True)
    ]
    return Result(samples, first.metrics, first.weights)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: _whole(value).detach().clone() for name, value in network.state_dict().items()}


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
