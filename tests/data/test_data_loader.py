"""Loaders that start at any position, from configurations and from instances."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from stratagem.data import DefaultSampler, EpochLoader, InfiniteSampler, build_dataloader, pseudo_collate
from stratagem.errors import ConfigTypeError, ConfigValueError


class Squares(Dataset[int]):
    """The square numbers 0, 1, 4, 9 ..."""

    def __init__(self, length: int = 10) -> None:
        self.length = length
        self.initialised = False

    def full_init(self) -> None:
        """Record the call."""
        self.initialised = True

    def __getitem__(self, index: int) -> int:
        return index * index

    def __len__(self) -> int:
        return self.length


class Stream(IterableDataset[int]):
    """A stream without a length that counts up from a hundred times the epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(100 * self.epoch, 100 * self.epoch + 7))


class Unsized(Dataset[int]):
    """A map-style dataset without a length."""

    def __getitem__(self, index: int) -> int:
        return index


class Reversed:
    """A sampler without a base class, in reversed order, that records the epochs."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        """Record the epoch."""
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length - 1, -1, -1))

    def __len__(self) -> int:
        return self.length


class OddAndEven(BatchSampler):
    """A batch sampler that groups odd and even samples."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        """Record the epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        yield [index for index in order if index % 2]
        yield [index for index in order if index % 2 == 0]

    def __len__(self) -> int:
        return 2


def build(training: bool = True, **cfg: Any) -> EpochLoader:
    """Build a loader of ten squares with seed 3."""
    collate = {} if cfg.get("batch_size", 4) is None else {"collate_fn": pseudo_collate}
    return build_dataloader({"dataset": Squares(), "batch_size": 4, **collate, **cfg}, seed=3, training=training)


WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_can_start_at_any_batch(workers: int, drop_last: bool) -> None:
    """An epoch that is interrupted after any batch continues with the next one."""
    loader = build(num_workers=workers, drop_last=drop_last)
    whole = list(loader.batches(5))
    assert loader.positioned
    assert len(whole) == loader.length == (2 if drop_last else 3)
    for done in range(len(whole) + 1):
        assert list(loader.batches(5, done)) == whole[done:]


def test_epochs_can_be_iterated_in_any_order() -> None:
    """The order depends only on the number of the epoch."""
    loader = build()
    first, second = list(loader.batches(0)), list(loader.batches(1))
    assert first != second
    assert list(loader.batches(0)) == first
    assert sorted(value for batch in second for value in batch) == [index * index for index in range(10)]


def test_samples_are_distributed_across_ranks() -> None:
    """Two ranks see every sample once in training and resume at the same position."""
    loaders = [
        build_dataloader({"dataset": Squares(), "batch_size": 2}, seed=3, rank=rank, world_size=2, training=True)
        for rank in range(2)
    ]
    whole = [list(loader.batches(0)) for loader in loaders]
    seen = sorted(value for batches in whole for batch in batches for value in batch)
    assert seen == [index * index for index in range(10)]
    assert [list(loader.batches(0, 2)) for loader in loaders] == [batches[2:] for batches in whole]


def test_evaluation_is_in_order_and_not_padded() -> None:
    """Evaluation repeats no sample: three samples on two ranks are two and one, whereas training gives both two."""
    of_rank = {
        training: [
            [value for batch in loader.batches(0) for value in batch]
            for loader in (
                build_dataloader(cfg, seed=0, rank=rank, world_size=2, training=training) for rank in range(2)
            )
        ]
        for training, cfg in (
            (False, {"dataset": [0, 1, 2]}),
            (True, {"dataset": [0, 1, 2], "sampler": {"type": "DefaultSampler", "shuffle": False}}),
        )
    }
    assert of_rank == {False: [[0, 2], [1]], True: [[0, 2], [1, 0]]}


def test_a_configured_sampler_does_not_pad_in_evaluation() -> None:
    """In evaluation, a configured sampler adds no padding, even with ``round_up=True``."""
    cfg = {"dataset": [0, 1, 2], "sampler": {"type": "DefaultSampler", "shuffle": False}}
    for sampler in (cfg["sampler"], {**cfg["sampler"], "round_up": True}):
        loader = build_dataloader({**cfg, "sampler": sampler}, seed=0, rank=1, world_size=2, training=False)
        assert list(loader.batches(0)) == [1]


def test_shuffle_can_be_set() -> None:
    """``shuffle`` overrides the defaults of training and evaluation."""
    in_order = [[0, 1, 4, 9], [16, 25, 36, 49], [64, 81]]
    assert list(build(shuffle=False).batches(0)) == in_order
    assert list(build(training=False).batches(0)) == in_order
    assert list(build(training=False, shuffle=True).batches(0)) != in_order


def test_the_seed_determines_the_order() -> None:
    """Loaders with equal seeds have the same order, and those with different seeds have different orders."""
    cfg = {"dataset": Squares(), "batch_size": 4, "collate_fn": list}
    orders = [list(build_dataloader(cfg, seed=seed, training=True).batches(0)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_an_infinite_sampler_continues_across_epochs() -> None:
    """The epochs of an infinite sampler are consecutive parts of its order."""
    loader = build(sampler={"type": "InfiniteSampler", "shuffle": True})
    endless = list(islice(loader.batches(0), 9))
    # Ten samples in batches of four count as an epoch with three batches.
    assert loader.length == 3
    for epoch, done in ((0, 2), (1, 0), (2, 1)):
        assert list(islice(loader.batches(epoch, done), 2)) == endless[3 * epoch + done :][:2]
    assert list(islice(loader.batches(0, 3), 1)) == [endless[3]]


def test_a_loader_instance_is_used_unchanged() -> None:
    """A loader instance keeps its sampler and collate function; on resume, earlier batches are drawn and discarded."""
    own = DataLoader(Squares(), batch_size=3, sampler=SequentialSampler(range(10)), collate_fn=list)
    loader = build_dataloader(own, seed=0, training=True)
    assert (loader.length, loader.batch_size, loader.positioned) == (4, 3, False)
    assert list(loader.batches(0, 2)) == [[36, 49, 64], [81]]


def test_a_loader_instance_with_a_built_in_sampler_starts_anywhere() -> None:
    """A loader instance with a built-in sampler resumes without loading earlier batches."""
    own = DataLoader(Squares(), batch_size=3, sampler=InfiniteSampler(range(10), shuffle=False), collate_fn=list)
    loader = build_dataloader(own, seed=0, training=True)
    assert loader.positioned
    assert list(islice(loader.batches(0, 4), 1)) == [[4, 9, 16]]


def test_set_epoch_of_a_distributed_sampler_is_called() -> None:
    """``set_epoch`` of torch's DistributedSampler is called, so that every epoch has a different order."""
    own = DataLoader(Squares(), sampler=DistributedSampler(Squares(), num_replicas=2, rank=0), collate_fn=list)
    loader = EpochLoader(own, world_size=2)
    assert list(loader.batches(0)) != list(loader.batches(1))


def test_set_epoch_of_a_custom_sampler_is_called() -> None:
    """``set_epoch`` is called for any sampler that has it."""
    sampler = Reversed(3)
    loader = EpochLoader(DataLoader(Squares(), sampler=sampler, collate_fn=list))
    assert list(loader.batches(7, 1)) == [[1], [0]]
    assert sampler.epochs == [7]


def test_a_custom_batch_sampler_is_not_positioned() -> None:
    """Batches of a custom batch sampler are not positioned, even if it uses a built-in sampler."""
    batch_sampler = OddAndEven(DefaultSampler(range(6), shuffle=False), 3, drop_last=False)
    loader = build(batch_sampler=batch_sampler, batch_size=1)
    assert not loader.positioned
    assert list(loader.batches(2, 1)) == [[0, 4, 16]]
    assert batch_sampler.epoch == 2


def test_a_batch_sampler_from_a_configuration_gets_sampler_and_size() -> None:
    """A configured batch sampler receives the sampler and the batch size."""
    loader = build(shuffle=False, batch_sampler={"type": BatchSampler, "drop_last": True})
    assert list(loader.batches(0)) == [[0, 1, 4, 9], [16, 25, 36, 49]]
    assert (loader.batch_size, loader.positioned) == (4, True)
    grouping = build(shuffle=False, batch_sampler={"type": OddAndEven, "drop_last": True})
    assert list(grouping.batches(0, 1)) == [[0, 4, 16, 36, 64]]
    assert not grouping.positioned


def test_streams_have_no_length() -> None:
    """A stream has no length, its ``set_epoch`` is called, and earlier batches are drawn on resume."""
    loader = build(dataset=Stream(), batch_size=3)
    assert loader.length is None
    assert list(loader.batches(0)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(loader.batches(2, 1)) == [[203, 204, 205], [206]]


def test_without_a_batch_size_samples_are_not_collated() -> None:
    """``batch_size=None`` disables torch's batching, for datasets that return batches."""
    loader = build(batch_size=None, shuffle=False)
    assert (loader.batch_size, loader.positioned) == (None, True)
    assert list(loader.batches(0, 7)) == [49, 64, 81]
    drawn = build(batch_size=None, sampler=[4, 2, 1])
    assert not drawn.positioned
    assert list(drawn.batches(0, 1)) == [4, 1]


def test_functions_can_be_configured() -> None:
    """``collate_fn`` is a function, or a mapping with a registered name or function and arguments."""
    stacked = next(build(collate_fn={"type": "default_collate"}, shuffle=False).batches(0))
    assert torch.equal(stacked, torch.tensor([0, 1, 4, 9]))
    summed = build(collate_fn={"type": sum, "start": 100}, shuffle=False)
    assert list(summed.batches(0)) == [114, 226, 245]


def test_a_dataset_from_a_configuration_is_built_and_initialised() -> None:
    """A configured dataset is built with DATASETS, and ``full_init`` is called."""
    loader = build(dataset={"type": Squares, "length": 2}, shuffle=False)
    assert list(loader.batches(0)) == [[0, 1]]
    assert loader.dataset.initialised


def test_the_configuration_is_not_modified() -> None:
    """Building does not modify the configuration."""
    cfg = {
        "dataset": {"type": Squares, "length": 3},
        "batch_size": 2,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "collate_fn": {"type": sum, "start": 1},
        "worker_init_fn": None,
    }
    before = copy.deepcopy(cfg)
    build_dataloader(cfg, seed=0, training=True)
    assert cfg == before


def test_starting_an_epoch_does_not_advance_the_generators() -> None:
    """Starting an epoch does not advance the global generators."""
    loader = build(generator=None)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(loader.batches(0))
    list(loader.batches(0, 2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


@pytest.mark.parametrize("dataloader", [None, [1, 2], "digits"])
def test_a_dataloader_of_the_wrong_type_is_shown(dataloader: Any) -> None:
    """The error for an invalid dataloader shows its value."""
    with pytest.raises(ConfigTypeError, match=rf"DataLoader or a mapping.*{dataloader!r}".replace("[", r"\[")):
        build_dataloader(dataloader, seed=0, training=True)


def test_a_dataloader_needs_a_dataset() -> None:
    """The error for a missing dataset lists the existing keys."""
    with pytest.raises(ConfigValueError, match="needs a dataset; its keys are 'batch_size', 'datset'"):
        build_dataloader({"batch_size": 2, "datset": []}, seed=0, training=True)


@pytest.mark.parametrize("dataset", [3, None, "digits", {"type": dict, "x": 1}])
def test_a_dataset_of_the_wrong_type_is_rejected(dataset: Any) -> None:
    """A value that is not a dataset raises an error."""
    with pytest.raises(ConfigTypeError, match="A dataset must be a Dataset, a sequence, or a mapping"):
        build(dataset=dataset)


def test_a_dataset_without_a_length_needs_a_sampler() -> None:
    """A dataset without a length requires a sampler."""
    with pytest.raises(ConfigTypeError, match="Unsized has no length"):
        build(dataset=Unsized())
    assert list(build(dataset=Unsized(), sampler=[5, 6]).batches(0)) == [[5, 6]]


@pytest.mark.parametrize(
    "cfg",
    [
        {"sampler": [1, 2], "shuffle": True},
        {"batch_sampler": [[1, 2]], "sampler": [1, 2]},
        {"batch_sampler": [[1, 2]], "shuffle": False},
    ],
)
def test_conflicting_options_are_rejected(cfg: dict[str, Any]) -> None:
    """Options that conflict in selecting the samples raise an error."""
    with pytest.raises(ConfigValueError, match="sampler"):
        build(**cfg)


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        ({"num_worker": 2}, ConfigTypeError, "num_worker"),
        ({"batch_size": 0}, ConfigValueError, "batch_size"),
        ({"num_workers": -1}, ConfigValueError, "num_workers"),
        ({"dataset": Stream(), "shuffle": True}, ConfigValueError, "shuffle"),
        ({"dataset": Stream(), "sampler": [1]}, ConfigValueError, "sampler"),
        ({"collate_fn": "default_collate"}, ConfigTypeError, "collate_fn must be a function or a mapping"),
        ({"collate_fn": {"type": 3}}, ConfigTypeError, "collate_fn: type=3 is neither a registered function"),
        ({"worker_init_fn": 3}, ConfigTypeError, "worker_init_fn must be a function"),
    ],
)
def test_arguments_that_torch_rejects_are_reported(cfg: dict[str, Any], error: type[Exception], message: str) -> None:
    """Arguments that torch's DataLoader rejects are configuration errors."""
    with pytest.raises(error, match=message):
        build(**cfg)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_plain_loader_is_distributed(shuffle: bool) -> None:
    """A plain DataLoader instance is distributed across ranks, which together see every sample once."""
    own = DataLoader(Squares(), batch_size=2, shuffle=shuffle, collate_fn=list)
    ranks = [build_dataloader(own, seed=0, rank=rank, world_size=2, training=True) for rank in range(2)]
    seen = [[sample for batch in loader.batches(0) for sample in batch] for loader in ranks]
    assert sorted(seen[0] + seen[1]) == sorted(Squares()[index] for index in range(10))
    assert all(loader.positioned for loader in ranks)


def test_a_plain_loader_resumes_within_an_epoch() -> None:
    """A plain shuffling DataLoader instance resumes after any batch with the next sample."""
    whole = build_dataloader(DataLoader(Squares(), batch_size=3, shuffle=True, collate_fn=list), seed=5, training=True)
    again = build_dataloader(DataLoader(Squares(), batch_size=3, shuffle=True, collate_fn=list), seed=5, training=True)
    assert list(again.batches(1, done=2)) == list(whole.batches(1))[2:]


def test_a_loader_with_a_generator_keeps_its_order() -> None:
    """With a custom generator, every epoch in one process has the batches of the plain DataLoader."""

    def own() -> DataLoader[int]:
        return DataLoader(Squares(), batch_size=3, shuffle=True, generator=torch.Generator(), collate_fn=list)

    plain, loader = own(), build_dataloader(own(), seed=0, training=True)
    assert [list(loader.batches(epoch)) for epoch in range(2)] == [list(plain) for _ in range(2)]
