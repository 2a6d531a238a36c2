"""Interpret a pickle without executing it.

A pickle is a program for a stack machine. This implementation has no operation that imports or calls anything: where
Python would create an object, it creates a :class:`PickledObject` that records the call. Therefore, no list of forbidden names is
needed. It supports the operations of protocols 2 to 5 (https://docs.python.org/3/library/pickletools.html) except those
that torch never writes: text encodings, extension codes and out-of-band buffers.

Memory use is bounded by the length of the pickle: no allocation depends on a number in it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, final

from stratagem.checkpoint.restricted_unpickler.pickled_objects import PersistentId, PickledGlobal, PickledObject
from stratagem.errors import CheckpointDamagedError

__all__ = ["read_pickle"]

# The optimizer state of 100,000 tensors takes 3 million operations; each creates an object of at most 216 bytes.
_MAX_OPERATIONS = 20_000_000
_STOP = ord(".")
_SCALARS = (str, bytes, int, float, type(None), PickledGlobal, PersistentId, PickledObject)


def read_pickle(data: bytes) -> Any:
    """Return the contents of a pickle: plain values, and a :class:`PickledObject` for each object.

    Raises:
        CheckpointDamagedError: if the pickle is incomplete or uses unsupported operations.
    """
    try:
        return _PickleVM(data).run()
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError, struct.error) as error:
        raise CheckpointDamagedError(f"its pickle is malformed: {type(error).__name__} {error}") from error


@final
class _PickleVM:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self.stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MAX_OPERATIONS):
            operation = self.take(1)[0]
            if operation == _STOP:
                return self.stack.pop()
            action = _ACTIONS.get(operation)
            if action is None:
                raise ValueError(f"unsupported operation {operation:#04x} at byte {self._at - 1}")
            action(self)
        raise ValueError(f"it has more than {_MAX_OPERATIONS:,} operations")

    # ---- input

    def take(self, count: int) -> bytes:
        """Return the next ``count`` bytes. Check the count first, so that a huge count does not allocate memory."""
        if not 0 <= count <= len(self._data) - self._at:
            raise ValueError(
                f"expected {count} bytes at byte {self._at}, but only {len(self._data) - self._at} bytes are left"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self._data.index(b"\n", self._at)
        text = self.take(end - self._at).decode()
        self.take(1)
        return text

    # ---- stack

    def mark(self) -> None:
        self._outer.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._outer.pop()
        return items

    def pop_many(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise ValueError(f"expected {count} values on the stack, got {len(self.stack)}")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def put_memo(self, index: int | None = None) -> None:
        self._memo[len(self._memo) if index is None else index] = self.stack[-1]

    def get_memo(self, index: int) -> None:
        self.stack.append(self._memo[index])

    # ---- containers

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, PickledObject):
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise TypeError(f"cannot append items to {type(target).__name__}")

    def add(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, PickledObject):
            target.items.extend(items)
        elif isinstance(target, set):
            target.update(_key(item) for item in items)
        else:
            raise TypeError(f"cannot add members to {type(target).__name__}")

    def set(self, flat: list[Any]) -> None:
        pairs = [(_key(key), value) for key, value in zip(flat[::2], flat[1::2], strict=True)]
        target = self.stack[-1]
        if isinstance(target, PickledObject):
            target.pairs.extend(pairs)
        elif isinstance(target, dict):
            target.update(pairs)
        else:
            raise TypeError(f"cannot set entries of {type(target).__name__}")

    # ---- objects

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("module and class names must be strings")
        self.stack.append(PickledGlobal(module, name))

    def reduce(self, *, with_kwargs: bool = False) -> None:
        kwargs = self.stack.pop() if with_kwargs else None
        constructor, args = self.pop_many(2)
        self.stack.append(PickledObject(constructor, args, kwargs))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, PickledObject):
            raise TypeError(f"cannot set the state of {type(target).__name__}")
        target.state = state


def _key(key: Any) -> Any:
    """Check that a value may be used as a key, because hashing deeply nested values could overflow the C stack."""
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, _SCALARS) for part in parts):
        raise TypeError(f"cannot use this {type(key).__name__} as a dictionary key or set member")
    return key


def _signed_int(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _push(read: Callable[[_PickleVM], Any]) -> Callable[[_PickleVM], None]:
    def push(vm: _PickleVM) -> None:
        value = read(vm)  # Read the values first, because reading may pop the stack to an earlier mark.
        vm.stack.append(value)

    return push


def _drop_mark(vm: _PickleVM) -> None:
    vm.pop_to_mark()


def _pop(vm: _PickleVM) -> None:
    if vm.stack:
        vm.stack.pop()
    else:
        vm.pop_to_mark()


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
    0x8A: _push(lambda m: _signed_int(m.take(m.number("<B")))),
    0x8B: _push(lambda m: _signed_int(m.take(m.number("<i")))),
    ord("G"): _push(lambda m: m.number(">d")),
    ord("X"): _push(lambda m: m.take(m.number("<I")).decode("utf-8", "surrogatepass")),
    0x8C: _push(lambda m: m.take(m.number("<B")).decode("utf-8", "surrogatepass")),
    0x8D: _push(lambda m: m.take(m.number("<Q")).decode("utf-8", "surrogatepass")),
    ord("U"): _push(lambda m: m.take(m.number("<B")).decode()),  # Python 2's str
    ord("T"): _push(lambda m: m.take(m.number("<i")).decode()),
    ord("B"): _push(lambda m: m.take(m.number("<I"))),
    ord("C"): _push(lambda m: m.take(m.number("<B"))),
    0x8E: _push(lambda m: m.take(m.number("<Q"))),
    0x96: _push(lambda m: bytearray(m.take(m.number("<Q")))),
    # containers
    ord(")"): _push(lambda _: ()),
    ord("t"): _push(lambda m: tuple(m.pop_to_mark())),
    0x85: _push(lambda m: m.pop_many(1)),
    0x86: _push(lambda m: m.pop_many(2)),
    0x87: _push(lambda m: m.pop_many(3)),
    ord("]"): _push(lambda _: []),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.pop_to_mark()),
    ord("}"): _push(lambda _: {}),
    ord("s"): lambda m: m.set(list(m.pop_many(2))),
    ord("u"): lambda m: m.set(m.pop_to_mark()),
    0x8F: _push(lambda _: set()),
    0x90: lambda m: m.add(m.pop_to_mark()),
    0x91: _push(lambda m: frozenset(map(_key, m.pop_to_mark()))),
    # memo
    ord("q"): lambda m: m.put_memo(m.number("<B")),
    ord("r"): lambda m: m.put_memo(m.number("<I")),
    0x94: _PickleVM.put_memo,
    ord("h"): lambda m: m.get_memo(m.number("<B")),
    ord("j"): lambda m: m.get_memo(m.number("<I")),
    # objects
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(*m.pop_many(2)),
    ord("R"): _PickleVM.reduce,
    0x81: _PickleVM.reduce,
    0x92: lambda m: m.reduce(with_kwargs=True),
    ord("b"): _PickleVM.build,
    ord("Q"): _push(lambda m: PersistentId(m.stack.pop())),
}


def _ignore(_: bytes) -> None:
    """Ignore the protocol version and frame sizes, which are only needed by streaming readers."""
