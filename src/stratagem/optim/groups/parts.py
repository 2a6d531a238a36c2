"""Assign the parameters of a model to the parts of a mixed optimizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, final

from torch import nn

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.groups.hidden_matrices import find_hidden_matrices
from stratagem.optim.groups.parameter_info import ParameterInfo
from stratagem.utils import canonical_names, refuse_unknown
from stratagem.utils.names import did_you_mean, some_names

__all__ = [
    "Assignment",
    "PartRules",
    "assign_parameters",
    "describe_assignment",
    "parse_parts",
    "require_matrices",
]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PartRules:
    """The configuration of a mixed optimizer.

    Attributes:
        parts: the configuration of each optimizer by name.
        others: the part of all parameters to which no other rule applies.
        hidden_matrices: the part of the weight matrices of hidden layers (see
            :func:`~stratagem.optim.groups.hidden_matrices.find_hidden_matrices`); None to treat them as ``others``.
        rules: maps regular expressions, which are searched in the names of parameters, to parts. The first one that matches
            takes precedence over ``hidden_matrices``.
    """

    parts: Mapping[str, Mapping[str, Any]]
    others: str
    hidden_matrices: str | None = None
    rules: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Mapping) or not self.parts:
            raise ConfigTypeError(
                f"MixedOptimizer: parts must map names to configurations of optimizers, got {self.parts!r}."
            )
        for name, part in self.parts.items():
            if not isinstance(part, Mapping) or "type" not in part:
                raise ConfigTypeError(
                    f"MixedOptimizer: the part {name!r} must be a mapping with a type, such as dict(type='AdamW', lr=3e-4), got "
                    f"{part!r}."
                )
        if not isinstance(self.rules, Mapping):
            raise ConfigTypeError(f"MixedOptimizer: rules must map regular expressions to parts, got {self.rules!r}.")
        named = {"others": self.others, **{f"rules[{pattern!r}]": part for pattern, part in self.rules.items()}}
        if self.hidden_matrices is not None:
            named["hidden_matrices"] = self.hidden_matrices
        for key, name in named.items():
            refuse_unknown([str(name)], self.parts, f"MixedOptimizer: {key}")
        for pattern in self.rules:
            _compile(pattern)


@final
@dataclass(frozen=True, slots=True)
class Assignment:
    """The parameters of each part.

    Attributes:
        infos: the parameters of each part, under each of their names.
        reasons: why parameters with two dimensions in ``others`` are not hidden matrices, by name.
    """

    infos: Mapping[str, list[ParameterInfo]]
    reasons: Mapping[str, str]


def parse_parts(cfg: Mapping[str, Any]) -> PartRules:
    """Validate the configuration of a mixed optimizer, without its ``type``.

    Raises:
        ConfigTypeError: if a value has the wrong type.
        ConfigKeyError: if a key or the name of a part is unknown.
        ConfigValueError: if a key is missing, or a regular expression is invalid.
    """
    options = {key: value for key, value in cfg.items() if key != "type"}
    known = [item.name for item in fields(PartRules)]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigKeyError(f"MixedOptimizer takes no argument {unknown[0]!r}. {did_you_mean(unknown[0], known)}")
    missing = [key for key in ("parts", "others") if key not in options]
    if missing:
        raise ConfigValueError(
            f"MixedOptimizer requires {' and '.join(missing)}. For example: dict(type='MixedOptimizer', "
            "parts=dict(muon=dict(type='Muon', lr=0.02), adamw=dict(type='AdamW', lr=3e-4)), hidden_matrices='muon', "
            "others='adamw')."
        )
    return PartRules(**options)


def assign_parameters(infos: Sequence[ParameterInfo], rules: PartRules, model: nn.Module) -> Assignment:
    """Return the parameters of each part.

    Args:
        infos: the parameters.
        rules: the configuration.
        model: the model that has the parameters.

    Raises:
        ConfigValueError: if a pattern matches no parameter, a part has no parameters, or the names of a shared parameter match
            rules for different parts.
    """
    canonical = canonical_names(model)
    names = {info.name: canonical(info.name) for info in infos}
    by_rule = _by_rule(infos, names, rules)
    hidden, reasons = find_hidden_matrices(model) if rules.hidden_matrices is not None else (set[int](), {})
    assigned: dict[str, list[ParameterInfo]] = {name: [] for name in rules.parts}
    for info in infos:
        default = rules.hidden_matrices if id(info.parameter) in hidden else rules.others
        assigned[by_rule.get(id(info.parameter)) or str(default)].append(info)
    empty = [name for name, some in assigned.items() if not some]
    if empty:
        why = "".join(f" {name} ({reason})," for name, reason in list(reasons.items())[:5]).rstrip(",")
        raise ConfigValueError(
            f"MixedOptimizer: no parameter belongs to the part {empty[0]!r}. Remove the part, or assign parameters to it with "
            "rules, which map regular expressions to parts." + (f" Not hidden matrices:{why}." if why else "")
        )
    others = {names[info.name] for info in assigned[rules.others] if id(info.parameter) not in by_rule}
    return Assignment(assigned, {name: reason for name, reason in reasons.items() if name in others})


def describe_assignment(rules: PartRules, assignment: Assignment) -> str:
    """Return a line with the number of parameters of each part, their first names, and matrices that are not hidden."""
    texts = []
    for name, infos in assignment.infos.items():
        unique: dict[int, ParameterInfo] = {}
        for info in infos:
            unique.setdefault(id(info.parameter), info)
        elements = sum(info.parameter.numel() for info in unique.values())
        shown = some_names([info.name for info in unique.values()], 3)
        count = "1 parameter" if len(unique) == 1 else f"{len(unique)} parameters"
        texts.append(f"{name} ({rules.parts[name]['type']}) updates {count} with {elements:,} elements: {shown}")
    excluded = some_names([f"{name} ({reason})" for name, reason in assignment.reasons.items()], 8)
    return f"MixedOptimizer: {'; '.join(texts)}." + (f" Not hidden matrices: {excluded}." if excluded else "")


def require_matrices(name: str, cfg: Mapping[str, Any], infos: Sequence[ParameterInfo]) -> None:
    """Require that all parameters of a part that uses Muon have two dimensions.

    Raises:
        ConfigValueError: if one has a different number.
    """
    kind = cfg["type"]
    wrong = [info for info in infos if info.parameter.ndim != 2]
    if wrong and getattr(kind, "__name__", kind) == "Muon":
        raise ConfigValueError(
            f"MixedOptimizer: Muon only updates parameters with two dimensions, but {wrong[0].name} with the shape "
            f"{list(wrong[0].parameter.shape)} belongs to the part {name!r}. Assign it to another part with hidden_matrices, "
            "others or rules."
        )


def _by_rule(infos: Sequence[ParameterInfo], names: Mapping[str, str], rules: PartRules) -> dict[int, str]:
    """Return the part of each parameter with a name that a pattern matches, by the ``id`` of the parameter."""
    patterns = {pattern: _compile(pattern) for pattern in rules.rules}
    matched: dict[int, tuple[str, str]] = {}
    used: set[str] = set()
    for info in infos:
        name = names[info.name]
        matching = [pattern for pattern, compiled in patterns.items() if compiled.search(name)]
        used.update(matching)
        if not matching:
            continue
        part = rules.rules[matching[0]]
        first_name, first_part = matched.setdefault(id(info.parameter), (name, part))
        if part != first_part:
            raise ConfigValueError(
                f"MixedOptimizer: {first_name} and {name} are the same parameter, but rules assign them to different parts "
                f"({first_part!r} and {part!r})."
            )
    unused = [pattern for pattern in patterns if pattern not in used]
    if unused:
        raise ConfigValueError(
            f"MixedOptimizer: rules[{unused[0]!r}] matches no parameter. The names are {some_names(list(names.values()))}."
        )
    return {key: part for key, (_, part) in matched.items()}


def _compile(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigValueError(
            f"MixedOptimizer: {pattern!r} in rules is not a valid regular expression: {error}."
        ) from None
