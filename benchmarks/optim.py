"""Measure the cost of optimization: building and stepping optimizers, averaging, schedules, and the optimizer wrapper.

Run ``python benchmarks/optim.py``. Every figure is the best of several interleaved rounds on one thread. Ratios are relative
to hand-written code for the same work. For clipping and for many parameter groups, the CPU times of short blocks are compared
within each round, and the median of the ratios has a 95 % interval.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from stratagem.model.averaging import ExponentialMovingAverage
from stratagem.optim import BaseOptimWrapper, LinearLR, OptimWrapper, build_optim_wrapper

ROUNDS = 7
PAIRED_ROUNDS = 200


class Tensors(nn.Module):
    """A model with many small layers. Half of its tensors are weights; the other half are biases without weight decay."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(tensors // 2))


def best(candidates: Mapping[str, Callable[[], object]], repeat: int = 1) -> dict[str, float]:
    """Return the best time of each candidate in seconds. Candidates take turns, so that noise affects all of them."""
    times = dict.fromkeys(candidates, float("inf"))
    for _ in range(ROUNDS):
        for name, run in candidates.items():
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            times[name] = min(times[name], (time.perf_counter() - start) / repeat)
    return times


def show(what: str, times: Mapping[str, float], limit: float | None = None) -> None:
    """Print the times in microseconds and their ratios to the first one."""
    reference = next(iter(times.values()))
    print(f"\n{what}" + (f" (limit for Stratagem: {limit} times the first row)" if limit else ""))
    for name, seconds in times.items():
        print(f"  {name:<42} {seconds * 1e6:>12.1f} us  {seconds / reference:>6.2f} x")


def show_paired(what: str, candidates: Mapping[str, Callable[[], object]], limit: str = "", repeat: int = 3) -> None:
    """Print the median CPU time of each candidate, and its ratio to the first one in the same round with a 95 % interval."""
    rounds: list[dict[str, float]] = []
    for run in candidates.values():
        run()
    for _ in range(PAIRED_ROUNDS):
        times = {}
        for name in random.sample(list(candidates), len(candidates)):
            start = time.process_time()
            for _ in range(repeat):
                candidates[name]()
            times[name] = (time.process_time() - start) / repeat
        rounds.append(times)
    print(f"\n{what}" + (f" ({limit})" if limit else ""))
    reference = next(iter(candidates))
    margin = round(0.98 * len(rounds) ** 0.5)  # the ranks of a distribution-free interval for the median
    for name in candidates:
        ratios = sorted(times[name] / times[reference] for times in rounds)
        middle, half = statistics.median(ratios), len(ratios) // 2
        microseconds = statistics.median(times[name] for times in rounds) * 1e6
        interval = f"{ratios[half - margin]:.2f}..{ratios[half + margin]:.2f}"
        print(f"  {name:<42} {microseconds:>12.1f} us  {middle:>6.2f} x ({interval})")


def set_gradients(model: nn.Module) -> None:
    """Set the gradient of every parameter, as a backward pass would."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def hand_written(model: nn.Module) -> Optimizer:
    """Build a carefully hand-written optimizer: two groups, fused."""
    decaying: list[nn.Parameter] = []
    flat: list[nn.Parameter] = []
    for parameter in model.parameters():
        (flat if parameter.ndim == 1 else decaying).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decaying}, {"params": flat, "weight_decay": 0.0}]
    return AdamW(groups, lr=1e-3, weight_decay=0.1, fused=True)


def one_group_per_tensor(model: nn.Module) -> Optimizer:
    """Build the optimizer that other libraries build from such rules: one group per tensor, default implementation."""
    groups = [{"params": [p], "weight_decay": 0.0 if p.ndim == 1 else 0.1} for p in model.parameters()]
    return AdamW(groups, lr=1e-3)


def from_config(model: nn.Module) -> BaseOptimWrapper:
    """Build an equivalent optimizer from a configuration."""
    config = {
        "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.1},
        "paramwise_cfg": {"flat_decay_mult": 0.0},
    }
    built = build_optim_wrapper(model, config)
    assert isinstance(built, BaseOptimWrapper)
    return built


def measure_groups(tensors: int) -> None:
    """Build and step an optimizer with many tensors and a rule for weight decay."""
    model = Tensors(tensors)
    built: dict[str, Callable[[], object]] = {
        "hand-written, 2 groups, fused": lambda: hand_written(model),
        "Stratagem, from paramwise_cfg": lambda: from_config(model),
    }
    slow = "one group per tensor, default loop"
    times = best(built)
    start = time.perf_counter()
    grouped = one_group_per_tensor(model)
    show(f"Build AdamW over {tensors} tensors", {**times, slow: time.perf_counter() - start}, limit=3)
    set_gradients(model)
    steps = {
        "hand-written, 2 groups, fused": hand_written(model).step,
        "Stratagem, from paramwise_cfg": from_config(model).optimizer.step,
    }
    for step in (*steps.values(), grouped.step):
        step()
    times = best(steps, repeat=5)
    start = time.perf_counter()
    grouped.step()
    show(f"Step AdamW over {tensors} tensors", {**times, slow: time.perf_counter() - start}, limit=1.05)


def measure_clipping(tensors: int = 500) -> None:
    """Clip the gradients of many tensors by their norm, including the collection of the gradients from the parameters."""
    model = Tensors(tensors)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    wrapper = OptimWrapper(SGD(parameters, lr=0.1), clip_grad={"max_norm": 1.0})
    clipping = wrapper.clipping
    assert clipping is not None

    def floor() -> None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0)), 2.0)
        torch._foreach_mul_(gradients, torch.clamp(1.0 / (norm + 1e-6), max=1.0))

    def ours() -> None:
        collected = wrapper.collect_grads(1)
        clipping.apply(collected, wrapper.compute_grad_norm(collected))

    candidates: dict[str, Callable[[], object]] = {
        "_foreach_norm, stack, norm, _foreach_mul_": floor,
        "Stratagem, collect_grads and clipping": ours,
        "torch.nn.utils.clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True),
    }
    show_paired(f"Clip {tensors} tensors", candidates, "limit for Stratagem: 1.15 times the first row")


def measure_many_groups(groups: int = 500) -> None:
    """Step AdamW with one parameter group per tensor, with equal and with different learning rates."""
    candidates: dict[str, Callable[[], object]] = {}
    for name, slope in (("equal", 0.0), ("different", 1e-6)):
        parameters = list(Tensors(groups).parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        options: list[dict[str, Any]] = [{"params": [p], "lr": 1e-3 + slope * i} for i, p in enumerate(parameters)]
        optimizer = AdamW(options, fused=True)
        optimizer.step()
        prepared = OptimWrapper(optimizer).prepared
        assert prepared is not None
        candidates[f"optimizer.step, {name} learning rates"] = optimizer.step
        candidates[f"Stratagem, {name} learning rates"] = partial(prepared.apply, optimizer)
    show_paired(f"Step AdamW, {groups} parameter groups", candidates, "limit for Stratagem: 5 ms", repeat=1)


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
        "Stratagem, ExponentialMovingAverage.update": average.update,
        "one tensor at a time, by name": one_by_one,
    }
    show(f"Average {tensors} tensors", best(candidates, repeat=20), limit=1.3)


def measure_iteration(kind: type[Optimizer]) -> None:
    """Train a 16-32-4 MLP with hand-written code, with the wrapper, and with a per-iteration schedule."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    data, target = torch.randn(32, 16), torch.randint(0, 4, (32,))
    optimizer: Any = kind(model.parameters(), lr=1e-3)  # type: ignore[call-arg]  # accepted by every subclass
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

    candidates: dict[str, Callable[[], object]] = {
        "hand-written": bare,
        "wrapper": wrapped,
        "wrapper, schedule": scheduled,
    }
    show(f"Iteration of a 16-32-4 MLP, {kind.__name__}", best(candidates, repeat=300))


def main() -> None:
    """Print all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), best of {ROUNDS} rounds")
    hand_written(nn.Linear(1, 1))  # creating the first optimizer imports torch's compiler
    for tensors in arguments.tensors:
        measure_groups(tensors)
    measure_clipping()
    measure_many_groups()
    measure_average()
    for kind in (SGD, AdamW):
        measure_iteration(kind)


if __name__ == "__main__":
    main()
