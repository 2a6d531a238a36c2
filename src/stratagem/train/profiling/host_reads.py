"""Find operations for whose result the host waits, with the line of the program that calls them."""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HostRead", "HostReads"]

_READS: Final = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")
_TORCH: Final = Path(torch.__file__).parent
# Functions of torch in Python that only call an operator, such as torch.unique, and those that call a dispatch mode.
_TRANSPARENT: Final = tuple(
    str(_TORCH / name)
    for name in (
        "_tensor.py", "functional.py", "_jit_internal.py",
        "_compile.py", "_dynamo/eval_frame.py", "utils/_python_dispatch.py", "_ops.py",
    )
)  # fmt: skip
_LIBRARIES: Final = tuple(f"{folder}/" for folder in (_TORCH, Path(__file__).parents[2], sysconfig.get_path("stdlib")))


@final
@dataclass(frozen=True, slots=True)
class HostRead:
    """A line that reads a value, such as ``loss.item()``.

    Attributes:
        line: the file and line, such as ``model.py:12``; None for calls of torch and of this package.
        operator: the operator, such as ``_local_scalar_dense``, which ``item()`` calls.
        calls: the number of calls.
    """

    line: str | None
    operator: str
    calls: int


@final
class HostReads(TorchDispatchMode):
    """Records the operations inside its ``with`` block that copy values to the host or have shapes that depend on values.

    On an accelerator, the host waits until the device has computed them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._calls: Counter[tuple[str | None, str]] = Counter()
        # Lines outside of the `with` block do not count.
        self._outermost = sys._getframe(1)

    @property
    def found(self) -> list[HostRead]:
        """The lines, those with the most calls first."""
        return [HostRead(line, operator, calls) for (line, operator), calls in self._calls.most_common()]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(getattr(func, "_overloadpacket", None), "__name__", "")
        out = func(*args, **(kwargs or {}))
        if name in _READS or (name in ("_to_copy", "copy_") and _leaves_device(name, args, out)):
            self._calls[_line_of_caller(self._outermost), name] += 1
        return out


def _leaves_device(name: str, args: Any, out: Any) -> bool:
    source, target = (args[1], args[0]) if name == "copy_" else (args[0], out)
    return bool(source.device.type != "cpu" and target.device.type == "cpu")


def _line_of_caller(outermost: Any) -> str | None:
    """Return the line that calls an operator; None if it is in torch, this package, the standard library or an outer frame."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame is not outermost:
        file = frame.f_code.co_filename
        if file not in _TRANSPARENT:
            return None if file.startswith(("<", *_LIBRARIES)) else f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return None
