"""Seeds and the state of random number generators."""

from __future__ import annotations

import json
import os
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
    """Restore the generators after the test."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.fixture
def determinism_as_before() -> Iterator[None]:
    """Restore the determinism settings after the test."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    variable = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if variable is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = variable
    cudnn.benchmark, cudnn.deterministic = before[:2]
    torch.use_deterministic_algorithms(before[2])


def draw() -> tuple[Any, ...]:
    """Draw from every generator."""
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()


def pretend_group(monkeypatch: pytest.MonkeyPatch, *, rank: int, size: int) -> None:
    """Make torch.distributed report an initialized process group."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: size)


def test_the_same_seed_gives_the_same_numbers() -> None:
    """Two runs with the same seed draw the same numbers from Python, NumPy and torch."""
    assert set_random_seed(7) == 7
    first = draw()
    set_random_seed(7)
    assert draw() == first


def test_each_generator_is_seeded_directly() -> None:
    """Each library is seeded with the given seed itself."""
    set_random_seed(3)
    expected = random.Random(3).random(), np.random.RandomState(3).rand(), torch.Generator().manual_seed(3)
    assert random.random() == expected[0]
    assert np.random.rand() == expected[1]
    assert torch.equal(torch.rand(2), torch.rand(2, generator=expected[2]))


def test_a_random_seed_is_returned_and_reusable() -> None:
    """Without a seed, a random one is returned, and it reproduces the run."""
    seed = set_random_seed()
    first = draw()
    set_random_seed(seed)
    assert draw() == first


def test_a_random_seed_does_not_depend_on_the_generators() -> None:
    """A random seed does not depend on the state of Python's generator."""
    random.seed(0)
    first = set_random_seed()
    random.seed(0)
    assert set_random_seed() != first


def test_the_rank_is_added_with_diff_rank_seed() -> None:
    """With ``diff_rank_seed=True``, the rank is added to the seed."""
    assert set_random_seed(10, diff_rank_seed=True, rank=5) == 15
    assert set_random_seed(10, rank=5) == 10


def test_the_default_rank_comes_from_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default rank is that of the process group, or 0 without one."""
    assert set_random_seed(10, diff_rank_seed=True) == 10
    pretend_group(monkeypatch, rank=3, size=4)
    assert set_random_seed(10, diff_rank_seed=True) == 13


def test_several_ranks_require_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With several processes, a seed is required, because each rank would generate a different one."""
    pretend_group(monkeypatch, rank=1, size=2)
    with pytest.raises(ConfigValueError, match=r"rank 1 of 2.*Draw a seed on rank 0"):
        set_random_seed()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_rejected(seed: int) -> None:
    """A seed outside NumPy's range is rejected before any generator is seeded."""
    before = random.getstate()
    with pytest.raises(ConfigValueError, match=str(seed)):
        set_random_seed(seed)
    assert random.getstate() == before


@pytest.mark.parametrize("seed", [1.5, "1", True])
def test_the_seed_must_be_an_integer(seed: Any) -> None:
    """A seed that is not an integer raises an error that shows the value."""
    with pytest.raises(ConfigTypeError, match=repr(seed)):
        set_random_seed(seed)


@pytest.mark.usefixtures("determinism_as_before")
def test_deterministic_disables_the_autotuner_with_a_warning() -> None:
    """``deterministic=True`` disables the cuDNN autotuner and warns."""
    torch.backends.cudnn.benchmark = True
    with pytest.warns(UserWarning, match=r"autotuner.*disabled"):
        set_random_seed(0, deterministic=True)
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("determinism_as_before")
def test_deterministic_does_not_warn_without_the_autotuner() -> None:
    """``deterministic=True`` does not warn if the autotuner is already disabled."""
    torch.backends.cudnn.benchmark = False
    set_random_seed(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("determinism_as_before")
@pytest.mark.parametrize(("given", "expected"), [(None, ":4096:8"), (":16:8", ":16:8"), (":4096:8", ":4096:8")])
def test_deterministic_makes_cublas_deterministic(given: str | None, expected: str) -> None:
    """``deterministic=True`` sets ``CUBLAS_WORKSPACE_CONFIG`` unless it already makes cuBLAS deterministic."""
    if given is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = given
    set_random_seed(0, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected


@pytest.mark.usefixtures("determinism_as_before")
def test_a_setting_with_which_cublas_is_not_deterministic_is_replaced() -> None:
    """Another value of ``CUBLAS_WORKSPACE_CONFIG`` would fail in a matrix multiplication; it is replaced with a warning."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:2"
    with pytest.warns(UserWarning, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:2 is replaced by :4096:8"):
        set_random_seed(0, deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.usefixtures("determinism_as_before")
def test_deterministic_warns_if_cuda_is_already_initialized(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuBLAS may have read the variable already, so the warning names the variable and the value to start the process with."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.warns(
        UserWarning, match=r"after CUDA was initialized.*Start the process with CUBLAS_WORKSPACE_CONFIG=:4096:8"
    ):
        set_random_seed(0, deterministic=True)


def test_restored_generators_continue_exactly() -> None:
    """Restored generators continue exactly, including a cached second normal sample."""
    set_random_seed(1)
    draw()  # one gauss() and one randn(), which each cache a second sample
    state = generator_state()
    expected = draw(), draw()
    set_random_seed(2)
    assert restore_generator_state(state) == []
    assert (draw(), draw()) == expected


def test_the_state_contains_only_tensors_and_json_values() -> None:
    """Apart from tensors, the state consists of JSON values, so it can be stored without pickle."""
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


def test_reading_the_state_has_no_side_effects() -> None:
    """Reading the state does not advance the generators."""
    set_random_seed(5)
    expected = draw()
    set_random_seed(5)
    generator_state()
    assert draw() == expected


def test_the_state_is_a_copy() -> None:
    """The state is a copy that later draws do not change."""
    set_random_seed(6)
    state = generator_state()
    first = draw()
    restore_generator_state(state)
    assert draw() == first
    restore_generator_state(state)
    assert draw() == first


def test_an_unknown_state_is_rejected() -> None:
    """A state in an unknown format raises an error that explains how to resume."""
    with pytest.raises(CheckpointMismatchError, match=r"KeyError: 'python'.*Resume without it"):
        restore_generator_state({"cuda": 1})


def test_a_damaged_state_is_rejected() -> None:
    """A truncated state raises an error and does not start a different random stream."""
    state = generator_state()
    state["numpy"]["key"] = state["numpy"]["key"][:-1]
    with pytest.raises(CheckpointMismatchError):
        restore_generator_state(state)


def test_an_unsupported_numpy_generator_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unsupported global NumPy generator raises an error that names it."""
    monkeypatch.setattr(np.random, "get_state", lambda **_: {"bit_generator": "PCG64"})
    with pytest.raises(StateError, match="PCG64"):
        generator_state()


def philox(seed: int, offset: int) -> torch.Tensor:
    """Return the state of a CUDA generator: 8 bytes for the seed and 8 bytes for the offset."""
    return torch.tensor([seed, offset], dtype=torch.int64).view(torch.uint8)


class Devices:
    """Four fake devices with CUDA's generators, which were seeded equally."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, current: int) -> None:
        self.states = [philox(11, 0) for _ in range(4)]
        self.current = current
        module = SimpleNamespace(
            get_rng_state=lambda index: self.states[index].clone(),
            set_rng_state=lambda state, index: self.states.__setitem__(index, state),
        )
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: SimpleNamespace(type="cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(self.states))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: self.current)
        monkeypatch.setattr(torch, "get_device_module", lambda _: module)

    def offsets(self) -> list[int]:
        """Return how far each generator has advanced."""
        return [int(state.view(torch.int64)[1]) for state in self.states]


def test_a_rank_that_moves_to_another_device_keeps_its_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that saved on cuda:3 and resumes on cuda:0 continues with the numbers of cuda:3."""
    devices = Devices(monkeypatch, current=3)
    devices.states[3] = philox(11, 40)
    state = generator_state()
    assert list(state["accelerator"]) == ["cuda"]
    devices.states, devices.current = [philox(5, 0) for _ in range(4)], 0
    assert restore_generator_state(state) == []
    assert devices.offsets() == [40, 0, 0, 0]
    assert torch.equal(devices.states[1], philox(5, 0))


@pytest.mark.parametrize("current", [0, 2, 3])
def test_an_old_checkpoint_restores_the_device_that_the_rank_used(
    monkeypatch: pytest.MonkeyPatch, current: int
) -> None:
    """Of the states of all devices in a checkpoint of an earlier version, the one that has advanced is restored."""
    devices = Devices(monkeypatch, current)
    old = {f"cuda:{index}": philox(11, 40 if index == 2 else 0) for index in range(4)}
    assert restore_generator_state({**generator_state(), "accelerator": old}) == []
    assert devices.offsets() == [40 if index == current else 0 for index in range(4)]


def test_equally_advanced_generators_of_an_old_checkpoint_keep_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """If several generators in a checkpoint of an earlier version have advanced equally, the device of the same index counts."""
    devices = Devices(monkeypatch, current=1)
    old = {f"cuda:{index}": philox(20 + index, 8) for index in range(4)}
    restore_generator_state({**generator_state(), "accelerator": old})
    assert torch.equal(devices.states[1], philox(21, 8))


def test_unmatched_types_of_accelerators_are_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types of devices that exist only in the state or only on this machine are returned, and nothing is restored."""
    devices = Devices(monkeypatch, current=0)
    state = {**generator_state(), "accelerator": {"xpu": torch.tensor([1])}}
    assert restore_generator_state(state) == ["xpu", "cuda"]
    assert devices.offsets() == [0] * 4
