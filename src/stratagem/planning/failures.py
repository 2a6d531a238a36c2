"""Explain why a model could not be simulated."""

from __future__ import annotations

import linecache
import traceback
from pathlib import Path
from typing import Final

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from stratagem.errors import StratagemError

__all__ = ["describe_failure"]

_LIBRARIES: Final = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def describe_failure(error: BaseException, model: str, *, sparse: bool = False) -> str:
    """Return where and why a simulated step failed: the last line that is neither torch's nor this package's.

    Args:
        error: what the step raised.
        model: the name of the model.
        sparse: whether the model has sparse gradients.
    """
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(_LIBRARIES)]
    where = ""
    if frames:
        last = frames[-1]
        line = linecache.getline(last.filename, last.lineno or 0).strip()
        where = f"{last.filename}:{last.lineno} in {last.name}: {line}\n"
    static = f"Only the static sizes of {model} are known."
    if isinstance(error, StratagemError):
        # A real step would raise it as well.
        return f"{where}{error} {static}"
    why = _explain(error, has_line=bool(where), sparse=sparse)
    return f"{where}{why} {static} Measure a real step with `stratagem find batch`."


def _explain(error: BaseException, *, has_line: bool, sparse: bool) -> str:
    if isinstance(error, DynamicOutputShapeException):
        return (
            f"The shape of the result of {error.func} depends on the values of tensors, and tensors have no values in a "
            "simulated step. An operation with a fixed shape, such as torch.where(condition, x, y) or a product with a mask, "
            "can be simulated."
        )
    if isinstance(error, DataDependentOutputException):
        return (
            f"This line reads a value of a tensor ({error.func}), and tensors have no values in a simulated step. Operations on "
            "tensors, such as torch.where, can be simulated, and on accelerators, they do not wait for the device."
        )
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": .!")
    if not has_line and (sparse or "Sparse" in text):
        return f"{text}. Steps with sparse gradients are not simulated, and the static sizes count these gradients as dense."
    what = "this line works in training, it" if has_line else "the step works in training, it probably"
    return f"{text}. If {what} needs values, which tensors do not have in a simulated step."
