"""Datasets made from other datasets."""

from __future__ import annotations

import bisect
import copy
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Never

import numpy as np
from torch.utils.data import ConcatDataset as _ConcatDataset

from stratagem.compat.mmengine.dataset.base_dataset import BaseDataset, _warn, force_full_init
from stratagem.compat.mmengine.registry import DATASETS
from stratagem.errors import ConfigTypeError, ConfigValueError

__all__ = ["ClassBalancedDataset", "ConcatDataset", "RepeatDataset"]


class _Wrapper:
    """Base class of the datasets in this module, which are initialized on first use and have no subsets."""

    _metainfo: dict[str, Any]
    _fully_initialized: bool

    @property
    def metainfo(self) -> dict[str, Any]:
        """A copy of the information about the dataset."""
        return copy.deepcopy(self._metainfo)

    def full_init(self) -> None:
        """Load the annotations of the wrapped datasets, unless this was done before."""
        raise NotImplementedError

    def get_subset_(self, indices: Sequence[int] | int) -> Never:
        """Raise an error, because the indices would be ambiguous."""
        raise self._no_subset("get_subset_")

    def get_subset(self, indices: Sequence[int] | int) -> Never:
        """Raise an error, because the indices would be ambiguous."""
        raise self._no_subset("get_subset")

    def _no_subset(self, method: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} has no {method}. Call it on the wrapped dataset.")

    def _require_init(self) -> None:
        if not self._fully_initialized:
            _warn("Call full_init() of the dataset before workers start, so that it does not run in each of them.")
            self.full_init()


def _built(dataset: Any) -> BaseDataset:
    built: Any = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
    if isinstance(dataset, dict) or isinstance(built, BaseDataset):
        return built  # type: ignore[no-any-return]
    raise ConfigTypeError(f"dataset must be a BaseDataset or its configuration, got {type(dataset).__name__}.")


@DATASETS.register_module()
class ConcatDataset(_Wrapper, _ConcatDataset[Any]):
    """The samples of several datasets, whose ``metainfo`` must be equal.

    Args:
        datasets: the datasets, or their configurations.
        lazy_init: whether annotations are not loaded before they are needed.
        ignore_keys: keys of ``metainfo`` that may differ.

    Raises:
        ConfigTypeError: if an argument has another type, or a value of ``metainfo`` has different types.
        ConfigValueError: if the ``metainfo`` of two datasets differs.
    """

    def __init__(
        self,
        datasets: Sequence[BaseDataset | dict[str, Any]],
        lazy_init: bool = False,
        ignore_keys: str | list[str] | None = None,
    ) -> None:
        self.datasets: list[Any] = [_built(dataset) for dataset in datasets]
        if ignore_keys is not None and not isinstance(ignore_keys, str | list):
            raise ConfigTypeError(f"ignore_keys must be a key or a list of keys, got {ignore_keys!r}.")
        self.ignore_keys = [ignore_keys] if isinstance(ignore_keys, str) else list(ignore_keys or ())
        self._metainfo = self.datasets[0].metainfo
        keys = {key for dataset in self.datasets for key in dataset.metainfo} - set(self.ignore_keys)
        for number, dataset in enumerate(self.datasets):
            for key in sorted(keys, key=str):
                self._compare(number, key, dataset.metainfo)
        self._fully_initialized = False
        if not lazy_init:
            self.full_init()

    def _compare(self, number: int, key: str, metainfo: dict[str, Any]) -> None:
        for own in (metainfo, self._metainfo):
            if key not in own:
                raise ConfigValueError(f"metainfo[{key!r}] is missing in dataset {number} or in the first one.")
        first, other = self._metainfo[key], metainfo[key]
        if type(first) is not type(other):
            raise ConfigTypeError(
                f"metainfo[{key!r}] is a {type(first).__name__} in the first dataset, but a {type(other).__name__} in dataset "
                f"{number}."
            )
        if not (np.array_equal(first, other) if isinstance(first, np.ndarray) else first == other):
            raise ConfigValueError(
                f"metainfo[{key!r}] is {first!r} in the first dataset, but {other!r} in dataset {number}. Make them equal, or "
                f"pass ignore_keys=[{key!r}]."
            )

    def full_init(self) -> None:
        """Load the annotations of the datasets, unless this was done before."""
        if self._fully_initialized:
            return
        for dataset in self.datasets:
            dataset.full_init()
        _ConcatDataset.__init__(self, self.datasets)
        self._fully_initialized = True

    @force_full_init
    def _get_ori_dataset_idx(self, idx: int) -> tuple[int, int]:
        """Return the number of the dataset that contains a sample, and its index in it."""
        if idx < 0:
            if -idx > len(self):
                raise ConfigValueError(f"The index {idx} is out of range; there are {len(self)} samples.")
            idx += len(self)
        number = bisect.bisect_right(self.cumulative_sizes, idx)
        return number, idx - (self.cumulative_sizes[number - 1] if number else 0)

    @force_full_init
    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Return the annotation of a sample."""
        number, index = self._get_ori_dataset_idx(idx)
        return self.datasets[number].get_data_info(index)  # type: ignore[no-any-return]

    @force_full_init
    def __len__(self) -> int:
        return _ConcatDataset.__len__(self)

    def __getitem__(self, idx: int) -> Any:
        self._require_init()
        number, index = self._get_ori_dataset_idx(idx)
        return self.datasets[number][index]


class _Repetition(_Wrapper):
    """Base class of the datasets whose samples are those of one other dataset, some of them repeated."""

    def __init__(self, dataset: BaseDataset | dict[str, Any], *, lazy_init: bool) -> None:
        self.dataset = _built(dataset)
        self._metainfo = self.dataset.metainfo
        self._fully_initialized = False
        if not lazy_init:
            self.full_init()

    def _get_ori_dataset_idx(self, idx: int) -> int:
        """Return the index of a sample in the dataset."""
        raise NotImplementedError

    @force_full_init
    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Return the annotation of a sample."""
        return self.dataset.get_data_info(self._get_ori_dataset_idx(idx))  # type: ignore[no-any-return]

    def __getitem__(self, idx: int) -> Any:
        self._require_init()
        return self.dataset[self._get_ori_dataset_idx(idx)]


@DATASETS.register_module()
class RepeatDataset(_Repetition):
    """The samples of a dataset, several times.

    Args:
        dataset: the dataset, or its configuration.
        times: how often.
        lazy_init: whether annotations are not loaded before they are needed.
    """

    def __init__(self, dataset: BaseDataset | dict[str, Any], times: int, lazy_init: bool = False) -> None:
        self.times = times
        super().__init__(dataset, lazy_init=lazy_init)

    def full_init(self) -> None:
        """Load the annotations of the dataset, unless this was done before."""
        if self._fully_initialized:
            return
        self.dataset.full_init()
        self._ori_len = len(self.dataset)
        self._fully_initialized = True

    @force_full_init
    def _get_ori_dataset_idx(self, idx: int) -> int:
        """Return the index of a sample in the dataset."""
        return idx % self._ori_len

    @force_full_init
    def __len__(self) -> int:
        return self.times * self._ori_len


@DATASETS.register_module()
class ClassBalancedDataset(_Repetition):
    """A dataset in which samples of rare categories are repeated (arXiv:1908.03195).

    Args:
        dataset: the dataset, or its configuration. It must implement ``get_cat_ids``.
        oversample_thr: a category is rare if the fraction of samples that contain it is below this threshold. A sample is
            repeated ``ceil(sqrt(oversample_thr / fraction))`` times for its rarest category.
        lazy_init: whether annotations are not loaded before they are needed.
    """

    def __init__(self, dataset: BaseDataset | dict[str, Any], oversample_thr: float, lazy_init: bool = False) -> None:
        self.oversample_thr = oversample_thr
        super().__init__(dataset, lazy_init=lazy_init)

    def full_init(self) -> None:
        """Load the annotations of the dataset and compute the repetitions, unless this was done before."""
        if self._fully_initialized:
            return
        self.dataset.full_init()
        factors = self._get_repeat_factors(self.dataset, self.oversample_thr)
        self.repeat_indices = [index for index, factor in enumerate(factors) for _ in range(math.ceil(factor))]
        self._fully_initialized = True

    def _get_repeat_factors(self, dataset: BaseDataset, repeat_thr: float) -> list[float]:
        """Return how often each sample is repeated, before rounding up."""
        categories = [set(self.dataset.get_cat_ids(index)) for index in range(len(dataset))]
        counts = Counter(category for some in categories for category in some)
        repeats = {
            category: max(1.0, math.sqrt(repeat_thr / (count / len(categories)))) for category, count in counts.items()
        }
        return [max((repeats[category] for category in some), default=1.0) for some in categories]

    @force_full_init
    def _get_ori_dataset_idx(self, idx: int) -> int:
        """Return the index of a sample in the dataset."""
        return self.repeat_indices[idx]

    @force_full_init
    def get_cat_ids(self, idx: int) -> list[int]:
        """Return the categories of a sample."""
        return self.dataset.get_cat_ids(self._get_ori_dataset_idx(idx))

    @force_full_init
    def __len__(self) -> int:
        return len(self.repeat_indices)
