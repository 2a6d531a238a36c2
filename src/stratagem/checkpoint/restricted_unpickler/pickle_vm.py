"""Read what a pickle says without doing it.

A pickle is a program for a small stack machine. The one here has no operation that imports or calls anything: where
Python's would make an object, it writes a :class:`PickledObject`. So it needs no list of what is dangerous. The operations
are those of protocols 2 to 5 as https://docs.python.org/3/library/pickletools.html describes them; what torch never
writes (text forms, extension codes, buffers outside of the stream) is refused.

Memory is bounded by the length of the pickle: nothing is allocated by a number that the pickle names.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, final

from stratagem.checkpoint.restricted_unpickler.pickled_objects import PersistentId, PickledGlobal, PickledObject
from stratagem.errors import CheckpointDamagedError

__all__ = ["read_pickle"]

# Of the largest models' optimizers 100,000 tensors need 3 million. An operation makes an object of at most 216 bytes.
_MOST_OPERATIONS = 20_000_000
_STOP = ord(".")
_SCALARS = (str, bytes, int, float, type(None), PickledGlobal, PersistentId, PickledObject)


def read_pickle(data: bytes) -> Any:
    """Return what ``data`` says: plain values, and a :class:`PickledObject` for every object.

    Raises:
        CheckpointDamagedError: if it is no whole pickle, or uses operations that torch does not write.
    """
    try:
        return _PickleVM(data).run()
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError, struct.error) as error:
        raise CheckpointDamagedError(f"its pickle makes no sense: {type(error).__name__} {error}") from error


@final
class _PickleVM:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self.stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MOST_OPERATIONS):
            operation = self.take(1)[0]
            if operation == _STOP:
                return self.stack.pop()
            action = _ACTIONS.get(operation)
            if action is None:
                raise ValueError(f"operation {operation:#04x} at byte {self._at - 1} is not one that torch writes")
            action(self)
        raise ValueError(f"it has more than {_MOST_OPERATIONS:,} operations")

    # ---- the stream

    def take(self, count: int) -> bytes:
        """Return the next bytes; the check comes first, so that a huge count allocates nothing."""
        if not 0 <= count <= len(self._data) - self._at:
            raise ValueError(f"{count} bytes are due at byte {self._at}, but {len(self._data) - self._at} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self._data.index(b"\n", self._at)
        text = self.take(end - self._at).decode()
        self.take(1)
        return text

    # ---- the stack

    def mark(self) -> None:
        self._outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._outer.pop()
        return items

    def pop_many(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise ValueError(f"{count} values are due on the stack, which has {len(self.stack)}")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def remember(self, place: int | None = None) -> None:
        self._memo[len(self._memo) if place is None else place] = self.stack[-1]

    def recall(self, place: int) -> None:
        self.stack.append(self._memo[place])

    # ---- containers

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, PickledObject):
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise TypeError(f"items are added to {type(target).__name__}")

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, PickledObject):
            target.items.extend(items)
        elif isinstance(target, set):
            target.update(_key(item) for item in items)
        else:
            raise TypeError(f"members are added to {type(target).__name__}")

    def set(self, flat: list[Any]) -> None:
        pairs = [(_key(key), value) for key, value in zip(flat[::2], flat[1::2], strict=True)]
        target = self.stack[-1]
        if isinstance(target, PickledObject):
            target.pairs.extend(pairs)
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise TypeError(f"entries are set in {type(target).__name__}")

    # ---- objects, written down

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("the name of a class is no text")
        self.stack.append(PickledGlobal(module, name))

    def make(self, *, with_kwargs: bool = False) -> None:
        kwargs = self.stack.pop() if with_kwargs else None
        maker, args = self.pop_many(2)
        self.stack.append(PickledObject(maker, args, kwargs))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, PickledObject):
            raise TypeError(f"state is given to {type(target).__name__}")
        target.state = state


def _key(key: Any) -> Any:
    """Return what may be a key: hashing anything deeper could exhaust the stack of the process."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, _SCALARS) for part in parts):
        raise TypeError(f"a {type(key).__name__} is used as a key")
    return key


def _whole_number(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _push(read: Callable[[_PickleVM], Any]) -> Callable[[_PickleVM], None]:
    def push(machine: _PickleVM) -> None:
        value = read(machine)  # first: reading may take the stack back to an earlier mark
        machine.stack.append(value)

    return push


def _drop_mark(machine: _PickleVM) -> None:
    machine.since_mark()


def _pop(machine: _PickleVM) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.since_mark()


_ACTIONS: dict[int, Callable[[_PickleVM], None]] = {
    0x80: lambda m: _ignore(m.take(1)),  # protocol
    0x95: lambda m: _ignore(m.take(8)),  # frame
    ord("("): _PickleVM.mark,
    ord("0"): _pop,
    ord("1"): _drop_mark,
    ord("2"): _push(lambda m: m.stack[-1]),
    # plain values
    ord("N"): _push(lambda _: None),
    0x88: _push(lambda _: True),
    0x89: _push(lambda _: False),
    ord("J"): _push(lambda m: m.number("<i")),
    ord("K"): _push(lambda m: m.number("<B")),
    ord("M"): _push(lambda m: m.number("<H")),
    0x8A: _push(lambda m: _whole_number(m.take(m.number("<B")))),
    0x8B: _push(lambda m: _whole_number(m.take(m.number("<i")))),
    ord("G"): _push(lambda m: m.number(">d")),
    ord("X"): _push(lambda m: m.take(m.number("<I")).decode("utf-8", "surrogatepass")),
    0x8C: _push(lambda m: m.take(m.number("<B")).decode("utf-8", "surrogatepass")),
    0x8D: _push(lambda m: m.take(m.number("<Q")).decode("utf-8", "surrogatepass")),
    ord("U"): _push(lambda m: m.take(m.number("<B")).decode()),  # text of Python 2
    ord("T"): _push(lambda m: m.take(m.number("<i")).decode()),
    ord("B"): _push(lambda m: m.take(m.number("<I"))),
    ord("C"): _push(lambda m: m.take(m.number("<B"))),
    0x8E: _push(lambda m: m.take(m.number("<Q"))),
    0x96: _push(lambda m: bytearray(m.take(m.number("<Q")))),
    # containers
    ord(")"): _push(lambda _: ()),
    ord("t"): _push(lambda m: tuple(m.since_mark())),
    0x85: _push(lambda m: m.pop_many(1)),
    0x86: _push(lambda m: m.pop_many(2)),
    0x87: _push(lambda m: m.pop_many(3)),
    ord("]"): _push(lambda _: []),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.since_mark()),
    ord("}"): _push(lambda _: {}),
    ord("s"): lambda m: m.set(list(m.pop_many(2))),
    ord("u"): lambda m: m.set(m.since_mark()),
    0x8F: _push(lambda _: set()),
    0x90: lambda m: m.add(m.since_mark()),
    0x91: _push(lambda m: frozenset(map(_key, m.since_mark()))),
    # the memory
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    0x94: _PickleVM.remember,
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    # objects
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(*m.pop_many(2)),
    ord("R"): _PickleVM.make,
    0x81: _PickleVM.make,
    0x92: lambda m: m.make(with_kwargs=True),
    ord("b"): _PickleVM.build,
    ord("Q"): _push(lambda m: PersistentId(m.stack.pop())),
}


def _ignore(_: bytes) -> None:
    """Protocol and frame only help readers that stream."""
