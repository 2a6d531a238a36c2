"""The keys under which checkpoints store the states of hooks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from stratagem.errors import ConfigValueError
from stratagem.logging import Logger

__all__ = ["StatefulHook", "by_state_key", "match_states"]


class StatefulHook(Protocol):
    """The part of a hook that checkpoints need."""

    state_key: str | None

    @property
    def has_state(self) -> bool:
        """Whether checkpoints contain a state of this hook."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state."""

    def recognizes_state(self, state_dict: Mapping[str, Any]) -> bool | None:
        """Return whether this hook saved a state, or None if the content of the state does not show that."""


AnyHook = TypeVar("AnyHook", bound=StatefulHook)


def by_state_key(hooks: Iterable[AnyHook]) -> dict[str, AnyHook]:
    """Return a mapping from keys to the hooks that have a state.

    A key is the name of the class, followed by a dot and ``state_key`` if the hook has one. The key does not depend on
    other hooks or on their order.

    Raises:
        ConfigValueError: if two hooks have the same key.
    """
    keyed: dict[str, AnyHook] = {}
    for hook in hooks:
        if not hook.has_state:
            continue
        key = _key_of(hook)
        if key in keyed:
            raise ConfigValueError(
                f"Two hooks save their state in checkpoints as {key!r}, so a resumed run could not tell them apart. Give each "
                f'of the {type(hook).__name__} hooks a different name: add state_key="..." to its configuration, as in '
                f'dict(type="{type(hook).__name__}", state_key="first"), or set the attribute state_key in its class or '
                "constructor."
            )
        keyed[key] = hook
    return keyed


def _key_of(hook: StatefulHook) -> str:
    name, key = type(hook).__name__, hook.state_key
    if key is None:
        return name
    if not isinstance(key, str) or not key:
        raise ConfigValueError(f"{name}: expected state_key to be a string that is not empty, or None, got {key!r}.")
    return f"{name}.{key}"


def match_states(
    saved: Mapping[str, Any], hooks: Mapping[str, StatefulHook], *, by_position: bool, logger: Logger
) -> dict[str, Any]:
    """Return the saved states, keyed as this run's hooks are; a state without such a hook keeps its saved key.

    Args:
        saved: the saved states by key.
        hooks: the hooks of this run by key.
        by_position: whether the keys are class names that are numbered in the order of the hooks (``Name``, ``Name_2``,
            ...), as in checkpoints of earlier versions. Such a state is matched with the hook that recognizes it, or with
            the only hook of its class; several states are matched in order if there are as many hooks, with a warning.
        logger: the logger for warnings.
    """
    if not by_position:
        return dict(saved)
    matched: dict[str, Any] = {}
    rest = dict(saved)
    for name, keys in _keys_by_class(hooks).items():
        numbered = _numbered(name, saved, hooks)
        states = [rest.pop(each) for each in numbered]
        matched |= _match(name, {key: hooks[key] for key in keys}, states, logger)
    return {**rest, **matched}


def _keys_by_class(hooks: Mapping[str, StatefulHook]) -> dict[str, list[str]]:
    by_class = defaultdict(list)
    for key, hook in hooks.items():
        by_class[type(hook).__name__].append(key)
    return by_class


def _numbered(name: str, saved: Mapping[str, Any], hooks: Mapping[str, StatefulHook]) -> list[str]:
    """Return the saved keys of a class in the order of their numbers."""
    classes = {type(hook).__name__ for hook in hooks.values()}
    numbers = {1: name} if name in saved else {}
    for key in saved:
        number = key.removeprefix(f"{name}_")
        if number != key and number.isdecimal() and key not in classes:
            numbers[int(number)] = key
    return [numbers[number] for number in sorted(numbers)]


def _match(
    name: str, hooks: Mapping[str, StatefulHook], states: Sequence[Mapping[str, Any]], logger: Logger
) -> dict[str, Any]:
    """Match the states of a class with its hooks; states that cannot be matched are not restored."""
    answers = {key: [hook.recognizes_state(state) for state in states] for key, hook in hooks.items()}
    if all(None not in answer for answer in answers.values()):
        return {key: states[answer.index(True)] for key, answer in answers.items() if answer.count(True) == 1}
    if len(hooks) != len(states):
        if states:
            logger.warning(
                "The checkpoint contains numbered states of %d hooks of the class %s, but this run has %d such hooks. No "
                "state is restored, because it is unknown which state belongs to which hook.",
                len(states), name, len(hooks),
            )  # fmt: skip
        return {}
    if len(states) > 1:
        logger.warning(
            "The checkpoint contains numbered states of %d hooks of the class %s. They are restored in the order of this "
            "run's hooks: %s. If that order has changed, hooks receive each other's states.",
            len(states), name, ", ".join(hooks),
        )  # fmt: skip
    return dict(zip(hooks, states, strict=True))
