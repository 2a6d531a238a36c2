"""The short names of strategies."""

from __future__ import annotations

from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.registry.builtin import STRATEGIES
from stratagem.utils import did_you_mean

__all__ = ["full_strategy_name", "require_strategy_name", "strategy_name"]


def full_strategy_name(name: str) -> str:
    """Return the class name for a short name, such as ``DDPStrategy`` for ``ddp``; any other name unchanged."""
    return name if name in STRATEGIES.names() else _short_names().get(name.lower(), name)


def require_strategy_name(name: str) -> str:
    """Return the class name of a strategy for the argument ``strategy``, given its short name, its class name or a dotted path.

    Raises:
        ConfigKeyError: if the name is unknown.
    """
    full = full_strategy_name(name)
    if "." not in full and STRATEGIES.get(full) is None:
        known = [*_short_names(), *STRATEGIES.names()]
        raise ConfigKeyError(f"strategy: unknown name {name!r}. {did_you_mean(name, known)}")
    return full


def strategy_name(name: str) -> str:
    """Return the class name of a strategy for ``--strategy``, given its short name or its class name.

    Raises:
        ConfigValueError: if the name is unknown.
    """
    full, known = full_strategy_name(name), STRATEGIES.names()
    if full not in known:
        raise ConfigValueError(f"--strategy {name}: unknown strategy. {did_you_mean(name, [*_short_names(), *known])}")
    return full


def _short_names() -> dict[str, str]:
    return {each.removesuffix("Strategy").removesuffix("Device").lower(): each for each in STRATEGIES.names()}
