"""A hook and a sampler that inject a bug into a run. They only use what a configuration and user code can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final, final
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import dropout
from torch.nn.parallel import DistributedDataParallel

from stratagem.data import PositionedSampler, epoch_order
from stratagem.optim.gradients import global_norm
from stratagem.tensors.dtensor import to_local
from stratagem.train import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.averaging import EMAHook

__all__ = ["AddDropout", "RankOrder", "SeededBug"]


@final
class RankOrder(PositionedSampler):
    """A sampler that shuffles with a different seed on each rank, so that ranks share samples and omit others."""

    def __init__(self, dataset: Any, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._length = len(dataset)
        self._seed = seed + self.rank

    @property
    def samples(self) -> int:
        """The number of samples per epoch."""
        return self._length

    def order(self, epoch: int) -> list[int]:
        """Return an order that depends on the rank, which is the bug."""
        return epoch_order(self._length, seed=self._seed, epoch=epoch, shuffle=True)


@final
class AddDropout(Hook):
    """Add dropout to the inputs of the last module with parameters, so that the training draws random numbers."""

    def before_train(self, run: Any) -> None:
        modules = [each for each in run.strategy.unwrap_model().modules() if [*each.parameters(recurse=False)]]
        handle = modules[-1].register_forward_pre_hook(lambda module, inputs: (dropout(inputs[0], 0.2), *inputs[1:]))
        run.at_close.append(handle.remove)


@final
class SeededBug(Hook):
    """Inject a bug into this run by replacing methods of its objects; they are restored when the run is closed.

    Args:
        bug: a key of ``_INJECTIONS``.
        relative: the size of the bug ``relative_error``.
    """

    priority = Priority.VERY_HIGH

    def __init__(self, bug: str, relative: float = 0.0) -> None:
        self._bug = bug
        self._relative = relative
        self._stack = ExitStack()
        self._resumes = False
        self._steps = 0

    def before_run(self, run: Any) -> None:
        run.at_close.append(self._stack.close)
        inject = _INJECTIONS.get(self._bug)
        if inject is not None and run.world_size > 1:
            self._stack.enter_context(inject(run))
        if self._bug == "relative_error":
            self._stack.enter_context(_relative_error(run, self._relative))

    def before_train(self, run: Any) -> None:
        self._steps = run.optim_wrapper.num_steps_applied
        if self._bug == "wrong_generator" and run.iter > 0:
            torch.manual_seed(1_000_003 + run.rank)
        if self._bug == "late_average" and run.world_size > 1:
            self._stack.enter_context(_late_average(run))

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        if self._bug == "zero_rate":
            for group in run.optim_wrapper.param_groups:
                group["lr"] = 0.0

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._bug != "schedule_twice" or run.world_size == 1:
            return
        steps = run.optim_wrapper.num_steps_applied
        for scheduler in run.param_schedulers if steps != self._steps else ():
            scheduler.step()
        self._steps = steps


@contextmanager
def _no_reduction(run: Any) -> Iterator[None]:
    """Never average the gradients over the ranks."""
    if not isinstance(run.model, DistributedDataParallel):

        def keep(output: Tensor, input: Tensor, **options: Any) -> None:
            output.copy_(input.chunk(run.world_size)[run.rank])

        with mock.patch.object(dist, "reduce_scatter_single", keep):
            yield
        return
    wrapper = run.optim_wrapper
    policy = wrapper.gradient_policy
    wrapper.gradient_policy = replace(
        policy, sync_context=lambda model, sync: run.model.no_sync(), always_set_grad_sync=True, complete=None
    )
    yield


@contextmanager
def _scaled_by_world(run: Any) -> Iterator[None]:
    """Multiply the averaged gradients by the number of ranks, as if they were still to be averaged."""
    policy = run.optim_wrapper.gradient_policy

    def complete() -> None:
        if policy.complete is not None:
            policy.complete()
        for parameter in run.strategy.unwrap_model().parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(run.world_size)

    run.optim_wrapper.gradient_policy = replace(policy, complete=complete)
    yield


@contextmanager
def _norm_twice(run: Any) -> Iterator[None]:
    """Count each gradient twice in the norm that clips the gradients."""
    wrapper = run.optim_wrapper
    compute = wrapper.compute_grad_norm
    with mock.patch.object(
        wrapper, "compute_grad_norm", lambda grads, *options: compute([*grads, *grads], *options), create=True
    ):
        yield


@contextmanager
def _local_norm(run: Any) -> Iterator[None]:
    """Clip by the norm of the gradients that this rank holds: its shards, or every n-th gradient."""

    def compute(grads: list[Tensor], factor: Tensor | None = None) -> Tensor:
        local = [to_local(each) for each in grads]
        if isinstance(run.model, DistributedDataParallel):
            local = local[run.rank :: run.world_size]
        run.optim_wrapper.grad_norm = norm = global_norm([each for each in local if each.numel()])
        return norm

    with mock.patch.object(run.optim_wrapper, "compute_grad_norm", compute, create=True):
        yield


@contextmanager
def _last_dropped(run: Any) -> Iterator[None]:
    """Ignore the gradients of the last micro-batch of each accumulation window."""
    wrapper = run.optim_wrapper
    accumulate = wrapper.accumulate

    def dropping(loss: Tensor, weight: Any = None) -> None:
        accumulate(loss * 0 if wrapper.should_sync() else loss, weight)

    with mock.patch.object(wrapper, "accumulate", dropping, create=True):
        yield


@contextmanager
def _frozen_layer(run: Any) -> Iterator[None]:
    """Freeze the first module with parameters."""
    model = run.strategy.unwrap_model()
    first = next(module for module in model.modules() if [*module.parameters(recurse=False)])
    first.requires_grad_(False)
    yield


@contextmanager
def _late_average(run: Any) -> Iterator[None]:
    """Average the weights before the last step instead of those after it."""
    hook = next(each for each in run.events.hooks if isinstance(each, EMAHook))
    average = hook.average
    parameters = [to_local(each) for each in run.strategy.unwrap_model().parameters()]
    update: Callable[[], None] = average.update
    before = [each.detach().clone() for each in parameters]

    def late() -> None:
        now = [each.detach().clone() for each in parameters]
        _write(parameters, before)
        update()
        _write(parameters, now)
        _write(before, now)

    with mock.patch.object(average, "update", late, create=True):
        yield


@contextmanager
def _relative_error(run: Any, relative: float) -> Iterator[None]:
    """Multiply the gradient of the first parameter by ``1 + relative`` before the update, on several ranks only."""
    if run.world_size == 1:
        yield
        return
    policy = run.optim_wrapper.gradient_policy
    first = next(run.strategy.unwrap_model().parameters())

    def complete() -> None:
        if policy.complete is not None:
            policy.complete()
        first.grad.mul_(1 + relative)

    run.optim_wrapper.gradient_policy = replace(policy, complete=complete)
    yield


@torch.no_grad()
def _write(targets: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


_INJECTIONS: Final[dict[str, Callable[[Any], Any]]] = {
    "no_reduction": _no_reduction,
    "scaled_by_world": _scaled_by_world,
    "norm_twice": _norm_twice,
    "local_norm": _local_norm,
    "last_dropped": _last_dropped,
    "frozen_layer": _frozen_layer,
}
