"""The GPU memory of training and resuming, in units of the bytes of all parameters."""

from __future__ import annotations

import copy
import gc
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem import Runner
from stratagem.strategies import SingleDeviceStrategy
from stratagem.train import Hook, Priority
from stratagem.train.tools import find_batch_size
from tests.gpu.models import CLASSES, Classifier, Samples
from tests.gpu.runs import ADAMW, settings
from tests.gpu.test_gpu_equality import by_hand

# Temporary tensors, workspaces of cuBLAS, and the activations of a batch of four samples.
SLACK = 0.3


def large_model(device: torch.device) -> Classifier:
    """Return a model with 16 equal layers: 268 MB on a GPU, and 1 MB on the CPU."""
    width = 128 if device.type == "cpu" else 2048
    return Classifier(nn.Sequential(*(nn.Linear(width, width) for _ in range(16)), nn.Linear(width, CLASSES)))


def size_of(model: nn.Module) -> int:
    """Return the bytes of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def batches(model: Classifier, count: int = 3) -> list[Any]:
    """Return batches of four samples."""
    width = model.layers[0].in_features  # type: ignore[index, union-attr]
    return Samples((int(width),), 4 * count).batches(4)


def start_measuring(device: torch.device) -> None:
    """Reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Return the peak in bytes; 0 on the CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def allocated(device: torch.device) -> int:
    """Return the current memory of tensors in bytes; 0 on the CPU."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def prepared(model: nn.Module, folder: Path, **optim: Any) -> SingleDeviceStrategy:
    """Return a strategy with AdamW."""
    strategy = SingleDeviceStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"})
    strategy.prepare(model, optim_wrapper={"optimizer": ADAMW, **optim})
    return strategy


@pytest.mark.parametrize("clip", [None, {"max_norm": 1.0}], ids=["plain", "clipping"])
def test_training_takes_four_models(clip: dict[str, Any] | None, device: torch.device, tmp_path: Path) -> None:
    """The peak of training with AdamW is weights, gradients and two moments, as with a hand-written loop."""
    model = large_model(device)
    reference = copy.deepcopy(model)
    before = allocated(device)
    start_measuring(device)
    strategy = prepared(model, tmp_path, clip_grad=clip)
    for batch in batches(model):
        strategy.model.train_step(batch, strategy.optim_wrapper)
    found = (peak(device) - before) / size_of(model)
    strategy.close()
    del strategy, model
    start_measuring(device)
    before = allocated(device)
    by_hand(reference, {**ADAMW, "fused": True}, batches(reference), device)
    expected = (peak(device) - before) / size_of(reference)
    assert found <= 4 + SLACK
    assert found <= expected + 0.1


def test_resuming_takes_less_than_training(device: torch.device, tmp_path: Path) -> None:
    """While a checkpoint is read, the GPU holds the weights, the two moments and at most a few tensors more."""
    model = large_model(device)
    size = size_of(model)
    first = prepared(model, tmp_path / "first")
    for batch in batches(model):
        first.model.train_step(batch, first.optim_wrapper)
    first.save_checkpoint(tmp_path / "at", extra_ckpt={"meta": {"iter": 3}})
    expected = {name: value.cpu() for name, value in first.unwrap_model().state_dict().items()}
    first.close()
    del first, model
    before = allocated(device)
    start_measuring(device)
    second = prepared(large_model(device), tmp_path / "second")
    second.resume(tmp_path / "at")
    assert (peak(device) - before) / size <= 3 + SLACK
    restored = second.unwrap_model()
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in restored.state_dict().items())
    second.model.train_step(batches(restored)[0], second.optim_wrapper)  # type: ignore[arg-type]
    assert (peak(device) - before) / size <= 4 + SLACK
    second.close()


def test_a_closed_run_releases_its_memory(device: torch.device, tmp_path: Path) -> None:
    """After a run, its tensors are released, so that another one can be started in the same process."""
    before = allocated(device)
    model = large_model(device)
    size = size_of(model)
    strategy = prepared(model, tmp_path)
    for batch in batches(model):
        strategy.model.train_step(batch, strategy.optim_wrapper)
    strategy.close()
    del strategy, model
    assert (allocated(device) - before) / size <= SLACK


class PeakAtLine(Hook):
    """Records the peak memory in MiB right after a log line."""

    priority = Priority.LOWEST

    def __init__(self) -> None:
        self.found: list[int] = []

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.found.append(peak(run.world.device) // 2**20)


def test_the_log_contains_the_peak_memory(device: torch.device, tmp_path: Path) -> None:
    """On a GPU, every log line contains the peak memory in MiB; on the CPU, there is no such number."""
    model = large_model(device)
    data = {"dataset": Samples((model.layers[0].in_features,), 8), "batch_size": 4}  # type: ignore[index, union-attr]
    hook = PeakAtLine()
    arguments = settings(tmp_path, model=model, iterations=2, custom_hooks=[hook], log_level="INFO")
    loader = {**arguments["train_dataloader"], **data}
    hooks = {"logger": {"interval": 1}, "checkpoint": None}
    runner = Runner(**{**arguments, "train_dataloader": loader, "default_hooks": hooks})
    runner.train()
    runner.close()
    lines = [line for path in tmp_path.rglob("*.log") for line in path.read_text().splitlines() if "(train)" in line]
    numbers = [int(number) for line in lines for number in re.findall(r"memory: (\d+)", line)]
    assert len(lines) == 2
    assert numbers == (hook.found if device.type == "cuda" else [])


def test_the_search_for_a_batch_size_stops_at_the_memory_limit(cuda: torch.device, tmp_path: Path) -> None:
    """With 1 GiB of GPU memory, the search finds a size that fits, reports that memory ended it, and training continues."""
    total = torch.cuda.get_device_properties(cuda).total_memory
    features = 2**20
    arguments = settings(tmp_path, model=Classifier(nn.Linear(features, CLASSES)))
    data = {"dataset": Wide(features), "batch_size": 2, "collate_fn": {"type": "default_collate"}}
    runner = Runner(**{**arguments, "train_dataloader": data})
    loop = runner.prepare()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(2**30 / total, cuda)
        found = find_batch_size(runner.strategy, loop.dataloader)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, cuda)
    # A sample has 4 MiB.
    assert found.out_of_memory
    assert found.largest is not None
    assert 64 <= found.largest < 256
    runner.train()
    runner.close()


class Wide(torch.utils.data.Dataset[Any]):
    """512 equal samples that take no memory on the host until they are collated."""

    def __init__(self, features: int) -> None:
        self.sample = torch.zeros(features)

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> Any:
        return self.sample, index % CLASSES
