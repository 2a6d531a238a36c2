"""Computing several metrics from the predictions of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.dataset import pseudo_collate
from stratagem.compat.mmengine.evaluator.metric import BaseMetric
from stratagem.compat.mmengine.registry import EVALUATOR, METRICS
from stratagem.compat.mmengine.structures import BaseDataElement
from stratagem.errors import ConfigValueError

__all__ = ["Evaluator"]


@EVALUATOR.register_module()
class Evaluator:
    """Compute metrics.

    Args:
        metrics: a metric or its configuration, or a sequence of them.

    Attributes:
        metrics: the metrics.
        dataset_meta: the ``metainfo`` of the dataset; setting it sets that of the metrics.
    """

    def __init__(self, metrics: dict[str, Any] | BaseMetric | Sequence[Any]) -> None:
        self._dataset_meta: dict[str, Any] | None = None
        given = metrics if isinstance(metrics, Sequence) else [metrics]
        self.metrics: list[Any] = [METRICS.build(each) if isinstance(each, dict) else each for each in given]

    @property
    def dataset_meta(self) -> dict[str, Any] | None:
        """The ``metainfo`` of the dataset."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict[str, Any]) -> None:
        self._dataset_meta = dataset_meta
        for metric in self.metrics:
            metric.dataset_meta = dataset_meta

    def process(self, data_samples: Sequence[Any], data_batch: Any = None) -> None:
        """Pass the predictions for a batch to all metrics; data elements are converted to dicts.

        Args:
            data_samples: the predictions.
            data_batch: the batch.
        """
        samples = [each.to_dict() if isinstance(each, BaseDataElement) else each for each in data_samples]
        for metric in self.metrics:
            metric.process(data_batch, samples)

    def evaluate(self, size: int) -> dict[str, Any]:
        """Return all metrics by name. Collective.

        Args:
            size: the number of samples in the dataset.

        Raises:
            ConfigValueError: if two metrics have the same name.
        """
        metrics: dict[str, Any] = {}
        for metric in self.metrics:
            computed = metric.evaluate(size)
            for name in computed:
                if name in metrics:
                    raise ConfigValueError(f"Two metrics have the name {name!r}. Set a different prefix for each.")
            metrics.update(computed)
        return metrics

    def offline_evaluate(
        self, data_samples: Sequence[Any], data: Sequence[Any] | None = None, chunk_size: int = 1
    ) -> dict[str, Any]:
        """Return the metrics of saved predictions.

        Args:
            data_samples: the predictions.
            data: the samples of the dataset.
            chunk_size: how many predictions are processed together.
        """
        if data is not None:
            require(
                len(data_samples) == len(data),
                f"data_samples and data must have the same length, got {len(data_samples)} and {len(data)}.",
            )
        samples = None if data is None else iter(data)
        size = 0
        for chunk in _chunks(data_samples, chunk_size):
            size += len(chunk)
            self.process(chunk, None if samples is None else pseudo_collate(list(islice(samples, len(chunk)))))
        return self.evaluate(size)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk
