"""Build hooks, loops and evaluators from configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stratagem.data import EpochLoader
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.optim import BaseOptimWrapper
from stratagem.registry import EVALUATORS, HOOKS, LOOPS
from stratagem.train.evaluation.evaluator import Evaluator
from stratagem.train.hook import Events, Hook
from stratagem.train.hook_priority import get_priority
from stratagem.train.run.context import Run
from stratagem.utils import refuse_unknown

__all__ = ["build_evaluation_loop", "build_events", "build_train_loop", "check_hook", "loop_arguments"]

_DEFAULT_HOOKS: dict[str, dict[str, Any]] = {
    "runtime_info": {"type": "RuntimeInfoHook"},
    "timer": {"type": "IterTimerHook"},
    "sampler_seed": {"type": "DistSamplerSeedHook"},
    "logger": {"type": "LoggerHook"},
    "nonfinite": {"type": "NonFiniteHook"},
    "param_scheduler": {"type": "ParamSchedulerHook"},
    "checkpoint": {"type": "CheckpointHook", "interval": 1},
}


def build_events(
    default_hooks: Mapping[str, Any] | None, custom_hooks: Sequence[Hook | Mapping[str, Any]] | None
) -> Events:
    """Build the default hooks with the changes in ``default_hooks`` (None removes a hook), and the custom hooks.

    Raises:
        ConfigKeyError: if ``default_hooks`` contains an unknown name.
        ConfigTypeError: if an item is neither a hook nor a mapping with a ``type``.
        ConfigValueError: if two hooks save their state under the same key.
    """
    changes = default_hooks or {}
    refuse_unknown(changes, _DEFAULT_HOOKS, "default_hooks (use custom_hooks for other hooks)")
    hooks = []
    for name, default in _DEFAULT_HOOKS.items():
        wanted = changes.get(name, default)
        if wanted is None:
            continue
        if isinstance(wanted, Mapping):
            # The default arguments only apply to the default type.
            wanted = {**default, **wanted} if wanted.get("type", default["type"]) == default["type"] else wanted
        hooks.append(_build_hook(wanted))
    events = Events([*hooks, *(_build_hook(hook) for hook in custom_hooks or ())])
    events.named()  # raises if two hooks save their state under the same key
    return events


def _build_hook(hook: Hook | Mapping[str, Any]) -> Hook:
    if isinstance(hook, Mapping):
        arguments = {key: value for key, value in hook.items() if key not in ("priority", "state_key")}
        built = HOOKS.build(arguments)
        if isinstance(built, Hook) and "priority" in hook:
            built.priority = get_priority(hook["priority"])
        if isinstance(built, Hook) and "state_key" in hook:
            built.state_key = hook["state_key"]
    else:
        built = hook
    if not isinstance(built, Hook):
        raise ConfigTypeError(f"Expected a subclass of stratagem.train.Hook or a mapping with its type, got {hook!r}.")
    return built


def check_hook(hook: Any, default_type: str | None = None) -> None:
    """Build a built-in hook to check its arguments. Hooks of other packages are not built, since that may have effects.

    Raises:
        ConfigError: (or a subclass) if building fails.
    """
    if not isinstance(hook, Mapping):
        return
    cfg = {**({} if default_type is None else {"type": default_type}), **hook}
    kind = cfg.get("type")
    target = HOOKS.get(kind) if isinstance(kind, str) else kind
    if getattr(target, "__module__", "").partition(".")[0] == __name__.partition(".")[0]:
        _build_hook(cfg)


def build_train_loop(
    train_cfg: Mapping[str, Any], run: Run, dataloader: EpochLoader, val_loop: Any, *, optim_wrapper: Any = None
) -> Any:
    """Build the training loop. ``type`` specifies its class; by default, ``by_epoch`` or the given length determines the class.

    Raises:
        ConfigTypeError: if ``train_cfg`` is not a mapping.
        ConfigValueError: if the length of the run is missing.
    """
    cfg = loop_arguments(train_cfg)
    defaults = {"run": run, "dataloader": dataloader, "val_loop": val_loop}
    if "max_steps" in cfg:
        defaults["accumulative_counts"] = accumulation_of(optim_wrapper)
    return LOOPS.build(cfg, default_args=defaults)


def accumulation_of(optim_wrapper: Any) -> int:
    """Return ``accumulative_counts`` of an optimizer wrapper, an optimizer or a configuration."""
    if isinstance(optim_wrapper, Mapping):
        return int(optim_wrapper.get("accumulative_counts", 1))
    return optim_wrapper.accumulative_counts if isinstance(optim_wrapper, BaseOptimWrapper) else 1


def loop_arguments(train_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the training loop with its ``type``, by default determined by ``by_epoch``.

    Raises:
        ConfigTypeError: if ``train_cfg`` is not a mapping.
        ConfigValueError: if the length of the run is missing.
    """
    cfg = _mapping(train_cfg, "train_cfg")
    if "type" not in cfg:
        by_epoch = cfg.pop("by_epoch", "max_epochs" in cfg)
        lengths = ("max_epochs",) if by_epoch else ("max_iters", "max_steps")
        if not any(length in cfg for length in lengths):
            raise ConfigValueError(
                f"train_cfg has by_epoch={by_epoch}, but the length is missing: set {' or '.join(lengths)}."
            )
        cfg["type"] = "EpochBasedTrainLoop" if by_epoch else "IterBasedTrainLoop"
    return cfg


def build_evaluation_loop(cfg: Mapping[str, Any], mode: str, run: Run, dataloader: EpochLoader, evaluator: Any) -> Any:
    """Build the loop for validation (``mode="val"``) or testing (``mode="test"``)."""
    arguments = {"type": "ValLoop" if mode == "val" else "TestLoop", **_mapping(cfg, f"{mode}_cfg")}
    defaults = {"run": run, "dataloader": dataloader, "evaluator": _build_evaluator(evaluator, run)}
    return LOOPS.build(arguments, default_args=defaults)


def _build_evaluator(evaluator: Any, run: Run) -> Evaluator:
    if isinstance(evaluator, Evaluator):
        return evaluator
    if isinstance(evaluator, Mapping) and evaluator.get("type") in ("Evaluator", Evaluator):
        built: Evaluator = EVALUATORS.build(evaluator, default_args={"device": run.world.device})
        return built
    return Evaluator(evaluator, device=run.world.device)


def _mapping(cfg: Any, name: str) -> dict[str, Any]:
    if not isinstance(cfg, Mapping):
        raise ConfigTypeError(f"Expected {name} to be a mapping, got {cfg!r}.")
    return dict(cfg)
