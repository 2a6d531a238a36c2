"""Find which top-level names the code of a configuration reads, to tell variables from misspelled keys."""

from __future__ import annotations

import dis
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Final, final

__all__ = ["NO_USES", "NameUses", "uses_of"]


@final
@dataclass(frozen=True, slots=True)
class NameUses:
    """The top-level names that one file reads.

    Attributes:
        own: names that are read after the last assignment to them in the file.
        before: names that are read in the file, but not after the last assignment to them.
        inherited: names whose value in a base the file reads: by name, as ``_base_.name`` or as ``{{ _base_.name }}``.
        whole_base: whether the file uses ``_base_`` as a whole, for example in a loop, which may read any name.
    """

    own: frozenset[str] = frozenset()
    before: frozenset[str] = frozenset()
    inherited: frozenset[str] = frozenset()
    whole_base: bool = False

    def inherits(self, name: str) -> bool:
        """Return whether the file may read the value that its bases give to ``name``."""
        return self.whole_base or name in self.inherited

    def renamed(self, names: Mapping[str, str]) -> NameUses:
        """Return the uses after the file that imports this one gave other names to some of its keys."""

        def new(old: Iterable[str]) -> frozenset[str]:
            return frozenset(names.get(name, name) for name in old)

        return replace(self, own=new(self.own), before=new(self.before), inherited=new(self.inherited))


NO_USES: Final = NameUses()

_EXTENDED_ARG: Final = dis.opmap["EXTENDED_ARG"]
_STORES: Final = frozenset({dis.opmap["STORE_NAME"], dis.opmap["STORE_GLOBAL"]})
_LOAD_NAME: Final = dis.opmap["LOAD_NAME"]
# Its argument is twice the index of the name, plus a flag.
_LOAD_GLOBAL: Final = dis.opmap["LOAD_GLOBAL"]
_JUMPS_BACK: Final = frozenset(dis.opmap[name] for name in ("JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"))
_RELEVANT: Final = re.compile(
    b"[" + re.escape(bytes({_LOAD_NAME, _LOAD_GLOBAL, *_STORES, *_JUMPS_BACK})) + b"]", re.DOTALL
)
_LATER: Final = 1 << 60


def uses_of(code: CodeType, *, inherits: bool = False, base: Iterable[str] = (), whole_base: bool = False) -> NameUses:
    """Return the names that the code of a file reads.

    Args:
        code: the compiled file.
        inherits: whether the names of the bases are in the namespace of the file.
        base: further names that the file reads from its bases.
        whole_base: whether it uses ``_base_`` as a whole.
    """
    trace = _Trace()
    trace.scan(code)
    own: set[str] = set()
    before: set[str] = set()
    inherited = set(base)
    for name, (first, last) in trace.loads.items():
        stored = trace.stores.get(name)
        if inherits and (stored is None or first < stored[0]):
            inherited.add(name)
        if stored is not None:
            (own if last > stored[1] else before).add(name)
        elif inherits:  # The file may have modified the value of its base in place.
            own.add(name)
    return NameUses(frozenset(own), frozenset(before), frozenset(inherited), whole_base)


@final
@dataclass(slots=True)
class _Trace:
    """The first and last position at which each name is read and assigned. A read in a loop is at the end of the loop."""

    loads: dict[str, tuple[int, int]] = field(default_factory=dict)
    stores: dict[str, tuple[int, int]] = field(default_factory=dict)

    def scan(self, code: CodeType) -> None:
        loops: list[tuple[int, int]] = []
        loads: list[tuple[int, str]] = []
        for position, operation, argument in _operations(code.co_code):
            if operation == _LOAD_NAME:
                loads.append((position, code.co_names[argument]))
            elif operation == _LOAD_GLOBAL:
                loads.append((position, code.co_names[argument >> 1]))
            elif operation in _STORES:
                _extend(self.stores, code.co_names[argument], position, position)
            else:
                loops.append((position - argument, position))
        for position, name in loads:
            end = max((end for start, end in loops if start <= position <= end), default=position)
            _extend(self.loads, name, position, end)
        for name in _names_in_functions(code):
            _extend(self.loads, name, _LATER, _LATER)


def _operations(raw: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the position, operation and argument of each instruction that concerns names or loops."""
    operations, arguments = raw[0::2], raw[1::2]
    # A regular expression finds the few relevant instructions faster than a loop over all of them.
    for found in _RELEVANT.finditer(operations):
        position = found.start()
        argument = arguments[position]
        before = position - 1
        while before >= 0 and operations[before] == _EXTENDED_ARG:
            argument |= arguments[before] << 8 * (position - before)
            before -= 1
        yield position, operations[position], argument


def _names_in_functions(code: CodeType) -> Iterator[str]:
    """Yield the global names that functions, comprehensions and classes read; they may run at any later time."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for _, operation, argument in _operations(inner.co_code):
                if operation in (_LOAD_NAME, _LOAD_GLOBAL):
                    yield inner.co_names[argument >> 1 if operation == _LOAD_GLOBAL else argument]
            yield from _names_in_functions(inner)


def _extend(spans: dict[str, tuple[int, int]], name: str, first: int, last: int) -> None:
    known = spans.get(name)
    spans[name] = (first, last) if known is None else (min(known[0], first), max(known[1], last))
