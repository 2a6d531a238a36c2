"""Record the operations that initialize a model on the meta device, and replay them later on tensors with values.

A model that is built on the meta device has shapes but no values. An :class:`OpRecorder` records every operation that
would have written a value, in order. When the operations are replayed from the same state of the random generators, they
produce the same values, bit for bit. A tensor is yielded and freed as soon as no later operation reads or changes it, so
that only the tensors in progress need memory.

This follows "deferred initialization" in torchdistx (2022), with one difference: a replay is limited to the operations that
the requested tensors depend on and to those that draw random numbers, so that the generators end in the same state.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from stratagem.utils.torch_private import operator_schema, storage_id

__all__ = ["INIT_FUNCTIONS", "OpRecorder"]

# These functions skip meta tensors, because they read tensor values during initialization.
INIT_FUNCTIONS: Final[Mapping[Any, Callable[..., Any]]] = {
    function.__code__: function
    for function in (init.dirac_, init.orthogonal_, init.sparse_, init._no_grad_trunc_normal_)
}
# Operators whose result does not depend on the previous values of the tensor.
_OVERWRITING: Final = frozenset(
    {
        *("aten::uniform_", "aten::normal_", "aten::fill_", "aten::zero_", "aten::copy_", "aten::exponential_"),
        *("aten::bernoulli_", "aten::random_", "aten::log_normal_", "aten::cauchy_", "aten::geometric_"),
    }
)
_IS_META: Final = Tensor.is_meta
# Functions that create tensors from Python numbers or NumPy arrays, whose values would be lost on the meta device.
_CONSTANTS: Final = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor})


@final
@dataclass(frozen=True, slots=True)
class TensorMeta:
    """The storage key, dtype, shape and strides of a meta tensor."""

    storage: int
    nbytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def covers_storage(self) -> bool:
        """Whether the tensor occupies its whole storage."""
        length = 1
        for extent in self.size:
            length *= extent
        return length * self.dtype.itemsize == self.nbytes


@final
@dataclass(frozen=True, slots=True)
class RecordedOp:
    """A recorded call of an operator, with the storages that it reads, overwrites, changes and creates."""

    function: Callable[..., Any]
    args: Any
    kwargs: Mapping[str, Any]
    reads: frozenset[int]
    overwrites: frozenset[int]
    changes: frozenset[int]
    creates: tuple[TensorMeta, ...]
    uses_rng: bool

    @property
    def touches(self) -> frozenset[int]:
        return self.reads | self.overwrites | self.changes | {meta.storage for meta in self.creates}


@final
class OpRecorder:
    """Records operations on meta tensors in order, and replays them on tensors with values; see the module docstring."""

    def __init__(self) -> None:
        self._ops: list[RecordedOp] = []
        # The address of a storage identifies it only while it is alive.
        self._alive: dict[int, Tensor] = {}
        self._written: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside the ``with`` block, create tensors on the meta device and record the operations on them."""
        with torch.device("meta"), _ConstantMode(self), _OpMode(self):
            yield

    def materialize(self, wanted: Iterable[Tensor], *, uses_rng: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Replay the operations that ``wanted`` depend on, and yield each tensor with its values when they are complete.

        The values are only valid until the next item is requested.

        Args:
            wanted: meta tensors.
            uses_rng: whether to replay all operations that draw random numbers, including operations that no tensor depends on,
                so that the generators end in the state that direct initialization would leave them in.
        """
        targets = _by_storage(wanted)
        ops = self._needed(set(targets), uses_rng=uses_rng)
        memory: dict[int, torch.UntypedStorage] = {}
        with torch.no_grad():
            for op, unused in zip(ops, _last_uses(ops), strict=True):
                _replay(op, memory)
                for storage, is_last in unused.items():
                    values = memory.pop(storage)
                    for tensor in targets.get(storage, ()) if is_last else ():
                        yield tensor, _tensor(_meta_of(tensor), values)

    def materialization_order(self, wanted: Iterable[Tensor], *, uses_rng: bool = True) -> list[Tensor]:
        """Return ``wanted`` in the order in which :meth:`materialize` yields them."""
        targets = _by_storage(wanted)
        last_uses = _last_uses(self._needed(set(targets), uses_rng=uses_rng))
        return [
            tensor
            for unused in last_uses
            for storage, is_last in unused.items()
            if is_last
            for tensor in targets.get(storage, ())
        ]

    def is_written(self, tensor: Tensor) -> bool:
        """Return whether an operation that writes to the storage of a meta tensor was recorded."""
        return tensor.is_meta and storage_id(tensor) in self._written

    def record(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Mapping[str, Any],
        *,
        written: Iterable[Tensor],
        created: Iterable[Tensor],
        overwrites: bool,
        uses_rng: bool,
    ) -> None:
        """Record a call, the tensors that it writes to, and the tensors that it creates."""
        metas = {storage_id(tensor): _meta_of(tensor) for tensor in written}
        read = [tensor for tensor in tree_iter((args, kwargs)) if _is_meta(tensor)]
        new = [_meta_of(tensor) for tensor in created if _is_meta(tensor)]
        for tensor in (*read, *(tensor for tensor in created if _is_meta(tensor))):
            self._alive.setdefault(storage_id(tensor), tensor.detach())
        self._written.update(metas, (meta.storage for meta in new))
        overwritten = {key for key, meta in metas.items() if overwrites and meta.covers_storage}
        uses = Counter(storage_id(tensor) for tensor in read)
        # copy_(a, b) overwrites a and reads b; a.copy_(a) reads a.
        reads = frozenset(key for key, count in uses.items() if count > 1 or key not in metas)
        self._ops.append(
            RecordedOp(
                function=function,
                args=_without_tensors(args),
                kwargs=_without_tensors(dict(kwargs)),
                reads=reads,
                overwrites=frozenset(overwritten - reads),
                changes=frozenset(set(metas) - overwritten),
                creates=tuple(meta for meta in new if meta.storage not in metas),
                uses_rng=uses_rng,
            )
        )

    def _needed(self, wanted: set[int], *, uses_rng: bool) -> list[RecordedOp]:
        """Return the recorded operations that the ``wanted`` storages depend on; with ``uses_rng``, also all that use the RNG."""
        live = set(wanted)
        needed = []
        for op in reversed(self._ops):
            created = _created(op)
            if not (op.uses_rng and uses_rng) and live.isdisjoint(op.overwrites | op.changes | created):
                continue
            needed.append(op)
            live -= op.overwrites | created
            live |= op.reads | op.changes
        return needed[::-1]


@final
class _OpMode(TorchDispatchMode):
    """Records torch operators."""

    def __init__(self, recorder: OpRecorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        inputs = {storage_id(tensor) for tensor in tree_iter((args, kwargs)) if _is_meta(tensor)}
        written = [tensor for tensor in _written(func, args, kwargs) if _is_meta(tensor)]
        created = [tensor for tensor in tree_iter(results) if _is_meta(tensor) and storage_id(tensor) not in inputs]
        if written or (created and "empty" not in operator_schema(func).name):
            self._recorder.record(
                func,
                args,
                kwargs,
                written=written,
                created=created,
                overwrites=operator_schema(func).name in _OVERWRITING,
                uses_rng=torch.Tag.nondeterministic_seeded in func.tags,
            )
        return results


@final
class _ConstantMode(TorchFunctionMode):
    """Records the values of constants, and the functions of ``torch.nn.init`` that skip meta tensors."""

    def __init__(self, recorder: OpRecorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONSTANTS and kwargs.get("device") is None and not _is_meta(args[0] if args else None):
            value = func(*args, **{**kwargs, "device": "cpu"})
            constant = torch.empty_like(value, device="meta")
            constant.copy_(value.clone())
            return constant
        if getattr(func, "__self__", None) is _IS_META and func.__name__ == "__get__":
            self._record_init(sys._getframe(1))
        return func(*args, **kwargs)

    def _record_init(self, caller: Any) -> None:
        """Record the calling function if it checks ``is_meta`` in order to skip meta tensors."""
        function = INIT_FUNCTIONS.get(caller.f_code)
        if function is None or not _is_meta(caller.f_locals["tensor"]):
            return
        given = {name: caller.f_locals[name] for name in inspect.signature(function).parameters}
        self._recorder.record(
            function, (), given, written=(given["tensor"],), created=(), overwrites=True, uses_rng=True
        )


def _replay(op: RecordedOp, memory: dict[int, torch.UntypedStorage]) -> None:
    """Execute an operation on the storages in ``memory``, and add the storages that it creates."""

    def real(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == "meta" else value
        if not isinstance(value, TensorMeta):
            return value
        if value.storage not in memory:
            memory[value.storage] = torch.UntypedStorage(value.nbytes)
        return _tensor(value, memory[value.storage])

    results = op.function(*tree_map(real, op.args), **tree_map(real, op.kwargs))
    created = iter(op.creates)
    if op.creates:
        for result in tree_iter(results):
            if isinstance(result, Tensor):
                meta = next(created)
                memory[meta.storage] = torch.UntypedStorage(meta.nbytes)
                _tensor(meta, memory[meta.storage]).copy_(result)


def _by_storage(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(storage_id(tensor), []).append(tensor)
    return found


def _last_uses(ops: list[RecordedOp]) -> list[dict[int, bool]]:
    """For each operation, return the storages whose values are not needed after it, and whether they are complete.

    A storage that a later operation overwrites or creates again is not complete.
    """
    following: dict[int, RecordedOp] = {}
    last_uses = []
    for op in reversed(ops):
        unused = {}
        for storage in op.touches:
            later = following.get(storage)
            if later is None or storage in later.overwrites or storage in _created(later):
                unused[storage] = later is None
            following[storage] = op
        last_uses.append(unused)
    return last_uses[::-1]


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    for index, argument in enumerate(operator_schema(func).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_iter(args[index] if index < len(args) else kwargs.get(argument.name))


def _created(op: RecordedOp) -> set[int]:
    return {meta.storage for meta in op.creates}


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _meta_of(tensor: Tensor) -> TensorMeta:
    return TensorMeta(
        storage_id(tensor),
        tensor.untyped_storage().nbytes(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        int(tensor.storage_offset()),
    )


def _without_tensors(tree: Any) -> Any:
    return tree_map(lambda value: _meta_of(value) if _is_meta(value) else value, tree)


def _tensor(meta: TensorMeta, storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=meta.dtype).set_(storage, meta.offset, meta.size, meta.stride)
