"""Read which collectives this rank has begun, from torch's flight recorder, and where its code is."""

from __future__ import annotations

import json
import sys
import sysconfig
import threading
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple, Self, final

import torch

from stratagem.utils.torch_private import flight_record, process_groups

__all__ = ["Collective", "RankRecord", "read_rank_record"]

# The first dump with stacks imports torch's compiler, which takes seconds, or forever if the main thread hangs in an import.
_STACKS_S: Final = 30.0
# The collectives of each group that a record contains, for small worlds and at least.
_MOST_COLLECTIVES, _FEWEST_COLLECTIVES, _COLLECTIVES_OF_ALL_RANKS = 100, 8, 4096
_TORCH: Final = str(Path(torch.__file__).parent)
_PACKAGE: Final = str(Path(__file__).parents[2])
_PLUMBING: Final = (_TORCH, str(Path(_PACKAGE) / "distributed"))
_LIBRARIES: Final = (_PACKAGE, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
_SKIPPED: Final = (sysconfig.get_path("stdlib"), sysconfig.get_path("scripts"), "<")
_DTYPES: Final = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
}  # fmt: skip


class _Frame(NamedTuple):
    file: str
    line: int
    function: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """A collective operation that a rank has begun.

    Attributes:
        group: the name of its process group.
        number: its number in the sequence of the group's collectives.
        kind: the operation of the backend, such as ``"all_reduce"``.
        function: the function of ``torch.distributed`` that was called, if it is known; otherwise the kind.
        shape: the dtype and shape of its input, such as ``"float32[4]"``; empty if it has none.
        finished: whether it has completed on this rank.
        order: the number of collectives of all groups that this rank had called before.
        place: the position in the code that called it; empty if it is unknown.
    """

    group: str
    number: int
    kind: str
    function: str
    shape: str
    finished: bool
    order: int
    place: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """The state of a rank during a hang.

    Attributes:
        rank: the rank.
        place: the position of the main thread in the user's code.
        stack: the stack of the main thread, outermost call first.
        groups: the description and the ranks of each process group of this rank, by name.
        collectives: the last collectives that the rank has begun, in this order.
    """

    rank: int
    place: str
    stack: Sequence[str]
    groups: Mapping[str, tuple[str, Sequence[int]]]
    collectives: Sequence[Collective]

    def as_json(self) -> str:
        """Return the record as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the record that :meth:`as_json` serialized."""
        values = json.loads(text)
        groups = {name: (description, tuple(ranks)) for name, (description, ranks) in values.pop("groups").items()}
        return cls(groups=groups, collectives=[Collective(**each) for each in values.pop("collectives")], **values)


def read_rank_record(rank: int, size: int, error: BaseException | None = None, *, stacks: bool = True) -> RankRecord:
    """Return the record of this rank. May be called while the main thread is blocked.

    Args:
        rank: this rank.
        size: the number of ranks, which limits the size of the record.
        error: the error of a collective that the main thread has called.
        stacks: whether to include the places of all collectives, which takes seconds.
    """
    entries = _read_entries() if stacks else flight_record(stacks=False)
    stack = _stack_of_main_thread() if error is None else _stack_of(error)
    place, last = _describe_place(stack), _last_of_main_thread(entries)
    # A collective that has failed is not listed as active.
    waiting = last if last is not None and (error is not None or not last["retired"]) else None
    return RankRecord(
        rank=rank,
        place=place,
        stack=[f"{frame.file}:{frame.line} in {frame.function}" for frame in reversed(stack)],
        groups=process_groups(),
        collectives=list(
            _last_of_each_group([_collective(entry, at=place if entry is waiting else None) for entry in entries], size)
        ),
    )


def _last_of_main_thread(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    main = str(threading.main_thread().ident)
    return next(
        (each for each in reversed(entries) if str(each["thread_id"]) == main), entries[-1] if entries else None
    )


def _read_entries() -> list[dict[str, Any]]:
    """Return the entries of the flight recorder, with stacks if they can be read in time."""
    entries = flight_record(stacks=False)
    with_stacks: list[list[dict[str, Any]]] = []
    reader = threading.Thread(target=lambda: with_stacks.append(flight_record(stacks=True)), daemon=True)
    reader.start()
    reader.join(_STACKS_S)
    return with_stacks[0] if with_stacks else entries


def _last_of_each_group(collectives: Sequence[Collective], size: int) -> Iterator[Collective]:
    limit = max(_FEWEST_COLLECTIVES, min(_MOST_COLLECTIVES, _COLLECTIVES_OF_ALL_RANKS // size))
    surplus = {group: count - limit for group, count in Counter(each.group for each in collectives).items()}
    for each in collectives:
        surplus[each.group] -= 1
        if surplus[each.group] < 0:
            yield each


def _collective(entry: Mapping[str, Any], *, at: str | None) -> Collective:
    """Return a collective; ``at`` is the position of the main thread if it waits in this one."""
    frames = [_Frame(each["filename"], each["line"], each["name"]) for each in entry.get("frames", ())]
    kind = str(entry["profiling_name"]).partition(":")[2]
    inputs = zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
    shapes = [f"{_DTYPES.get(dtype, dtype)}{list(sizes)}" for dtype, sizes in inputs]
    return Collective(
        group=str(entry["process_group"][0]),
        number=int(entry["collective_seq_id"]),
        kind=kind,
        function=_called_function(frames) or kind,
        shape=", ".join(shapes[:3]) + (f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""),
        finished=at is None and bool(entry["retired"]),
        order=int(entry["record_id"]),
        place=_describe_place(frames) or at or "",
    )


def _called_function(frames: Iterable[_Frame]) -> str:
    """Return the outermost function of ``torch.distributed`` among the innermost frames; empty if there is none."""
    found = ""
    for frame in frames:
        name = Path(frame.file).name
        if name == "distributed_c10d.py":
            found = frame.function
        elif name not in ("c10d_logger.py", "typing_extensions.py"):
            break
    return found


def _stack_of_main_thread() -> list[_Frame]:
    """Return the frames of the main thread, innermost first."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    return [] if frame is None else _frames(traceback.walk_stack(frame))


def _stack_of(error: BaseException) -> list[_Frame]:
    """Return the frames from which an error was raised, innermost first; if it wraps another error, those of the latter."""
    while isinstance(error.__cause__, RuntimeError):
        error = error.__cause__
    return _frames(traceback.walk_tb(error.__traceback__))[::-1]


def _frames(walked: Iterable[tuple[FrameType, int]]) -> list[_Frame]:
    return [_Frame(frame.f_code.co_filename, line, frame.f_code.co_name) for frame, line in walked]


def _describe_place(frames: Sequence[_Frame]) -> str:
    """Return the innermost position outside of torch; if it is in a library, also the user's call of it."""
    own = [frame for frame in frames if not frame.file.startswith(_PLUMBING) and not _is_skipped(frame.file)]
    users = [frame for frame in own if not frame.file.startswith(_LIBRARIES)]
    if not own:
        return _describe_frame(frames[0]) if frames else ""
    innermost = _describe_frame(own[0])
    return innermost if not users or users[0] is own[0] else f"{innermost}, called from {_describe_frame(users[0])}"


def _is_skipped(file: str) -> bool:
    # The packages are below the folder of the standard library.
    return (file.startswith(_SKIPPED) and not file.startswith(_LIBRARIES)) or file.endswith("typing_extensions.py")


def _describe_frame(frame: _Frame) -> str:
    return f"{_short_path(Path(frame.file))}:{frame.line} in {frame.function}"


def _short_path(path: Path) -> Path:
    for folder in (Path(_PACKAGE).parent, Path(_TORCH).parent, Path(_LIBRARIES[1]), Path.cwd()):
        if path.is_relative_to(folder):
            return path.relative_to(folder)
    return path
