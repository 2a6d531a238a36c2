"""Write predictions to files, one result after the other."""

from __future__ import annotations

import csv
import json
import math
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from stratagem.errors import ConfigValueError, TrainingError
from stratagem.storage import atomic_file

__all__ = ["require_prediction_file", "write_predictions"]

# The name of a result that is not a mapping.
_VALUE = "prediction"
_INDEX = "index"
_SEPARATOR = "/"
_FLOATS = (torch.bfloat16, torch.float16)


def require_prediction_file(path: Path) -> None:
    """Check the suffix and the folder of a file for predictions.

    Raises:
        ConfigValueError: if the suffix is unknown or the folder does not exist.
    """
    if path.suffix not in _WRITERS:
        raise ConfigValueError(
            f"{path}: the format of predictions is determined by the suffix, which must be {', '.join(_WRITERS)}."
        )
    if not path.parent.is_dir():
        raise ConfigValueError(f"{path}: the folder {path.parent} does not exist. Create it first.")


def write_predictions(path: Path, results: Iterator[Any]) -> int:
    """Write results to a file in the format of its suffix; return their number. The file is complete or unchanged.

    Raises:
        TrainingError: if a result does not fit the format.
    """
    with atomic_file(path) as temporary:
        writer = _WRITERS[path.suffix](path)
        return writer.write(temporary, results)


class _Writer(ABC):
    """Writes results.

    Args:
        path: the final path, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def write(self, target: Path, results: Iterator[Any]) -> int:
        """Write all results to ``target``; return their number."""


@final
class _JsonLines(_Writer):
    """One JSON object per line: the result if it is a mapping, otherwise an object with the key ``prediction``."""

    def write(self, target: Path, results: Iterator[Any]) -> int:
        count = 0
        with target.open("w", encoding="utf-8") as file:
            for result in results:
                count += 1
                value = result if isinstance(result, Mapping) else {_VALUE: result}
                file.write(json.dumps(_json_value(value, self.path), allow_nan=False, ensure_ascii=False) + "\n")
        return count


@final
class _Csv(_Writer):
    """One row per result, and one column for each number or string in it."""

    def write(self, target: Path, results: Iterator[Any]) -> int:
        first = next(results, None)
        if first is None:
            return 0
        columns = list(self._row(first, 0))
        count = 0
        with target.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow([_INDEX, *columns])
            for index, result in enumerate(chain([first], results)):
                row = self._row(result, index)
                if list(row) != columns:
                    raise TrainingError(
                        f"{self.path}: the results of samples 0 and {index} have different columns, because their names or "
                        f"shapes differ: {', '.join(columns)} and {', '.join(row)}. Use a .jsonl or .pt file."
                    )
                rows.writerow([index, *row.values()])
                count = index + 1
        return count

    def _row(self, result: Any, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name, value in _leaves(result):
            array = value if isinstance(value, np.ndarray) else np.asarray(value) if isinstance(value, list) else None
            if array is None or array.ndim == 0:
                row[name] = _scalar(value, name, self.path) if array is None else array.item()
            elif array.ndim == 1 and array.dtype.kind in "biufU":
                row |= {f"{name}_{number}": item for number, item in enumerate(array.tolist())}
            else:
                raise TrainingError(
                    f"{self.path}: {name} of sample {index} has the shape {list(array.shape)}, but a column contains numbers or "
                    "strings. Use a .jsonl, .npz or .pt file."
                )
        return row


@final
class _Arrays(_Writer):
    """One array for each tensor or number in a result, with one row per sample."""

    def write(self, target: Path, results: Iterator[Any]) -> int:
        count = 0
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{self.path.name}.") as folder:
            kinds: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
            files: dict[str, Any] = {}
            try:
                for count, result in enumerate(results, 1):
                    row = {name: self._array(name, value, count - 1) for name, value in _leaves(result)}
                    if count == 1:
                        kinds = {name: (each.dtype, each.shape) for name, each in row.items()}
                        files = {name: (Path(folder) / str(k)).open("wb") for k, name in enumerate(row)}
                    self._require_same(kinds, row, count - 1)
                    for name, array in row.items():
                        files[name].write(array.tobytes())
            finally:
                for file in files.values():
                    file.close()
            with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for number, (name, (dtype, shape)) in enumerate(kinds.items()):
                    header = {
                        "descr": np.lib.format.dtype_to_descr(dtype),
                        "fortran_order": False,
                        "shape": (count, *shape),
                    }
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array_header_1_0(entry, header)
                        with (Path(folder) / str(number)).open("rb") as source:
                            shutil.copyfileobj(source, entry)
        return count

    def _array(self, name: str, value: Any, index: int) -> np.ndarray[Any, Any]:
        array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
        if array.dtype.kind not in "biufc":
            raise TrainingError(
                f"{self.path}: {name} of sample {index} is a {type(value).__name__}, which is not an array of numbers. Use a "
                ".jsonl or .pt file."
            )
        return array

    def _require_same(self, kinds: Mapping[str, Any], row: Mapping[str, np.ndarray[Any, Any]], index: int) -> None:
        own = {name: (each.dtype, each.shape) for name, each in row.items()}
        if own != kinds:
            raise TrainingError(
                f"{self.path}: the results of samples 0 and {index} have different names, types or shapes: {_describe(kinds)} "
                f"and {_describe(own)}. Use a .jsonl or .pt file."
            )


@final
class _Torch(_Writer):
    """A list of results, as ``torch.save`` writes it. All results are in memory."""

    def write(self, target: Path, results: Iterator[Any]) -> int:
        everything = list(results)
        torch.save(everything, target)
        return len(everything)


_WRITERS: Mapping[str, type[_Writer]] = {".jsonl": _JsonLines, ".csv": _Csv, ".npz": _Arrays, ".pt": _Torch}


def _leaves(result: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the named values in a result: mappings and tuples contain several, and tensors become arrays."""
    if isinstance(result, Mapping | tuple):
        items = result.items() if isinstance(result, Mapping) else enumerate(result)
        for key, value in items:
            yield from _leaves(value, f"{name}{_SEPARATOR}{key}" if name else str(key))
    elif result is not None or not name:
        yield name or _VALUE, _as_array(result) if isinstance(result, Tensor) else result


def _as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = (tensor.float() if tensor.dtype in _FLOATS else tensor).numpy()
    return array


def _json_value(value: Any, path: Path) -> Any:
    if isinstance(value, Tensor):
        value = _as_array(value)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json_value(each, path) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(each, path) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None else _scalar(value, "a value", path)


def _scalar(value: Any, name: str, path: Path) -> Any:
    if not isinstance(value, str | bool | int | float | None):
        raise TrainingError(
            f"{path}: {name} is a {type(value).__name__}, which this format cannot contain. Return numbers, strings and tensors, "
            "or use a .pt file."
        )
    return value


def _describe(kinds: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in kinds.items())
