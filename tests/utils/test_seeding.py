"""Seeds and the state of generators."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from stratagem.errors import CheckpointMismatchError, ConfigTypeError, ConfigValueError, StateError
from stratagem.utils import generator_state, restore_generator_state, set_random_seed


@pytest.fixture(autouse=True)
def generators_as_before() -> Iterator[None]:
    """Leave the generators as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.fixture
def determinism_as_before() -> Iterator[None]:
    """Leave the switches of determinism as they were."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    yield
    cudnn.benchmark, cudnn.deterministic = before[:2]
    torch.use_deterministic_algorithms(before[2])


def draw() -> tuple[Any, ...]:
    """Draw from every generator."""
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()


def pretend_group(monkeypatch: pytest.MonkeyPatch, *, rank: int, size: int) -> None:
    """Let torch.distributed tell of a process group."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: size)


def test_the_same_seed_gives_the_same_numbers() -> None:
    """Two runs with one seed draw the same numbers from Python, NumPy and torch."""
    assert set_random_seed(7) == 7
    first = draw()
    set_random_seed(7)
    assert draw() == first


def test_each_generator_is_seeded_like_by_hand() -> None:
    """The seed is handed to each library as it is."""
    set_random_seed(3)
    expected = random.Random(3).random(), np.random.RandomState(3).rand(), torch.Generator().manual_seed(3)
    assert random.random() == expected[0]
    assert np.random.rand() == expected[1]
    assert torch.equal(torch.rand(2), torch.rand(2, generator=expected[2]))


def test_a_drawn_seed_can_be_used_again() -> None:
    """Without a seed, one is drawn and returned, and it reproduces the run."""
    seed = set_random_seed()
    first = draw()
    set_random_seed(seed)
    assert draw() == first


def test_drawing_a_seed_does_not_depend_on_the_generators() -> None:
    """Two draws differ even where Python's generator was seeded alike before."""
    random.seed(0)
    first = set_random_seed()
    random.seed(0)
    assert set_random_seed() != first


def test_rank_is_added_where_asked() -> None:
    """With diff_rank_seed each rank gets its own seed."""
    assert set_random_seed(10, diff_rank_seed=True, rank=5) == 15
    assert set_random_seed(10, rank=5) == 10


def test_rank_comes_from_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a rank, torch.distributed's is added, and 0 without a process group."""
    assert set_random_seed(10, diff_rank_seed=True) == 10
    pretend_group(monkeypatch, rank=3, size=4)
    assert set_random_seed(10, diff_rank_seed=True) == 13


def test_ranks_may_not_draw_their_own_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group of several processes a seed must be given, because each rank would draw another."""
    pretend_group(monkeypatch, rank=1, size=2)
    with pytest.raises(ConfigValueError, match=r"rank 1 of 2.*Draw one on rank 0"):
        set_random_seed()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    """A seed that NumPy cannot take is refused before any generator is touched."""
    before = random.getstate()
    with pytest.raises(ConfigValueError, match=str(seed)):
        set_random_seed(seed)
    assert random.getstate() == before


@pytest.mark.parametrize("seed", [1.5, "1", True])
def test_seed_must_be_an_integer(seed: Any) -> None:
    """A seed of another type is refused with the value."""
    with pytest.raises(ConfigTypeError, match=repr(seed)):
        set_random_seed(seed)


@pytest.mark.usefixtures("determinism_as_before")
def test_deterministic_switches_the_autotuner_off_and_says_so() -> None:
    """Deterministic wins over the cuDNN autotuner, with a warning."""
    torch.backends.cudnn.benchmark = True
    with pytest.warns(UserWarning, match=r"autotuner.*switched off"):
        set_random_seed(0, deterministic=True)
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("determinism_as_before")
def test_deterministic_is_silent_without_autotuner() -> None:
    """No warning where nothing had to be switched off."""
    torch.backends.cudnn.benchmark = False
    set_random_seed(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()


def test_restored_generators_go_on_exactly() -> None:
    """After restoring, every generator draws what it would have drawn, also the second half of a Gaussian pair."""
    set_random_seed(1)
    draw()  # one gauss() and one randn(): each keeps its second number
    state = generator_state()
    expected = draw(), draw()
    set_random_seed(2)
    assert restore_generator_state(state) == []
    assert (draw(), draw()) == expected


def test_state_holds_only_tensors_and_json_values() -> None:
    """The state is stored without pickle: everything but tensors goes through JSON unchanged."""
    set_random_seed(4)
    draw()
    state = generator_state()
    expected = draw()

    def through_json(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.clone()
        if isinstance(value, dict):
            return {key: through_json(inner) for key, inner in value.items()}
        return json.loads(json.dumps(value))

    restore_generator_state(through_json(state))
    assert draw() == expected


def test_capturing_changes_nothing() -> None:
    """Reading the state draws nothing."""
    set_random_seed(5)
    expected = draw()
    set_random_seed(5)
    generator_state()
    assert draw() == expected


def test_a_captured_state_does_not_move() -> None:
    """The state is a copy: drawing later does not change it."""
    set_random_seed(6)
    state = generator_state()
    first = draw()
    restore_generator_state(state)
    assert draw() == first
    restore_generator_state(state)
    assert draw() == first


def test_a_foreign_state_is_refused() -> None:
    """A state without our parts is an error that says what to do."""
    with pytest.raises(CheckpointMismatchError, match=r"KeyError: 'python'.*resume without it"):
        restore_generator_state({"cuda": 1})


def test_a_damaged_state_is_refused() -> None:
    """A truncated state is an error, not another random stream."""
    state = generator_state()
    state["numpy"]["key"] = state["numpy"]["key"][:-1]
    with pytest.raises(CheckpointMismatchError):
        restore_generator_state(state)


def test_another_numpy_generator_cannot_be_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A global generator of NumPy that was replaced is named, instead of being stored wrongly."""
    monkeypatch.setattr(np.random, "get_state", lambda **_: {"bit_generator": "PCG64"})
    with pytest.raises(StateError, match="PCG64"):
        generator_state()


class TwoDevices:
    """An accelerator of two devices whose generators are one number each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states = [torch.tensor([1]), torch.tensor([2])]
        module = SimpleNamespace(
            get_rng_state=lambda index: self.states[index].clone(),
            set_rng_state=lambda state, index: self.states.__setitem__(index, state),
        )
        device = SimpleNamespace(type="gpu")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(self.states))
        monkeypatch.setattr(torch, "get_device_module", lambda _: module)


def test_every_device_of_the_accelerator_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device gets its own state back."""
    devices = TwoDevices(monkeypatch)
    state = generator_state()
    assert list(state["accelerator"]) == ["gpu:0", "gpu:1"]
    devices.states = [torch.tensor([0]), torch.tensor([0])]
    assert restore_generator_state(state) == []
    assert [int(value) for value in devices.states] == [1, 2]


def test_devices_that_are_not_shared_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state from another machine is restored as far as it goes, and the rest is named."""
    TwoDevices(monkeypatch)
    state = generator_state()
    state["accelerator"]["gpu:7"] = state["accelerator"].pop("gpu:1")
    assert restore_generator_state(state) == ["gpu:7", "gpu:1"]
