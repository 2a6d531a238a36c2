"""Record one micro-batch of a model without a strategy; plans of engines are computed from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stratagem.planning.fake_world import replaced
from stratagem.planning.sharded_layers import shard_linear_layers
from stratagem.planning.simulate import Job, simulating
from stratagem.planning.storage_history import Change
from stratagem.planning.trace import StepTrace, storage_bytes
from stratagem.utils.torch_private import storage_key

__all__ = [
    "GradientReady",
    "Sent",
    "Timeline",
    "Visit",
    "cast_to",
    "interpolated",
    "record_timeline",
    "resized",
    "sizes_of",
]

# Gradients are recorded before an update, so the optimizer does not matter.
_NO_UPDATE: Final[Mapping[str, Any]] = {"optimizer": {"type": "SGD", "lr": 0.0}, "accumulative_counts": 2}


@final
@dataclass(frozen=True, slots=True)
class GradientReady:
    """The gradient of a parameter is complete in this micro-batch.

    Attributes:
        parameter: the index of the parameter.
        nbytes: the size of its storage; 0 if another gradient has the same storage.
    """

    parameter: int
    nbytes: int


@final
@dataclass(frozen=True, slots=True)
class Visit:
    """A module is entered or left, in the forward or the backward pass.

    Attributes:
        module: the index of the module in ``Timeline.modules``.
        enters: whether it is entered.
        forward: whether this is its forward pass, which activation checkpointing repeats during the backward pass.
        phase: the part of the step.
    """

    module: int
    enters: bool
    forward: bool
    phase: str


@final
@dataclass(frozen=True, slots=True)
class Sent:
    """The model itself sends a tensor in its tensor-parallel group.

    Attributes:
        kind: the kind of collective.
        nbytes: the bytes of the tensor.
        ranks: the number of ranks of the group.
    """

    kind: str
    nbytes: int
    ranks: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One micro-batch: forward and backward pass.

    Attributes:
        events: what happens, in order.
        numels: the number of elements of each parameter, in the order of ``model.parameters()``.
        trainable: whether each parameter is trainable.
        modules: the indices of the parameters of each module, without those of its children, and of those that its forward
            pass reads from other modules.
        saved: the bytes of the storages that the forward pass saves for the backward pass.
        largest: the bytes of the largest storage that is created.
        flops: the number of floating-point operations.
        compute_dtype: the dtype of the operands of most of them.
        buffers: the bytes of the buffers of the model.
        batch: the bytes of the batch.
        weight: the bytes of the weight of the loss, which is summed over ranks before an update; 0 without one.
        samples: the number of samples, if it is known.
    """

    events: tuple[Change | GradientReady | Visit | Sent, ...]
    numels: tuple[int, ...]
    trainable: tuple[bool, ...]
    modules: tuple[tuple[int, ...], ...]
    saved: int
    largest: int
    flops: int
    compute_dtype: str
    buffers: int
    batch: int
    weight: int
    samples: int | None = None


def interpolated(low: Timeline, high: Timeline, steps: float) -> Timeline | None:
    """Return the micro-batch of which all sizes are on the lines through those of two others.

    Args:
        low: a micro-batch.
        high: one with more samples.
        steps: the number of samples in addition to those of ``low``, divided by the difference between ``high`` and ``low``.

    Returns:
        The micro-batch; None if the two differ in more than sizes.
    """
    if len(low.events) != len(high.events):
        return None

    def between(before: int, after: int) -> int:
        return round(before + steps * (after - before))

    events: list[Change | GradientReady | Visit | Sent] = []
    for before, after in zip(low.events, high.events, strict=True):
        if before == after:
            events.append(before)
        elif isinstance(before, Change) and isinstance(after, Change):
            if (before.kind, before.phase) != (after.kind, after.phase):
                return None
            events.append(replace(before, nbytes=between(before.nbytes, after.nbytes)))
        elif isinstance(before, Sent) and isinstance(after, Sent):
            if (before.kind, before.ranks) != (after.kind, after.ranks):
                return None
            events.append(replace(before, nbytes=between(before.nbytes, after.nbytes)))
        else:
            return None
    return replace(
        low,
        samples=None if low.samples is None or high.samples is None else between(low.samples, high.samples),
        events=tuple(events),
        saved=between(low.saved, high.saved),
        largest=max((each.nbytes for each in events if isinstance(each, Change)), default=0),
        flops=between(low.flops, high.flops),
        batch=between(low.batch, high.batch),
    )


def sizes_of(timeline: Timeline) -> list[Change]:
    """Return the changes of storages and the tensors that the model sends, in order."""
    return [
        each if isinstance(each, Change) else Change(f"sent in {each.kind} of {each.ranks}", each.nbytes, "")
        for each in timeline.events
        if isinstance(each, Change | Sent)
    ]


def resized(
    timeline: Timeline, sizes: Sequence[Change], short: Timeline, long: Timeline, times: int
) -> Timeline | None:
    """Return a micro-batch of a model with another number of samples.

    Args:
        timeline: a micro-batch of the model.
        sizes: the sizes with the other number of samples, as returned by ``sizes_of``.
        short: the micro-batch with the other number of samples of a model with a few blocks.
        long: the same with one more block.
        times: the number of blocks in addition to those of ``long``.

    Returns:
        The micro-batch; None if it differs in more than sizes.
    """
    before = sizes_of(timeline)
    pairs = zip(before, sizes, strict=False)
    if len(before) != len(sizes) or any((one.kind, one.phase) != (other.kind, other.phase) for one, other in pairs):
        return None
    following = iter(sizes)
    events = tuple(
        replace(each, nbytes=next(following).nbytes) if isinstance(each, Change | Sent) else each
        for each in timeline.events
    )
    return replace(
        timeline,
        samples=long.samples,
        events=events,
        saved=long.saved + times * (long.saved - short.saved),
        largest=max((each.nbytes for each in events if isinstance(each, Change)), default=0),
        flops=long.flops + times * (long.flops - short.flops),
        batch=long.batch,
    )


def cast_to(model: nn.Module, dtype: torch.dtype | None, *, keeps_buffers: bool = False) -> nn.Module:
    """Cast a model, with its buffers unless they keep their dtype, and the floating-point inputs of its forward pass."""
    if dtype is None:
        return model
    if keeps_buffers:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    else:
        model.to(dtype)

    def cast(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(convert, args), tree_map(convert, kwargs)

    def convert(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    model.register_forward_pre_hook(cast, with_kwargs=True)
    return model


def record_timeline(
    job: Job,
    batch: Any,
    dtype: torch.dtype | None,
    *,
    keeps_buffers: bool = False,
    tp_size: int = 1,
    samples: int | None = None,
) -> Timeline:
    """Run one micro-batch on fake tensors and record it.

    Args:
        job: what is planned.
        batch: a batch on the meta device.
        dtype: the dtype that an engine casts the model to; None for that of its parameters.
        keeps_buffers: whether the buffers keep their dtype.
        tp_size: the number of ranks that ColossalAI shards the layers of ``tp_plan`` across.
        samples: the number of samples of the batch, if it is known.
    """
    recording: list[StepTrace] = []

    def note(nbytes: int) -> None:
        if recording:
            recording[0].mark(Sent("all_reduce", nbytes, tp_size))

    def make_model() -> nn.Module:
        model = job.make_model()
        if tp_size > 1:
            shard_linear_layers(model, tp_size, note)
        return cast_to(model, dtype, keeps_buffers=keeps_buffers)

    plain = Job(make_model=make_model, optim_wrapper=_NO_UPDATE, randomness=job.randomness)
    with simulating(plain, "SingleDeviceStrategy", 1) as sim:
        model = sim.model
        parameters = list(model.parameters())
        index = {id(each): number for number, each in enumerate(parameters)}
        modules = list(model.modules())
        read: dict[nn.Module, list[nn.Parameter]] = {}
        with ExitStack() as stack:

            def hooked(trace: StepTrace) -> None:
                recording.append(trace)
                stack.enter_context(_gradients(trace, parameters))
                stack.enter_context(_visits(trace, modules))
                stack.enter_context(_reads(modules, read))

            trace, batch_bytes, weight = sim.micro_batch(batch, hooked)
        return Timeline(
            events=tuple(trace.timeline()),
            numels=tuple(each.numel() for each in parameters),
            trainable=tuple(each.requires_grad for each in parameters),
            modules=tuple(
                tuple(index[id(each)] for each in (*module.parameters(recurse=False), *read.get(module, ())))
                for module in modules
            ),
            saved=trace.activations,
            largest=trace.largest,
            flops=trace.flops,
            compute_dtype=trace.main_dtype,
            buffers=storage_bytes(model.buffers()),
            batch=batch_bytes,
            weight=weight,
            samples=samples,
        )


@contextmanager
def _gradients(trace: StepTrace, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    known: set[int] = set()

    def ready(number: int) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                return
            trace.label([gradient], "gradients")
            storage = gradient.untyped_storage()
            is_new = storage_key(storage) not in known
            known.add(storage_key(storage))
            trace.mark(GradientReady(number, storage.nbytes() if is_new else 0))

        return note

    hooks = [
        each.register_post_accumulate_grad_hook(ready(number))
        for number, each in enumerate(parameters)
        if each.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@final
class _Passage(torch.autograd.Function):
    """Return an alias of a tensor, and call a function in the backward pass when the gradient of the alias is complete."""

    @staticmethod
    def forward(tensor: Tensor, _: Callable[[], None]) -> Tensor:
        return tensor.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Callable[[], None]], _: Tensor) -> None:
        ctx.call = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradients[0], None


def _with_passages(values: Any, call: Callable[[], None]) -> Any:
    """Return values with aliases of all differentiable tensors, which call a function; dictionaries are changed in place."""
    if not _count_differentiable(values):
        return values
    if isinstance(values, Tensor):
        return _Passage.apply(values, call)  # type: ignore[no-untyped-call]
    if isinstance(values, dict):
        for key, value in values.items():
            values[key] = _with_passages(value, call)
    elif isinstance(values, tuple | list):
        changed = [_with_passages(each, call) for each in values]
        return type(values)(*changed) if hasattr(values, "_fields") else type(values)(changed)
    return values


@contextmanager
def _visits(trace: StepTrace, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Note when modules are entered and left, in the backward pass as DeepSpeed does.

    A module is entered when the gradient of one of its outputs is complete, again for every output. It is left when the gradients
    of all positional inputs are complete; if it was called several times, only those of the last call.
    """
    missing = dict.fromkeys(range(len(modules)), 0)

    def enter(number: int) -> Callable[..., Any]:
        def left() -> None:
            missing[number] -= 1
            if missing[number] == 0:
                trace.mark(Visit(number, False, False, trace.phase))

        def hook(_: nn.Module, args: Any) -> Any:
            trace.mark(Visit(number, True, True, trace.phase))
            missing[number] = _count_differentiable(args)
            return _with_passages(args, left)

        return hook

    def leave(number: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            trace.mark(Visit(number, False, True, trace.phase))
            return _with_passages(output, lambda: trace.mark(Visit(number, True, False, trace.phase)))

        return hook

    index = {module: number for number, module in enumerate(modules)}
    hooks = [
        each
        for module in _with_shared(modules[0])
        for each in (
            module.register_forward_pre_hook(enter(index[module])),
            module.register_forward_hook(leave(index[module])),
        )
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def _with_shared(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and its descendants, those with several parents once for each: DeepSpeed registers hooks in this way."""
    for child in module.children():
        yield from _with_shared(child)
    yield module


@contextmanager
def _reads(modules: Sequence[nn.Module], read: dict[nn.Module, list[nn.Parameter]]) -> Iterator[None]:
    """Note in ``read`` the parameters that the forward pass of a module reads from modules whose forward pass is not running."""
    running: list[nn.Module] = []
    original = nn.Module.__getattr__

    def get(module: nn.Module, name: str) -> Any:
        value = original(module, name)
        if isinstance(value, nn.Parameter) and running and module not in running:
            known = read.setdefault(running[-1], [])
            if not any(value is each for each in (*known, *running[-1].parameters(recurse=False))):
                known.append(value)
        return value

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)

    def leave(*_: Any) -> None:
        running.pop()

    hooks = [
        each
        for module in modules
        for each in (
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        )
    ]
    try:
        with replaced(nn.Module, "__getattr__", get):
            yield
    finally:
        for each in hooks:
            each.remove()


def _count_differentiable(values: Any) -> int:
    if isinstance(values, Tensor):
        return int(values.requires_grad)
    children = values.values() if isinstance(values, dict) else values if isinstance(values, tuple | list) else ()
    return sum(map(_count_differentiable, children))
