"""Generators that are seeded when they are used yield the same numbers as generators that are seeded for every sample."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import multiprocessing
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import gauss as imported_gauss
from random import random as imported_random
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.random.mtrand import get_bit_generator
from torch.utils.data import Dataset

from stratagem.data import build_dataloader, seeding
from stratagem.errors import ConfigValueError

WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]


def conditional(index: int) -> list[float]:
    """Draw from a generator for some samples only."""
    drawn = [random.random()] if index % 3 == 1 else []
    drawn += [float(np.random.rand())] if index % 4 == 2 else []
    return drawn + ([float(torch.rand(()))] if index % 2 else [])


def shuffled(_: int) -> list[int]:
    """Shuffle with each generator."""
    first, second = list(range(9)), np.arange(9)
    random.shuffle(first)
    np.random.shuffle(second)
    return [*first, *second.tolist(), *torch.randperm(9).tolist()]


def forked(_: int) -> list[float]:
    """Draw within and after ``fork_rng``."""
    with torch.random.fork_rng():
        inner = float(torch.rand(()))
    return [inner, float(torch.rand(()))]


def reseeded(index: int) -> list[float]:
    """Seed the generators, as datasets do that want fixed augmentations."""
    random.seed(index)
    first = random.random()
    np.random.seed(index)
    second = float(np.random.rand())
    torch.manual_seed(index)
    return [first, second, float(torch.rand(()))]


def restored(_: int) -> list[float]:
    """Save the states, draw, restore them and draw again."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = [random.random(), float(np.random.randn()), float(torch.randn(()))]
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return [*drawn, random.random(), float(np.random.randn()), float(torch.randn(()))]


def own_generator(_: int) -> list[float]:
    """Seed a separate generator from each global one."""
    return [
        float(np.random.default_rng(torch.initial_seed()).random()),
        random.Random(random.getrandbits(32)).random(),
        float(np.random.RandomState(np.random.randint(2**31)).rand()),
    ]


# Each function draws the values of a sample.
DRAWS: dict[str, Callable[[int], Any]] = {
    "nothing": lambda index: index,
    "random.random": lambda _: random.random(),
    "random.getrandbits": lambda _: random.getrandbits(70),
    "random.randint": lambda _: [random.randint(0, 99) for _ in range(3)],
    "random.gauss": lambda _: [random.gauss(0, 1) for _ in range(3)],
    "random.choices": lambda _: random.choices(range(50), k=3),
    "random.sample": lambda _: random.sample(range(50), 3),
    "random.uniform": lambda _: random.uniform(2, 3),
    "random.betavariate": lambda _: random.betavariate(0.4, 0.4),
    "random.randbytes": lambda _: random.randbytes(5),
    "random.getstate": lambda _: hash(random.getstate()),
    "a copy of Python's generator": lambda _: copy.copy(random._inst).random(),
    "a pickled generator": lambda _: pickle.loads(pickle.dumps(random._inst)).random(),
    "an imported function": lambda _: imported_random(),
    "an imported method": lambda _: imported_gauss(0, 1),
    "np.random.rand": lambda _: np.random.rand(3).tolist(),
    "np.random.randn": lambda _: np.random.randn(3).tolist(),
    "np.random.randint": lambda _: np.random.randint(0, 99, 3).tolist(),
    "np.random.randint of 64 bits": lambda _: np.random.randint(0, 2**60, 3).tolist(),
    "np.random.permutation": lambda _: np.random.permutation(7).tolist(),
    "np.random.choice": lambda _: np.random.choice(50, 3, replace=False).tolist(),
    "np.random.normal": lambda _: float(np.random.normal()),
    "np.random.beta": lambda _: float(np.random.beta(0.4, 0.4)),
    "np.random.poisson": lambda _: np.random.poisson(3, 3).tolist(),
    "np.random.binomial": lambda _: int(np.random.binomial(9, 0.3)),
    "np.random.bytes": lambda _: np.random.bytes(5),
    "np.random.get_state": lambda _: hash(np.random.get_state()[1].tobytes()),  # type: ignore[union-attr]
    "NumPy's bit generator": lambda _: int(get_bit_generator().random_raw()),
    "a Generator of the bit generator": lambda _: float(np.random.Generator(get_bit_generator()).random()),
    "torch.rand": lambda _: torch.rand(3).tolist(),
    "torch.initial_seed": lambda _: torch.initial_seed(),
    "conditional": conditional,
    "shuffled": shuffled,
    "forked": forked,
    "reseeded": reseeded,
    "restored": restored,
    "own generator": own_generator,
}


class Drawing(Dataset[Any]):
    """Samples with what a function draws, and a count of how often each sample was loaded."""

    def __init__(self, draw: str) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, DRAWS[self.draw](index)


class DrawingAtOnce(Drawing):
    """Samples that are loaded a batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        return [self[index] for index in indices]


class Nested(Dataset[Any]):
    """Samples that contain a batch of another data loader."""

    def __init__(self) -> None:
        self.loader = build_dataloader(
            {"dataset": Drawing("shuffled"), "batch_size": 3, "collate_fn": list}, seed=5, training=False
        )

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        before = random.random() if index % 2 else np.random.rand()
        return before, next(iter(self.loader.batches(0))), random.random(), np.random.rand(), float(torch.rand(()))


def mixed(samples: list[Any]) -> tuple[list[Any], Any]:
    """Collate with a number from each generator."""
    return samples, (random.random(), np.random.rand(), float(torch.rand(())))


def batches(dataset: Any, *, done: int = 0, epochs: int = 2, **options: Any) -> list[Any]:
    """Return the batches of two epochs; each loader starts with the same global state."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    cfg = {"dataset": dataset, "batch_size": 4, "collate_fn": list, **options}
    loader = build_dataloader(cfg, seed=3, training=True)
    return [batch for epoch in range(epochs) for batch in loader.batches(epoch, done)]


@pytest.mark.parametrize("dataset", [Drawing, pytest.param(DrawingAtOnce, marks=pytest.mark.slow)])
@pytest.mark.parametrize("collate", [list, mixed])
@pytest.mark.parametrize("draw", DRAWS)
def test_auto_equals_always(draw: str, collate: Any, dataset: type[Drawing]) -> None:
    """``streams="auto"`` yields the bits of ``streams="always"``, whatever a dataset draws and however it draws."""
    options = {"collate_fn": collate}
    assert batches(dataset(draw), streams="auto", **options) == batches(dataset(draw), streams="always", **options)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_auto_equals_always_in_workers(*, persistent: bool) -> None:
    """The same holds in data workers, which may persist."""
    for draw in DRAWS:
        options = {"num_workers": 2, "persistent_workers": persistent, "collate_fn": mixed}
        expected = batches(Drawing(draw), streams="always", collate_fn=mixed)
        assert batches(Drawing(draw), streams="auto", **options) == expected


@pytest.mark.parametrize("draw", DRAWS)
def test_auto_equals_always_after_a_resume(draw: str) -> None:
    """A run that resumes within an epoch draws the numbers of the remaining samples."""
    whole = batches(Drawing(draw), streams="always", epochs=1)
    assert batches(Drawing(draw), done=2, epochs=1) == whole[2:]


@pytest.mark.slow
def test_auto_equals_always_without_batching() -> None:
    """Samples that are not batched have the same streams."""
    options = {"batch_size": None, "collate_fn": mixed}
    for draw in DRAWS:
        assert batches(Drawing(draw), **options) == batches(Drawing(draw), streams="always", **options)


def test_a_dataset_that_reads_another_loader_keeps_its_stream() -> None:
    """A data loader within a dataset does not change the numbers of the outer sample."""
    assert batches(Nested(), streams="auto") == batches(Nested(), streams="always")


@pytest.mark.parametrize("draw", DRAWS)
def test_loading_does_not_change_the_global_generators(draw: str) -> None:
    """Afterwards, the generators continue where they were, including Python's spare normal number."""
    random.seed(4)
    random.gauss(0, 1)
    np.random.seed(4)
    torch.manual_seed(4)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr]
    names = dict(random.__dict__)
    loader = build_dataloader({"dataset": Drawing(draw), "batch_size": 4, "collate_fn": mixed}, seed=3, training=True)
    assert len(list(loader.batches(0))) == 4
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[union-attr]
    assert after == states
    assert random.__dict__ == names
    assert set(random._inst.__dict__) == {"gauss_next"}


def test_an_error_in_a_dataset_restores_the_generators() -> None:
    """If a sample cannot be loaded, the generators are restored."""

    class Failing(Drawing):
        def __getitem__(self, index: int) -> Any:
            if index == 9:
                raise KeyError(index)
            return random.random()

    random.seed(4)
    state, names = random.getstate(), dict(random.__dict__)
    with pytest.raises(KeyError, match="9"):
        batches(Failing("nothing"))
    random.seed(4)
    assert random.getstate() == state
    assert random.__dict__ == names


@pytest.fixture
def late_module(tmp_path: Path) -> Iterator[ModuleType]:
    """A module that is imported after the first stream and has imported ``random`` from the standard library."""
    batches(Drawing("nothing"))
    (tmp_path / "late_module.py").write_text("from random import random\n\ndef draw():\n    return random()\n")
    spec = importlib.util.spec_from_file_location("late_module", tmp_path / "late_module.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["late_module"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["late_module"]
    gc.collect()


@pytest.mark.slow
def test_a_function_that_is_imported_later_is_seeded(late_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that imports a function of ``random`` after the first batch draws the numbers of the streams."""
    monkeypatch.setitem(DRAWS, "late", lambda _: late_module.draw())
    assert batches(Drawing("late"), streams="auto") == batches(Drawing("late"), streams="always")


@pytest.mark.slow
def test_a_function_that_is_stored_later_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset that stores a method of Python's generator draws the numbers of the streams."""
    batches(Drawing("nothing"))
    stored = [random.random]
    monkeypatch.setitem(DRAWS, "stored", lambda _: stored[0]())
    assert batches(Drawing("stored"), streams="auto") == batches(Drawing("stored"), streams="always")


@pytest.fixture
def numpy_seeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The seeds that NumPy's generator receives in this test."""
    seeds: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(seeding, "_lazy_generators", functools.cache(seeding._lazy_generators.__wrapped__))
        patch.setattr(seeding, "MT19937", CountedMT19937)
        patch.setattr(CountedMT19937, "seeds", seeds)
        yield seeds
    gc.collect()  # The temporary object refers to the methods of Python's generator.


def test_a_platform_without_functions_created_at_run_time_seeds_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """If NumPy's generator cannot be replaced, the samples are the same."""
    expected = batches(Drawing("shuffled"), streams="always")
    monkeypatch.setattr(seeding, "_lazy_generators", functools.cache(seeding._lazy_generators.__wrapped__))
    monkeypatch.setattr(seeding, "_LazyGenerators", Mock(side_effect=MemoryError))
    assert batches(Drawing("shuffled")) == expected
    assert seeding._lazy_generators() is None


@pytest.mark.slow
def test_generators_that_are_not_used_are_not_seeded(numpy_seeds: list[Any]) -> None:
    """NumPy's generator is never seeded for a dataset that draws nothing, and for every sample of one that uses it."""
    batches(Drawing("nothing"), epochs=1)
    assert numpy_seeds == []
    batches(Drawing("np.random.rand"), epochs=1)
    # Each of 14 samples, and collate_fn of each of 4 batches, since the samples of the batch used the generator.
    assert len(numpy_seeds) == 18


class CountedMT19937(np.random.MT19937):
    """A bit generator that records when it is seeded."""

    seeds: ClassVar[list[Any]] = []

    def _legacy_seeding(self, seed: Any) -> None:
        self.seeds.append(seed)
        super()._legacy_seeding(seed)


def samples_that_look() -> tuple[list[list[bool]], list[list[bool]]]:
    """Return for each sample of two batches whether the methods of the generator are the original ones; sample 5 uses it."""
    kind = type(random.random)

    def look(index: int) -> list[bool]:
        found = [isinstance(random.random, kind), isinstance(imported_random, kind)]
        if index == 5:
            random.random()
        return found

    DRAWS["look"] = look
    first, second = batches(Drawing("look"), epochs=1, batch_size=7, shuffle=False)
    return [found for _, found in first], [found for _, found in second]


@pytest.mark.slow
def test_pythons_generator_is_not_seeded_for_a_sample_that_does_not_use_it() -> None:
    """Its methods are replaced while samples are loaded, and are back in place once one of them was called.

    This requires that only modules refer to them, as in a new process; other tests may have created other references.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as new_process:
        first, second = new_process.submit(samples_that_look).result()
    assert first == [[False, False]] * 6 + [[True, True]]
    assert second == [[False, False]] * 7


def test_an_unknown_value_of_streams_is_rejected() -> None:
    """The error suggests the value that was meant."""
    with pytest.raises(ConfigValueError, match="unknown streams='allways'. Did you mean 'always'"):
        batches(Drawing("nothing"), streams="allways")


def test_streams_of_an_iterable_dataset_are_rejected() -> None:
    """An iterable dataset has no streams per sample, so the option would have no effect."""

    class Endless(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

    with pytest.raises(
        ConfigValueError, match="streams='always' requires a map-style dataset, but Endless is iterable"
    ):
        batches(Endless(), streams="always")
