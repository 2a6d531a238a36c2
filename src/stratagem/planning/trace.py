"""Record the storages, collectives and floating-point operations of a training step, with real or fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from stratagem.planning.storage_history import Change, StorageHistory
from stratagem.tensors.dtensor import to_local
from stratagem.tensors.flops import flops_of_call, operand_dtype
from stratagem.utils.torch_private import (
    backward_pass_id,
    group_ranks,
    observe_shape_propagation,
    storage_id,
    storage_key,
)

__all__ = ["CollectiveCall", "StepTrace", "storage_bytes", "storages_of"]

_KINDS: Final = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "recv",
}
_WAIT: Final = torch.ops._c10d_functional.wait_tensor.default
_NAMESPACES: Final = frozenset({"c10d", "_c10d_functional"})


@final
@dataclass(frozen=True, slots=True)
class CollectiveCall:
    """A collective: its kind, the bytes of its largest tensor, the ranks of its group, and the part of the step."""

    kind: str
    nbytes: int
    ranks: tuple[int, ...]
    phase: str


@final
@dataclass(slots=True)
class _Event:
    number: int
    change: int
    phase: str


@final
class StepTrace(TorchDispatchMode):
    """Records what a training step allocates, sends and computes; a step runs inside its ``with`` block.

    A storage counts from the operation that creates it until it is freed. Memory that a kernel only uses internally is not
    seen.

    Args:
        known: storages that exist before the step, by kind, such as ``{"parameters": [...]}``.

    Attributes:
        calls: the collectives in order.
        flops: the number of floating-point operations, as torch's ``FlopCounterMode`` counts them.
        flops_by_dtype: the same by the dtype of the operands.
        activations: the bytes of storages that the forward pass creates and that exist when the backward pass starts, except
            those of other kinds; with several micro-batches, those of the one with the most.
        largest: the bytes of the largest storage that the step creates.
    """

    def __init__(self, known: Mapping[str, Iterable[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.calls: list[CollectiveCall] = []
        self.flops = 0
        self.flops_by_dtype: Counter[str] = Counter()
        self.largest = 0
        # The sizes of storages that exist before the step, and the changes during the step.
        self._before: dict[int, int] = {}
        self._events: list[_Event] = []
        # What other code noted, each with the number of events before it.
        self._marks: list[tuple[int, Any]] = []
        self._kinds: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._past_backward = False
        # Greater than 0 while DTensor computes shapes with fake tensors, which a step does not allocate.
        self._computing_shapes = 0
        self._exit = ExitStack()
        self._first_of_forward = 0
        self.activations = 0
        for kind, tensors in known.items():
            for tensor in tensors:
                self._add(tensor, kind)

    # ---- the context ------------------------------------------------------------------------------------------------

    def __enter__(self) -> StepTrace:
        self._exit.enter_context(self._following_resizes())
        self._exit.enter_context(observe_shape_propagation(self._note_shape_propagation))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._exit.close()
        # Later frees are not part of the step.
        self._references.clear()

    @contextmanager
    def _following_resizes(self) -> Iterator[None]:
        """Follow changes of the size of a storage, with which FSDP frees gathered parameters."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            number = self._number(storage, None, new=False)
            result = original(storage, size)
            self._record(number, size - self._sizes[number])
            self._sizes[number] = size
            self.largest = max(self.largest, size)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def _note_shape_propagation(self, change: int) -> None:
        self._computing_shapes += change

    @property
    def phase(self) -> str:
        """The current part of the step: ``"forward"``, ``"backward"`` or ``"update"``."""
        if backward_pass_id() != -1:
            return "backward"
        return "update" if self._past_backward else "forward"

    def begin_micro_batch(self) -> None:
        """Start the forward pass of a micro-batch of the step. What remains of those before are gradients."""
        if self._past_backward:
            for number in self._numbers.values():
                if number not in self._before:
                    self._kinds.setdefault(number, "gradients")
        self._past_backward = False
        self._first_of_forward = len(self._sizes)

    def _begin_backward(self) -> None:
        """Note the activations: what the forward pass has created and is still there."""
        self._past_backward = True
        size = 0
        for number in self._numbers.values():
            created = number >= self._first_of_forward and number not in self._before
            if created and self._kinds.setdefault(number, "activations") == "activations":
                size += self._sizes[number]
        self.activations = max(self.activations, size)

    # ---- operations -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            # Let DTensor compute with its local tensors first; this mode then sees these operations.
            return NotImplemented
        kwargs = kwargs or {}
        if self._computing_shapes:
            return func(*args, **kwargs)
        if not self._past_backward and backward_pass_id() != -1:
            self._begin_backward()
        for tensor in _tensors_in(args, kwargs):
            self._add(tensor, None)
        if func is _WAIT and isinstance(args[0], FakeTensor):
            # Without fake tensors, the result is the argument, and not a copy.
            return args[0]
        out = func(*args, **kwargs)
        for tensor in _tensors_in(out):
            self._add(tensor, None, new=True)
        if getattr(func, "namespace", None) in _NAMESPACES:
            self._note_collective(func, args, kwargs, out)
        packet = getattr(func, "_overloadpacket", None)
        operations = flops_of_call(func, args, kwargs, out)
        if operations:
            self.flops += operations
            self.flops_by_dtype[operand_dtype(args)] += operations
        if packet is not None and packet.__name__ == "split_with_sizes_copy":
            # FSDP copies gathered parameters from the message of an all-gather to their own storages.
            for tensor in kwargs.get("out", ()):
                self._label(tensor, "gathered parameters")
        return out

    def _note_collective(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        kind = _KINDS.get(func._overloadpacket.__name__)
        if kind is None:
            return
        tensors = list(_tensors_in(args, kwargs, out))
        # Functional collectives return the gathered tensor, and others have it as an argument.
        nbytes = max((each.numel() * each.element_size() for each in tensors), default=0)
        self.calls.append(CollectiveCall(kind, nbytes, group_ranks(args, kwargs), self.phase))
        for each in tensors:
            self._add(each, None)
            self._label(each, "communication")

    # ---- storages ---------------------------------------------------------------------------------------------------

    def _add(self, tensor: Tensor, kind: str | None, *, new: bool = False) -> int:
        return self._number(_local(tensor).untyped_storage(), kind, new=new)

    def _number(self, storage: torch.UntypedStorage, kind: str | None, *, new: bool) -> int:
        """Return the number of a storage. If it is unknown and not ``new``, it has existed since the beginning of the step."""
        key = storage_key(storage)
        known = self._numbers.get(key)
        if known is not None:
            return known
        number = len(self._sizes)
        size = storage.nbytes()
        self._numbers[key] = number
        self._sizes[number] = size
        if kind is not None:
            self._kinds[number] = kind
        if new:
            self.largest = max(self.largest, size)

        def free(_: object) -> None:
            if self._numbers.get(key) == number:
                del self._numbers[key]
                self._references.pop(number, None)
                self._record(number, -self._sizes[number])

        self._references[number] = weakref.ref(storage, free)
        if new:
            self._record(number, size)
        else:
            self._before[number] = size
        return number

    def _record(self, number: int, change: int) -> None:
        if change:
            self._events.append(_Event(number, change, self.phase))

    def _label(self, tensor: Tensor, kind: str) -> None:
        number = self._numbers.get(storage_id(_local(tensor)))
        if number is not None:
            self._kinds.setdefault(number, kind)

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Set the kind of storages, such as those of gradients, even if they have another kind."""
        for tensor in tensors:
            number = self._numbers.get(storage_id(_local(tensor)))
            if number is not None and self._kinds.get(number) != "parameters":
                self._kinds[number] = kind

    def mark(self, what: Any) -> None:
        """Note what happens now, for ``timeline``."""
        self._marks.append((len(self._events), what))

    # ---- results ----------------------------------------------------------------------------------------------------

    @property
    def main_dtype(self) -> str:
        """The dtype of the operands of most floating-point operations."""
        counted = self.flops_by_dtype.most_common(1)
        return counted[0][0] if counted else "float32"

    def history(self) -> StorageHistory:
        """Return the sizes of all storages during the step."""
        before: Counter[str] = Counter()
        for number, size in self._before.items():
            before[self._kinds.get(number, "temporary")] += size
        return StorageHistory(before, tuple(map(self._change_of, self._events)))

    def _change_of(self, event: _Event) -> Change:
        return Change(self._kinds.get(event.number, "temporary"), event.change, event.phase)

    def timeline(self) -> Iterator[Any]:
        """Yield the changes of storages and the marks in order."""
        marks = iter(self._marks)
        mark = next(marks, None)
        for index, event in enumerate(self._events):
            while mark is not None and mark[0] <= index:
                yield mark[1]
                mark = next(marks, None)
            yield self._change_of(event)
        if mark is not None:
            yield mark[1]
        for _, what in marks:
            yield what

    def take_counts(self) -> tuple[list[CollectiveCall], int]:
        """Return the collectives and floating-point operations since the last call of this method."""
        taken = self.calls, self.flops
        self.calls, self.flops = [], 0
        return taken


def _tensors_in(*values: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results of an operation, in less time than torch's ``tree_leaves``."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(*value)
        elif isinstance(value, dict):
            yield from _tensors_in(*value.values())


def _local(tensor: Tensor) -> Tensor:
    """Return the tensor of this rank that has a storage."""
    local = to_local(tensor) if isinstance(tensor, DTensor) else tensor
    # The result of a functional collective that has not been waited for.
    return getattr(local, "elem", local)


def storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the storages of the local parts of tensors, each once."""
    storages = (_local(each).untyped_storage() for each in tensors)
    return {storage_key(storage): storage for storage in storages}


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors; shared storages count once."""
    return sum(storage.nbytes() for storage in storages_of(tensors).values())
