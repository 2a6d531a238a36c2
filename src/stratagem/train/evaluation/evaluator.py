"""Evaluate predictions with metrics computed over the results of all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """Base class of metrics that are computed from all results at once.

    Subclasses implement :meth:`process` and :meth:`compute_metrics`.

    Args:
        prefix: the prefix of metric names, as in ``<prefix>/<name>``. None selects ``default_prefix``.

    Attributes:
        process_group: the ranks whose results are gathered, if the other ranks have copies of the same results; None for
            all ranks. Set before :meth:`evaluate` is called, like ``batch_ends``.
        batch_ends: the number of results after each batch, if whole batches are distributed to the ranks in turn; None if
            samples are distributed.
    """

    default_prefix: str | None = None
    process_group: ProcessGroup | None = None
    batch_ends: Sequence[int] | None = None

    def __init__(self, prefix: str | None = None) -> None:
        self.results: list[Any] = []
        self.prefix = prefix or self.default_prefix

    @abstractmethod
    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Append the results of one batch to ``self.results``: usually one item per sample, but any number is allowed."""

    @abstractmethod
    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Return a mapping from names to values, computed from the results of all ranks. Called on rank 0.

        The results are in the order of the samples if there is one per sample, or if whole batches are distributed to the
        ranks in turn.
        """

    def evaluate(self, size: int | None = None) -> dict[str, float]:
        """Return the metric values on every rank and discard the results. Collective.

        Args:
            size: use only this number of results, for callers whose sampler repeats samples at the end. The loops use
                all results: built-in samplers do not repeat samples during evaluation.
        """
        gathered = gather_object(_in_batches(self.results, self.batch_ends), 0, self.process_group)
        results = None if gathered is None else list(chain.from_iterable(_in_turn(gathered)))[:size]
        self.results = []
        values = None if results is None else self.compute_metrics(results)
        values = broadcast_object(values)
        return {f"{self.prefix}/{name}" if self.prefix else name: value for name, value in (values or {}).items()}


@final
class Evaluator:
    """Updates metrics with predictions. Supports torchmetrics metrics and subclasses of :class:`BaseMetric`.

    For a torchmetrics metric, the model's ``val_step`` must return a mapping with ``preds`` and ``target``, or a tuple of
    arguments for the metric's ``update``.

    Args:
        metrics: a metric, its configuration, a list of them, or a mapping from names to them. The default name of a
            torchmetrics metric is its class name in lowercase.
        device: the device for torchmetrics metrics.
    """

    def __init__(self, metrics: Any, *, device: torch.device | None = None) -> None:
        self._metrics = {name: _place(metric, device) for name, metric in _named(metrics, _build).items()}
        self._batch_ends: defaultdict[str, list[int]] = defaultdict(list)

    def process(self, data_batch: Any, outputs: Any) -> None:
        """Update all metrics with a batch and the outputs of the model."""
        for name, metric in self._metrics.items():
            if isinstance(metric, BaseMetric):
                metric.process(data_batch, outputs)
                self._batch_ends[name].append(len(metric.results))
            else:
                _update(metric, outputs)

    def reset(self) -> None:
        """Discard all results."""
        self._batch_ends.clear()
        for metric in self._metrics.values():
            if isinstance(metric, BaseMetric):
                metric.results = []
            else:
                metric.reset()

    def evaluate(
        self, size: int | None = None, *, group: ProcessGroup | None = None, by_batch: bool = False
    ) -> dict[str, float]:
        """Return the values of all metrics over the results of all ranks, and reset. Collective.

        Args:
            size: see :meth:`BaseMetric.evaluate`.
            group: the ranks whose results are combined, if the other ranks processed the same samples; None for all ranks.
            by_batch: whether whole batches, rather than samples, were distributed to the ranks in turn.

        Raises:
            ConfigValueError: if two metrics return values with the same name.
        """
        values: dict[str, float] = {}
        ends, self._batch_ends = self._batch_ends, defaultdict(list)
        for name, metric in self._metrics.items():
            for key, value in _values(name, metric, size, group, ends[name] if by_batch else None).items():
                if key in values:
                    raise ConfigValueError(
                        f"Two metrics return a value named {key!r}. Give one of them a prefix or a name."
                    )
                values[key] = value
        return values


def _in_batches(results: list[Any], ends: Sequence[int] | None) -> list[list[Any]]:
    """Split results by batch, or into single results if ``ends`` is None."""
    if ends is None:
        return [[result] for result in results]
    # Results that a metric adds after the last batch are part of that batch.
    starts = [0, *ends[:-1]]
    return [results[start:end] for start, end in pairwise([*starts, len(results)])]


def _in_turn(of_ranks: Sequence[Sequence[list[Any]]]) -> Iterator[list[Any]]:
    """Yield the first item of each rank, then the second item of each rank, and so on."""
    for round_ in zip_longest(*of_ranks, fillvalue=[]):
        yield from round_


def check_metrics(metrics: Any) -> None:
    """Check the metrics of an :class:`Evaluator`, as creating it does.

    Torchmetrics metrics that only compute numbers are built. Other metrics are not built, because they may load a model.

    Raises:
        ConfigError: (or a subclass) if a metric is invalid.
    """
    _named(metrics, _try_build)


def _named(metrics: Any, build: Callable[[Any], Any]) -> dict[str, Any]:
    if isinstance(metrics, Mapping) and "type" not in metrics:
        if not metrics:
            raise ConfigValueError("The evaluator has no metrics: its mapping of metrics is empty.")
        return {name: build(metric) for name, metric in metrics.items()}
    listed = metrics if isinstance(metrics, Sequence) and not isinstance(metrics, str) else [metrics]
    named: dict[str, Any] = {}
    for item in listed:
        metric = build(item)
        name = _name_of(item, metric)
        if name in named:
            raise ConfigValueError(
                f"Two metrics have the name {name!r}. Give each a name: dict(first=dict(type=...), second=dict(type=...))."
            )
        named[name] = metric
    return named


def _build(metric: Any) -> Any:
    built = METRICS.build(metric) if isinstance(metric, Mapping) else metric
    if not isinstance(built, BaseMetric) and not all(callable(getattr(built, method, None)) for method in _METHODS):
        raise ConfigTypeError(
            f"Expected a torchmetrics metric, a subclass of BaseMetric, or a mapping with a type, got {metric!r}."
        )
    return built


def _try_build(metric: Any) -> Any:
    """Build a metric if that has no side effects; otherwise return an object that represents it."""
    kind = metric.get("type") if isinstance(metric, Mapping) else None
    target = METRICS.get(kind) if isinstance(kind, str) else kind
    package = str(getattr(target, "__module__", "")).split(".")
    if target is None or (package[0] == "torchmetrics" and {*package[1:2]} <= _NUMERIC_PACKAGES):
        return _build(metric)
    # The name of a class can differ from that of the object that it creates, so use a unique one.
    return target if isinstance(kind, str) else type(f"Metric{id(metric)}", (), {})()


# The packages of torchmetrics whose metrics have no models or files.
_NUMERIC_PACKAGES = frozenset(
    {"aggregation", "classification", "clustering", "nominal", "regression", "retrieval", "segmentation"}
)
_METHODS = ("update", "compute", "reset")


def _name_of(item: Any, metric: Any) -> str:
    kind = item.get("type") if isinstance(item, Mapping) else None
    # Prefer the configured name: `Accuracy(task="multiclass")` creates a MulticlassAccuracy.
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
            f"{type(metric).__name__} needs predictions and targets, but val_step returned a {type(outputs).__name__}. "
            "Return {'preds': ..., 'target': ...}, or implement a subclass of BaseMetric."
        )


def _values(
    name: str, metric: Any, size: int | None, group: ProcessGroup | None, batch_ends: Sequence[int] | None
) -> dict[str, float]:
    if isinstance(metric, BaseMetric):
        metric.process_group, metric.batch_ends = group, batch_ends
        return metric.evaluate(size)
    if group is not None:
        _set_process_group(metric, group)
    _fill_empty_lists(metric, group)
    computed = metric.compute()
    metric.reset()
    if isinstance(computed, Mapping):
        return {f"{name}/{key}": _number(value) for key, value in computed.items()}
    return {name: _number(computed)}


def _set_process_group(metric: Any, group: ProcessGroup) -> None:
    """Set the ranks of a metric, and those of the metrics in a collection or wrapper, which synchronize separately."""
    metric.process_group = group
    parts: Iterable[Any] = metric.modules() if isinstance(metric, nn.Module) else ()
    for part in parts:
        if hasattr(part, "process_group"):
            part.process_group = group


def _fill_empty_lists(metric: Any, group: ProcessGroup | None) -> None:
    """Add an empty tensor to list states that are empty on this rank but not on every rank. Collective.

    Torchmetrics gathers the tensors in these lists, so a rank that processed no batch would not join the collective.
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
            setattr(module, name, [torch.empty((0, *shape), dtype=dtype, device=cast("Any", module).device)])


def _number(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    return value
