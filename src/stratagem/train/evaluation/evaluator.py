"""Measure predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise, zip_longest
from typing import Any, cast, final

import torch
from torch import nn
from torch.distributed import ProcessGroup

from stratagem.distributed import all_gather_object, broadcast_object, gather_object, get_world_size
from stratagem.errors import ConfigTypeError, ConfigValueError, TrainingError
from stratagem.registry import METRICS

__all__ = ["BaseMetric", "Evaluator"]


class BaseMetric(ABC):
    """A metric that is computed from all results at once: write :meth:`process` and :meth:`compute_metrics`.

    Args:
        prefix: put before the names of its values, with a slash.

    Attributes:
        process_group: the ranks that have all results together, if the remaining ranks have the same ones; None for all.
        batch_ends: how many results there were after each batch, if the ranks take turns at whole batches; None if they
            take turns at samples. Both are set before :meth:`evaluate` is called.
    """

    default_prefix: str | None = None
    process_group: ProcessGroup | None = None
    batch_ends: Sequence[int] | None = None

    def __init__(self, prefix: str | None = None) -> None:
        self.results: list[Any] = []
        self.prefix = prefix or self.default_prefix

    @abstractmethod
    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Append to ``self.results`` what is needed of one batch: usually one item per sample, but any number is kept."""

    @abstractmethod
    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Return the values, from all results of all ranks. Called on rank 0.

        The results are in the order of the samples if there is one per sample, or if the ranks take turns at whole
        batches.
        """

    def evaluate(self, size: int | None = None) -> dict[str, float]:
        """Return the values on every rank and discard the results. Collective.

        Args:
            size: how many results to keep, for callers whose own sampler repeats samples at the end. The loops keep all:
                no sampler repeats samples in an evaluation.
        """
        gathered = gather_object(_in_batches(self.results, self.batch_ends), 0, self.process_group)
        results = None if gathered is None else list(chain.from_iterable(_in_turn(gathered)))[:size]
        self.results = []
        values = None if results is None else self.compute_metrics(results)
        values = broadcast_object(values)
        return {f"{self.prefix}/{name}" if self.prefix else name: value for name, value in (values or {}).items()}


@final
class Evaluator:
    """Feeds predictions to metrics: those of torchmetrics, and those derived from :class:`BaseMetric`.

    A metric of torchmetrics is given what the model's ``val_step`` returned: a mapping with ``preds`` and ``target``,
    or a tuple of them in the order of its ``update``.

    Args:
        metrics: a metric, its configuration, a list of them, or a mapping from the name of the value to one of them. A
            metric of torchmetrics without a name is called by its class in small letters.
        device: where the metrics of torchmetrics count.
    """

    def __init__(self, metrics: Any, *, device: torch.device | None = None) -> None:
        self._metrics = {name: _place(metric, device) for name, metric in _named(metrics).items()}
        self._batch_ends: defaultdict[str, list[int]] = defaultdict(list)

    def process(self, data_batch: Any, outputs: Any) -> None:
        """Take in one batch and what the model made of it."""
        for name, metric in self._metrics.items():
            if isinstance(metric, BaseMetric):
                metric.process(data_batch, outputs)
                self._batch_ends[name].append(len(metric.results))
            else:
                _update(metric, outputs)

    def reset(self) -> None:
        """Forget what was taken in."""
        self._batch_ends.clear()
        for metric in self._metrics.values():
            if isinstance(metric, BaseMetric):
                metric.results = []
            else:
                metric.reset()

    def evaluate(
        self, size: int | None = None, *, group: ProcessGroup | None = None, by_batch: bool = False
    ) -> dict[str, float]:
        """Return all values, over everything that was processed on all ranks, and reset. Collective.

        Args:
            size: see :meth:`BaseMetric.evaluate`.
            group: the ranks that saw all samples together, if the remaining ranks saw the same ones; None for all ranks.
            by_batch: whether the ranks took turns at whole batches, rather than at samples.
        """
        values: dict[str, float] = {}
        ends, self._batch_ends = self._batch_ends, defaultdict(list)
        for name, metric in self._metrics.items():
            for key, value in _values(name, metric, size, group, ends[name] if by_batch else None).items():
                if key in values:
                    raise ConfigValueError(
                        f"Two metrics give a value called {key!r}. Give one of them a prefix or a name."
                    )
                values[key] = value
        return values


def _in_batches(results: list[Any], ends: Sequence[int] | None) -> list[list[Any]]:
    """Split results by batch; without the ends of the batches, into single ones."""
    if ends is None:
        return [[result] for result in results]
    # What a metric adds after the last batch belongs to it.
    starts = [0, *ends[:-1]]
    return [results[start:end] for start, end in pairwise([*starts, len(results)])]


def _in_turn(of_ranks: Sequence[Sequence[list[Any]]]) -> Iterator[list[Any]]:
    """Yield the first item of each rank, then the second of each, and so on."""
    for round_ in zip_longest(*of_ranks, fillvalue=[]):
        yield from round_


def _named(metrics: Any) -> dict[str, Any]:
    if isinstance(metrics, Mapping) and "type" not in metrics:
        if not metrics:
            raise ConfigValueError("The evaluator has no metric.")
        return {name: _build(metric) for name, metric in metrics.items()}
    listed = metrics if isinstance(metrics, Sequence) and not isinstance(metrics, str) else [metrics]
    named: dict[str, Any] = {}
    for item in listed:
        metric = _build(item)
        name = _name_of(item, metric)
        if name in named:
            raise ConfigValueError(
                f"Two metrics are called {name!r}. Give them names: dict(first=dict(type=...), second=dict(type=...))."
            )
        named[name] = metric
    return named


def _build(metric: Any) -> Any:
    built = METRICS.build(metric) if isinstance(metric, Mapping) else metric
    if not isinstance(built, BaseMetric) and not all(callable(getattr(built, method, None)) for method in _METHODS):
        raise ConfigTypeError(
            f"A metric is one of torchmetrics, one derived from BaseMetric, or a mapping with its type, not {metric!r}."
        )
    return built


_METHODS = ("update", "compute", "reset")


def _name_of(item: Any, metric: Any) -> str:
    kind = item.get("type") if isinstance(item, Mapping) else None
    # As configured: `Accuracy(task="multiclass")` makes a MulticlassAccuracy.
    return (kind.rpartition(".")[2] if isinstance(kind, str) else type(metric).__name__).lower()


def _place(metric: Any, device: torch.device | None) -> Any:
    return metric if isinstance(metric, BaseMetric) or device is None else metric.to(device)


def _update(metric: Any, outputs: Any) -> None:
    if isinstance(outputs, Mapping) and "preds" in outputs and "target" in outputs:
        metric.update(outputs["preds"], outputs["target"])
    elif isinstance(outputs, tuple):
        metric.update(*outputs)
    else:
        raise TrainingError(
            f"{type(metric).__name__} needs predictions and targets, and val_step returned a {type(outputs).__name__}. "
            "Return {'preds': ..., 'target': ...}, or derive a metric from BaseMetric."
        )


def _values(
    name: str, metric: Any, size: int | None, group: ProcessGroup | None, batch_ends: Sequence[int] | None
) -> dict[str, float]:
    if isinstance(metric, BaseMetric):
        metric.process_group, metric.batch_ends = group, batch_ends
        return metric.evaluate(size)
    if group is not None:
        metric.process_group = group
    _fill_empty_lists(metric, group)
    computed = metric.compute()
    metric.reset()
    if isinstance(computed, Mapping):
        return {f"{name}/{key}": _number(value) for key, value in computed.items()}
    return {name: _number(computed)}


def _fill_empty_lists(metric: Any, group: ProcessGroup | None) -> None:
    """Give a rank that saw no batch empty tensors in the lists that the ranks concatenate. Collective.

    Torchmetrics gathers the tensors that a rank has, so a rank with none would not take part.
    """
    if get_world_size(group) == 1 or not isinstance(metric, nn.Module):
        return
    places = [
        (module, name)
        for module in metric.modules()
        for name, reduction in getattr(module, "_reductions", {}).items()
        if isinstance(getattr(module, name), list) and getattr(reduction, "__name__", "") == "dim_zero_cat"
    ]
    firsts = [next(iter(getattr(module, name)), None) for module, name in places]
    kinds: list[Any] = [None if first is None else (first.dtype, first.shape[1:]) for first in firsts]
    for (module, name), first, of_ranks in zip(
        places, firsts, zip(*all_gather_object(kinds, group), strict=True), strict=True
    ):
        known: Any = next((kind for kind in of_ranks if kind is not None), None)
        if first is None and known is not None:
            dtype, shape = known
            setattr(module, name, [torch.empty((0, *shape), dtype=dtype, device=cast("Any", metric).device)])


def _number(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value
