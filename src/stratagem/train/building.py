"""Build hooks, loops and evaluators from configurations."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stratagem.data import BatchLimits, EpochLoader
from stratagem.errors import ConfigError, ConfigTypeError, ConfigValueError
from stratagem.optim import BaseOptimWrapper
from stratagem.optim.schedules.plateau import PlateauScheduler
from stratagem.registry import EVALUATORS, HOOKS, LOOPS
from stratagem.train.evaluation.evaluator import Evaluator, check_metrics
from stratagem.train.evaluation.precision import require_fp16
from stratagem.train.evaluation.sets import evaluators_by_set, named_loaders, require_known_sets
from stratagem.train.hook import Events, Hook
from stratagem.train.hook_priority import get_priority
from stratagem.train.hooks.averaging import EMAHook, require_one_average
from stratagem.train.hooks.checkpoint import CheckpointHook
from stratagem.train.hooks.early_stopping import EarlyStoppingHook
from stratagem.train.loop_options import EpochLoopOptions, IterLoopOptions
from stratagem.train.loops import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, ValLoop
from stratagem.train.run.context import Run
from stratagem.train.run.hook_states import by_state_key
from stratagem.utils import refuse_unknown

__all__ = [
    "build_evaluation_loop",
    "build_events",
    "build_train_loop",
    "check_evaluation_loop",
    "check_evaluator",
    "check_hook",
    "check_hooks",
    "check_train_loop",
    "loop_arguments",
    "require_complete_phase",
    "require_limited_data",
    "require_monitored_sets",
]

_DEFAULT_HOOKS: dict[str, dict[str, Any]] = {
    "runtime_info": {"type": "RuntimeInfoHook"},
    "timer": {"type": "IterTimerHook"},
    "sampler_seed": {"type": "DistSamplerSeedHook"},
    "logger": {"type": "LoggerHook"},
    "nonfinite": {"type": "NonFiniteHook"},
    "param_scheduler": {"type": "ParamSchedulerHook"},
    "checkpoint": {"type": "CheckpointHook", "interval": 1},
}

_EVALUATION_LOOPS = {"val": "ValLoop", "test": "TestLoop"}


def build_events(
    default_hooks: Mapping[str, Any] | None, custom_hooks: Sequence[Hook | Mapping[str, Any]] | None
) -> Events:
    """Build the default hooks with the changes in ``default_hooks`` (None removes a hook), and the custom hooks.

    Raises:
        ConfigKeyError: if ``default_hooks`` contains an unknown name.
        ConfigTypeError: if ``default_hooks`` is not a mapping, ``custom_hooks`` is not a list, or an item is neither a hook
            nor a mapping with a ``type``.
        ConfigValueError: if two hooks save their state under the same key, or there are several EMAHooks.
    """
    events = Events([_build_hook(hook) for hook in _all_hooks(default_hooks, custom_hooks)])
    events.named()  # raises if two hooks save their state under the same key
    require_one_average(events.hooks)
    _require_frozen_weights_for_averages(events.hooks)
    return events


def _require_frozen_weights_for_averages(hooks: Iterable[Hook]) -> None:
    """Require that checkpoints contain frozen parameters if the weights are averaged.

    Raises:
        ConfigValueError: if they do not, although the averages in the same checkpoints contain all parameters.
    """
    listed = list(hooks)
    omits = any(isinstance(hook, CheckpointHook) and not hook.saves_frozen for hook in listed)
    if omits and any(isinstance(hook, EMAHook) for hook in listed):
        raise ConfigValueError(
            "CheckpointHook: save_frozen=False cannot be combined with EMAHook, because the averaged weights in the checkpoint "
            "contain all parameters. Omit one of them."
        )


def _all_hooks(default_hooks: Any, custom_hooks: Any) -> list[Hook | Mapping[str, Any]]:
    """Return all hooks of a run and the configurations of those that are not built."""
    changes = {} if default_hooks is None else default_hooks
    if not isinstance(changes, Mapping):
        raise ConfigTypeError(f"default_hooks must be a mapping from names to hooks, got {changes!r}.")
    if custom_hooks is not None and (isinstance(custom_hooks, str) or not isinstance(custom_hooks, Sequence)):
        raise ConfigTypeError(f"custom_hooks must be a list of hooks, got {custom_hooks!r}.")
    refuse_unknown(changes, _DEFAULT_HOOKS, "default_hooks (use custom_hooks for other hooks)")
    hooks: list[Hook | Mapping[str, Any]] = []
    for name, default in _DEFAULT_HOOKS.items():
        wanted = changes.get(name, default)
        if wanted is None:
            continue
        if isinstance(wanted, Mapping):
            # The default arguments only apply to the default type.
            wanted = {**default, **wanted} if wanted.get("type", default["type"]) == default["type"] else wanted
        hooks.append(wanted)
    return [*hooks, *(custom_hooks or ())]


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
    if isinstance(hook, list | tuple) or hook is None:
        return
    if isinstance(hook, Mapping):
        hook = {**({} if default_type is None else {"type": default_type}), **hook}
    _try_hook(hook)


def check_hooks(default_hooks: Any, custom_hooks: Any, train_cfg: Any = None) -> list[Hook]:
    """Check the hooks of a run together, as :func:`build_events` and the start of training do; return the hooks considered.

    Of hooks of other packages, only those are considered whose ``state_key`` is known without building them.

    Raises:
        ConfigError: (or a subclass) if building or the start of training fails.
    """
    tried = [_try_hook(hook) for hook in _all_hooks(default_hooks, custom_hooks)]
    hooks = [hook for hook in tried if hook is not None]
    by_state_key(hooks)
    require_one_average(hooks)
    _require_frozen_weights_for_averages(hooks)
    if isinstance(train_cfg, Mapping) and _type_of_loop(train_cfg) is IterBasedTrainLoop:
        for hook in hooks:
            if isinstance(hook, EMAHook):
                hook.refuse_epochs()
    return hooks


def _try_hook(hook: Any) -> Hook | None:
    """Return a hook of this package, or one that is already built; otherwise an instance with only a key, or None."""
    if not isinstance(hook, Mapping):
        return _build_hook(hook)
    kind = hook.get("type")
    target = HOOKS.get(kind) if isinstance(kind, str) else kind
    if target is None or getattr(target, "__module__", "").partition(".")[0] == __name__.partition(".")[0]:
        built = _build_hook(hook)
        if isinstance(built, EMAHook):
            built.check_average()
        return built
    return _uninitialized(target, hook)


def _uninitialized(target: Any, hook: Mapping[str, Any]) -> Hook | None:
    """Return an uninitialized instance of a hook's class with its ``state_key``, or None if the key is unknown."""
    if not (isinstance(target, type) and issubclass(target, Hook)) or target.__new__ is not object.__new__:
        return None
    if inspect.getattr_static(target, "has_state") is not inspect.getattr_static(Hook, "has_state"):
        return None
    if "state_key" not in hook and target.__init__ is not Hook.__init__:
        return None  # The constructor may set the key.
    instance = object.__new__(target)
    if "state_key" in hook:
        instance.state_key = hook["state_key"]
    return instance


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
        if not isinstance(by_epoch, bool):
            raise ConfigTypeError(f"train_cfg: by_epoch must be True or False, got {by_epoch!r}.")
        lengths = ("max_epochs",) if by_epoch else ("max_iters", "max_steps")
        if not any(length in cfg for length in lengths):
            raise ConfigValueError(
                f"train_cfg has by_epoch={by_epoch}, but the length is missing: set {' or '.join(lengths)}."
            )
        cfg["type"] = "EpochBasedTrainLoop" if by_epoch else "IterBasedTrainLoop"
    return cfg


def check_train_loop(train_cfg: Any) -> None:
    """Check the options of a built-in training loop, as building it does.

    Raises:
        ConfigError: (or a subclass) if an option is invalid.
    """
    cfg = loop_arguments(train_cfg)
    options = {key: value for key, value in cfg.items() if key not in ("type", "_scope_")}
    kind = _type_of_loop(cfg)
    if kind is EpochBasedTrainLoop:
        EpochLoopOptions(**options)
    elif kind is IterBasedTrainLoop:
        IterLoopOptions(**options)


def check_evaluation_loop(cfg: Any, mode: str) -> None:
    """Check the options of the loop for validation (``mode="val"``) or testing (``mode="test"``), as building it does.

    Raises:
        ConfigError: (or a subclass) if an option is invalid.
    """
    arguments = _mapping(cfg, f"{mode}_cfg")
    if _type_of_loop({"type": _EVALUATION_LOOPS[mode], **arguments}) in (ValLoop, TestLoop):
        require_fp16(arguments.get("fp16"))


def _type_of_loop(cfg: Mapping[str, Any]) -> Any:
    """Return the class of the loop, or None if it is unknown."""
    try:
        kind = cfg["type"] if "type" in cfg else loop_arguments(cfg)["type"]
    except ConfigError:
        return None
    return LOOPS.get(kind) if isinstance(kind, str) else kind


def require_complete_phase(**arguments: Any) -> None:
    """Require either all or none of the arguments of training, validation or testing.

    Args:
        arguments: the dataloader, the arguments of the loop, and the optimizer wrapper or the evaluator; None if not specified.

    Raises:
        ConfigValueError: if only some of them are specified.
    """
    missing = [name for name, value in arguments.items() if value is None]
    if missing and len(missing) < len(arguments):
        given = [name for name in arguments if name not in missing]
        raise ConfigValueError(
            f"{', '.join(given)} was specified without {', '.join(missing)}. Specify all of them or none of them."
        )


def build_evaluation_loop(
    cfg: Mapping[str, Any], mode: str, run: Run, dataloader: EpochLoader | Mapping[str, EpochLoader], evaluator: Any
) -> Any:
    """Build the loop for validation (``mode="val"``) or testing (``mode="test"``).

    Args:
        cfg: the arguments of the loop.
        mode: the mode.
        run: the run.
        dataloader: the loader, or a mapping from the names of the sets to their loaders.
        evaluator: the evaluator or its configuration, common to all sets, or a mapping from the names of the sets to them.
    """
    arguments = {"type": _EVALUATION_LOOPS[mode], **_mapping(cfg, f"{mode}_cfg")}
    names = list(dataloader) if isinstance(dataloader, Mapping) else None
    by_set = evaluators_by_set(evaluator, names, f"{mode}_evaluator") or dict.fromkeys(names or (), evaluator)
    built = {name: _build_evaluator(each, run) for name, each in by_set.items()} or _build_evaluator(evaluator, run)
    return LOOPS.build(arguments, default_args={"run": run, "dataloader": dataloader, "evaluator": built})


def require_limited_data(limits: BatchLimits, **loaders: Any) -> None:
    """Check that limited data is specified, and that the validation can use the training batches if it has to.

    Args:
        limits: the limits.
        loaders: ``train_dataloader``, ``val_dataloader`` and ``test_dataloader``; None if not specified.

    Raises:
        ConfigValueError: if a limit has no effect, or the validation has named sets, but uses training batches.
    """
    for mode in ("train", "val", "test"):
        limits.require_data(mode, given=loaders.get(f"{mode}_dataloader") is not None)
    named = named_loaders(loaders.get("val_dataloader"), "val_dataloader")
    if limits.overfit_batches is not None and named:
        raise ConfigValueError(
            f"overfit_batches={limits.overfit_batches} validates on the training batches, but val_dataloader has the sets "
            f"{', '.join(named)}, whose metrics would be the same. Specify a single val_dataloader for this test."
        )


def require_monitored_sets(hooks: Sequence[Any], schedulers: Any, names: Sequence[str] | None) -> None:
    """Check that the metrics of hooks and schedules begin with the name of a set, if the sets of the validation are named.

    Args:
        hooks: the hooks of the run.
        schedulers: the schedules: a list, or for several optimizers a mapping to lists; None if there are none.
        names: the names of the sets; None or empty if there is a single set without a name.

    Raises:
        ConfigKeyError: if a metric does not begin with the name of a set.
    """
    monitored = [
        pair for hook in hooks if isinstance(hook, CheckpointHook | EarlyStoppingHook) for pair in hook.monitored
    ]
    groups = schedulers.values() if isinstance(schedulers, Mapping) else [schedulers or ()]
    on_metrics = [each for group in groups for each in group if isinstance(each, PlateauScheduler)]
    monitored += [(f"{type(each).__name__}: monitor", each.settings.monitor) for each in on_metrics]
    require_known_sets(monitored, names)


def check_evaluator(evaluator: Any, names: Sequence[str] | None = None, key: str = "val_evaluator") -> None:
    """Check the metrics of an evaluator, or of the evaluators by set, as building them does.

    Args:
        evaluator: the evaluator, its configuration, or a mapping from the names of the sets to them.
        names: the names of the sets; None if there is a single set without a name.
        key: the key of the configuration.

    Raises:
        ConfigError: (or a subclass) if a metric is invalid.
    """
    for each in (evaluators_by_set(evaluator, names, key) or {"": evaluator}).values():
        if isinstance(each, Mapping) and each.get("type") in ("Evaluator", Evaluator):
            check_metrics(each.get("metrics"))
        elif each is not None and not isinstance(each, Evaluator):
            check_metrics(each)


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
