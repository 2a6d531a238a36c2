"""Count the floating-point operations of training, for the rate and the utilization of the devices in the log."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final, final

from torch import Tensor
from torch.utils._pytree import tree_leaves

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.optim import BaseOptimWrapper, OptimWrapperDict
from stratagem.parallel.compiled_parts import has_compiled_parts
from stratagem.tensors.flops import FlopCounter
from stratagem.train.hook import Hook
from stratagem.train.run.context import Run
from stratagem.train.run.step_flops import FlopsMeter, Peak, peak_of_device
from stratagem.utils.overridden import overridden

__all__ = ["FlopsHook"]

# Iterations with more different shapes are not counted, because counting makes an iteration slow.
_MAX_SHAPES: Final = 64


@final
class FlopsHook(Hook):
    """Log the floating-point operations per second (``tflops/s``) and the part of the devices' peak rate that they use (``mfu``).

    The first iteration with each shape of a batch is counted while it trains; its results are not changed. Other iterations with
    this shape have the same operations. ``mfu``, model FLOPs utilization, contains the forward and backward pass; ``hfu`` also
    contains forward passes that activation checkpointing repeats, and the optimizer. Both are only logged if the dense peak rate
    of the device for the dtype of the operations is known. Operations are summed over the ranks in the all-reduce of log lines.

    Not for models whose operations depend on other things than the shapes of the batch, such as the iteration.

    Args:
        peak_flops: the dense peak rate of each device in FLOP/s; by default, that of the data sheet for the dtype.

    Raises:
        ConfigTypeError: if ``peak_flops`` is not a number.
        ConfigValueError: if it is not positive.
    """

    def __init__(self, *, peak_flops: float | None = None) -> None:
        if peak_flops is not None and (isinstance(peak_flops, bool) or not isinstance(peak_flops, int | float)):
            raise ConfigTypeError(f"FlopsHook: expected peak_flops to be a number, got {peak_flops!r}.")
        if peak_flops is not None and not 0 < peak_flops < math.inf:
            raise ConfigValueError(f"FlopsHook: expected peak_flops to be positive, got {peak_flops}.")
        self._peak_flops = peak_flops
        self._meter: FlopsMeter | None = None
        self._exit = ExitStack()
        self._has_reported = False

    def before_train(self, run: Run) -> None:
        self._close(run)
        optim = run.optim_wrapper
        if isinstance(optim, OptimWrapperDict):
            raise ConfigValueError(
                f"FlopsHook does not support several optimizers ({', '.join(optim)}), because iterations may update different "
                "ones and have different operations. Remove the hook."
            )
        if has_compiled_parts(run.strategy.unwrap_model()):
            run.logger.info(
                "FlopsHook: the operations are unknown, because the model is compiled, and counting would run it without the "
                "compiler. tflops/s and mfu are not logged. To know them, train some iterations without compile."
            )
            return
        peak = self._peak(run)
        self._meter = FlopsMeter(peak, lambda: optim.num_steps_applied)
        run.flops_meter = self._meter
        model: Any = run.model
        self._exit.enter_context(
            overridden(model, "train_step", self._counting(model.train_step, run, self._meter, peak))
        )
        run.at_close.append(lambda: self._close(run))

    def after_train(self, run: Run) -> None:
        self._close(run)

    def _close(self, run: Run) -> None:
        self._exit.close()
        if self._meter is not None and run.flops_meter is self._meter:
            run.flops_meter = None
        self._meter = None

    def _peak(self, run: Run) -> Peak:
        given = self._peak_flops
        return peak_of_device(run.world.device) if given is None else lambda _: given

    def _counting(self, train_step: Callable[..., Any], run: Run, meter: FlopsMeter, peak: Peak) -> Callable[..., Any]:
        """Return a ``train_step`` that adds the operations of each iteration to the meter, and counts unknown ones."""

        def step(data: Any, optim_wrapper: BaseOptimWrapper) -> Any:
            key = _shapes(data)
            if meter.has_update and meter.work_of(key):
                return train_step(data, optim_wrapper=optim_wrapper)
            if meter.num_known >= _MAX_SHAPES:
                meter.skip()
                return train_step(data, optim_wrapper=optim_wrapper)
            outputs, counter, has_update = _count(train_step, data, optim_wrapper)
            meter.learn(key, counter.flops, has_update=has_update)
            meter.work_of(key)
            self._report(run, counter, peak, key)
            return outputs

        return step

    def _report(self, run: Run, counter: FlopCounter, peak: Peak, shapes: tuple[Any, ...]) -> None:
        if self._has_reported or run.rank != 0:
            return
        self._has_reported = True
        repeated = (
            ""
            if not counter.recomputation
            else f", and {counter.recomputation:.4g} of repeated forward passes (hfu only)"
        )
        rates = sorted({f"{kind.dtype}: {peak(kind) / 1e12:.4g} TFLOP/s" for kind in counter.flops if peak(kind) > 0})
        unknown = not counter.flops or any(math.isnan(peak(kind)) for kind in counter.flops)
        run.logger.info(
            "FlopsHook: an iteration of rank 0 with %s has %.4g floating-point operations%s. %s",
            " ".join(str(list(shape)) for shape in shapes) or "this batch", counter.model, repeated,
            f"The peak rate of {run.world.device} is unknown, so mfu is not logged; it can be set with peak_flops."
            if unknown else f"Peak rate of {run.world.device} for {', '.join(rates)}.",
        )  # fmt: skip


def _count(train_step: Callable[..., Any], data: Any, optim_wrapper: BaseOptimWrapper) -> tuple[Any, FlopCounter, bool]:
    """Train on a batch; return the outputs, the counted operations, and whether the optimizer was updated."""
    counter = FlopCounter()
    update, before = optim_wrapper.step, optim_wrapper.num_steps_applied

    def counted(**kwargs: Any) -> None:
        with counter.updating():
            update(**kwargs)

    with overridden(optim_wrapper, "step", counted), counter:
        outputs = train_step(data, optim_wrapper=optim_wrapper)
    return outputs, counter, optim_wrapper.num_steps_applied > before


def _shapes(batch: Any) -> tuple[Any, ...]:
    """Return the shapes of the tensors in a batch."""
    return tuple(each.shape for each in tree_leaves(batch) if isinstance(each, Tensor))
