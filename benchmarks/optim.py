"""What optimization costs: building and stepping grouped optimizers, averages, schedules, the wrapper itself.

Run ``python benchmarks/optim.py``. Every figure is the best of several interleaved rounds, on one thread, and each
ratio is against what a person would write by hand for the same work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from stratagem.model.averaging import ExponentialMovingAverage
from stratagem.optim import BaseOptimWrapper, LinearLR, OptimWrapper, build_optim_wrapper

ROUNDS = 7


class Tensors(nn.Module):
    """A model of many small layers: half of its tensors are weights, half are biases, which do not decay."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(tensors // 2))


def best(candidates: Mapping[str, Callable[[], object]], repeat: int = 1) -> dict[str, float]:
    """Return the seconds of each candidate: the best of rounds in which all take turns, so that noise is shared."""
    times = dict.fromkeys(candidates, float("inf"))
    for _ in range(ROUNDS):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            times[name] = min(times[name], (time.perf_counter() - start) / repeat)
    return times


def show(what: str, times: Mapping[str, float], limit: float | None = None) -> None:
    """Print the times in microseconds and their ratios to the first of them."""
    reference = next(iter(times.values()))
    print(f"\n{what}" + (f" (ours at most {limit} times the first)" if limit else ""))
    for name, seconds in times.items():
        print(f"  {name:<42} {seconds * 1e6:>12.1f} us  {seconds / reference:>6.2f} x")


def give_gradients(model: nn.Module) -> None:
    """Give every parameter a gradient, as a backward would."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def by_hand(model: nn.Module) -> Optimizer:
    """Build what a careful person writes: two groups, fused."""
    decaying: list[nn.Parameter] = []
    flat: list[nn.Parameter] = []
    for parameter in model.parameters():
        (flat if parameter.ndim == 1 else decaying).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": flat, "weight_decay": 0.0}]
    return AdamW(groups, lr=1e-3, weight_decay=0.1, fused=True)


def one_group_per_tensor(model: nn.Module) -> Optimizer:
    """Build what other systems build from such rules: a group for every tensor, with the default loop."""
    groups = [{"params": [p], "weight_decay": 0.0 if p.ndim == 1 else 0.1} for p in model.parameters()]
    return AdamW(groups, lr=1e-3)


def ours(model: nn.Module) -> BaseOptimWrapper:
    """Build the same from a configuration."""
    config = {
        "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.1},
        "paramwise_cfg": {"flat_decay_mult": 0.0},
    }
    built = build_optim_wrapper(model, config)
    assert isinstance(built, BaseOptimWrapper)
    return built


def measure_groups(tensors: int) -> None:
    """Build and step an optimizer over many tensors with a rule for weight decay."""
    model = Tensors(tensors)
    built: dict[str, Callable[[], object]] = {
        "by hand, 2 groups, fused": lambda: by_hand(model),
        "ours, from paramwise_cfg": lambda: ours(model),
    }
    slow = "one group per tensor, default loop"
    times = best(built)
    start = time.perf_counter()
    grouped = one_group_per_tensor(model)
    show(f"Build AdamW over {tensors} tensors", {**times, slow: time.perf_counter() - start}, limit=3)
    give_gradients(model)
    steps = {"by hand, 2 groups, fused": by_hand(model).step, "ours, from paramwise_cfg": ours(model).optimizer.step}
    for step in (*steps.values(), grouped.step):
        step()
    times = best(steps, repeat=5)
    start = time.perf_counter()
    grouped.step()
    show(f"Step AdamW over {tensors} tensors", {**times, slow: time.perf_counter() - start}, limit=1.05)


def measure_average(tensors: int = 500) -> None:
    """Update an exponential moving average."""
    model = Tensors(tensors)
    average = ExponentialMovingAverage(model, momentum=0.01)
    average.update()
    weights = [parameter.detach() for parameter in model.parameters()]
    values = [weight.clone() for weight in weights]
    named = {name: value.clone() for name, value in model.state_dict().items()}

    def one_by_one() -> None:
        for name, weight in model.state_dict().items():
            named[name].lerp_(weight, 0.01)

    candidates: dict[str, Callable[[], object]] = {
        "torch._foreach_lerp_": lambda: torch._foreach_lerp_(values, weights, 0.01),
        "ours, ExponentialMovingAverage.update": average.update,
        "one tensor after the other, by name": one_by_one,
    }
    show(f"Average {tensors} tensors", best(candidates, repeat=20), limit=1.3)


def measure_iteration(kind: type[Optimizer]) -> None:
    """Train a perceptron of 16-32-4 by hand and through the wrapper with a schedule by iteration."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    data, target = torch.randn(32, 16), torch.randint(0, 4, (32,))
    optimizer: Any = kind(model.parameters(), lr=1e-3)  # type: ignore[call-arg]  # of every subclass
    wrapper = OptimWrapper(optimizer)

    def bare() -> None:
        loss = nn.functional.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def wrapped() -> None:
        with wrapper.optim_context(model):
            loss = nn.functional.cross_entropy(model(data), target)
        wrapper.update_params(loss)

    schedule = LinearLR(wrapper, start_factor=0.1, end=10**8, by_epoch=False)

    def scheduled() -> None:
        wrapped()
        schedule.step()

    candidates: dict[str, Callable[[], object]] = {"by hand": bare, "wrapper": wrapped, "wrapper, schedule": scheduled}
    show(f"Iteration of a 16-32-4 perceptron, {kind.__name__}", best(candidates, repeat=300))


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), best of {ROUNDS} rounds")
    by_hand(nn.Linear(1, 1))  # torch imports its compiler with the first optimizer
    for tensors in arguments.tensors:
        measure_groups(tensors)
    measure_average()
    for kind in (SGD, AdamW):
        measure_iteration(kind)


if __name__ == "__main__":
    main()
