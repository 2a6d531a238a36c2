"""Loader instances: unchanged in one process, and distributed across ranks, which are simulated one by one."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from stratagem.data import DefaultSampler, GroupedBatchSampler, build_dataloader
from stratagem.data.batches import OpaqueBatches
from stratagem.data.rank_share import RankItems, RankShare
from stratagem.errors import ConfigValueError

NUMBERS = list(range(11))


def generator() -> torch.Generator:
    """Return a generator in a fixed state."""
    return torch.Generator().manual_seed(7)


class Drawing(Sampler[int]):
    """A sampler that draws each sample lazily, from alternating global generators."""

    def __len__(self) -> int:
        return len(NUMBERS)

    def __iter__(self) -> Iterator[int]:
        for place in range(len(NUMBERS)):
            requests_from = (random.random(), float(np.random.rand()), torch.rand(1).item())
            yield int(requests_from[place % 3] * len(NUMBERS))


class OddThenEven(BatchSampler):
    """A batch sampler whose batches are not consecutive samples of its sampler."""

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        yield [index for index in order if index % 2]
        yield [index for index in order if index % 2 == 0]

    def __len__(self) -> int:
        return 2


class Doubling(DataLoader[int]):
    """A loader with a custom iteration."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (batch * 2 for batch in super().__iter__())


class Counting(IterableDataset[int]):
    """A stream of numbers that its workers share."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(self.length)[0 if info is None else info.id :: 1 if info is None else info.num_workers])


PLAIN: dict[str, Callable[[], DataLoader[Any]]] = {
    "batch sampler over a subset": lambda: DataLoader(
        NUMBERS, batch_sampler=BatchSampler(SubsetRandomSampler([0, 1, 2, 3, 4], generator()), 2, drop_last=True)
    ),
    "batch sampler over a weighted sampler": lambda: DataLoader(
        NUMBERS, batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 11, 6, generator=generator()), 4, False)
    ),
    "batch sampler over a random sampler": lambda: DataLoader(
        NUMBERS, batch_sampler=BatchSampler(RandomSampler(NUMBERS, generator=generator()), 4, False)
    ),
    "batch sampler over a list": lambda: DataLoader(NUMBERS, batch_sampler=[[3, 1], [2]]),
    "own batch sampler": lambda: DataLoader(NUMBERS, batch_sampler=OddThenEven(SequentialSampler(NUMBERS), 3, False)),
    "subset": lambda: DataLoader(NUMBERS, batch_size=3, sampler=SubsetRandomSampler([4, 5, 6], generator())),
    "with replacement": lambda: DataLoader(
        NUMBERS, batch_size=3, sampler=RandomSampler(NUMBERS, replacement=True, num_samples=7, generator=generator())
    ),
    "generator": lambda: DataLoader(NUMBERS, batch_size=3, shuffle=True, generator=generator()),
    "generator, no short batch": lambda: DataLoader(
        NUMBERS, batch_size=3, shuffle=True, generator=generator(), drop_last=True
    ),
    "single samples": lambda: DataLoader(NUMBERS, batch_size=None, sampler=[5, 2]),
    "own iteration": lambda: Doubling(NUMBERS, batch_size=3),
    "stream": lambda: DataLoader(Counting(5), batch_size=2),
}


def lists(batches: Any) -> list[Any]:
    """Return batches as lists."""
    return [batch.tolist() if isinstance(batch, Tensor) else batch for batch in batches]


def of_ranks(loader: Callable[[], Any], *, training: bool, size: int = 2, epoch: int = 0, done: int = 0) -> list[Any]:
    """Return the batches of each rank."""
    return [
        lists(build_dataloader(loader(), seed=3, rank=rank, world_size=size, training=training).batches(epoch, done))
        for rank in range(size)
    ]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("training", [True, False])
def test_one_process_gets_the_batches_of_the_plain_loader(kind: str, training: bool) -> None:
    """In one process, the batches of two epochs are exactly those of the plain loader."""
    plain, loader = PLAIN[kind](), build_dataloader(PLAIN[kind](), seed=3, training=training)
    for epoch in range(2):
        assert lists(loader.batches(epoch)) == lists(plain)
    assert loader.length == len(plain)


@pytest.mark.parametrize("kind", PLAIN)
def test_an_epoch_that_ends_at_its_length_leaves_the_next_one_unchanged(kind: str) -> None:
    """A sampler that draws at its end, such as torch's ``RandomSampler``, does so when only ``length`` batches are taken."""
    plain, loader = PLAIN[kind](), build_dataloader(PLAIN[kind](), seed=3, training=True)
    for epoch in range(3):
        batches = loader.batches(epoch)
        assert lists(next(batches) for _ in range(len(plain))) == lists(plain)


def torchdata_loader(kind: str, batch_size: int, **options: Any) -> Any:
    """Return a ``StatefulDataLoader`` over 24 numbers in a random order from a seeded generator."""
    module = pytest.importorskip("torchdata.stateful_dataloader")
    data, order = list(range(24)), generator()
    if kind == "shuffle":
        return module.StatefulDataLoader(data, batch_size, shuffle=True, generator=order, **options)
    return module.StatefulDataLoader(
        data, batch_size, sampler=RandomSampler(data, generator=order), generator=order, **options
    )


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", ["shuffle", "sampler"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"num_workers": 2}, marks=pytest.mark.slow),
        pytest.param({"num_workers": 2, "persistent_workers": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_torchdata_loader_has_the_samples_of_the_plain_loader(kind: str, size: int, options: dict[str, Any]) -> None:
    """With any number of ranks, every iteration of three epochs has the samples of the plain loop in one process."""
    plain = torchdata_loader(kind, 8, **options)
    loaders = [
        build_dataloader(
            torchdata_loader(kind, 8 // size, **options), seed=3, rank=rank, world_size=size, training=True
        )
        for rank in range(size)
    ]
    for epoch in range(3):
        # As in training, the iteration ends after ``length`` batches, before the loader reports its end.
        found = zip(*(lists(islice(loader.batches(epoch), 3)) for loader in loaders), strict=True)
        assert [sorted(chain(*batches)) for batches in found] == [sorted(batch) for batch in lists(plain)]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("samples", range(1, 14))
def test_torchdata_forms_the_batches_of_torch(samples: int, batch_size: int, drop_last: bool) -> None:
    """The batches of torchdata's batch sampler are those of torch's, which is a condition for distributing their samples."""
    module = pytest.importorskip("torchdata.stateful_dataloader.sampler")
    assert list(module.BatchSampler(range(samples), batch_size, drop_last)) == list(
        BatchSampler(range(samples), batch_size, drop_last)
    )


class Countdown(Sampler[int]):
    """A sampler with a state, whose iteration continues where the last one stopped."""

    def __init__(self) -> None:
        self.left = len(NUMBERS)

    def __iter__(self) -> Iterator[int]:
        while self.left:
            self.left -= 1
            yield self.left

    def state_dict(self) -> dict[str, int]:
        """Return the number of samples left."""
        return {"left": self.left}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state."""
        self.left = state["left"]


class Named(BatchSampler):
    """A batch sampler that adds an attribute and inherits everything else."""

    name = "named"


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", ["inherited", "torchdata", "StatefulDataLoader"])
def test_the_last_batches_of_all_ranks_are_the_last_batch_of_one_process(kind: str) -> None:
    """Batch samplers that form torch's batches are distributed by sample, so that the last round is that of one process."""
    module = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        if kind == "StatefulDataLoader":
            return module.StatefulDataLoader(NUMBERS[:10], 2)
        batches = Named if kind == "inherited" else module.sampler.BatchSampler
        return DataLoader(NUMBERS[:10], batch_sampler=batches(NUMBERS[:10], 2, False))

    assert of_ranks(loader, training=True) == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], [9]]]
    assert of_ranks(loader, training=False) == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], [9]]]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("version", ["today", "before samples were distributed"])
@pytest.mark.parametrize("kind", ["shuffle", "stateful sampler"])
def test_a_torchdata_loader_on_two_ranks_continues_from_its_state(kind: str, version: str) -> None:
    """Its state continues with the next samples of the same order, also the state that an earlier version saved."""
    sampler = pytest.importorskip("torchdata.stateful_dataloader.sampler")
    share = RankShare(1, 2)

    def order(seed: int) -> Any:
        if kind == "shuffle":
            return sampler.RandomSampler(NUMBERS, generator=torch.Generator().manual_seed(seed))
        return Countdown()

    def batches(seed: int) -> OpaqueBatches:
        return OpaqueBatches(sampler.BatchSampler(order(seed), 2, False), single=False, seed=3, share=share)

    whole = iter(batches(1))
    next(whole)
    if version == "today":
        state = whole.state_dict()  # type: ignore[attr-defined]
    else:
        items = RankItems(sampler.BatchSampler(order(1), 2, False), share)
        next(items)
        state = items.state_dict()
    resumed = iter(batches(2))
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))  # type: ignore[attr-defined]
    expected = list(whole)
    assert len(expected) == 2
    assert list(resumed) == expected


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_the_padding_of_a_distributed_sampler_is_dropped_from_torchdata_loaders() -> None:
    """In evaluation, a ``StatefulDataLoader`` with a ``DistributedSampler`` yields each sample once."""
    module = pytest.importorskip("torchdata.stateful_dataloader")
    found = []
    for rank in range(2):
        sampler = DistributedSampler(NUMBERS, 2, rank, shuffle=False)  # type: ignore[arg-type]
        loader = module.StatefulDataLoader(NUMBERS, 2, sampler=sampler)
        found += lists(build_dataloader(loader, seed=3, rank=rank, world_size=2, training=False).batches(0))
    assert sorted(chain(*found)) == NUMBERS


def test_samples_of_a_sampler_are_distributed_in_turn() -> None:
    """Two ranks with batches of two form a batch of four; in evaluation, no sample is repeated."""

    def loader() -> DataLoader[int]:
        return DataLoader(NUMBERS, batch_size=2, sampler=NUMBERS)

    even = [[0, 2], [4, 6], [8, 10]]
    assert of_ranks(loader, training=True) == [even, [[1, 3], [5, 7], [9, 0]]]
    assert of_ranks(loader, training=False) == [even, [[1, 3], [5, 7], [9]]]


def test_batches_of_a_batch_sampler_are_distributed_in_turn() -> None:
    """Batches of a batch sampler stay intact; in training, a rank without a batch repeats the first."""

    def loader() -> DataLoader[int]:
        return DataLoader(NUMBERS, batch_sampler=[[1, 2], [3], [4, 5]])

    assert of_ranks(loader, training=True) == [[[1, 2], [4, 5]], [[3], [1, 2]]]
    assert of_ranks(loader, training=False) == [[[1, 2], [4, 5]], [[3]]]


@pytest.mark.parametrize("loader", [lambda: Doubling(NUMBERS[:10], batch_size=2), lambda: DataLoader(Counting(10), 2)])
def test_batches_of_a_custom_loader_are_distributed_in_turn(loader: Callable[[], Any]) -> None:
    """Of five batches, each rank gets three in training, with one repetition, and three or two in evaluation."""
    plain = lists(loader())
    assert of_ranks(loader, training=True) == [plain[::2], [plain[1], plain[3], plain[4]]]
    assert of_ranks(loader, training=False) == [plain[::2], plain[1::2]]
    for training, lengths in ((True, [3, 3]), (False, [3, 2])):
        for rank, length in enumerate(lengths):
            built = build_dataloader(loader(), seed=3, rank=rank, world_size=2, training=training)
            assert built.length == length


def test_fewer_batches_than_ranks_give_every_rank_one_in_training() -> None:
    """In training, every rank gets a batch, even if there are fewer batches than ranks."""
    assert of_ranks(lambda: DataLoader(NUMBERS, batch_sampler=[[1]]), training=True, size=3) == [[[1]]] * 3
    assert of_ranks(lambda: DataLoader(Counting(1)), training=True, size=3) == [[[0]]] * 3


def test_an_order_from_the_global_generators_is_reproducible() -> None:
    """The order depends only on the seed and the epoch, does not affect the model's generators, and can be resumed."""

    def loader() -> DataLoader[int]:
        return DataLoader(NUMBERS, batch_size=2, sampler=Drawing())

    first = of_ranks(loader, training=True)
    state = random.getstate(), torch.get_rng_state()
    torch.rand(5), random.random(), np.random.rand()
    drawn = random.getstate(), torch.get_rng_state()
    assert of_ranks(loader, training=True) == first
    assert random.getstate() == drawn[0] != state[0]
    assert torch.equal(torch.get_rng_state(), drawn[1])
    assert of_ranks(loader, training=True, epoch=1) != first
    assert of_ranks(loader, training=True, done=2) == [batches[2:] for batches in first]


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomSampler(NUMBERS),
        lambda: RandomSampler(NUMBERS, replacement=True, num_samples=40),
        lambda: SubsetRandomSampler(NUMBERS),
        lambda: WeightedRandomSampler([1.0] * 11, 40),
        lambda: BatchSampler(WeightedRandomSampler([1.0] * 11, 40), 2, drop_last=False),
        Drawing,
    ],
)
def test_random_numbers_of_the_model_and_of_the_sampler_are_independent(make: Callable[[], Any]) -> None:
    """Random numbers of the model do not affect the order, and loading does not affect the model's generators."""

    def order(*, drawing: bool) -> tuple[list[Any], Tensor]:
        sampler = make()
        how = {"batch_sampler": sampler} if isinstance(sampler, BatchSampler) else {"batch_size": 2, "sampler": sampler}
        torch.manual_seed(5)
        batches = []
        for batch in build_dataloader(DataLoader(NUMBERS, **how), seed=0, training=True).batches(0):
            batches.append(batch.tolist())
            if drawing:
                torch.rand(3), random.random(), np.random.rand()
        return batches, torch.rand(1)

    undisturbed, drawn = order(drawing=False)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert order(drawing=True)[0] == undisturbed


@pytest.mark.parametrize("training", [True, False])
def test_a_matching_distributed_sampler_is_used_unchanged(training: bool) -> None:
    """A DistributedSampler for these ranks is used unchanged; in evaluation, its padding is removed."""
    for rank in range(2):

        def loader(rank: int = rank) -> DataLoader[int]:
            return DataLoader(NUMBERS, batch_size=2, sampler=DistributedSampler(NUMBERS, 2, rank, shuffle=False))  # type: ignore[arg-type]

        built = build_dataloader(loader(), seed=3, rank=rank, world_size=2, training=training)
        expected = lists(loader())
        if rank == 1 and not training:
            expected[-1] = expected[-1][:-1]
        assert lists(built.batches(0)) == expected
        assert built.length == 3


@pytest.mark.parametrize(("replicas", "rank"), [(3, 0), (2, 0)])
def test_a_sampler_for_different_ranks_is_rejected(replicas: int, rank: int) -> None:
    """A sampler for different ranks raises an error that contains both, because samples would be missing or repeated."""
    sampler = DistributedSampler(NUMBERS, replicas, rank)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigValueError, match=rf"DistributedSampler yields the data of rank {rank} of {replicas}.*rank 1 of 2"
    ):
        build_dataloader(DataLoader(NUMBERS, sampler=sampler), seed=3, rank=1, world_size=2, training=True)


def test_a_stream_for_different_ranks_is_rejected() -> None:
    """A stream that declares different ranks raises an error."""
    stream = Counting(4)
    stream.num_replicas, stream.rank = 4, 0  # type: ignore[attr-defined]
    with pytest.raises(ConfigValueError, match=r"Counting yields the data of rank 0 of 4"):
        build_dataloader({"dataset": stream}, seed=3, rank=0, world_size=2, training=True)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(NUMBERS, sampler=DefaultSampler(NUMBERS, shuffle=False)),
        lambda: DataLoader(NUMBERS, batch_sampler=GroupedBatchSampler(NUMBERS, 1, [0] * 11, shuffle=False)),
    ],
    ids=["sampler", "batch sampler"],
)
def test_a_built_in_sampler_without_ranks_is_distributed(loader: Callable[[], Any]) -> None:
    """A built-in sampler that was created before the process group is distributed."""
    assert of_ranks(loader, training=False) == [[[number] for number in NUMBERS[rank::2]] for rank in range(2)]


def test_a_configured_loader_stacks_its_batches() -> None:
    """The default ``collate_fn`` is torch's ``default_collate``; MMEngine's ``pseudo_collate`` is available by name."""
    cfg = {"dataset": [{"x": 1.0}, {"x": 2.0}], "batch_size": 2, "shuffle": False}
    (batch,) = build_dataloader(cfg, seed=3, training=True).batches(0)
    assert torch.equal(batch["x"], torch.tensor([1.0, 2.0], dtype=torch.float64))
    cfg["collate_fn"] = {"type": "pseudo_collate"}
    assert list(build_dataloader(cfg, seed=3, training=True).batches(0)) == [{"x": [1.0, 2.0]}]


DESCRIBED: dict[str, Callable[[], Any]] = {
    "11 samples of list in the order of DefaultSampler, batches of 2, the samples split across 2 data-parallel ranks": (
        lambda: {"dataset": NUMBERS, "batch_size": 2}
    ),
    "11 samples of list in the order of SubsetRandomSampler, batches of 4, the samples split across 2": (
        lambda: DataLoader(NUMBERS, 4, sampler=SubsetRandomSampler([1]))
    ),
    "11 samples of list in the order of list, the batches split across 2 data-parallel ranks, undivided because list forms "
    "its own batches": (lambda: DataLoader(NUMBERS, batch_sampler=[[1]])),
    "stream Counting of 4 samples, batches of 2, the batches split across 2 data-parallel ranks; every rank reads all": (
        lambda: DataLoader(Counting(4), 2)
    ),
    "11 samples of list in the order of DistributedSampler, batches of 1, already split across 2": (
        lambda: DataLoader(NUMBERS, sampler=DistributedSampler(NUMBERS, 2, 0))  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("words", DESCRIBED)
def test_a_loader_describes_its_order_and_distribution(words: str) -> None:
    """``describe`` returns one line with the order and the distribution across ranks, for the log."""
    assert words in build_dataloader(DESCRIBED[words](), seed=3, world_size=2, training=False).describe()


def test_undivided_batches_are_announced_for_training() -> None:
    """``describe`` states that whole batches of a batch sampler with its own ``__iter__`` may be repeated in training."""
    loader = DataLoader(NUMBERS, batch_sampler=OddThenEven(SequentialSampler(NUMBERS), 3, False))
    assert (
        build_dataloader(loader, seed=3, world_size=2, training=True)
        .describe()
        .endswith(
            "the batches split across 2 data-parallel ranks, undivided because OddThenEven forms its own batches; the last round "
            "of an epoch may repeat batches"
        )
    )


@pytest.mark.slow
def test_every_worker_of_a_stream_has_a_short_last_batch() -> None:
    """Two workers with five samples each yield four batches, although torch's length is 3."""
    loader = build_dataloader(DataLoader(Counting(10), batch_size=4, num_workers=2), seed=3, training=True)
    assert (loader.length, loader.slack) == (3, 1)
    assert sorted(map(len, loader.batches(0))) == [1, 1, 4, 4]
