"""Update buffers only once if activation checkpointing repeats a forward pass in the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial, wraps
from typing import Any, Final, final
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks

from stratagem.utils.torch_private import backward_pass_id

__all__ = ["BufferReplay", "Contexts", "update_buffers_once"]

# The context managers for a forward pass and for its recomputation.
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

# Larger buffers are compared with a copy once, instead of being copied in each forward pass.
_SMALL_NUMEL: Final = 1 << 16
# Set in a thread while it runs a recomputation whose buffers are replaced.
_thread = threading.local()
# Models that update_buffers_once() was called for since the last recomputation began.
_without_hooks: Final[WeakSet[nn.Module]] = WeakSet()


def update_buffers_once(model: nn.Module) -> None:
    """Make every module of a model discard the buffer changes of forward passes that run during a backward pass.

    Such a forward pass is a recomputation, whichever function started it (``torch.utils.checkpoint``, reentrant or not, or
    a function from an engine or another library). The modules get hooks when something that may recompute them is first used:
    hooks for saved tensors, or the backward method of a function that torch does not define. Until then, a forward pass costs
    nothing more. Modules that are compiled together with the checkpoint are not covered. Calling this function again has no
    effect.
    """
    if any(True for _ in model.buffers()):
        _observe_recomputations()
        _without_hooks.add(model)


@cache
def _observe_recomputations() -> None:
    """Add the hooks to all models before the first recomputation.

    A recomputation that autograd starts runs either in the backward method of a Python function or in a hook for saved tensors.
    Torch reports neither, so the methods that all of them call are replaced for the whole process.
    """
    create = saved_tensors_hooks.__init__

    @wraps(create)
    def observed_create(self: saved_tensors_hooks, *args: Any, **kwargs: Any) -> None:
        if not torch.compiler.is_compiling() and _without_hooks:
            _add_hooks()
        create(self, *args, **kwargs)

    saved_tensors_hooks.__init__ = observed_create  # type: ignore[method-assign]
    for name in filter(partial(hasattr, BackwardCFunction), ("apply", "apply_boxed")):
        setattr(BackwardCFunction, name, _observed_backward(getattr(BackwardCFunction, name)))


def _observed_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(backward)
    def observed(self: Any, *args: Any) -> Any:
        if _without_hooks and _may_recompute(self._forward_cls.__module__):
            _add_hooks()
        return backward(self, *args)

    return observed


def _may_recompute(module: str) -> bool:
    """Return whether a function of a module may run a forward pass in its backward method."""
    return module == "torch.utils.checkpoint" or module.partition(".")[0] != "torch"


def _add_hooks() -> None:
    """Add the hooks to the modules of all models that do not have them."""
    while _without_hooks:
        for module in _without_hooks.pop().modules():
            has_buffers = any(buffer is not None for buffer in module._buffers.values())
            if has_buffers and not any(isinstance(hook, _Discard) for hook in module._forward_hooks.values()):
                stack: list[dict[str, Tensor | None]] = []
                module.register_forward_pre_hook(_Replace(stack))
                module.register_forward_hook(_Discard(stack), always_call=True)


@final
class _Replace:
    """Replaces the buffers of a module with copies before a recomputation."""

    def __init__(self, stack: list[dict[str, Tensor | None]]) -> None:
        self._stack = stack

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or backward_pass_id() == -1 or getattr(_thread, "replays", False):
            return
        self._stack.append(dict(module._buffers))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.detach().clone()


@final
class _Discard:
    """Restores the buffers of a module after a recomputation."""

    def __init__(self, stack: list[dict[str, Tensor | None]]) -> None:
        self._stack = stack

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and not torch.compiler.is_compiling():
            module._buffers.update(self._stack.pop())


@final
class BufferReplay:
    """Makes the recomputation of a module start from copies of the buffers as they were before its forward pass.

    The recomputed activations therefore equal those of the forward pass, even if they depend on buffers that the forward
    pass updates, and the recomputation does not change the buffers of the module.

    Args:
        module: the checkpointed module.
        others: a function that returns additional context managers for each forward pass and its recomputation; they are
            entered after those for the buffers.
    """

    def __init__(self, module: nn.Module, others: Callable[[], Contexts] | None = None) -> None:
        self._module = module
        self._others = others
        # Large buffers that the last forward pass did not change, with their version and the training mode of their module.
        self._constant: dict[tuple[nn.Module, str], tuple[int, bool]] = {}

    def contexts(self) -> Contexts:
        """Return the context managers for a forward pass and for its recomputation."""
        before: dict[tuple[nn.Module, str], Tensor] = {}
        forward, recomputation = (None, None) if self._others is None else self._others()
        return _both(self._forward(before), forward), _both(self._recomputation(before), recomputation)

    @contextmanager
    def _forward(self, before: dict[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
        for owner in self._module.modules():
            for key, buffer in owner._buffers.items():
                slot = (owner, key)
                if buffer is not None and self._constant.get(slot) != (buffer._version, owner.training):
                    before[slot] = buffer.detach().clone()
        yield
        for slot in [slot for slot, copy in before.items() if copy.numel() > _SMALL_NUMEL]:
            owner, key = slot
            buffer = owner._buffers[key]
            if buffer is not None and torch.equal(buffer, before[slot]):
                self._constant[slot] = (buffer._version, owner.training)
                del before[slot]

    @contextmanager
    def _recomputation(self, before: dict[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
        current = {slot: slot[0]._buffers[slot[1]] for slot in before}
        replays = getattr(_thread, "replays", False)
        # Do not write to the buffers themselves, because autograd may have saved them for this backward pass.
        for (owner, key), copy in before.items():
            owner._buffers[key] = copy.clone()
        _thread.replays = True
        try:
            yield
        finally:
            _thread.replays = replays
            for (owner, key), buffer in current.items():
                owner._buffers[key] = buffer


@contextmanager
def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any] | None) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(first)
        if second is not None:
            stack.enter_context(second)
        yield
