"""Plans are close to the memory that training allocates on a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

import stratagem
from stratagem.strategies import SingleDeviceStrategy
from tests.gpu.runs import ADAMW
from tests.gpu.test_gpu_memory import SLACK, batches, large_model, size_of, start_measuring


def test_the_planned_peak_is_that_of_the_allocator(cuda: torch.device, tmp_path: Path) -> None:
    """The peak of a step differs from ``torch.cuda.max_memory_allocated`` by less than 0.3 times the parameters."""
    model = large_model(cuda)
    [batch] = batches(model, 1)
    plan = stratagem.plan(model, optim_wrapper={"optimizer": ADAMW}, batch=batch, strategies=["single"], worlds=[1])
    planned = plan.steps[0].memory.peak
    assert planned is not None
    strategy = SingleDeviceStrategy(work_dir=tmp_path)
    try:
        strategy.prepare(model, optim_wrapper={"optimizer": ADAMW}, dispatch_kwargs={"max_iters": 10})
        for _ in range(3):
            strategy.model.train_step(batch, optim_wrapper=strategy.optim_wrapper)  # type: ignore[operator, union-attr]
        start_measuring(cuda)
        strategy.model.train_step(batch, optim_wrapper=strategy.optim_wrapper)  # type: ignore[operator, union-attr]
        torch.cuda.synchronize()
        assert abs(torch.cuda.max_memory_allocated(cuda) - planned) < SLACK * size_of(model)
    finally:
        strategy.close()
