"""Loaders that begin anywhere, from configurations and from objects."""

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
    """The numbers 0, 1, 4, 9 ..."""

    def __init__(self, length: int = 10) -> None:
        self.length = length
        self.initialised = False

    def full_init(self) -> None:
        """Remember that it was called."""
        self.initialised = True

    def __getitem__(self, index: int) -> int:
        return index * index

    def __len__(self) -> int:
        return self.length


class Stream(IterableDataset[int]):
    """Numbers that count up from a hundred times the epoch, without a length."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin elsewhere."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(100 * self.epoch, 100 * self.epoch + 7))


class Unsized(Dataset[int]):
    """A dataset by index that does not say how long it is."""

    def __getitem__(self, index: int) -> int:
        return index


class Reversed:
    """A sampler that derives from nothing, in an order of its own in each epoch."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        """Remember the epoch."""
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length - 1, -1, -1))

    def __len__(self) -> int:
        return self.length


class OddAndEven(BatchSampler):
    """Batches of odd and of even samples, as those that group by shape do."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        """Remember the epoch."""
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
def test_beginning_at_any_batch_gives_the_rest(workers: int, drop_last: bool) -> None:
    """An epoch that was interrupted after any batch, even the last, goes on with the next."""
    loader = build(num_workers=workers, drop_last=drop_last)
    whole = list(loader.batches(5))
    assert loader.positioned
    assert len(whole) == loader.length == (2 if drop_last else 3)
    for done in range(len(whole) + 1):
        assert list(loader.batches(5, done)) == whole[done:]


def test_epochs_differ_and_can_be_asked_for_in_any_order() -> None:
    """The epoch's number decides its order, not what was iterated before."""
    loader = build()
    first, second = list(loader.batches(0)), list(loader.batches(1))
    assert first != second
    assert list(loader.batches(0)) == first
    assert sorted(value for batch in second for value in batch) == [index * index for index in range(10)]


def test_ranks_share_the_samples_out() -> None:
    """Two ranks together see every sample once in training, and each goes on where the other ranks do."""
    loaders = [
        build_dataloader({"dataset": Squares(), "batch_size": 2}, seed=3, rank=rank, world_size=2, training=True)
        for rank in range(2)
    ]
    whole = [list(loader.batches(0)) for loader in loaders]
    seen = sorted(value for batches in whole for batch in batches for value in batch)
    assert seen == [index * index for index in range(10)]
    assert [list(loader.batches(0, 2)) for loader in loaders] == [batches[2:] for batches in whole]


def test_evaluation_is_in_order_and_not_filled_up() -> None:
    """No sample is counted twice: three samples on two ranks are two and one. Training gives both two."""
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


def test_a_sampler_of_a_configuration_does_not_fill_up_in_evaluation() -> None:
    """Naming the sampler changes nothing about that, not even with ``round_up=True``: a sample would count twice."""
    cfg = {"dataset": [0, 1, 2], "sampler": {"type": "DefaultSampler", "shuffle": False}}
    for sampler in (cfg["sampler"], {**cfg["sampler"], "round_up": True}):
        loader = build_dataloader({**cfg, "sampler": sampler}, seed=0, rank=1, world_size=2, training=False)
        assert list(loader.batches(0)) == [1]


def test_shuffle_can_be_said() -> None:
    """``shuffle`` overrules what training and evaluation do by default."""
    in_order = [[0, 1, 4, 9], [16, 25, 36, 49], [64, 81]]
    assert list(build(shuffle=False).batches(0)) == in_order
    assert list(build(training=False).batches(0)) == in_order
    assert list(build(training=False, shuffle=True).batches(0)) != in_order


def test_the_seed_decides_the_order() -> None:
    """Loaders of one seed agree; those of another do not."""
    cfg = {"dataset": Squares(), "batch_size": 4, "collate_fn": list}
    orders = [list(build_dataloader(cfg, seed=seed, training=True).batches(0)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_an_infinite_sampler_goes_on_from_epoch_to_epoch() -> None:
    """Epochs of an endless order are its following stretches, not the first one again and again."""
    loader = build(sampler={"type": "InfiniteSampler", "shuffle": True})
    endless = list(islice(loader.batches(0), 9))
    # Ten samples in batches of four count as an epoch of three.
    assert loader.length == 3
    for epoch, done in ((0, 2), (1, 0), (2, 1)):
        assert list(islice(loader.batches(epoch, done), 2)) == endless[3 * epoch + done :][:2]
    assert list(islice(loader.batches(0, 3), 1)) == [endless[3]]


def test_a_built_loader_is_taken_as_it_is() -> None:
    """A built DataLoader keeps its sampler and its collate function; what was seen is drawn and dropped."""
    own = DataLoader(Squares(), batch_size=3, sampler=SequentialSampler(range(10)), collate_fn=list)
    loader = build_dataloader(own, seed=0, training=True)
    assert (loader.length, loader.batch_size, loader.positioned) == (4, 3, False)
    assert list(loader.batches(0, 2)) == [[36, 49, 64], [81]]


def test_a_built_loader_with_a_sampler_of_ours_begins_anywhere() -> None:
    """The position is taken up at no cost there too."""
    own = DataLoader(Squares(), batch_size=3, sampler=InfiniteSampler(range(10), shuffle=False), collate_fn=list)
    loader = build_dataloader(own, seed=0, training=True)
    assert loader.positioned
    assert list(islice(loader.batches(0, 4), 1)) == [[4, 9, 16]]


def test_torch_s_own_distributed_sampler_is_told_the_epoch() -> None:
    """It would give every epoch the same order otherwise."""
    own = DataLoader(Squares(), sampler=DistributedSampler(Squares(), num_replicas=2, rank=0), collate_fn=list)
    loader = EpochLoader(own, world_size=2)
    assert list(loader.batches(0)) != list(loader.batches(1))


def test_a_sampler_that_derives_from_nothing_is_told_the_epoch() -> None:
    """What counts is that it has ``set_epoch``."""
    sampler = Reversed(3)
    loader = EpochLoader(DataLoader(Squares(), sampler=sampler, collate_fn=list))
    assert list(loader.batches(7, 1)) == [[1], [0]]
    assert sampler.epochs == [7]


def test_a_batch_sampler_is_told_the_epoch_and_never_jumped_into() -> None:
    """Batches of a sampler that groups are not the next samples in order, even if it draws from a sampler of ours."""
    batch_sampler = OddAndEven(DefaultSampler(range(6), shuffle=False), 3, drop_last=False)
    loader = build(batch_sampler=batch_sampler, batch_size=1)
    assert not loader.positioned
    assert list(loader.batches(2, 1)) == [[0, 4, 16]]
    assert batch_sampler.epoch == 2


def test_a_batch_sampler_from_a_configuration_gets_sampler_and_size() -> None:
    """The sampler and the batch size are handed to it."""
    loader = build(shuffle=False, batch_sampler={"type": BatchSampler, "drop_last": True})
    assert list(loader.batches(0)) == [[0, 1, 4, 9], [16, 25, 36, 49]]
    assert (loader.batch_size, loader.positioned) == (4, True)
    grouping = build(shuffle=False, batch_sampler={"type": OddAndEven, "drop_last": True})
    assert list(grouping.batches(0, 1)) == [[0, 4, 16, 36, 64]]
    assert not grouping.positioned


def test_streams_have_no_length_and_are_told_the_epoch() -> None:
    """A stream gives batches as long as it lasts; a position is reached by drawing."""
    loader = build(dataset=Stream(), batch_size=3)
    assert loader.length is None
    assert list(loader.batches(0)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(loader.batches(2, 1)) == [[203, 204, 205], [206]]


def test_without_a_batch_size_samples_come_as_they_are() -> None:
    """``batch_size=None`` switches torch's batching off, for datasets that make batches themselves."""
    loader = build(batch_size=None, shuffle=False)
    assert (loader.batch_size, loader.positioned) == (None, True)
    assert list(loader.batches(0, 7)) == [49, 64, 81]
    drawn = build(batch_size=None, sampler=[4, 2, 1])
    assert not drawn.positioned
    assert list(drawn.batches(0, 1)) == [4, 1]


def test_functions_come_by_name_or_with_arguments() -> None:
    """``collate_fn`` is an object, a registered name, or a mapping with further arguments."""
    stacked = next(build(collate_fn={"type": "default_collate"}, shuffle=False).batches(0))
    assert torch.equal(stacked, torch.tensor([0, 1, 4, 9]))
    summed = build(collate_fn={"type": sum, "start": 100}, shuffle=False)
    assert list(summed.batches(0)) == [114, 226, 245]


def test_a_dataset_from_a_configuration_is_built_and_initialised() -> None:
    """A mapping is built through DATASETS, and one that loads late is asked to load."""
    loader = build(dataset={"type": Squares, "length": 2}, shuffle=False)
    assert list(loader.batches(0)) == [[0, 1]]
    assert loader.dataset.initialised


def test_the_configuration_stays_as_it_is() -> None:
    """One configuration can be built twice, for validation and test."""
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


def test_beginning_an_epoch_leaves_the_model_s_random_numbers_alone() -> None:
    """Stopping and going on begins an epoch once more; dropout must not notice."""
    loader = build(generator=None)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(loader.batches(0))
    list(loader.batches(0, 2))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


@pytest.mark.parametrize("dataloader", [None, [1, 2], "digits"])
def test_a_dataloader_of_the_wrong_type_is_shown(dataloader: Any) -> None:
    """The error shows what came."""
    with pytest.raises(ConfigTypeError, match=rf"DataLoader or a mapping.*{dataloader!r}".replace("[", r"\[")):
        build_dataloader(dataloader, seed=0, training=True)


def test_a_dataloader_needs_a_dataset() -> None:
    """The error lists what it has in place of one."""
    with pytest.raises(ConfigValueError, match="needs a dataset; it has 'batch_size', 'datset'"):
        build_dataloader({"batch_size": 2, "datset": []}, seed=0, training=True)


@pytest.mark.parametrize("dataset", [3, None, "digits", {"type": dict, "x": 1}])
def test_a_dataset_of_the_wrong_type_is_refused(dataset: Any) -> None:
    """A path, a number, or what a wrong type made is no dataset."""
    with pytest.raises(ConfigTypeError, match="A dataset is a Dataset, a sequence, or a mapping"):
        build(dataset=dataset)


def test_a_dataset_without_a_length_needs_a_sampler() -> None:
    """Nobody can deal an unknown number of samples."""
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
def test_two_that_would_choose_the_samples_are_refused(cfg: dict[str, Any]) -> None:
    """One of them would be ignored."""
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
        ({"collate_fn": "default_collate"}, ConfigTypeError, "collate_fn is a function or a mapping"),
        ({"collate_fn": {"type": 3}}, ConfigTypeError, "collate_fn: type=3 is no function"),
        ({"worker_init_fn": 3}, ConfigTypeError, "worker_init_fn is a function"),
    ],
)
def test_arguments_that_torch_does_not_take_are_named(
    cfg: dict[str, Any], error: type[Exception], message: str
) -> None:
    """What torch's DataLoader refuses comes as an error about the configuration."""
    with pytest.raises(error, match=message):
        build(**cfg)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_plain_loader_is_dealt_to_the_ranks(shuffle: bool) -> None:
    """A plain DataLoader of one's own gives two ranks different samples, together all of them once."""
    own = DataLoader(Squares(), batch_size=2, shuffle=shuffle, collate_fn=list)
    ranks = [build_dataloader(own, seed=0, rank=rank, world_size=2, training=True) for rank in range(2)]
    seen = [[sample for batch in loader.batches(0) for sample in batch] for loader in ranks]
    assert sorted(seen[0] + seen[1]) == sorted(Squares()[index] for index in range(10))
    assert all(loader.positioned for loader in ranks)


def test_a_plain_loader_goes_on_inside_of_an_epoch() -> None:
    """A plain shuffling DataLoader of one's own begins after any batch with the very next sample."""
    whole = build_dataloader(DataLoader(Squares(), batch_size=3, shuffle=True, collate_fn=list), seed=5, training=True)
    again = build_dataloader(DataLoader(Squares(), batch_size=3, shuffle=True, collate_fn=list), seed=5, training=True)
    assert list(again.batches(1, done=2)) == list(whole.batches(1))[2:]


def test_a_loader_with_its_own_generator_keeps_its_order() -> None:
    """In one process, every epoch has exactly the batches that the plain DataLoader gives."""

    def own() -> DataLoader[int]:
        return DataLoader(Squares(), batch_size=3, shuffle=True, generator=torch.Generator(), collate_fn=list)

    plain, loader = own(), build_dataloader(own(), seed=0, training=True)
    assert [list(loader.batches(epoch)) for epoch in range(2)] == [list(plain) for _ in range(2)]
