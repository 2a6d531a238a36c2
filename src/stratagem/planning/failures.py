"""Explain why a model could not be simulated."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path
from typing import Final

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

__all__ = ["describe_failure"]

_LIBRARIES: Final = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def describe_failure(error: BaseException, model: str) -> str:
    """Return where and why a simulated step failed: the last line that is neither torch's nor this package's."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(_LIBRARIES)]
    where = ""
    if frames:
        last = frames[-1]
        line = linecache.getline(last.filename, last.lineno or 0).strip()
        where = f"{last.filename}:{last.lineno} in {last.name}: {line}\n"
    if isinstance(error, DynamicOutputShapeException):
        why = f"The shape of the result of {error.func} depends on the values of tensors"
    elif isinstance(error, DataDependentOutputException):
        why = f"{error.func} reads a value of a tensor"
    else:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
    return (
        f"{where}{why}, and tensors have no values in a simulated step, so only the static sizes of {model} are known. "
        "Replace the operation by one with a fixed shape, such as torch.where or a mask, or measure a real step with "
        "`stratagem find batch`."
    )
