"""Check a configuration for unknown keys and arguments before anything is built.

The caller passes a schema: a ``Section`` for each top-level key. This module defines no sections and no registries.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from stratagem.config.config import Config
from stratagem.config.keys import KeyPath, path_text
from stratagem.config.reading.custom_imports import CUSTOM_IMPORTS, IMPORT_KEYS
from stratagem.config.reading.source import Origin
from stratagem.config.variables import Severity, examine_name, is_foreign_scope
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, StratagemError
from stratagem.utils import did_you_mean, import_object, nearest_names
from stratagem.utils.data_rules import refused_arguments
from stratagem.utils.signatures import Arguments, arguments_of

__all__ = ["FREE_KEY", "JointRule", "SupportsLookup", "Problem", "Rule", "Section", "check", "require"]

# The section for values that are not checked, such as YAML anchors, notes, and values that other sections refer to.
FREE_KEY = "vars"
# Keys allowed in every mapping with a type; they are not passed to the target of the type.
_SHOWN_PATHS = 3
_BUILD_KEYS = frozenset({"type", "_scope_"})
_WORD = re.compile(r"\w+")


class SupportsLookup(Protocol):
    """The registry methods that the check uses."""

    @property
    def name(self) -> str: ...
    def get(self, key: str) -> Callable[..., Any] | None: ...
    def suggest(self, key: str) -> str: ...
    def switch_scope_and_registry(self, scope: str | None) -> AbstractContextManager[Any]: ...
    def refused_arguments(self, target: Any, given: Mapping[str, Any]) -> Mapping[str, str]: ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The schema of one value in a configuration. If no field is set, any value is valid.

    Args:
        registry: The registry that builds the value, which is a mapping or a list of mappings.
        target: The ``"module:name"`` whose arguments the value contains, as a mapping.
        default_type: The ``type`` used for a mapping without one.
        by_name: Whether the value can also be the name of a registry entry.
        supplied: Arguments that the program passes.
        partial: Whether the target is a function that is called later with the missing arguments.
        keys: The schemas of further keys of the mapping, and of arguments of the target.
        others: The schema of all other keys; None to reject other keys.
        validate: A function that raises a ``StratagemError`` for an invalid value, such as the one that building uses. It is
            only called if the keys are valid.
    """

    registry: SupportsLookup | None = None
    target: str | None = None
    default_type: str | None = None
    by_name: bool = False
    supplied: frozenset[str] = frozenset()
    partial: bool = False
    keys: Mapping[str, Rule] = field(default_factory=dict)
    others: Rule | None = None
    validate: Callable[[Any], object] | None = None

    @property
    def accepts_anything(self) -> bool:
        """Whether any value is valid."""
        structure = self.registry is None and self.target is None and not self.keys and self.others is None
        return structure and self.validate is None


# A section, or a function that returns the section for a value.
Rule = Section | Callable[[Any], Section]


@final
@dataclass(frozen=True, slots=True)
class JointRule:
    """A rule for several sections together. It is only checked if these sections are valid.

    Args:
        keys: the top-level keys whose values the rule checks; a problem is in one of them.
        validate: receives the configuration, and raises a ``StratagemError`` if the values of these keys do not fit together.
        context: further top-level keys that the rule reads.
    """

    keys: Sequence[str]
    validate: Callable[[Config], object]
    context: Sequence[str] = ()


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in a configuration.

    Attributes:
        path: the path of the value.
        origin: the file and line, or the option, that set the value.
        message: what is wrong, and the suggested fix.
        error: the type of the exception that building the value raises.
    """

    path: str
    origin: Origin | None
    message: str
    error: type[StratagemError] = ConfigKeyError

    @property
    def key(self) -> str:
        """The top-level key of the value."""
        return self.path.partition(".")[0]

    def __str__(self) -> str:
        where = f"{self.path} ({self.origin})" if self.origin else self.path
        return f"{where}: {self.message}" if where else self.message


def check(
    config: Config,
    sections: Mapping[str, Rule],
    *,
    scope: str | None = None,
    rules: Sequence[JointRule] = (),
) -> list[Problem]:
    """Return all problems of a configuration, in the order of its keys.

    Problems are unknown top-level keys, unknown keys within a section, a ``type`` that is not registered, unknown or
    missing arguments of the target of a ``type``, and values that the ``validate`` functions of sections and rules reject.
    Targets are imported, but this module builds nothing. A mapping nested in the
    arguments of a target may be intended for other code. It is checked only if its ``type`` is in the registry of the
    section, and only likely typos in it are reported.

    Args:
        config: The configuration to check.
        sections: The schema of each top-level key.
        scope: The library whose registries are searched first.
        rules: Rules for several sections together.
    """
    imports = Section(keys=dict.fromkeys(IMPORT_KEYS, Section()))
    top = Section(keys={**sections, FREE_KEY: Section(), CUSTOM_IMPORTS: imports})
    run = _Check(config, scope)
    problems = list(run.mapping(config, top, ()))
    invalid = {problem.key for problem in problems}
    for rule in rules:
        if invalid.isdisjoint((*rule.keys, *rule.context)):
            values = {key: config[key] for key in rule.keys if key in config}
            found = list(run.validated(config, rule.validate, (next(iter(values), ""),), inside=values, root=()))
            problems += found
            invalid.update(rule.keys if found else ())
    return problems


def require(
    config: Config,
    sections: Mapping[str, Rule],
    *,
    scope: str | None = None,
    rules: Sequence[JointRule] = (),
) -> None:
    """Check a configuration with :func:`check` and raise an error that lists all problems.

    Raises:
        ConfigKeyError: if there are several problems, or if a key or an argument is unknown.
        StratagemError: of the same class as when the value is built, if the only problem is an invalid value.
    """
    problems = check(config, sections, scope=scope, rules=rules)
    texts = _by_cause(problems)
    if len(texts) == 1:
        raise problems[0].error(texts[0])
    if problems:
        listed = "\n".join(f"  {text}" for text in texts)
        raise ConfigKeyError(f"{config.filename or 'The configuration'} has {len(problems)} problems:\n{listed}")


def _by_cause(problems: list[Problem]) -> list[str]:
    """Return a line for each problem; problems with the same message are listed once, with the number of further paths."""
    by_message: dict[str, list[Problem]] = {}
    for problem in problems:
        by_message.setdefault(problem.message, []).append(problem)
    return [
        str(same[0]) if len(same) == 1 else f"{same[0]} The same applies to {_paths(same[1:])}."
        for same in by_message.values()
    ]


def _paths(problems: list[Problem]) -> str:
    shown = ", ".join(problem.path for problem in problems[:_SHOWN_PATHS])
    rest = len(problems) - _SHOWN_PATHS
    return f"{shown} and {rest} more" if rest > 0 else shown


@final
class _Check:
    """Visits the values of one configuration and yields their problems."""

    def __init__(self, config: Config, scope: str | None) -> None:
        self._config = config
        self._scope = scope

    def value(self, value: Any, rule: Rule, path: KeyPath) -> Iterator[Problem]:
        section = rule if isinstance(rule, Section) else rule(value)
        if section.accepts_anything:
            return
        problems = list(self._structure(value, section, path))
        yield from problems
        if section.validate is not None and value is not None and not problems:
            yield from self.validated(value, section.validate, path, inside=value)

    def validated(
        self, value: Any, validate: Callable[[Any], object], path: KeyPath, *, inside: Any, root: KeyPath | None = None
    ) -> Iterator[Problem]:
        """Yield the error that a function raises for a value, if any.

        Args:
            value: the argument of the function.
            validate: the function.
            path: the path of the problem.
            inside: the value in which the key that the message mentions is searched.
            root: the path of that value; ``path`` by default.
        """
        try:
            validate(value)
        except StratagemError as error:
            narrowed = _narrowed(path if root is None else root, inside, str(error)) or path
            yield self._problem(narrowed, str(error), type(error))
        except Exception as error:  # noqa: BLE001 -- building would fail with the same error
            message = f"{type(error).__name__}: {error}"
            kind = ConfigTypeError if isinstance(error, TypeError) else ConfigValueError
            yield self._problem(_narrowed(path if root is None else root, inside, message) or path, message, kind)

    def _structure(self, value: Any, section: Section, path: KeyPath) -> Iterator[Problem]:
        if isinstance(value, Mapping):
            if section.registry is None and section.target is None and not section.keys and section.others is None:
                return
            yield from self.mapping(value, section, path)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                yield from self.value(item, section, (*path, index))
        elif isinstance(value, str) and section.by_name and section.registry is not None:
            yield from self._named(value, section.registry, self._scope, path)[1]

    def mapping(self, node: Mapping[str, Any], section: Section, path: KeyPath) -> Iterator[Problem]:
        """Check a mapping and everything nested in it."""
        target = None
        if section.target is not None:
            target = import_object(section.target)
        elif section.registry is not None:
            target, problems = self._target(node, section, section.registry, path)
            yield from problems
            if target is None:
                return
        taken = Arguments() if target is None else arguments_of(target)
        for key in node:
            below = (*path, key)
            if key in section.keys:
                yield from self._below(node, key, section.keys[key], below)
            elif target is not None and key in _BUILD_KEYS:
                continue
            elif target is not None and taken.accepts(key):
                yield from self._argument(node, key, section.registry, below)
            elif section.others is not None:
                yield from self._below(node, key, section.others, below)
            elif not path and target is None:
                yield from self._top_level(key, section)
            else:
                yield self._unknown(key, section, taken, below, target)
        refused = refused_arguments if section.registry is None else section.registry.refused_arguments
        for key, reason in refused(target, node).items():
            yield self._problem((*path, key), reason)
        missing = sorted(taken.required - node.keys() - section.supplied)
        if missing and not section.partial:
            yield self._problem(
                path, f"{_title(target)} is missing required arguments: {', '.join(map(repr, missing))}."
            )

    def _top_level(self, key: str, section: Section) -> Iterator[Problem]:
        """Check a top-level key that is not a section: a variable that the files use, or a mistake."""
        advice = f"Put values that only your own code uses in the section {FREE_KEY!r}."
        foreign = is_foreign_scope(self._scope)
        found = examine_name(key, self._config.file_layers, section.keys, foreign=foreign, advice=advice)
        if found is None:
            return
        if found.severity is Severity.ERROR:
            yield self._problem((key,), found.message)
        else:
            warnings.warn(f"{self._config.where(key)}: {found.message}", UserWarning, stacklevel=2)

    def _below(self, node: Mapping[str, Any], key: str, rule: Rule, path: KeyPath) -> Iterator[Problem]:
        try:
            value = node[key]
        except StratagemError as error:  # The value is a lazy object that cannot be imported.
            yield self._problem(path, str(error))
        else:
            yield from self.value(value, rule, path)

    def _argument(self, node: Any, key: str | int, registry: SupportsLookup | None, path: KeyPath) -> Iterator[Problem]:
        """Check the mappings nested in an argument. The registry may or may not build them."""
        try:
            value = node[key]
        except StratagemError as error:
            yield self._problem(path, str(error))
            return
        if isinstance(value, list | tuple):
            for index in range(len(value)):
                yield from self._argument(value, index, registry, (*path, index))
        elif isinstance(value, Mapping):
            yield from self._typos(value, registry, path)
            for name in value:
                yield from self._argument(value, name, registry, (*path, name))

    def _typos(self, node: Mapping[str, Any], registry: SupportsLookup | None, path: KeyPath) -> Iterator[Problem]:
        if registry is None:
            return
        key = "type" if "type" in node else next(iter(nearest_names("type", map(str, node))), None)
        if key is None or (not isinstance(node.get(key), str) and key != "type"):
            return
        try:
            target = _find(node[key], registry, self._scope_at(path))
        except StratagemError as error:
            yield self._problem((*path, key), str(error))
            return
        if key != "type":
            if target is not None:  # The value is a registered name, so the key is a typo of 'type'.
                yield self._problem((*path, key), f"unknown key {key!r}. Did you mean 'type'?")
            return
        taken = Arguments(open=True) if target is None else arguments_of(target)
        for key, reason in (registry.refused_arguments(target, node) if target is not None else {}).items():
            yield self._problem((*path, key), reason)
        for key in node:
            if not (key in _BUILD_KEYS or taken.accepts(key)) and set(nearest_names(key, taken.names)) - node.keys():
                yield self._unknown(key, Section(), taken, (*path, key), target)

    def _target(
        self, node: Mapping[str, Any], section: Section, registry: SupportsLookup, path: KeyPath
    ) -> tuple[Any, list[Problem]]:
        try:
            kind = node.get("type", section.default_type)
        except StratagemError as error:
            return None, [self._problem((*path, "type"), str(error))]
        if kind is None:
            near = nearest_names("type", [str(key) for key in node])
            hint = f" Is {near[0]!r} a typo?" if near else ""
            return None, [self._problem(path, f"the key 'type', which names a {registry.name}, is missing.{hint}")]
        return self._named(kind, registry, self._scope_at(path), (*path, "type"))

    def _scope_at(self, path: KeyPath) -> str | None:
        """Return the library whose registries are searched first at a path: that of the innermost ``_scope_``."""
        node: Any = self._config
        scope = self._scope
        for key in path:
            node = node[key]
            scope = node.get("_scope_", scope) if isinstance(node, Mapping) else scope
        return scope

    def _named(
        self, kind: Any, registry: SupportsLookup, scope: str | None, path: KeyPath
    ) -> tuple[Any, list[Problem]]:
        try:
            target = _find(kind, registry, scope)
        except StratagemError as error:
            return None, [self._problem(path, str(error))]
        if target is None:
            suggestion = registry.suggest(str(kind))
            return None, [self._problem(path, f"{kind!r} is not in the {registry.name} registry. {suggestion}")]
        return target, []

    def _unknown(self, key: str, section: Section, taken: Arguments, path: KeyPath, target: Any) -> Problem:
        type_key = {"type"} if section.registry is not None else set()
        suggestion = did_you_mean(str(key), {*section.keys, *taken.names, *type_key} - section.supplied)
        if target is not None:
            return self._problem(path, f"{_title(target)} takes no argument {key!r}. {suggestion}")
        return self._problem(path, f"unknown key {key!r}. {suggestion}")

    def _problem(self, path: KeyPath, message: str, error: type[StratagemError] = ConfigKeyError) -> Problem:
        origin = next(
            (found for end in range(len(path), 0, -1) if (found := self._config.where(".".join(map(str, path[:end]))))),
            None,
        )
        return Problem(path_text(path), origin, message, error)


def _narrowed(path: KeyPath, value: Any, message: str) -> KeyPath:
    """Return the path of the innermost key that a message mentions, if there is only one; otherwise ``path``.

    Args:
        path: the path of the value.
        value: the value, whose nested mappings and lists are searched.
        message: the message.
    """
    words = set(_WORD.findall(message))
    found = sorted((each for each in _paths_in(value, path) if each[-1] in words), key=len)
    # The keys that contain the innermost one may be mentioned as well.
    if found and all(found[-1][: len(each)] == each for each in found):
        return found[-1]
    return path


def _paths_in(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Yield the paths of all keys in a value, except ``type``."""
    if isinstance(value, Mapping):
        for key in value:
            try:
                item = value[key]
            except StratagemError:  # A lazy object that cannot be imported, which is reported for its key.
                continue
            if key != "type":
                yield (*path, key)
            yield from _paths_in(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _paths_in(item, (*path, index))


def _find(kind: Any, registry: SupportsLookup, scope: str | None) -> Any:
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    with registry.switch_scope_and_registry(scope) as scoped:
        return scoped.get(kind)


def _title(target: Any) -> str:
    return getattr(target, "__qualname__", None) or repr(target)
