"""Choose the strategy of the engine for a runner of this layer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from stratagem.compat.mmengine.checks import NotSupportedError
from stratagem.compat.mmengine.registry import MODEL_WRAPPERS
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.model import unwrap_model
from stratagem.model.norms import convert_sync_batchnorm
from stratagem.optim.gradient_policy import GradientPolicy
from stratagem.parallel import Placed, Placement, Steps
from stratagem.strategies import BaseStrategy, DDPStrategy
from stratagem.strategies.choice import choose_strategy, refuse_ignored, strategy_class
from stratagem.strategies.composed import ComposedStrategy
from stratagem.utils import absolute, did_you_mean

__all__ = ["choose_placing"]

# The wrappers that DDPStrategy implements.
_OF_DDP = ("MMDistributedDataParallel", "MMSeparateDistributedDataParallel", "DistributedDataParallel")
# They create the optimizer together with the model.
_ENGINES = ("deepspeed", "colossalai")
_UNUSED = "find_unused_parameters"
_ENV_KEYS = (
    "cudnn_benchmark",
    "cudnn_allow_tf32",
    "float32_matmul_precision",
    "mp_cfg",
    "dist_cfg",
    "resource_limit",
)


@final
class _CustomWrapper(Placement):
    """Wraps the model with a class of the user.

    Args:
        wrapper_cfg: the configuration of the wrapper; None if the model is already wrapped.
        sync_bn: ``"torch"`` converts BatchNorm layers to SyncBatchNorm.
    """

    def __init__(self, wrapper_cfg: Mapping[str, Any] | None, sync_bn: str | None) -> None:
        self._cfg = wrapper_cfg
        self._sync_bn = sync_bn

    def place(self, model: nn.Module, steps: Steps, world: Any) -> Placed:
        model = steps.init_and_sync(model)
        if self._sync_bn is not None:
            model = convert_sync_batchnorm(model, self._sync_bn)
        model = steps.compile(model)
        optim = steps.make_optim(unwrap_model(model)) if steps.make_optim else None
        if self._cfg is None:
            return Placed(model=model, optim=optim)
        arguments: dict[str, Any] = {"module": model}
        kind = MODEL_WRAPPERS.get(self._cfg["type"])
        if isinstance(kind, type) and issubclass(kind, nn.parallel.DistributedDataParallel):
            arguments["device_ids"] = None if world.device.type == "cpu" else [world.device]
        return Placed(model=MODEL_WRAPPERS.build(dict(self._cfg), default_args=arguments), optim=optim)

    def unwrap(self, model: nn.Module) -> nn.Module:
        inner = getattr(model, "module", None)
        return inner if isinstance(inner, nn.Module) else model

    def gradient_policy(self, model: nn.Module, *, accumulates: bool) -> GradientPolicy:
        return GradientPolicy(always_set_grad_sync=False)


@final
class WrappedModelStrategy(ComposedStrategy):
    """Trains with a wrapper of the user, which is responsible for the communication between the ranks.

    Args:
        wrapper_cfg: the configuration of the wrapper; None if the model is already wrapped.
        sync_bn: ``"torch"`` converts BatchNorm layers to SyncBatchNorm.
        kwargs: the arguments of :class:`~stratagem.strategies.BaseStrategy`.
    """

    def __init__(self, *, wrapper_cfg: Mapping[str, Any] | None, sync_bn: str | None = None, **kwargs: Any) -> None:
        self._wrapper_cfg = wrapper_cfg
        self._sync_bn = sync_bn
        super().__init__(**kwargs)

    def _make_placement(self) -> Placement:
        return _CustomWrapper(self._wrapper_cfg, self._sync_bn)


def choose_placing(
    *,
    cfg: Any,
    strategy: Any,
    is_wrapped: bool,
    launcher: str,
    work_dir: str,
    experiment_name: str | None,
    env_cfg: Mapping[str, Any],
    randomness: Mapping[str, Any],
    log_level: str | int,
) -> BaseStrategy:
    """Return the strategy of a run.

    Args:
        cfg: the configuration, of which ``model_wrapper_cfg``, ``sync_bn`` and ``find_unused_parameters`` are used.
        strategy: a strategy, its configuration or its name; None for a single device, or DDP with a launcher.
        is_wrapped: whether the model is already wrapped.
        launcher: the launcher.
        work_dir: the work directory.
        experiment_name: the name of the run.
        env_cfg: the settings of the process.
        randomness: the seed and the other randomness settings.
        log_level: the logging level.

    Raises:
        TypeError: if a wrapper is configured for a model that is already wrapped.
        ValueError: if an option would be ignored, because a strategy is given, or because it is already built.
        NotImplementedError: if the wrapper is ``MMFullyShardedDataParallel``, or the strategy uses DeepSpeed or ColossalAI.
    """
    wrapper = cfg.get("model_wrapper_cfg")
    if is_wrapped and wrapper is not None:
        raise ConfigTypeError(f"The model is already wrapped, but model_wrapper_cfg={wrapper!r}. Omit one of them.")
    arguments: dict[str, Any] = {
        "launcher": launcher,
        "work_dir": work_dir,
        "experiment_name": experiment_name,
        "env_cfg": _settings(env_cfg),
        "randomness": {key: value for key, value in randomness.items() if value is not None},
        "auto_scale_lr": None,
        "log_level": log_level,
    }
    _warn_unknown_settings(env_cfg)
    if strategy is not None:
        _refuse_engines(strategy)
        _refuse_ignored(cfg)
        if isinstance(strategy, BaseStrategy):
            return _built(strategy, cfg, arguments)
        strategy = _with_unused_parameters(strategy, cfg)
    elif wrapper is not None:
        _refuse_fsdp1(wrapper)
    custom = is_wrapped or (wrapper is not None and wrapper.get("type", _OF_DDP[0]) not in _OF_DDP)
    if strategy is None and custom and (launcher != "none" or is_wrapped):
        if cfg.get(_UNUSED):
            _warn_unused_parameters("the wrapper of the model", f"Set {_UNUSED} of the wrapper.")
        return WrappedModelStrategy(
            wrapper_cfg=wrapper,
            sync_bn=None if launcher == "none" else cfg.get("sync_bn"),
            work_dir=work_dir,
            experiment_name=experiment_name,
            env_kwargs={
                "launcher": launcher,
                "randomness": arguments["randomness"],
                **arguments["env_cfg"],
            },
            log_kwargs={"log_level": log_level},
        )
    if strategy is None and launcher != "none":
        strategy = {"type": "DDPStrategy", "model_wrapper": None if wrapper is None else _plain(wrapper)}
        for option in ("sync_bn", _UNUSED):
            # The configuration of the wrapper takes precedence.
            if cfg.get(option) is not None and option not in (wrapper or {}):
                strategy[option] = cfg[option]
    return choose_strategy(_plain(strategy), **arguments)


def _built(strategy: BaseStrategy, cfg: Any, arguments: Mapping[str, Any]) -> BaseStrategy:
    """Return a strategy that is already built, if no argument would be ignored.

    Raises:
        ConfigValueError: otherwise.
    """
    settings = {name: value for name, value in arguments["env_cfg"].items() if value not in ({}, {"backend": "nccl"})}
    same_folder = Path(strategy.work_dir) == absolute(arguments["work_dir"])
    refuse_ignored(
        work_dir=None if same_folder else arguments["work_dir"],
        env_cfg=settings or None,
        randomness=arguments["randomness"] or None,
    )
    if (arguments["launcher"] == "none") == (strategy.world_size > 1):
        raise ConfigValueError(
            f"launcher={arguments['launcher']!r}, but the strategy was built in a process group of size {strategy.world_size}. "
            "Pass the launcher that started the processes to the runner as well."
        )
    if cfg.get(_UNUSED):
        _warn_unused_parameters("a strategy that is already built", f"Pass {_UNUSED} to DDPStrategy.")
    return strategy


def _with_unused_parameters(strategy: Any, cfg: Any) -> Any:
    """Return the configuration of a strategy with ``find_unused_parameters``, if it is DDP; warn if it is another one."""
    value = cfg.get(_UNUSED)
    if value is None:
        return strategy
    kind = strategy_class(_plain(strategy))
    if kind is DDPStrategy:
        # The configuration of the strategy takes precedence.
        return {"type": strategy, _UNUSED: value} if isinstance(strategy, str) else {_UNUSED: value, **strategy}
    if value:
        name = strategy if kind is None else kind.__name__
        _warn_unused_parameters(str(name), "Omit it: only DDP needs to know whether parameters are unused.")
    return strategy


def _warn_unused_parameters(what: str, instead: str) -> None:
    warnings.warn(f"{_UNUSED}=True has no effect on {what}. {instead}", stacklevel=4)


def _warn_unknown_settings(env_cfg: Mapping[str, Any]) -> None:
    """Warn about keys of ``env_cfg`` that have no effect; MMEngine ignores them, too."""
    unknown = [key for key in env_cfg if key not in _ENV_KEYS]
    if unknown:
        warnings.warn(
            f"env_cfg: {', '.join(map(repr, unknown))} has no effect. {did_you_mean(str(unknown[0]), _ENV_KEYS)}",
            stacklevel=4,
        )


def _refuse_engines(strategy: Any) -> None:
    """Refuse strategies that create the optimizer together with the model, which this layer creates one after the other.

    Raises:
        NotSupportedError: if the strategy is one of them.
    """
    kind = strategy.get("type") if isinstance(strategy, Mapping) else strategy
    kind = kind if isinstance(kind, str | type) else type(kind)
    name = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
    if name.lower().removesuffix("strategy") in _ENGINES:
        raise NotSupportedError(
            f"strategy: {name} is not supported in a runner with MMEngine's interface. Use FSDPStrategy, which shards the model "
            "and the optimizer as ZeRO stage 3 does; or convert the configuration with `stratagem config port` and train it "
            "with `stratagem train`."
        )


def _refuse_ignored(cfg: Any) -> None:
    """Refuse the options of the default strategy if another one is given.

    Raises:
        ConfigValueError: if one of them is set.
    """
    for option, argument in (("model_wrapper_cfg", "model_wrapper"), ("sync_bn", "sync_bn")):
        if cfg.get(option) is not None:
            raise ConfigValueError(
                f"{option}={cfg[option]!r} has no effect on the strategy that the configuration chooses. Omit {option}; for "
                f"DDP, write strategy=dict(type='DDPStrategy', {argument}=...)."
            )


def _refuse_fsdp1(wrapper: Mapping[str, Any]) -> None:
    """Refuse a wrapper that shards the model, because its checkpoints would contain only the shard of one rank.

    Raises:
        NotSupportedError: if the wrapper is torch's ``FullyShardedDataParallel`` or a subclass.
    """
    kind = MODEL_WRAPPERS.get(wrapper["type"]) if isinstance(wrapper.get("type"), str) else wrapper.get("type")
    if isinstance(kind, type) and issubclass(kind, FullyShardedDataParallel):
        raise NotSupportedError(
            f"model_wrapper_cfg: {kind.__name__} is not supported in a runner. Omit model_wrapper_cfg and write "
            "strategy=dict(type='FSDPStrategy'), which shards the model and saves complete checkpoints."
        )


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _settings(env_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the engine has. The backend nccl, MMEngine's default, is not used without a GPU."""
    settings = {key: _plain(env_cfg[key]) for key in _ENV_KEYS if env_cfg.get(key) is not None}
    dist_cfg = settings.get("dist_cfg")
    if isinstance(dist_cfg, dict) and dist_cfg.get("backend") == "nccl" and not torch.cuda.is_available():
        dist_cfg.pop("backend")
        logging.getLogger(__name__).debug("Using the default backend, because there is no GPU for nccl.")
    return settings
