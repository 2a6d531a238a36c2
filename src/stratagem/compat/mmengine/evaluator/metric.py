"""The base class of metrics, and saving predictions."""

from __future__ import annotations

import logging
from abc import ABCMeta, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stratagem.compat.mmengine.dist import broadcast_object_list, collect_results, is_main_process
from stratagem.compat.mmengine.fileio import dump
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.registry import METRICS
from stratagem.compat.mmengine.structures import BaseDataElement
from stratagem.errors import ConfigValueError

__all__ = ["BaseMetric", "DumpResults"]


class BaseMetric(metaclass=ABCMeta):
    """Base class of metrics. Subclasses implement ``process`` and ``compute_metrics``.

    Args:
        collect_device: ``"cpu"`` or ``"gpu"``: how the results of all ranks are collected.
        prefix: the prefix of the names of the metrics; by default, ``default_prefix`` of the class.
        collect_dir: a folder that all ranks share, through which results are collected if ``collect_device`` is ``"cpu"``.

    Attributes:
        results: the results of this rank, to which ``process`` appends.
        dataset_meta: the ``metainfo`` of the dataset.

    Raises:
        ConfigValueError: if ``collect_dir`` is set and ``collect_device`` is not ``"cpu"``.
    """

    default_prefix: str | None = None

    def __init__(self, collect_device: str = "cpu", prefix: str | None = None, collect_dir: str | None = None) -> None:
        if collect_dir is not None and collect_device != "cpu":
            raise ConfigValueError(f'collect_dir requires collect_device="cpu", got {collect_device!r}.')
        self._dataset_meta: dict[str, Any] | None = None
        self.collect_device = collect_device
        self.results: list[Any] = []
        self.prefix = prefix or self.default_prefix
        self.collect_dir = collect_dir
        if self.prefix is None:
            print_log(
                f"{type(self).__name__} has no prefix, so its names may conflict with those of other metrics.",
                logger="current",
                level=logging.WARNING,
            )

    @property
    def dataset_meta(self) -> dict[str, Any] | None:
        """The ``metainfo`` of the dataset."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict[str, Any] | None) -> None:
        self._dataset_meta = dataset_meta

    @abstractmethod
    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Append the results of a batch to ``results``.

        Args:
            data_batch: the batch.
            data_samples: the predictions for it.
        """

    @abstractmethod
    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        """Return the metrics by name, from the results of all ranks in the order of the dataset. Called on rank 0."""

    def evaluate(self, size: int) -> dict[str, Any]:
        """Return the metrics of the whole dataset, and clear the results. Collective.

        Args:
            size: the number of samples in the dataset. Results of samples that were repeated at its end are discarded.
        """
        if not self.results:
            print_log(
                f"{type(self).__name__} has no results. Check that process appends to self.results.",
                logger="current",
                level=logging.WARNING,
            )
        folder = {"tmpdir": self.collect_dir} if self.collect_device == "cpu" else {}
        collected: Any = collect_results(self.results, size, self.collect_device, **folder)
        metrics: list[Any] = [None]
        if is_main_process():
            computed = self.compute_metrics(_to_cpu(collected))
            if self.prefix:
                computed = {f"{self.prefix}/{name}": value for name, value in computed.items()}
            metrics = [computed]
        broadcast_object_list(metrics)
        self.results.clear()
        return metrics[0]  # type: ignore[no-any-return]


@METRICS.register_module()
class DumpResults(BaseMetric):
    """Save the predictions in a pickle file, without computing metrics.

    Args:
        out_file_path: the path, which ends with ``.pkl`` or ``.pickle``.
        collect_device: see ``BaseMetric``.
        collect_dir: see ``BaseMetric``.

    Raises:
        ConfigValueError: if the path has another ending.
    """

    def __init__(self, out_file_path: str, collect_device: str = "cpu", collect_dir: str | None = None) -> None:
        super().__init__(collect_device=collect_device, collect_dir=collect_dir)
        if not out_file_path.endswith((".pkl", ".pickle")):
            raise ConfigValueError(f"out_file_path must end with .pkl or .pickle, got {out_file_path!r}.")
        self.out_file_path = out_file_path

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Append the predictions, moved to the CPU."""
        self.results.extend(_to_cpu(data_samples))

    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        """Save the predictions and return an empty dict."""
        dump(results, self.out_file_path)
        print_log(f"The predictions were saved in {self.out_file_path}.", logger="current")
        return {}


def _to_cpu(data: Any) -> Any:
    """Return nested results with all tensors on the CPU."""
    if isinstance(data, Tensor | BaseDataElement):
        return data.to("cpu")
    if isinstance(data, list | tuple):
        return type(data)(map(_to_cpu, data)) if type(data) in (list, tuple) else tuple(map(_to_cpu, data))
    if isinstance(data, dict):
        return {key: _to_cpu(value) for key, value in data.items()}
    return data
