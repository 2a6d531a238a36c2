"""Which validations were the best so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from stratagem.checkpoint import RetentionTag
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.utils import did_you_mean

__all__ = ["GREATER_KEYS", "LESS_KEYS", "BestScores", "greater_is_better"]

GREATER_KEYS = ("acc", "top", "AR@", "auc", "precision", "mAP", "mDice", "mIoU", "mAcc", "aAcc")
LESS_KEYS = ("loss",)
_RULES = {"greater": True, "less": False}
_AUTO = "auto"


def greater_is_better(
    metric: str, greater_keys: Sequence[str] = GREATER_KEYS, less_keys: Sequence[str] = LESS_KEYS
) -> bool:
    """Tell from a metric's name which of its values are better: from the same key, else from one that the name contains.

    Capitals do not matter.

    Raises:
        ConfigValueError: if no key fits.
    """
    name = metric.lower()
    greater, less = [key.lower() for key in greater_keys], [key.lower() for key in less_keys]
    if name in greater or (name not in less and any(key in name for key in greater)):
        return True
    if name in less or any(key in name for key in less):
        return False
    raise ConfigValueError(
        f"CheckpointHook: whether greater values of {metric!r} are better cannot be told from its name. Say it with "
        "rule='greater' or rule='less'."
    )


@final
class BestScores:
    """The best scores of each of some metrics, and which validation gave them.

    Args:
        metrics: the names of the metrics; ``"auto"`` for the first that a validation gives.
        rule: ``"greater"`` or ``"less"``, for all or for each; None to tell it from the names.
        greater_keys: what in a name says that greater values are better.
        less_keys: what says that smaller ones are.
        count: how many are remembered for each.

    Raises:
        ConfigKeyError: if a rule is neither of the two.
        ConfigValueError: if there are not as many rules as metrics, or a name tells no rule.
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
        unknown = [each for each in rules if each is not None and each not in _RULES]
        if unknown:
            raise ConfigKeyError(
                f"CheckpointHook: rule={unknown[0]!r} is not known. {did_you_mean(unknown[0], _RULES)}"
            )
        if len(rules) != len(self._names):
            raise ConfigValueError(
                f"CheckpointHook: there are {len(rules)} rules for {len(self._names)} metrics in save_best. Give one for "
                "all, or one for each."
            )
        if _AUTO in self._names and len(self._names) > 1:
            raise ConfigValueError("CheckpointHook: save_best='auto' stands alone: it is the first metric.")
        self._keys = (greater_keys or GREATER_KEYS, less_keys or LESS_KEYS)
        self._rules = dict(zip(self._names, rules, strict=True))
        self._count = count
        self._greater = {name: self._rule_of(name) for name in self._names if name != _AUTO}
        # metric -> number of the validation -> score
        self._scores: dict[str, dict[int, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the scores; empty where there are none."""
        return {"scores": {metric: dict(scores) for metric, scores in self._scores.items()}} if self._scores else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up scores."""
        for metric, scores in state_dict.get("scores", {}).items():
            for number, score in scores.items():
                self._remember(RetentionTag(metric=metric, number=number, score=score))

    def find_again(self, tags: Iterable[RetentionTag]) -> None:
        """Take up what checkpoints on the disk were saved for."""
        for tag in tags:
            if tag.metric:
                self._remember(tag)

    def enter(self, metrics: Mapping[str, Any], number: int) -> list[RetentionTag]:
        """Take in a validation's values; return for which metrics it is among the best, in the order of their names.

        A value that is not finite is not among them.

        Raises:
            ConfigKeyError: if a metric is not there.
            ConfigTypeError: if its value is no number.
        """
        found = []
        for name in self._resolved(metrics):
            score = _number(name, metrics[name])
            tag = RetentionTag(metric=name, number=number, score=score, greater=self._greater[name])
            if math.isfinite(score) and self._remember(tag):
                found.append(tag)
        return found

    def _resolved(self, metrics: Mapping[str, Any]) -> list[str]:
        """Return the names, with the first metric in the place of ``"auto"`` from the first validation on."""
        if self._names == [_AUTO]:
            # After a resume it stays the one that it was.
            first = next(iter(self._scores or metrics), None)
            if first is None:
                raise ConfigValueError("CheckpointHook: save_best='auto', but the validation gives no metric.")
            self._names, self._rules = [first], {first: self._rules[_AUTO]}
            self._greater = {first: self._rule_of(first)}
        for name in self._names:
            if name not in metrics:
                raise ConfigKeyError(
                    f"CheckpointHook: save_best={name!r}, but the validation gives no such metric. "
                    f"{did_you_mean(name, list(metrics))}"
                )
        return self._names

    def _remember(self, tag: RetentionTag) -> bool:
        """Take a score in; return whether it is among the best, and better than what that validation gave before."""
        metric = tag.metric
        if metric not in self._names and self._names != [_AUTO]:
            return False
        greater = self._greater.get(metric, tag.greater)
        scores = dict(self._scores.get(metric, {}))
        # Where a run went back, validations come again: their checkpoints have the same name.
        known = scores.pop(tag.number, None)
        if known is not None and not tag.is_better_than(replace(tag, score=known)):
            return False
        # Of equal ones the earlier is the better.
        ranked = sorted([*scores.items(), (tag.number, tag.score)], key=lambda item: item[1], reverse=greater)
        self._scores[metric] = dict(ranked[: self._count])
        return tag.number in self._scores[metric]

    def _rule_of(self, name: str) -> bool:
        rule = self._rules[name]
        return greater_is_better(name, *self._keys) if rule is None else _RULES[rule]


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigTypeError(
            f"CheckpointHook: save_best={name!r}, but its value is a {type(value).__name__}, not a number to compare."
        )
    return float(value)
