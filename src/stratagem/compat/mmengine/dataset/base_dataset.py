"""The base class of datasets: annotations that are loaded once, and transforms that prepare each sample."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.fileio import join_path, list_from_file, load
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.registry import TRANSFORMS
from stratagem.compat.mmengine.utils import is_abs
from stratagem.errors import ConfigTypeError, ConfigValueError, TrainingError

__all__ = ["BaseDataset", "Compose", "force_full_init"]

_DATA_PREFIX: Mapping[str, Any] = MappingProxyType({"img_path": ""})
_ANNOTATIONS = ("data_list", "data_address", "data_bytes")


class Compose:
    """Apply transforms one after the other. If one of them returns None, the result is None.

    Args:
        transforms: functions, or configurations of transforms.

    Raises:
        ConfigTypeError: if a transform cannot be called.
    """

    def __init__(self, transforms: Sequence[dict[str, Any] | Callable[..., Any]] | None) -> None:
        self.transforms: list[Callable[..., Any]] = []
        for given in transforms or ():
            transform = TRANSFORMS.build(given) if isinstance(given, dict) else given
            if not callable(transform):
                raise ConfigTypeError(f"A transform must be callable or the configuration of one, got {given!r}.")
            self.transforms.append(transform)

    def __call__(self, data: Any) -> Any:
        """Return the result of all transforms."""
        for transform in self.transforms:
            data = transform(data)
            if data is None:
                return None
        return data

    def __repr__(self) -> str:
        return "\n".join([f"{type(self).__name__}(", *(f"    {transform}" for transform in self.transforms), ")"])


def force_full_init(old_func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that calls ``full_init`` of its object before the first call.

    Raises:
        AttributeError: when the method is called, if the object has no ``full_init``.
    """

    @functools.wraps(old_func)
    def wrapper(obj: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(obj, "full_init"):
            raise AttributeError(f"{type(obj).__name__} has no method full_init, which {old_func.__name__} requires.")
        if not getattr(obj, "_fully_initialized", False):
            _warn(f"{type(obj).__name__}.{old_func.__name__} calls full_init, because it was not called before.")
            obj.full_init()
            obj._fully_initialized = True
        return old_func(obj, *args, **kwargs)

    return wrapper


class BaseDataset(Dataset[Any]):
    """A dataset whose annotations are in a file, and whose samples are prepared by transforms.

    The file contains a dict with ``metainfo``, a dict, and ``data_list``, a list with the annotation of each sample. Subclasses
    override ``load_data_list`` to read other files.

    Args:
        ann_file: the path of the annotations, relative to ``data_root``.
        metainfo: information about the dataset, such as class names, which takes precedence over that in the file. A string
            that is the path of a file is replaced with its lines.
        data_root: the folder of the dataset.
        data_prefix: folders relative to ``data_root``, by the key of the annotation whose paths are relative to them.
        filter_cfg: options for ``filter_data``.
        indices: the number of samples to use, from the start or, if it is negative, from the end; or the indices of the samples.
        serialize_data: whether annotations are stored as one array, which worker processes share without copying.
        pipeline: the transforms.
        test_mode: whether a sample for which the transforms return None is an error.
        lazy_init: whether annotations are not loaded before they are needed.
        max_refetch: the number of other random samples that are tried if the transforms return None.
    """

    METAINFO: ClassVar[dict[str, Any]] = {}
    _fully_initialized: bool = False

    def __init__(
        self,
        ann_file: str | None = "",
        metainfo: Mapping[str, Any] | Config | None = None,
        data_root: str | None = "",
        data_prefix: Mapping[str, Any] = _DATA_PREFIX,
        filter_cfg: dict[str, Any] | None = None,
        indices: int | Sequence[int] | None = None,
        serialize_data: bool = True,
        pipeline: Sequence[dict[str, Any] | Callable[..., Any]] = (),
        test_mode: bool = False,
        lazy_init: bool = False,
        max_refetch: int = 1000,
    ) -> None:
        self.ann_file = ann_file
        self._metainfo = self._load_metainfo(copy.deepcopy(metainfo))
        self.data_root = data_root
        self.data_prefix: Any = dict(data_prefix) if data_prefix is _DATA_PREFIX else copy.copy(data_prefix)
        self.filter_cfg = copy.deepcopy(filter_cfg)
        self._indices = indices
        self.serialize_data = serialize_data
        self.test_mode = test_mode
        self.max_refetch = max_refetch
        self.data_list: list[dict[str, Any]] = []
        self.data_bytes: NDArray[np.uint8]
        self.data_address: NDArray[np.int64]
        self._join_prefix()
        self.pipeline = Compose(pipeline)
        if not lazy_init:
            self.full_init()

    @property
    def metainfo(self) -> dict[str, Any]:
        """A copy of the information about the dataset."""
        return copy.deepcopy(self._metainfo)

    def full_init(self) -> None:
        """Load, filter and store the annotations, unless this was done before."""
        if self._fully_initialized:
            return
        self.data_list = self.load_data_list()
        self.data_list = self.filter_data()
        if self._indices is not None:
            self.data_list = self._get_unserialized_subset(self._indices)
        if self.serialize_data:
            self.data_bytes, self.data_address = self._serialize_data()
        self._fully_initialized = True

    def load_data_list(self) -> list[dict[str, Any]]:
        """Return the annotations of all samples.

        Raises:
            ConfigTypeError: if the file or an annotation has another type.
            ConfigValueError: if the file lacks ``data_list`` or ``metainfo``.
        """
        annotations = load(self.ann_file)
        if not isinstance(annotations, dict):
            raise ConfigTypeError(f"{self.ann_file} must contain a dict, got {type(annotations).__name__}.")
        missing = [key for key in ("data_list", "metainfo") if key not in annotations]
        if missing:
            raise ConfigValueError(f"{self.ann_file} has no {' and no '.join(missing)}; its keys are {[*annotations]}.")
        self._metainfo = {**annotations["metainfo"], **self._metainfo}
        data_list: list[dict[str, Any]] = []
        for raw in annotations["data_list"]:
            parsed = self.parse_data_info(raw)
            items = parsed if isinstance(parsed, list) else [parsed]
            for item in items:
                if not isinstance(item, dict):
                    raise ConfigTypeError(f"parse_data_info must return a dict or a list of dicts, got {parsed!r}.")
            data_list.extend(items)
        return data_list

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the annotation of a sample, or several ones, from an item of ``data_list``.

        Args:
            raw_data_info: the item. Its paths are joined with ``data_prefix``.
        """
        for key, prefix in self.data_prefix.items():
            if key not in raw_data_info:
                raise InvalidArgumentError(
                    f"data_prefix has the key {key!r}, but the annotation has not: {raw_data_info}"
                )
            raw_data_info[key] = join_path(prefix, raw_data_info[key])
        return raw_data_info

    def filter_data(self) -> list[dict[str, Any]]:
        """Return the annotations of the samples to keep: all, unless a subclass overrides this."""
        return self.data_list

    def get_cat_ids(self, idx: int) -> list[int]:
        """Return the categories of a sample, for ``ClassBalancedDataset``."""
        raise NotImplementedError(f"{type(self).__name__} must implement get_cat_ids, which returns the categories.")

    @force_full_init
    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Return the annotation of a sample, with its index under ``sample_idx``."""
        info: dict[str, Any] = self._unpickled(idx) if self.serialize_data else copy.deepcopy(self.data_list[idx])
        info["sample_idx"] = idx if idx >= 0 else len(self) + idx
        return info

    def __getitem__(self, idx: int) -> Any:
        """Return a prepared sample, or another random one if the transforms return None.

        Raises:
            TrainingError: if the transforms return None for all samples that were tried.
        """
        if not self._fully_initialized:
            _warn("Call full_init() of the dataset before workers start, so that it does not run in each of them.")
            self.full_init()
        for _ in range(1 if self.test_mode else self.max_refetch + 1):
            data = self.prepare_data(idx)
            if data is not None:
                return data
            if self.test_mode:
                raise TrainingError(
                    f"The transforms returned None for sample {idx}, which is not allowed in test_mode."
                )
            idx = self._rand_another()
        raise TrainingError(
            f"The transforms returned None for {self.max_refetch + 1} samples. Check the paths and the pipeline."
        )

    def prepare_data(self, idx: int) -> Any:
        """Return the result of the transforms for a sample."""
        return self.pipeline(self.get_data_info(idx))

    @force_full_init
    def __len__(self) -> int:
        return len(self.data_address) if self.serialize_data else len(self.data_list)

    def _rand_another(self) -> int:
        """Return a random index."""
        return int(np.random.randint(0, len(self)))

    @classmethod
    def _load_metainfo(cls, metainfo: Mapping[str, Any] | Config | None = None) -> dict[str, Any]:
        """Return ``METAINFO`` with the given information; strings that are paths are replaced with the lines of the files."""
        merged = copy.deepcopy(cls.METAINFO)
        if metainfo is None:
            return merged
        if not isinstance(metainfo, Mapping | Config):
            raise ConfigTypeError(f"metainfo must be a mapping, got {type(metainfo).__name__}.")
        for key, value in metainfo.items():
            merged[key] = value
            if isinstance(value, str):
                try:
                    merged[key] = list_from_file(value)
                except (TypeError, FileNotFoundError):
                    _warn(f"metainfo: {key}={value!r} is not the path of a file, so it is used as it is.")
        return merged

    def _join_prefix(self) -> None:
        """Make ``ann_file`` and ``data_prefix`` relative to ``data_root``."""
        if self.ann_file and self.data_root and not is_abs(self.ann_file):
            self.ann_file = join_path(self.data_root, self.ann_file)
        for key, prefix in self.data_prefix.items():
            if not isinstance(prefix, str):
                raise ConfigTypeError(f"data_prefix: {key} must be a string, got {prefix!r}.")
            if self.data_root and not is_abs(prefix):
                self.data_prefix[key] = join_path(self.data_root, prefix)

    @force_full_init
    def get_subset_(self, indices: Sequence[int] | int) -> None:
        """Keep a number of samples, from the start or, if it is negative, from the end; or those with the given indices."""
        if self.serialize_data:
            self.data_bytes, self.data_address = self._get_serialized_subset(indices)
        else:
            self.data_list = self._get_unserialized_subset(indices)

    @force_full_init
    def get_subset(self, indices: Sequence[int] | int) -> BaseDataset:
        """Return a dataset with some of the samples; see ``get_subset_``."""
        subset = self._copy_without_annotation()
        if self.serialize_data:
            subset.data_bytes, subset.data_address = self._get_serialized_subset(indices)
        else:
            subset.data_list = copy.deepcopy(self._get_unserialized_subset(indices))
        return subset

    def _serialize_data(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Return all annotations in one array, and the end of each of them in it; clear ``data_list``."""
        parts = [np.frombuffer(pickle.dumps(info, protocol=4), dtype=np.uint8) for info in self.data_list]
        joined = _join(parts)
        self.data_list.clear()
        gc.collect()
        return joined

    def _unpickled(self, idx: int) -> Any:
        return pickle.loads(self._bytes_of(idx).data)  # noqa: S301 -- this object has written it

    def _bytes_of(self, idx: int) -> NDArray[np.uint8]:
        ends = self.data_address
        # The item before the first one is the last one, whose end is not the start of the first one.
        start = 0 if idx in (0, -len(ends)) else int(ends[idx - 1])
        return self.data_bytes[start : int(ends[idx])]

    def _get_serialized_subset(self, indices: Sequence[int] | int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        length = len(self.data_address)
        if isinstance(indices, int):
            require(-length <= indices < length, f"{indices} is not a valid number of samples; there are {length}.")
            indices = range(indices) if indices >= 0 else range(length + indices, length)
        chosen = _as_indices(indices)
        for index in chosen:
            require(-length <= index < length, f"{index} is not a valid index; there are {length} samples.")
        return _join([self._bytes_of(index) for index in chosen])

    def _get_unserialized_subset(self, indices: Sequence[int] | int) -> list[dict[str, Any]]:
        if isinstance(indices, int):
            return self.data_list[:indices] if indices >= 0 else self.data_list[indices:]
        return [self.data_list[index] for index in _as_indices(indices)]

    def _copy_without_annotation(self, memo: dict[int, Any] | None = None) -> Self:
        """Return a deep copy without the annotations."""
        memo = {} if memo is None else memo
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        for key, value in self.__dict__.items():
            if key not in _ANNOTATIONS:
                object.__setattr__(other, key, copy.deepcopy(value, memo))
        return other


def _join(parts: Sequence[NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return (np.concatenate(parts) if parts else np.array([], dtype=np.uint8)), ends


def _as_indices(indices: Any) -> Sequence[int]:
    if not isinstance(indices, Sequence):
        raise ConfigTypeError(f"indices must be an integer or a sequence of integers, got {indices!r}.")
    return indices


def _warn(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)
