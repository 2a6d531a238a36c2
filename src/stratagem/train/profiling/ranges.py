"""Measure the parts of an iteration, and name them in the trace of torch's profiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any, Final, final

from torch.autograd.profiler import record_function

from stratagem.optim import AccumulatingOptimWrapper, BaseOptimWrapper
from stratagem.utils.overridden import overridden

__all__ = ["PREFIX", "StepRanges"]

#: The names of the ranges in the trace begin with this.
PREFIX: Final = "stratagem: "
_CLIPPING: Final = ("collect_grads", "compute_grad_norm", "scale_grads", "unscale")


@final
class StepRanges:
    """Divides the time of iterations into exclusive parts: a part that begins inside another one interrupts it.

    Attributes:
        is_active: whether times are measured; otherwise, all methods return immediately.
        seconds: the time of each part.
    """

    def __init__(self) -> None:
        self.is_active = False
        self.seconds: dict[str, float] = {}
        self._stack: list[tuple[str, Any]] = []
        self._since = 0.0

    def begin(self) -> None:
        """Begin to measure."""
        self.seconds.clear()
        self.is_active = True
        self._since = perf_counter()

    def end(self) -> None:
        """Complete all parts and stop measuring."""
        while self._stack:
            self._leave()
        self.is_active = False

    def switch(self, name: str) -> None:
        """Complete all parts, and begin another one."""
        if not self.is_active:
            return
        while self._stack:
            self._leave()
        self._enter(name)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Interrupt the current part by another one."""
        if not self.is_active:
            yield
            return
        self._enter(name)
        depth = len(self._stack)
        try:
            yield
        finally:
            while len(self._stack) >= depth:
                self._leave()

    @contextmanager
    def split(self) -> Iterator[None]:
        """End the events of the current parts in the trace, and begin them again after the context. Their times continue.

        An event of the profiler that begins or ends in the context then does not overlap with them. Viewers require that the
        events of a thread are nested, and drop others.
        """
        for _, record in reversed(self._stack):
            record.__exit__(None, None, None)
        try:
            yield
        finally:
            self._stack = [(name, _begun(name)) for name, _ in self._stack]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are a part."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.inside(name):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def observing(self, wrappers: Mapping[str, BaseOptimWrapper]) -> Iterator[None]:
        """Inside the ``with`` block, measure the parts of the step that the optimizer wrappers run."""
        with ExitStack() as stack:
            for wrapper in wrappers.values():
                for owner, name, value in self._parts(wrapper):
                    stack.enter_context(overridden(owner, name, value))
            yield

    def _parts(self, wrapper: Any) -> Iterator[tuple[Any, str, Any]]:
        # Replacing `backward` itself would disable the shortcut of `accumulate`, unless a subclass, such as that of an engine,
        # overrides it.
        is_built_in = getattr(type(wrapper), "backward", None) is AccumulatingOptimWrapper.backward
        backward = "_backward" if is_built_in else "backward"
        yield wrapper, backward, self.timed("backward", getattr(wrapper, backward))
        for name in ("step", "zero_grad"):
            yield wrapper, name, self.timed("optimizer", getattr(wrapper, name))
        for name in _CLIPPING:
            if hasattr(wrapper, name):
                yield wrapper, name, self.timed("clipping", getattr(wrapper, name))
        clipping = vars(wrapper).get("clipping")
        if clipping is not None:
            yield wrapper, "clipping", _Delegate(clipping, apply=self.timed("clipping", clipping.apply))
        policy = vars(wrapper).get("gradient_policy")
        if policy is not None and policy.complete is not None:
            complete = self.timed("gradient synchronization", policy.complete)
            yield wrapper, "gradient_policy", replace(policy, complete=complete)

    def _enter(self, name: str) -> None:
        self._account()
        self._stack.append((name, _begun(name)))

    def _leave(self) -> None:
        self._account()
        self._stack.pop()[1].__exit__(None, None, None)

    def _account(self) -> None:
        now = perf_counter()
        if self._stack:
            name = self._stack[-1][0]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


def _begun(name: str) -> Any:
    record = record_function(PREFIX + name)
    record.__enter__()
    return record


@final
class _Delegate:
    """An object with a few other attributes."""

    def __init__(self, target: Any, **attributes: Any) -> None:
        self._target = target
        vars(self).update(attributes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)
