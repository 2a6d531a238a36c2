"""Select the strategy of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from stratagem.distributed import infer_launcher
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.registry import STRATEGIES
from stratagem.registry.strategy_names import full_strategy_name, require_strategy_name
from stratagem.strategies.base import BaseStrategy
from stratagem.strategies.setup.environment import check_environment

__all__ = [
    "check_environment_settings",
    "check_strategy",
    "check_strategy_settings",
    "choose_strategy",
    "refuse_ignored",
    "strategy_class",
]


def choose_strategy(
    strategy: BaseStrategy | Mapping[str, Any] | str | None,
    *,
    launcher: str | None,
    work_dir: str | os.PathLike[str] | None,
    experiment_name: str | None,
    env_cfg: Mapping[str, Any] | None,
    randomness: Mapping[str, Any] | None,
    auto_scale_lr: Mapping[str, Any] | None,
    log_level: str | int | None,
    default_name: str | None = None,
) -> BaseStrategy:
    """Return the given strategy, or build one from its configuration or name.

    Args:
        strategy: a strategy, its configuration or its name, which may be short, such as ``"ddp"``. By default
            ``DDPStrategy`` if a launcher started the process, otherwise ``SingleDeviceStrategy``.
        launcher: the launcher that started the processes; inferred if None.
        work_dir: the work directory of the run; ``work_dirs`` by default.
        experiment_name: the name of the run.
        env_cfg: additional ``env_kwargs`` for the strategy.
        randomness: the seed and the other randomness settings.
        auto_scale_lr: how learning rates are scaled with the batch size; see :class:`BaseStrategy`.
        log_level: the logging level; ``"INFO"`` by default.
        default_name: the name of the run if ``experiment_name`` is None; unused if the strategy is already built.

    Raises:
        ConfigValueError: if the strategy is already built and other arguments would therefore be ignored.
        ConfigTypeError: if the configuration builds something other than a strategy.
    """
    if isinstance(strategy, BaseStrategy):
        refuse_ignored(
            launcher=launcher,
            work_dir=work_dir,
            experiment_name=experiment_name,
            env_cfg=env_cfg,
            randomness=randomness,
            auto_scale_lr=auto_scale_lr,
            log_level=log_level,
        )
        return strategy
    if strategy is None:
        strategy = "SingleDeviceStrategy" if (launcher or infer_launcher()) == "none" else "DDPStrategy"
    cfg = {"type": strategy} if isinstance(strategy, str) else strategy
    if isinstance(cfg, Mapping) and isinstance(cfg.get("type"), str):
        cfg = {**cfg, "type": require_strategy_name(cfg["type"])}
    defaults = {
        "work_dir": work_dir or "work_dirs",
        "experiment_name": experiment_name or default_name,
        "auto_scale_lr": auto_scale_lr,
        "env_kwargs": _env_kwargs(launcher, randomness, env_cfg),
        "log_kwargs": {"log_level": "INFO" if log_level is None else log_level},
    }
    built = STRATEGIES.build(cfg, default_args=defaults)
    if not isinstance(built, BaseStrategy):
        raise ConfigTypeError(
            f"strategy: {cfg.get('type')!r} builds a {type(built).__name__}, which is not a strategy."
        )
    return built


def refuse_ignored(**given: Any) -> None:
    """Reject arguments for the constructor of a strategy that is already built.

    Raises:
        ConfigValueError: if an argument is not None.
    """
    ignored = [name for name, value in given.items() if value is not None]
    if ignored:
        raise ConfigValueError(
            f"The strategy is already built, so {', '.join(ignored)} would be ignored. Pass them to the strategy instead."
        )


def check_strategy(strategy: Any) -> None:
    """Check the arguments of a strategy that do not depend on devices or processes, as building it does.

    Raises:
        StratagemError: (a subclass) if an argument is invalid.
    """
    if isinstance(strategy, str) or strategy is None or isinstance(strategy, BaseStrategy):
        return
    if not isinstance(strategy, Mapping):
        STRATEGIES.build(strategy)  # raises an error
    kind = strategy_class(strategy)
    if kind is not None:
        kind.check_arguments({key: value for key, value in strategy.items() if key not in ("type", "_scope_")})


def check_strategy_settings(strategy: Any, **settings: Any) -> None:
    """Check a strategy together with the other arguments of :func:`choose_strategy`.

    Raises:
        ConfigValueError: if the strategy is already built, so that they would be ignored.
        StratagemError: (a subclass) if the strategy does not support one of them.
    """
    if isinstance(strategy, BaseStrategy):
        refuse_ignored(**settings)
        return
    kind = strategy_class(strategy)
    if kind is not None:
        own = {key: value for key, value in strategy.items() if key != "type"} if isinstance(strategy, Mapping) else {}
        env_kwargs = _env_kwargs(*(settings.get(key) for key in ("launcher", "randomness", "env_cfg")))
        kind.check_arguments({"env_kwargs": env_kwargs, **own})


def check_environment_settings(launcher: Any, randomness: Any, env_cfg: Any) -> None:
    """Check the settings of the process, as building a strategy does.

    Raises:
        ConfigError: (or a subclass) if a setting is invalid.
        LaunchError: if the launcher is unknown.
    """
    check_environment(_env_kwargs(launcher, randomness, env_cfg))


def strategy_class(strategy: Any) -> type[BaseStrategy] | None:
    """Return the class of a strategy, given the strategy, its configuration or its name; None if the class is unknown."""
    if isinstance(strategy, BaseStrategy):
        return type(strategy)
    kind = strategy.get("type") if isinstance(strategy, Mapping) else strategy
    found = STRATEGIES.get(full_strategy_name(kind)) if isinstance(kind, str) else kind
    return found if isinstance(found, type) and issubclass(found, BaseStrategy) else None


def _env_kwargs(launcher: Any, randomness: Any, env_cfg: Any) -> dict[str, Any]:
    if env_cfg is not None and not isinstance(env_cfg, Mapping):
        raise ConfigTypeError(f"env_cfg must be a mapping, got {env_cfg!r}.")
    return {"launcher": launcher, "randomness": randomness, **(env_cfg or {})}
