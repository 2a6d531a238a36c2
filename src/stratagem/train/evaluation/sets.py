"""Named validation and test sets: their dataloaders, their evaluators, and the metric names that they lead to."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch.utils.data import DataLoader

from stratagem.data import EpochLoader
from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.train.evaluation.evaluator import Evaluator
from stratagem.utils import did_you_mean

__all__ = ["EvaluationSet", "evaluation_sets", "evaluators_by_set", "named_loaders", "require_known_sets"]

# A metric of a set has the name of the set as prefix.
_SEPARATOR = "/"
_NAME = re.compile(r"[\w-]+")
_LOADER_KEYS = frozenset({*inspect.signature(DataLoader).parameters, "streams", "device_prefetch", "type"})


@final
@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """The data and the metrics of one of the sets of an evaluation.

    Attributes:
        name: the name of the set; None for the only set of an evaluation whose sets are not named.
        loader: yields the batches.
        evaluator: computes the metrics.
    """

    name: str | None
    loader: EpochLoader
    evaluator: Evaluator

    def named(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics with the name of the set as prefix, if it has a name."""
        return {metric if self.name is None else self.name + _SEPARATOR + metric: v for metric, v in metrics.items()}


def evaluation_sets(
    loaders: EpochLoader | Mapping[str, EpochLoader], evaluators: Evaluator | Mapping[str, Evaluator]
) -> tuple[EvaluationSet, ...]:
    """Return the sets of a loop, which receives either a loader and an evaluator, or mappings from names to them.

    Raises:
        ConfigValueError: if a set has no evaluator.
    """
    if not isinstance(loaders, Mapping):
        if isinstance(evaluators, Mapping):
            raise ConfigValueError(f"There is one set of data, but there are evaluators for {', '.join(evaluators)}.")
        return (EvaluationSet(None, loaders, evaluators),)
    by_name = evaluators if isinstance(evaluators, Mapping) else dict.fromkeys(loaders, evaluators)
    if set(by_name) != set(loaders):
        raise ConfigValueError(f"The sets are {', '.join(loaders)}, but the evaluators are for {', '.join(by_name)}.")
    return tuple(EvaluationSet(name, loader, by_name[name]) for name, loader in loaders.items())


def named_loaders(spec: Any, key: str) -> dict[str, Any] | None:
    """Return the dataloaders of a mapping from names to dataloaders; None if ``spec`` is a single dataloader.

    A mapping without the key ``dataset`` in which a value is a ``DataLoader``, or the configuration of one, contains named sets.

    Args:
        spec: a ``DataLoader``, its configuration, or a mapping from names to them.
        key: the key of the configuration, such as ``"val_dataloader"``, for error messages.

    Raises:
        ConfigValueError: if a name is not allowed, or a mapping contains both arguments of a dataloader and named dataloaders.
    """
    if not isinstance(spec, Mapping):
        return None
    loaders = [name for name, value in spec.items() if _is_loader(value)]
    arguments = [name for name in spec if name not in loaders]
    if not loaders or ("dataset" in arguments and set(loaders) <= _LOADER_KEYS):
        return None
    if arguments:
        raise ConfigValueError(
            f"{key} is ambiguous: {_quoted(loaders)} looks like the dataloader of a named set, because it has a dataset, and "
            f"{_quoted(arguments)} does not. Either list the arguments of one dataloader, or give every set a dataloader: "
            f"{key}=dict(first=dict(dataset=...), second=dict(dataset=...))."
        )
    for name in loaders:
        _require_name(name, key)
    return dict(spec)


def _is_loader(value: Any) -> bool:
    if isinstance(value, DataLoader):
        return True
    # A dataset that wraps another dataset has a type.
    return isinstance(value, Mapping) and "dataset" in value and "type" not in value


def _require_name(name: Any, key: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigValueError(
            f"{key}: the set name {name!r} is not allowed. Names consist of letters, digits, '_' and '-', because metrics are "
            f"named '<set>{_SEPARATOR}<metric>' and --set uses '.' between keys."
        )
    if name in _LOADER_KEYS:
        raise ConfigValueError(
            f"{key}: a set cannot have the name {name!r}, because that is an argument of a dataloader. Choose a different name."
        )


def evaluators_by_set(evaluators: Any, names: Sequence[str] | None, key: str) -> dict[str, Any] | None:
    """Return the evaluator of each set if a mapping specifies one for each; None if the evaluator is common to all sets.

    Args:
        evaluators: the evaluator or its configuration, or a mapping from the names of the sets to them.
        names: the names of the sets; None if there is a single set without a name.
        key: the key of the configuration, such as ``"val_evaluator"``.

    Raises:
        ConfigValueError: if a mapping contains the names of only some sets.
    """
    if not names or not isinstance(evaluators, Mapping) or "type" in evaluators:
        return None
    matching = [name for name in names if name in evaluators]
    if not matching:
        return None
    missing = [name for name in names if name not in evaluators]
    unknown = [str(name) for name in evaluators if name not in names]
    if missing or unknown:
        problems = [f"the sets {_quoted(missing)} have no evaluator"] if missing else []
        problems += [f"{_quoted(unknown)} is not a set"] if unknown else []
        raise ConfigValueError(
            f"{key} has evaluators by set, but {' and '.join(problems)}. The sets are {_quoted(names)}. Give every set an "
            "evaluator, or give metrics names that differ from those of the sets."
        )
    return {name: evaluators[name] for name in names}


def require_known_sets(monitored: Iterable[tuple[str, str]], names: Sequence[str] | None) -> None:
    """Check that metrics which a run monitors begin with the name of a set, if the sets of its validation are named.

    Args:
        monitored: pairs of the option that names a metric, for the error message, and the name of the metric.
        names: the names of the sets; None if there is a single set without a name.

    Raises:
        ConfigKeyError: if a metric does not begin with the name of a set.
    """
    for owner, metric in monitored if names else ():
        name, separator, rest = metric.partition(_SEPARATOR)
        if names and (name not in names or not separator or not rest):
            possible = [f"{each}{_SEPARATOR}{rest or metric}" for each in names]
            raise ConfigKeyError(
                f"{owner}={metric!r} does not begin with the name of a validation set. The sets are {_quoted(names)}, and their "
                f"metrics are named '<set>{_SEPARATOR}<metric>'. {did_you_mean(metric, possible)}"
            )


def _quoted(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names)
