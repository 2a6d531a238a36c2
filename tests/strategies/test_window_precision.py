"""Accumulation windows that start in one precision and finish in another."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from stratagem.strategies import DDPStrategy, SingleDeviceStrategy
from tests.support.ranks import Ranks

PRECISIONS = ["float32", "bfloat16", "float16", "float16 by 8"]


class Line(nn.Module):
    """A linear layer that computes in float32 even under autocast, so results only differ by rounding of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs * self.weight).sum(1)


def wrapper(parameters: Any, precision: str, counts: int = 2) -> Any:
    """Return a wrapper of SGD."""
    sgd = torch.optim.SGD(parameters, lr=0.5)
    if precision == "float32":
        return OptimWrapper(sgd, accumulative_counts=counts)
    dtype, _, scale = precision.partition(" by ")
    options = {"loss_scale": float(scale)} if scale else {}
    return AmpOptimWrapper(sgd, dtype=dtype, accumulative_counts=counts, **options)


def prepared(folder: Path, precision: str, counts: int = 2, kind: Any = SingleDeviceStrategy, **kwargs: Any) -> Any:
    """Return a prepared strategy."""
    strategy = kind(work_dir=folder, log_kwargs={"log_level": "ERROR"}, **kwargs)
    model = Line()
    optim = wrapper(model.parameters(), precision, counts)
    strategy.prepare(model, optim_wrapper=optim, dispatch_kwargs={"max_iters": 4, "cur_iter": 0})
    return strategy


def micro_batch(strategy: Any, value: float) -> None:
    """Add the gradient ``[value, 2 * value]`` of one micro-batch."""
    optim, model = strategy.optim_wrapper, strategy.model
    with optim.optim_context(model):
        loss = model(torch.tensor([[value, 2 * value]])).mean()
    optim.update_params(loss)


@pytest.mark.parametrize("after", PRECISIONS)
@pytest.mark.parametrize("before", PRECISIONS)
def test_a_window_can_finish_in_a_different_precision(tmp_path: Path, before: str, after: str):
    """Micro-batches of 1 and 3 in a window of two give w - 0.5 * (1 + 3) / 2 * [1, 2] = [0, 0] for any loss scales."""
    first = prepared(tmp_path, before)
    micro_batch(first, 1.0)
    first.save_checkpoint(tmp_path / "inside")
    first.close()
    second = prepared(tmp_path, after)
    second.resume(tmp_path / "inside")
    micro_batch(second, 3.0)
    assert second.unwrap_model().weight.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    second.close()


@pytest.mark.parametrize("after", ["float32", "bfloat16"])
# A loss scale may be 1, initially or after overflows.
@pytest.mark.parametrize(("before", "too_large"), [("float16", 1e36), ("float16 by 1", 1e39)])
def test_an_overflowed_window_is_discarded_without_a_loss_scale(
    tmp_path: Path, before: str, too_large: float, after: str
):
    """After an overflow in float16, a run without a loss scale discards the window with a warning."""
    first = prepared(tmp_path, before)
    micro_batch(first, too_large)
    assert not first.unwrap_model().weight.grad.isfinite().all()
    first.save_checkpoint(tmp_path / "inside")
    first.close()
    second = prepared(tmp_path, after)
    with pytest.warns(UserWarning, match="The gradients of the last 1 micro-batches are lost"):
        second.resume(tmp_path / "inside")
    micro_batch(second, 2.0)
    assert second.unwrap_model().weight.tolist() == [0.0, 0.0]
    second.close()


def test_an_overflowed_window_is_skipped_with_a_loss_scale(tmp_path: Path):
    """After an overflow in float16, a resumed run with a scaler skips the update and halves the scale."""
    first = prepared(tmp_path, "float16")
    micro_batch(first, 1e36)
    first.save_checkpoint(tmp_path / "inside")
    first.close()
    second = prepared(tmp_path, "float16")
    second.resume(tmp_path / "inside")
    micro_batch(second, 2.0)
    assert (second.optim_wrapper.num_steps_attempted, second.optim_wrapper.num_steps_applied) == (1, 0)
    assert second.optim_wrapper.loss_scale == 2.0**15
    assert second.unwrap_model().weight.tolist() == [1.0, 2.0]
    second.close()


class Pair(nn.Module):
    """Two linear layers with separate optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Line(), Line()


@pytest.mark.parametrize("after", [("float32", "float16"), ("float16", "float16"), ("bfloat16", "float32")])
def test_each_optimizer_has_a_separate_loss_scale(tmp_path: Path, after: tuple[str, str]):
    """One optimizer starts its window in float16 and the other in float32; both finish at [0, 0] in any precision."""

    def pair(precisions: tuple[str, str]) -> Any:
        strategy = SingleDeviceStrategy(work_dir=tmp_path, log_kwargs={"log_level": "ERROR"})
        model = Pair()
        parts = {"one": model.one, "two": model.two}
        wrappers = {
            name: wrapper(part.parameters(), precision)
            for (name, part), precision in zip(parts.items(), precisions, strict=True)
        }
        strategy.prepare(model, optim_wrapper=OptimWrapperDict(**wrappers), dispatch_kwargs={"max_iters": 4})
        return strategy

    def step(strategy: Any, value: float) -> None:
        for name, optim in strategy.optim_wrapper.items():
            optim.update_params(getattr(strategy.model, name)(torch.tensor([[value, 2 * value]])).mean())

    first = pair(("float16", "float32"))
    step(first, 1.0)
    first.save_checkpoint(tmp_path / "inside")
    first.close()
    second = pair(after)
    second.resume(tmp_path / "inside")
    step(second, 3.0)
    for part in (second.model.one, second.model.two):
        assert part.weight.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    second.close()


def test_a_discarded_window_causes_a_warning(tmp_path: Path):
    """A run with accumulative_counts=1 discards two micro-batches of a window of three with a warning."""
    first = prepared(tmp_path, "float32", counts=3)
    micro_batch(first, 1.0)
    micro_batch(first, 1.0)
    first.save_checkpoint(tmp_path / "inside")
    first.close()
    second = prepared(tmp_path, "float32", counts=1)
    with pytest.warns(UserWarning, match="The gradients of the last 2 micro-batches are lost"):
        second.resume(tmp_path / "inside")
    second.close()


def test_a_complete_window_causes_no_warning(tmp_path: Path):
    """A checkpoint between two windows resumes without a warning."""
    first = prepared(tmp_path, "float32", counts=2)
    micro_batch(first, 1.0)
    micro_batch(first, 1.0)
    first.save_checkpoint(tmp_path / "between")
    first.close()
    second = prepared(tmp_path, "float32", counts=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.resume(tmp_path / "between")
    second.close()


def finished_in_float32(folder: str) -> list[float]:
    """Start a window in float16 under DDP with different inputs per rank, and finish it in float32."""
    first = prepared(Path(folder), "float16", kind=DDPStrategy, env_kwargs={"launcher": "pytorch"})
    micro_batch(first, 1.0 + first.rank)
    first.save_checkpoint(Path(folder) / "inside")
    first.close()
    second = prepared(Path(folder), "float32", kind=DDPStrategy, env_kwargs={"launcher": "pytorch"})
    second.resume(Path(folder) / "inside")
    micro_batch(second, 2.0 + second.rank)
    second.close()
    return second.unwrap_model().weight.tolist()


@pytest.mark.slow
def test_ranks_can_finish_a_float16_window_in_float32(ranks: Ranks, tmp_path: Path):
    """Inputs 1, 2 and 2, 3 have the mean 2, so both ranks finish at [1, 2] - 0.5 * 2 * [1, 2] = [0, 0]."""
    for weight in ranks.run(finished_in_float32, str(tmp_path)):
        assert weight == pytest.approx([0.0, 0.0], abs=1e-6)
