"""Select the strategy of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from stratagem.distributed import infer_launcher
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.registry import STRATEGIES
from stratagem.registry.strategy_names import full_strategy_name
from stratagem.strategies.base import BaseStrategy

__all__ = ["choose_strategy"]


def choose_strategy(
    strategy: BaseStrategy | Mapping[str, Any] | str | None,
    *,
    launcher: str | None,
    work_dir: str | os.PathLike[str] | None,
    experiment_name: str | None,
    env_cfg: Mapping[str, Any] | None,
    randomness: Mapping[str, Any] | None,
    auto_scale_lr: Mapping[str, Any] | None,
    log_level: str | int,
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
        log_level: the logging level.

    Raises:
        ConfigValueError: if the strategy is already built and other arguments would therefore be ignored.
        ConfigTypeError: if the configuration builds something other than a strategy.
    """
    given = {
        "launcher": launcher,
        "work_dir": work_dir,
        "env_cfg": env_cfg,
        "randomness": randomness,
        "auto_scale_lr": auto_scale_lr,
    }
    if isinstance(strategy, BaseStrategy):
        ignored = [name for name, value in given.items() if value is not None]
        if ignored:
            raise ConfigValueError(
                f"The strategy is already built, so {', '.join(ignored)} would be ignored. Pass them to the strategy instead."
            )
        return strategy
    if strategy is None:
        strategy = "SingleDeviceStrategy" if (launcher or infer_launcher()) == "none" else "DDPStrategy"
    cfg = {"type": strategy} if isinstance(strategy, str) else strategy
    if isinstance(cfg, Mapping) and isinstance(cfg.get("type"), str):
        cfg = {**cfg, "type": full_strategy_name(cfg["type"])}
    defaults = {
        "work_dir": work_dir or "work_dirs",
        "experiment_name": experiment_name,
        "auto_scale_lr": auto_scale_lr,
        "env_kwargs": {"launcher": launcher, "randomness": randomness, **(env_cfg or {})},
        "log_kwargs": {"log_level": log_level},
    }
    built = STRATEGIES.build(cfg, default_args=defaults)
    if not isinstance(built, BaseStrategy):
        raise ConfigTypeError(
            f"strategy: {cfg.get('type')!r} builds a {type(built).__name__}, which is not a strategy."
        )
    return built
