"""Loaders of every kind that a user may build, with samples that are their own indices."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torchmetrics import MeanSquaredError

from stratagem import Runner
from stratagem.data import DefaultSampler
from stratagem.dist import get_rank, get_world_size
from stratagem.model import BaseModel
from stratagem.train import BaseMetric, Hook


class Ids(Dataset[Tensor]):
    """A dataset in which sample ``i`` is the number ``i``."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


class Reversed(Sampler[int]):
    """A custom sampler without randomness."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length - 1, -1, -1))


class Unseeded(Reversed):
    """A sampler with an unseeded generator, so that every process has a different order."""

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng().permutation(self.length).tolist())


class Global(Reversed):
    """A sampler without a length that uses NumPy's global generator."""

    __len__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(self.length).tolist())


class OddThenEven(BatchSampler):
    """A batch sampler whose batches are not consecutive samples."""

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for part in (0, 1):
            chosen = [index for index in order if index % 2 == part]
            yield from (chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size))

    def __len__(self) -> int:
        return len(list(iter(self)))


class Collating(DataLoader[Tensor]):
    """A loader with a custom collate function."""

    def __init__(self, length: int, workers: int) -> None:
        super().__init__(Ids(length), batch_size=2, shuffle=True, **loading(workers), collate_fn=stack)


class Iterating(DataLoader[Tensor]):
    """A loader whose batches do not come from its sampler."""

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        ids = torch.arange(float(len(self.dataset))).view(-1, 1)  # type: ignore[arg-type]
        return iter(ids.split(2))


class Stream(IterableDataset[Tensor]):
    """A stream of the same samples, which are split across its workers."""

    def __init__(self, length: int) -> None:
        self.total = length

    def numbers(self) -> range:
        """Return the samples of the stream."""
        return range(self.total)

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (torch.tensor([float(number)]) for number in self.numbers()[first::step])


class SizedStream(Stream):
    """A stream with a length."""

    def __len__(self) -> int:
        return len(self.numbers())


class DividedStream(Stream):
    """A stream that is already distributed across ranks and declares it."""

    @property
    def num_replicas(self) -> int:
        """Return the number of ranks."""
        return get_world_size()

    @property
    def rank(self) -> int:
        """Return the rank of this process."""
        return get_rank()

    def numbers(self) -> range:
        return super().numbers()[self.rank :: self.num_replicas]


class UndeclaredStream(DividedStream):
    """A stream that is already distributed across ranks and does not declare it."""

    num_replicas = rank = None  # type: ignore[assignment]

    def numbers(self) -> range:
        return range(self.total)[get_rank() :: get_world_size()]


def loading(workers: int) -> dict[str, Any]:
    """Return a loader's arguments for workers, which are forked because spawning them is slow."""
    return {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}


def stack(samples: Sequence[Tensor]) -> Tensor:
    """Return a batch of samples."""
    return torch.stack(list(samples))


def ids_of(rows: Sequence[dict[str, int]]) -> Tensor:
    """Return a batch of table rows."""
    return torch.tensor([[float(row["id"])] for row in rows])


def _plain(n: int, workers: int, **options: Any) -> DataLoader[Tensor]:
    return DataLoader(
        Ids(n), **loading(workers), **({} if "batch_sampler" in options else {"batch_size": 2}), **options
    )


def _table(n: int) -> Any:
    # With a fingerprint, the table does not need to be pickled for identification.
    table = importlib.import_module("datasets.table").InMemoryTable.from_pydict({"id": list(range(n))})
    return importlib.import_module("datasets").Dataset(table, fingerprint="ids")


def _hugging_face(n: int, workers: int) -> DataLoader[Any]:
    return DataLoader(_table(n), batch_size=2, shuffle=True, **loading(workers), collate_fn=ids_of)


def _hugging_face_stream(n: int, workers: int, *, split: bool) -> DataLoader[Any]:
    stream = _table(n).to_iterable_dataset(num_shards=2)
    if split:
        split_by_node = importlib.import_module("datasets.distributed").split_dataset_by_node
        stream = split_by_node(stream, rank=get_rank(), world_size=get_world_size())
    return DataLoader(stream, batch_size=2, **loading(workers), collate_fn=ids_of)


def _stateful(n: int, workers: int, **order: Any) -> DataLoader[Tensor]:
    module = importlib.import_module("torchdata.stateful_dataloader")
    with warnings.catch_warnings():
        # torchdata 0.11 calls a deprecated function of torch.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        loader: DataLoader[Tensor] = module.StatefulDataLoader(
            Ids(n), batch_size=2, **order or {"shuffle": True}, **loading(workers)
        )
    return loader


def stateful_by_rank(n: int) -> DataLoader[Tensor]:
    """Return a ``StatefulDataLoader`` whose sampler has a different seed on each rank."""
    return _stateful(n, 0, sampler=RandomSampler(range(n), generator=torch.Generator().manual_seed(get_rank())))


KINDS: dict[str, Callable[[int, int], Any]] = {
    "shuffled": lambda n, w: _plain(n, w, shuffle=True),
    "built-in sampler": lambda n, w: _plain(n, w, sampler=DefaultSampler(range(n))),
    "own sampler": lambda n, w: _plain(n, w, sampler=Reversed(n)),
    "sampler without a seed": lambda n, w: _plain(n, w, sampler=Unseeded(n)),
    "sampler without a length": lambda n, w: _plain(n, w, sampler=Global(n)),
    "batch sampler over a sampler": lambda n, w: _plain(n, w, batch_sampler=BatchSampler(Reversed(n), 2, False)),
    "own batch sampler": lambda n, w: _plain(n, w, batch_sampler=OddThenEven(RandomSampler(range(n)), 2, False)),
    "single samples": lambda n, w: DataLoader(Ids(n), batch_size=None, sampler=Reversed(n), **loading(w)),
    "weighted": lambda n, w: _plain(n, w, sampler=WeightedRandomSampler([1.0] * n, n, replacement=False)),
    "subset": lambda n, w: _plain(n, w, sampler=SubsetRandomSampler(range(n))),
    "generator": lambda n, w: _plain(n, w, shuffle=True, generator=torch.Generator()),
    "generator seeded by rank": lambda n, w: _plain(
        n, w, shuffle=True, generator=torch.Generator().manual_seed(get_rank())
    ),
    "distributed sampler": lambda n, w: _plain(
        n,
        w,
        sampler=DistributedSampler(range(n), get_world_size(), get_rank()),  # type: ignore[arg-type]
    ),
    "subclass with a collate function": Collating,
    "subclass with its own iteration": lambda n, w: Iterating(Ids(n), batch_size=2, **loading(w)),
    "configuration": lambda n, w: {"dataset": Ids(n), "batch_size": 2, **loading(w), "sampler": Reversed(n)},
    "stream": lambda n, w: DataLoader(Stream(n), batch_size=2, **loading(w)),
    "stream with a length": lambda n, w: DataLoader(SizedStream(n), batch_size=2, **loading(w)),
    "stream with a generator": lambda n, w: DataLoader(
        SizedStream(n), batch_size=2, **loading(w), generator=torch.Generator()
    ),
    "divided stream": lambda n, w: DataLoader(DividedStream(n), batch_size=2, **loading(w)),
    "Hugging Face datasets": _hugging_face,
    "Hugging Face stream": lambda n, w: _hugging_face_stream(n, w, split=False),
    "Hugging Face stream split by node": lambda n, w: _hugging_face_stream(n, w, split=True),
    "StatefulDataLoader": _stateful,
}
# Loaders that require optional packages.
PACKAGES = {
    "Hugging Face datasets": "datasets",
    "Hugging Face stream": "datasets",
    "Hugging Face stream split by node": "datasets",
    "StatefulDataLoader": "torchdata",
}


class Model(BaseModel):
    """A model with one weight that does not change its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, ids: Tensor, mode: str = "tensor") -> Any:
        score = self.layer(ids.view(-1, 1))
        if mode == "loss":
            return {"loss": score.square().mean()}
        return {"ids": ids.flatten(), "preds": ids.flatten(), "target": torch.zeros(ids.numel())}


class Seen(Hook):
    """A hook that records the samples of each training iteration."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.batches.append(data_batch.flatten().int().tolist())


class Counted(BaseMetric):
    """A metric that records the samples, each ``times`` times."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times = times

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [number for number in data_samples["ids"].int().tolist() for _ in range(self.times)]

    def compute_metrics(self, results: list[int]) -> dict[str, Any]:
        return {"ids": results}


def run(folder: str, strategy: str, train: Any, val: Any, *, epochs: int = 1, **changes: Any) -> tuple[Any, Any]:
    """Train and validate on this rank; return the training batches and the metrics."""
    seen = Seen()
    settings = {
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.0}},
        "val_evaluator": {"own": Counted(), "square": MeanSquaredError()},
        "strategy": strategy,
        "randomness": {"seed": 5},
        "default_hooks": {"runtime_info": None, "logger": None, "checkpoint": None},
        "custom_hooks": [seen, *changes.pop("hooks", ())],
        "log_level": "ERROR",
        "train_cfg": {"max_epochs": epochs, "val_interval": epochs},
        **changes,
    }
    runner = Runner(
        Model(), folder, train_dataloader=train, val_dataloader=val, val_cfg={}, **settings,
    )  # fmt: skip
    try:
        runner.train()
        return seen.batches, dict(runner.run.metrics or {})
    finally:
        runner.close()
