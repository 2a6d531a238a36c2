"""Write down what fills the tensors of a model that is built without memory, and do it afterwards, tensor by tensor.

A model that is built on the meta device has shapes and no values. A :class:`Tape` notes every operation that would have
written one, in order. Played on a device with memory it makes the same values with the same random numbers, bit for
bit, and needs memory only for the tensors that are half made: a tensor is handed over and freed once nothing later
reads or changes it.

The idea is that of "deferred initialisation" (torchdistx, 2022); here only what the wanted tensors need is done again,
and every draw, so that the generator ends where it would have.
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

__all__ = ["INIT_FUNCTIONS", "Tape"]

# They leave tensors without memory as they are, since they look at values while they draw.
INIT_FUNCTIONS: Final[Mapping[Any, Callable[..., Any]]] = {
    function.__code__: function
    for function in (init.dirac_, init.orthogonal_, init.sparse_, init._no_grad_trunc_normal_)
}
# What a tensor held before does not matter to these.
_OVERWRITING: Final = frozenset(
    {
        *("aten::uniform_", "aten::normal_", "aten::fill_", "aten::zero_", "aten::copy_", "aten::exponential_"),
        *("aten::bernoulli_", "aten::random_", "aten::log_normal_", "aten::cauchy_", "aten::geometric_"),
    }
)
_IS_META: Final = Tensor.is_meta
# Constants that are made of Python's numbers or of NumPy's arrays: on the meta device their values would be lost.
_CONSTANTS: Final = frozenset({torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor})


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor without memory: where in which storage it lies."""

    storage: int
    nbytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def covers(self) -> bool:
        """Whether it is all of its storage."""
        length = 1
        for extent in self.size:
            length *= extent
        return length * self.dtype.itemsize == self.nbytes


@final
@dataclass(frozen=True, slots=True)
class _Step:
    """One call: what it reads, changes and makes, by storage."""

    function: Callable[..., Any]
    args: Any
    kwargs: Mapping[str, Any]
    reads: frozenset[int]
    overwrites: frozenset[int]
    changes: frozenset[int]
    makes: tuple[_Place, ...]
    draws: bool

    @property
    def touches(self) -> frozenset[int]:
        return self.reads | self.overwrites | self.changes | {place.storage for place in self.makes}


@final
class Tape:
    """What was done to tensors without memory, in order; see the module's documentation."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        # A storage's address names it only while it lives.
        self._alive: dict[int, Tensor] = {}
        self._written: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Build tensors on the meta device for the length of a block, and note what is done to them."""
        with torch.device("meta"), _Constants(self), _Operations(self):
            yield

    def play(self, wanted: Iterable[Tensor], *, draws: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Make the values of ``wanted`` tensors; yields each of them with its values, in memory, as soon as it is made.

        Take what you need of the values before going on. With ``draws`` the generators end where they would have if
        every step had been done, wanted or not.
        """
        targets = _by_storage(wanted)
        steps = self._needed(set(targets), draws=draws)
        memory: dict[int, torch.UntypedStorage] = {}
        with torch.no_grad():
            for step, over in zip(steps, _ends(steps), strict=True):
                _do(step, memory)
                for storage, is_last in over.items():
                    values = memory.pop(storage)
                    for tensor in targets.get(storage, ()) if is_last else ():
                        yield tensor, _tensor(_place(tensor), values)

    def order(self, wanted: Iterable[Tensor], *, draws: bool = True) -> list[Tensor]:
        """Return ``wanted`` tensors in the order in which :meth:`play` makes them."""
        targets = _by_storage(wanted)
        ends = _ends(self._needed(set(targets), draws=draws))
        return [
            tensor
            for over in ends
            for storage, is_last in over.items()
            if is_last
            for tensor in targets.get(storage, ())
        ]

    def is_written(self, tensor: Tensor) -> bool:
        """Tell whether anything was done to the memory that a tensor would have."""
        return tensor.is_meta and _key(tensor) in self._written

    def note(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Mapping[str, Any],
        *,
        written: Iterable[Tensor],
        made: Iterable[Tensor],
        overwrites: bool,
        draws: bool,
    ) -> None:
        """Add a call with the tensors that it writes into, and those that it makes."""
        places = {_key(tensor): _place(tensor) for tensor in written}
        read = [tensor for tensor in tree_iter((args, kwargs)) if _is_meta(tensor)]
        fresh = [_place(tensor) for tensor in made if _is_meta(tensor)]
        for tensor in (*read, *(tensor for tensor in made if _is_meta(tensor))):
            self._alive.setdefault(_key(tensor), tensor.detach())
        self._written.update(places, (place.storage for place in fresh))
        gone = {key for key, place in places.items() if overwrites and place.covers}
        sources = Counter(_key(tensor) for tensor in read)
        # copy_(a, b) overwrites a and reads b; a.copy_(a) reads a.
        reads = frozenset(key for key, times in sources.items() if times > 1 or key not in places)
        self._steps.append(
            _Step(
                function=function,
                args=_without_tensors(args),
                kwargs=_without_tensors(dict(kwargs)),
                reads=reads,
                overwrites=frozenset(gone - reads),
                changes=frozenset(set(places) - gone),
                makes=tuple(place for place in fresh if place.storage not in places),
                draws=draws,
            )
        )

    def _needed(self, wanted: set[int], *, draws: bool) -> list[_Step]:
        """Return the steps that the wanted storages need, and those that draw where they count too, in order."""
        live = set(wanted)
        needed = []
        for step in reversed(self._steps):
            made = _made(step)
            if not (step.draws and draws) and live.isdisjoint(step.overwrites | step.changes | made):
                continue
            needed.append(step)
            live -= step.overwrites | made
            live |= step.reads | step.changes
        return needed[::-1]


@final
class _Operations(TorchDispatchMode):
    """Notes what torch's operators do."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        inputs = {_key(tensor) for tensor in tree_iter((args, kwargs)) if _is_meta(tensor)}
        written = [tensor for tensor in _written(func, args, kwargs) if _is_meta(tensor)]
        made = [tensor for tensor in tree_iter(results) if _is_meta(tensor) and _key(tensor) not in inputs]
        if written or (made and "empty" not in func._schema.name):
            self._tape.note(
                func,
                args,
                kwargs,
                written=written,
                made=made,
                overwrites=func._schema.name in _OVERWRITING,
                draws=torch.Tag.nondeterministic_seeded in func.tags,
            )
        return results


@final
class _Constants(TorchFunctionMode):
    """Notes the values of constants, and the functions of ``torch.nn.init`` that leave meta tensors as they are."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONSTANTS and kwargs.get("device") is None and not _is_meta(args[0] if args else None):
            value = func(*args, **{**kwargs, "device": "cpu"})
            constant = torch.empty_like(value, device="meta")
            constant.copy_(value.clone())
            return constant
        if getattr(func, "__self__", None) is _IS_META and func.__name__ == "__get__":
            self._note_init(sys._getframe(1))
        return func(*args, **kwargs)

    def _note_init(self, caller: Any) -> None:
        """Note a function that asks whether its tensor has memory, in order to do nothing where it has none."""
        function = INIT_FUNCTIONS.get(caller.f_code)
        if function is None or not _is_meta(caller.f_locals["tensor"]):
            return
        given = {name: caller.f_locals[name] for name in inspect.signature(function).parameters}
        self._tape.note(function, (), given, written=(given["tensor"],), made=(), overwrites=True, draws=True)


def _do(step: _Step, memory: dict[int, torch.UntypedStorage]) -> None:
    """Do what the step did, in memory."""

    def real(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == "meta" else value
        if not isinstance(value, _Place):
            return value
        if value.storage not in memory:
            memory[value.storage] = torch.UntypedStorage(value.nbytes)
        return _tensor(value, memory[value.storage])

    results = step.function(*tree_map(real, step.args), **tree_map(real, step.kwargs))
    made = iter(step.makes)
    if step.makes:
        for result in tree_iter(results):
            if isinstance(result, Tensor):
                place = next(made)
                memory[place.storage] = torch.UntypedStorage(place.nbytes)
                _tensor(place, memory[place.storage]).copy_(result)


def _by_storage(tensors: Iterable[Tensor]) -> dict[int, list[Tensor]]:
    found: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(_key(tensor), []).append(tensor)
    return found


def _ends(steps: list[_Step]) -> list[dict[int, bool]]:
    """Return for each step the storages whose values are of no use after it, and whether they are not used again."""
    following: dict[int, _Step] = {}
    ends = []
    for step in reversed(steps):
        over = {}
        for storage in step.touches:
            later = following.get(storage)
            if later is None or storage in later.overwrites or storage in _made(later):
                over[storage] = later is None
            following[storage] = step
        ends.append(over)
    return ends[::-1]


def _written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_iter(args[index] if index < len(args) else kwargs.get(argument.name))


def _made(step: _Step) -> set[int]:
    return {place.storage for place in step.makes}


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _place(tensor: Tensor) -> _Place:
    return _Place(
        _key(tensor),
        tensor.untyped_storage().nbytes(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        int(tensor.storage_offset()),
    )


def _without_tensors(tree: Any) -> Any:
    return tree_map(lambda value: _place(value) if _is_meta(value) else value, tree)


def _tensor(place: _Place, storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=place.dtype).set_(storage, place.offset, place.size, place.stride)
