"""Keep track of the best validation scores of metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, cast, final

from stratagem.checkpoint import RetentionTag
from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.utils import did_you_mean
from stratagem.utils.scalars import read_metric

__all__ = ["GREATER_KEYS", "LESS_KEYS", "RULES", "BestScores", "Rule", "best_prefix", "infer_rule", "is_better"]

Rule = Literal["greater", "less"]

_CLASSES = ("acc", "mAcc", "aAcc", "top", "AR@", "auc", "auroc", "precision", "recall", "f1", "mAP", "dice", "iou")
GREATER_KEYS: Final = (*_CLASSES, "r2", "bleu")
LESS_KEYS: Final = ("loss", "error", "perplexity", "mae", "mse")
RULES: Final = ("greater", "less")
_AUTO: Final = "auto"


def infer_rule(
    metric: str,
    greater_keys: Sequence[str] = GREATER_KEYS,
    less_keys: Sequence[str] = LESS_KEYS,
    *,
    owner: str = "CheckpointHook",
) -> Rule:
    """Infer from the name of a metric whether greater or smaller values are better.

    A key that equals the name takes precedence over a key at its end, and that over a key that is contained in it: smaller values
    of ``top1_error`` are better. The last part of a name with ``/`` is considered first, because the other parts name sets and
    metrics: smaller values of ``accents/loss`` are better. The comparison is case-insensitive.

    Args:
        metric: the name of the metric.
        greater_keys: names, or parts of names, of metrics for which greater values are better.
        less_keys: names, or parts of names, of metrics for which smaller values are better.
        owner: the class that error messages mention.

    Raises:
        ConfigValueError: if no key matches.
    """
    name = metric.lower()
    last = name.rpartition("/")[2]
    greater, less = [key.lower() for key in greater_keys], [key.lower() for key in less_keys]
    for part in (name, last):
        if part in greater or part in less:
            return "greater" if part in greater else "less"
    for part in (last, name):
        if part.endswith(tuple(less)) and not part.endswith(tuple(greater)):
            return "less"
        if any(key in part for key in greater):
            return "greater"
        if any(key in part for key in less):
            return "less"
    raise ConfigValueError(
        f"{owner}: cannot infer from the name {metric!r} whether greater or smaller values are better. Set rule='greater' "
        "or rule='less'."
    )


def _without(defaults: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the default keys except those that the configuration lists for the opposite rule."""
    configured = {key.lower() for key in keys}
    return [key for key in defaults if key.lower() not in configured]


def is_better(value: float, than: float, rule: Rule, *, by: float = 0.0) -> bool:
    """Return whether a value is better than another by more than ``by``; NaN is never better."""
    return value > than + by if rule == "greater" else value < than - by


def best_prefix(metric: str) -> str:
    """Return the beginning of the names of the best checkpoints by a metric, which are files and cannot contain ``/``."""
    return f"best_{metric.replace('/', '_')}"


@final
class BestScores:
    """The best scores of each monitored metric, and the validations in which they were reached.

    Args:
        metrics: the names of the metrics; ``"auto"`` for the first metric that a validation returns.
        rule: ``"greater"`` or ``"less"``, for all metrics or for each one; by default inferred from their names.
        greater_keys: see :func:`infer_rule`.
        less_keys: see :func:`infer_rule`.
        count: the number of scores to keep per metric.

    Raises:
        ConfigKeyError: if a rule is unknown.
        ConfigValueError: if the number of rules differs from the number of metrics, or a rule cannot be inferred.
    """

    def __init__(
        self,
        metrics: str | Sequence[str],
        rule: str | Sequence[str] | None = None,
        greater_keys: Sequence[str] | None = None,
        less_keys: Sequence[str] | None = None,
        count: int = 1,
    ) -> None:
        self._names = [metrics] if isinstance(metrics, str) else list(metrics)
        rules = [rule] * len(self._names) if isinstance(rule, str) or rule is None else list(rule)
        unknown = [each for each in rules if each is not None and each not in RULES]
        if unknown:
            raise ConfigKeyError(f"CheckpointHook: unknown rule={unknown[0]!r}. {did_you_mean(unknown[0], RULES)}")
        if len(rules) != len(self._names):
            raise ConfigValueError(
                f"CheckpointHook: got {len(rules)} rules for {len(self._names)} metrics in save_best. Specify one rule for "
                "all metrics, or one for each."
            )
        if _AUTO in self._names and len(self._names) > 1:
            raise ConfigValueError(
                "CheckpointHook: save_best='auto' stands for the first metric and cannot be combined with other names."
            )
        named: dict[str, str] = {}
        for name in self._names:
            if named.setdefault(best_prefix(name), name) != name:
                raise ConfigValueError(
                    f"CheckpointHook: the best checkpoints for save_best={named[best_prefix(name)]!r} and {name!r} would have "
                    f"the same name, {best_prefix(name)!r}. Rename a metric or a set."
                )
        self._keys = (
            greater_keys or _without(GREATER_KEYS, less_keys or ()),
            less_keys or _without(LESS_KEYS, greater_keys or ()),
        )
        self._given_rules = dict(zip(self._names, rules, strict=True))
        self._count = count
        self._rules: dict[str, Rule] = {name: self._rule_for(name) for name in self._names if name != _AUTO}
        # metric -> number of the validation -> score
        self._scores: dict[str, dict[int, float]] = {}
        # The metrics that a validation has returned.
        self._returned: set[str] = set()

    @property
    def monitored(self) -> list[str]:
        """The names of the monitored metrics, as far as they are known."""
        return [name for name in self._names if name != _AUTO]

    def state_dict(self) -> dict[str, Any]:
        """Return the scores; an empty dict if there are none."""
        return {"scores": {metric: dict(scores) for metric, scores in self._scores.items()}} if self._scores else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the scores."""
        for metric, scores in state_dict.get("scores", {}).items():
            for number, score in scores.items():
                self._add(RetentionTag(metric=metric, number=number, score=score))

    def recognizes(self, state_dict: Mapping[str, Any]) -> bool:
        """Return whether all scores in a saved state belong to the monitored metrics."""
        return self._names == [_AUTO] or set(state_dict.get("scores", {})) <= set(self._names)

    def best(self) -> dict[str, float]:
        """Return the best value of each metric that has one."""
        return {metric: next(iter(scores.values())) for metric, scores in self._scores.items() if scores}

    def add_saved(self, retention_tags: Iterable[RetentionTag]) -> None:
        """Add the scores that are recorded in the manifests of saved checkpoints."""
        for retention_tag in retention_tags:
            if retention_tag.metric:
                self._add(retention_tag)

    def update(self, metrics: Mapping[str, Any], number: int) -> list[RetentionTag]:
        """Add the results of a validation; return a tag for each metric whose value is among the best.

        The tags are in the order of the monitored metrics. NaN and Inf are never among the best, and a metric that an earlier
        validation returned may be missing.

        Raises:
            ConfigKeyError: if the validation returned metrics, but lacks a monitored metric that no earlier validation returned.
            ConfigTypeError: if a value is not a number.
        """
        best: list[RetentionTag] = []
        for name in self._resolve_names(metrics):
            score = read_metric(name, metrics, owner="CheckpointHook (save_best)")
            tag = RetentionTag(metric=name, number=number, score=score, greater=self._rules[name] == "greater")
            if math.isfinite(score) and self._add(tag):
                best.append(tag)
        return best

    def _resolve_names(self, metrics: Mapping[str, Any]) -> list[str]:
        """Return the monitored metrics that were returned; the first validation determines the metric for ``"auto"``."""
        if not metrics:
            return []
        if self._names == [_AUTO]:
            # A resumed run keeps the metric of the checkpoint.
            first = next(iter(self._scores or metrics))
            self._names, self._given_rules = [first], {first: self._given_rules[_AUTO]}
            self._rules = {first: self._rule_for(first)}
        for name in self._names:
            if name not in metrics and name not in self._returned and name not in self._scores:
                raise ConfigKeyError(
                    f"CheckpointHook: save_best={name!r}, but the validation did not return this metric. "
                    f"{did_you_mean(name, list(metrics))}"
                )
        present = [name for name in self._names if name in metrics]
        self._returned.update(present)
        return present

    def missing(self, metrics: Mapping[str, Any]) -> list[str]:
        """Return the monitored metrics that a validation did not return; ``"auto"`` if it returned no metrics."""
        return [name for name in self._names if name not in metrics and (name != _AUTO or not metrics)]

    def _add(self, tag: RetentionTag) -> bool:
        """Add a score; return whether it is among the best, and better than an earlier score of the same validation."""
        metric = tag.metric
        if metric not in self._names and self._names != [_AUTO]:
            return False
        greater = self._rules[metric] == "greater" if metric in self._rules else tag.greater
        scores = dict(self._scores.get(metric, {}))
        # After a rollback, a validation is repeated, and its checkpoint would have the same name.
        known = scores.pop(tag.number, None)
        if known is not None and not tag.is_better_than(replace(tag, score=known)):
            return False
        # The sort is stable: of two equal scores, the earlier one ranks first.
        ranked = sorted([*scores.items(), (tag.number, tag.score)], key=lambda item: item[1], reverse=greater)
        self._scores[metric] = dict(ranked[: self._count])
        return tag.number in self._scores[metric]

    def _rule_for(self, name: str) -> Rule:
        rule = self._given_rules[name]
        return infer_rule(name, *self._keys) if rule is None else cast("Rule", rule)
