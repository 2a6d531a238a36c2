"""Saving while kernels are running: every checkpoint has the values of its iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import Runner
from stratagem.checkpoint.staging import Staging
from stratagem.train import Hook, Priority
from tests.gpu.models import Classifier
from tests.gpu.runs import checkpoint, settings

# About 50 ms on a GPU of 1.5 GHz.
_CYCLES = 75_000_000
EVERY = 3


def keep_busy(device: torch.device) -> None:
    """Enqueue a kernel that takes longer than the host needs for an iteration."""
    if device.type == "cuda":
        torch.cuda._sleep(_CYCLES)


class Recorder(Hook):
    """Keeps the GPU busy, and clones the weights and moments after the iterations whose state is saved."""

    priority = Priority.HIGHEST

    def __init__(self) -> None:
        self.found: dict[int, dict[str, Tensor]] = {}

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        keep_busy(run.world.device)

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done = run.iter + 1
        if done % EVERY == 0:
            model = run.strategy.unwrap_model()
            state = run.optim_wrapper.optimizer.state
            self.found[done] = {name: value.detach().clone() for name, value in model.named_parameters()}
            self.found[done] |= {
                f"{name}/{key}": state[parameter][key].clone()
                for name, parameter in model.named_parameters()
                for key in ("exp_avg", "exp_avg_sq")
            }


@pytest.mark.parametrize("asynchronous", [False, True], ids=["foreground", "background"])
def test_a_checkpoint_has_the_values_of_its_iteration(asynchronous: bool, device: torch.device, tmp_path: Path) -> None:
    """Weights and moments in each of four checkpoints equal clones that were made on the GPU's stream at that iteration."""
    model = Classifier(nn.Sequential(nn.Linear(32, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.Linear(1024, 5)))
    recorder = Recorder()
    hooks = {"checkpoint": {"by_epoch": False, "interval": EVERY, "async_save": asynchronous}}
    runner = Runner(
        **settings(tmp_path, model=model, iterations=4 * EVERY, default_hooks=hooks, custom_hooks=[recorder])
    )
    runner.train()
    names = [name for name, _ in runner.strategy.unwrap_model().named_parameters()]
    assert all(value.device == device for value in recorder.found[EVERY].values())
    runner.close()
    assert sorted(recorder.found) == [EVERY, 2 * EVERY, 3 * EVERY, 4 * EVERY]
    for done, expected in recorder.found.items():
        tree = checkpoint(tmp_path / f"iter_{done}")
        for name in names:
            assert torch.equal(tree["state_dict"][name], expected[name].cpu()), (done, name)
        moments = sorted(
            (value.cpu() for key, value in expected.items() if "/" in key), key=lambda value: (value.shape, value.sum())
        )
        saved = sorted(
            (slots[key] for slots in tree["optimizer"]["state"].values() for key in ("exp_avg", "exp_avg_sq")),
            key=lambda value: (value.shape, value.sum()),
        )
        assert len(saved) == len(moments)
        assert all(torch.equal(one, other) for one, other in zip(saved, moments, strict=True)), done


def test_later_kernels_do_not_change_the_copy(device: torch.device) -> None:
    """The copy in host memory has the values that kernels enqueued before it compute, and none of those enqueued later."""
    tensors = [torch.full((1000, 100), float(index), device=device) for index in range(5)]
    staging = Staging()
    for round_number in range(3):
        keep_busy(device)
        for tensor in tensors:
            tensor.add_(1)
        copies = staging.copy(tensors)
        for tensor in tensors:
            tensor.mul_(-1)
        for index, copy in enumerate(copies):
            assert copy.device.type == "cpu"
            expected = (float(index) + 1) if round_number == 0 else tensors[index].neg().flatten()[0].item()
            assert torch.equal(copy, torch.full((1000, 100), expected))


def test_the_copy_is_pinned(cuda: torch.device) -> None:
    """The copies of GPU tensors are in pinned memory, so that they are made at the full speed of the bus."""
    copies = Staging().copy([torch.ones(1000, device=cuda), torch.ones(10, dtype=torch.bfloat16, device=cuda)])
    assert all(copy.is_pinned() for copy in copies)
