"""The memory on the device that resuming takes. The meta device stands in for an accelerator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem.strategies import SingleDeviceStrategy
from stratagem.strategies.state.optim_state import read_optim, write_optim
from tests.support.device_memory import META, DeviceMemory, pretend_accelerator

# torch points out that copying to the meta device has no effect.
pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")

LAYERS, WIDTH = 8, 32
LARGEST = 4 * WIDTH * WIDTH


def model() -> nn.Module:
    """Return a model with equally large layers."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def strategy(folder: Path, network: nn.Module) -> SingleDeviceStrategy:
    """Return a strategy that is prepared with AdamW."""
    made = SingleDeviceStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"})
    made.prepare(network, optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.1}})
    return made


def step(made: Any) -> None:
    """Make one update."""
    made.optim_wrapper.update_params(made.model(torch.ones(2, WIDTH, device=made.world.device)).square().sum())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a run on the CPU."""
    made = strategy(tmp_path, model())
    step(made)
    made.save_checkpoint(tmp_path / "saved")
    made.close()
    return tmp_path / "saved"


def test_resuming_allocates_only_the_optimizer_state(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming AdamW allocates its two moments on the device and at most one more tensor, not the checkpoint and a clone."""
    pretend_accelerator(monkeypatch)
    made = strategy(saved.parent, model())
    parameters = list(made.model.parameters())
    assert {each.device.type for each in parameters} == {"meta"}
    with DeviceMemory(META) as memory:
        made.resume(saved)
    state = [value for slots in made.optim_wrapper.optimizer.state.values() for value in slots.values()]
    moments = sum(value.nbytes for value in state if value.device.type == "meta")
    assert moments >= 2 * sum(each.nbytes for each in parameters)
    assert memory.peak <= moments + LARGEST
    made.close()


@pytest.mark.slow
def test_resuming_again_allocates_nothing_on_the_device(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the optimizer already has state, as in a rollback, resuming copies into it instead of allocating it twice."""
    pretend_accelerator(monkeypatch)
    made = strategy(saved.parent, model())
    made.resume(saved)
    with DeviceMemory(META) as memory:
        made.resume(saved)
    assert memory.peak <= LARGEST
    made.close()


def test_a_rollback_restores_the_tensors_of_the_optimizer_in_place(saved: Path) -> None:
    """Resuming with existing optimizer state keeps its tensors and gives them the values of the checkpoint."""
    network = model()
    made = strategy(saved.parent, network)
    made.resume(saved)
    expected = {
        key: value.clone() for key, value in made.optim_wrapper.optimizer.state[next(network.parameters())].items()
    }
    step(made)
    before = dict(made.optim_wrapper.optimizer.state[next(network.parameters())])
    assert not torch.equal(before["exp_avg"], expected["exp_avg"])
    made.resume(saved)
    after = made.optim_wrapper.optimizer.state[next(network.parameters())]
    assert after["exp_avg"] is before["exp_avg"]
    for key, value in expected.items():
        assert torch.equal(after[key], value), key
    made.close()


def test_state_in_shared_memory_is_not_overwritten(tmp_path: Path) -> None:
    """State tensors that are parts of a larger tensor are replaced instead of being written to."""
    layer = nn.Linear(4, 4, bias=False)
    made = strategy(tmp_path, layer)
    layer(torch.ones(2, 4)).sum().backward()
    made.optim_wrapper.optimizer.step()
    saved_state = {
        key: {**value} if isinstance(value, dict) else value
        for key, value in read_optim(made.optim_wrapper, layer).items()
    }
    large = torch.full((2, 4, 4), 7.0)
    made.optim_wrapper.optimizer.state[layer.weight]["exp_avg"] = large[0]
    write_optim(made.optim_wrapper, saved_state, layer)
    assert torch.equal(large, torch.full((2, 4, 4), 7.0))
    made.close()


def test_state_that_is_shared_within_the_optimizer_is_not_overwritten(tmp_path: Path) -> None:
    """Two state tensors that share their memory get separate values instead of both getting that of the second."""
    layer = nn.Linear(4, 4, bias=False)
    made = strategy(tmp_path, layer)
    layer(torch.ones(2, 4)).sum().backward()
    made.optim_wrapper.optimizer.step()
    saved_state = read_optim(made.optim_wrapper, layer)
    slots = made.optim_wrapper.optimizer.state[layer.weight]
    expected = {key: value.clone() for key, value in slots.items()}
    saved_state = {**saved_state, "state": {"weight": expected}}
    made.optim_wrapper.optimizer.state[layer.weight] = {**slots, "exp_avg": slots["exp_avg_sq"]}
    write_optim(made.optim_wrapper, saved_state, layer)
    assert not torch.equal(expected["exp_avg"], expected["exp_avg_sq"])
    for key, value in made.optim_wrapper.optimizer.state[layer.weight].items():
        assert torch.equal(value, expected[key]), key
    made.close()
