"""Simulate a disk that loses unsynced data when the power fails.

The operations of a program are recorded with their data. After a power loss, the disk contains everything that was
synced: the contents of a file if the file was synced, and a name if its folder was synced. Of everything else it contains
an arbitrary part, as https://research.cs.wisc.edu/adsl/Publications/alice-osdi14.pdf observed for real file systems: each
change may or may not be on the disk, and a write may be incomplete.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

# The part of an unsynced change that reached the disk.
DROPPED, HALF, WHOLE = 0.0, 0.5, 1.0
# Larger than any valid PID (https://man7.org/linux/man-pages/man5/proc_sys_kernel.5.html, pid_max).
NOBODY = 1 << 22 | 1


@final
@dataclass(eq=False)
class _Node:
    """The contents of a file, or the names in a folder, when the recording started."""

    content: bytes | None = None
    names: dict[str, _Node] = field(default_factory=dict)


@final
@dataclass(frozen=True, eq=False)
class _Written:
    """Bytes written to a file, or a new size of the file."""

    node: _Node
    offset: int
    data: bytes | None

    def apply(self, contents: dict[_Node, bytearray], share: float) -> None:
        content = contents[self.node]
        if self.data is None:
            content[self.offset :] = b""
            content.extend(bytes(self.offset - len(content)))
            return
        data = self.data[: int(len(self.data) * share)]
        content.extend(bytes(max(0, self.offset - len(content))))
        content[self.offset : self.offset + len(data)] = data


@final
@dataclass(frozen=True, eq=False)
class _Named:
    """New targets for names in folders, changed atomically; None removes a name."""

    names: tuple[tuple[_Node, str, _Node | None], ...]


@final
@dataclass(frozen=True, eq=False)
class _Synced:
    node: _Node


@final
class Recording:
    """The recorded operations on a folder; pass :meth:`act` to ``faults.between``."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._start = _read(root)
        self._now: dict[_Node, dict[str, _Node]] = {}
        self._open: dict[int, _Node] = {}
        self._done: list[_Written | _Named | _Synced] = []

    def __len__(self) -> int:
        return len(self._done)

    def act(self, name: str, operation: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Run an operation and record it."""
        result = operation(*arguments)
        getattr(self, f"_{name}")(result, *arguments)
        return result

    def pending(self, end: int) -> list[int]:
        """Return the numbers of the first ``end`` changes that were not synced by then."""
        return [number for number in range(end) if self._is_pending(number, end)]

    def replay(self, end: int, kept: dict[int, float], folder: Path) -> None:
        """Create ``folder`` with the contents of a disk whose power failed after ``end`` changes.

        ``kept`` maps each pending change to the part of it that reached the disk; changes that are missing were lost.
        """
        contents: dict[_Node, bytearray] = {}
        names: dict[_Node, dict[str, _Node]] = {}
        order: dict[_Node, int] = {}
        for number, change in enumerate(self._done[:end]):
            share = kept.get(number, DROPPED) if self._is_pending(number, end) else WHOLE
            if share == DROPPED or isinstance(change, _Synced):
                continue
            if isinstance(change, _Written):
                contents.setdefault(change.node, bytearray(change.node.content or b""))
                change.apply(contents, share)
                order[change.node] = 1 + number
            else:
                for parent, name, node in change.names:
                    _set(names.setdefault(parent, dict(parent.names)), name, node)
        self._lay_out(self._start, folder, contents, names, order)

    def _is_pending(self, number: int, end: int) -> bool:
        change = self._done[number]
        if isinstance(change, _Synced):
            return False
        nodes = {change.node} if isinstance(change, _Written) else {parent for parent, _, _ in change.names}
        later = self._done[number + 1 : end]
        return not any(isinstance(other, _Synced) and other.node in nodes for other in later)

    def _lay_out(
        self,
        node: _Node,
        place: Path,
        contents: dict[_Node, bytearray],
        names: dict[_Node, dict[str, _Node]],
        order: dict[_Node, int],
    ) -> None:
        if node.content is not None:
            place.write_bytes(contents.get(node, node.content))
            # Files that existed before are older than those written later.
            os.utime(place, (1e9 + order.get(node, 0),) * 2)
            return
        place.mkdir()
        for name, inner in names.get(node, node.names).items():
            # The process that wrote them no longer exists after the power loss.
            self._lay_out(inner, place / name.replace(f"-{os.getpid()}-", f"-{NOBODY}-"), contents, names, order)

    def _parent(self, path: Path) -> tuple[_Node, str]:
        node = self._start
        *folders, name = path.relative_to(self._root).parts
        for folder in folders:
            node = self._names(node)[folder]
        return node, name

    def _names(self, node: _Node) -> dict[str, _Node]:
        return self._now.setdefault(node, dict(node.names))

    def _at(self, path: Path) -> _Node:
        if path == self._root:
            return self._start
        parent, name = self._parent(path)
        return self._names(parent)[name]

    def _name(self, *named: tuple[Path, _Node | None]) -> None:
        change = _Named(tuple((*self._parent(path), node) for path, node in named))
        for parent, name, node in change.names:
            _set(self._names(parent), name, node)
        self._done.append(change)

    def _create_folder(self, _: None, path: Path) -> None:
        self._name((path, _Node()))

    def _create_file(self, descriptor: int, path: Path) -> None:
        self._open[descriptor] = _Node(b"")
        self._name((path, self._open[descriptor]))

    def _open_file(self, descriptor: int, path: Path) -> None:
        self._open[descriptor] = self._at(path)

    _open_folder = _open_file

    def _write(self, count: int, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._done.append(_Written(self._open[descriptor], offset, bytes(memoryview(data)[:count])))

    def _truncate(self, _: None, descriptor: int, size: int) -> None:
        self._done.append(_Written(self._open[descriptor], size, None))

    def _fsync(self, _: None, descriptor: int) -> None:
        self._done.append(_Synced(self._open[descriptor]))

    def _close(self, _: None, descriptor: int) -> None:
        del self._open[descriptor]

    def _rename(self, _: None, old: Path, new: Path) -> None:
        node = self._at(old)
        self._name((old, None), (new, node))

    def _exchange(self, done: bool, first: Path, second: Path) -> None:
        if done:
            one, other = self._at(first), self._at(second)
            self._name((first, other), (second, one))

    def _remove_file(self, _: None, path: Path) -> None:
        parent, name = self._parent(path)
        if name in self._names(parent):
            self._name((path, None))

    def _remove_folder(self, _: None, path: Path) -> None:
        self._name((path, None))


def _read(path: Path) -> _Node:
    if path.is_file():
        return _Node(path.read_bytes())
    return _Node(names={inner.name: _read(inner) for inner in path.iterdir()})


def _set(names: dict[str, _Node], name: str, node: _Node | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node
