"""The schema of a run's configuration: its sections and the keys that each section accepts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stratagem import builtin_entries
from stratagem.config import Config, JointRule, Problem, Rule, Section, check, require
from stratagem.data import BatchLimits, check_dataloader
from stratagem.errors import ConfigKeyError, StratagemError
from stratagem.logging.logger import parse_level
from stratagem.optim.groups.constructor import DefaultOptimWrapperConstructor
from stratagem.optim.groups.multi_optim_constructor import MultiOptimWrapperConstructor
from stratagem.optim.groups.paramwise import parse_paramwise
from stratagem.optim.groups.parts import parse_parts
from stratagem.optim.implementation import check_implementation
from stratagem.optim.mixed import MixedOptimizer
from stratagem.parallel import AnyOptim
from stratagem.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATORS,
    FUNCTIONS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    STRATEGIES,
    TOKENIZERS,
    TRACKERS,
    switch_scope,
)
from stratagem.registry.strategy_names import require_strategy_name
from stratagem.report.automatic import require_report
from stratagem.strategies import BaseStrategy, SingleDeviceStrategy
from stratagem.strategies.base import require_readable_path
from stratagem.strategies.choice import (
    check_environment_settings,
    check_strategy,
    check_strategy_settings,
    strategy_class,
)
from stratagem.strategies.setup.auto_scale import AutoScale
from stratagem.strategies.setup.building import check_compile, check_model, require_optimizer
from stratagem.strategies.setup.trial import try_optim_wrapper, try_param_schedulers
from stratagem.train.building import (
    check_evaluation_loop,
    check_evaluator,
    check_hook,
    check_hooks,
    check_train_loop,
    require_complete_phase,
    require_limited_data,
    require_monitored_sets,
)
from stratagem.train.evaluation.sets import named_loaders
from stratagem.train.hook_priority import get_priority
from stratagem.train.hooks import CheckpointHook, EMAHook
from stratagem.train.hooks.schedule import check_epoch_schedules
from stratagem.train.loops import require_one_optimizer
from stratagem.train.resume.preemption import require_requeue
from stratagem.train.resume.source import ResumeSource
from stratagem.train.trackers.building import check_tracker, check_trackers

__all__ = ["RULES", "SECTIONS", "check_run", "require_valid"]

_FREE = Section()
_MODEL = Section(registry=MODELS, keys={"data_preprocessor": Section(registry=MODELS)})

# The DeepSpeed and ColossalAI optimizers name the parameters model_params.
_OPTIMIZER = Section(registry=OPTIMIZERS, supplied=frozenset({"params", "model_params"}))
_MIXED_OPTIMIZER = Section(
    registry=OPTIMIZERS,
    keys={"parts": Section(others=_OPTIMIZER), "hidden_matrices": _FREE, "others": _FREE, "rules": _FREE},
    validate=parse_parts,
)


def _optimizer(value: Any) -> Section:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return _MIXED_OPTIMIZER if kind in ("MixedOptimizer", MixedOptimizer) else _OPTIMIZER


_OPTIM_WRAPPER = Section(
    registry=OPTIM_WRAPPERS,
    default_type="OptimWrapper",
    # The key 'optimizer' is not required here, because some strategies create the optimizer themselves. Other strategies
    # report a missing optimizer.
    supplied=frozenset({"optimizer"}),
    keys={
        "optimizer": _optimizer,
        "constructor": Section(
            registry=OPTIM_WRAPPER_CONSTRUCTORS,
            by_name=True,
            supplied=frozenset({"optim_wrapper_cfg", "paramwise_cfg"}),
        ),
        "paramwise_cfg": Section(validate=parse_paramwise),
        "implementation": Section(validate=check_implementation),
    },
)


def _optim_wrapper(value: Any) -> Section:
    constructor = _constructor_of(value)
    if constructor is DefaultOptimWrapperConstructor:
        return _OPTIM_WRAPPER
    keys = {**_OPTIM_WRAPPER.keys, "paramwise_cfg": _FREE}
    if constructor is MultiOptimWrapperConstructor:
        return Section(keys={"constructor": keys["constructor"]}, others=_OPTIM_WRAPPER, validate=_check_multi)
    if constructor is None or "optimizer" not in value:
        return Section(keys=keys, others=_named_wrapper)
    # A wrapper with one optimizer. The constructor may also use keys that the wrapper does not have.
    own = {key: _FREE for key, item in value.items() if isinstance(item, Mapping) or _mentions(constructor, key)}
    return replace(_OPTIM_WRAPPER, keys={**own, **keys})


def _constructor_of(value: Any) -> Any:
    """Return the constructor of an optimizer wrapper; None if it is unknown, which is reported for its key."""
    if not isinstance(value, Mapping):
        return DefaultOptimWrapperConstructor
    given = value.get("constructor", DefaultOptimWrapperConstructor)
    kind = given.get("type") if isinstance(given, Mapping) else given
    try:
        return OPTIM_WRAPPER_CONSTRUCTORS.get(kind) if isinstance(kind, str) else kind
    except StratagemError:
        return None


def _named_wrapper(value: Any) -> Section:
    return _OPTIM_WRAPPER if isinstance(value, Mapping) and "optimizer" in value else _FREE


def _check_multi(value: Any) -> None:
    rest = {key: item for key, item in value.items() if key not in ("constructor", "paramwise_cfg")}
    MultiOptimWrapperConstructor(rest, value.get("paramwise_cfg"))


def _mentions(constructor: Any, key: object) -> bool:
    """Return whether the source of a constructor contains a key, or is not available."""
    classes = inspect.getmro(constructor) if isinstance(constructor, type) else (constructor,)
    try:
        sources = [inspect.getsource(each) for each in classes if each is not object]
    except (OSError, TypeError):
        return True
    return any(str(key) in source for source in sources)


_SCHEDULE = Section(
    registry=PARAM_SCHEDULERS, supplied=frozenset({"optimizer"}), keys={"convert_to_iter_based": _FREE, "part": _FREE}
)


def _is_by_name(value: Any) -> bool:
    """Return whether a mapping contains named configurations.

    A mapping with plain values is a single misspelled configuration.
    """
    plain = str | int | float | None
    return isinstance(value, Mapping) and "type" not in value and not any(isinstance(v, plain) for v in value.values())


def _param_scheduler(value: Any) -> Section:
    return Section(others=_SCHEDULE) if _is_by_name(value) else _SCHEDULE


_FUNCTION = Section(registry=FUNCTIONS, partial=True, by_name=True)
_PARTS_OF_LOADER = Section(
    target="torch.utils.data:DataLoader",
    keys={
        "dataset": Section(registry=DATASETS),
        "sampler": Section(registry=DATA_SAMPLERS, supplied=frozenset({"dataset", "seed", "rank", "world_size"})),
        "batch_sampler": Section(
            registry=DATA_SAMPLERS,
            supplied=frozenset({"sampler", "batch_size", "dataset", "seed", "rank", "world_size"}),
        ),
        "collate_fn": _FUNCTION,
        "worker_init_fn": _FUNCTION,
        "streams": _FREE,
        "device_prefetch": _FREE,
    },
)


_TRAIN_LOADER = replace(_PARTS_OF_LOADER, validate=lambda value: check_dataloader(value, training=True))
_EVALUATION_LOADER = replace(_PARTS_OF_LOADER, validate=lambda value: check_dataloader(value, training=False))


def _evaluation_loader(key: str) -> Callable[[Any], Section]:
    """Return a rule for the dataloader of an evaluation, or for a mapping from the names of sets to dataloaders."""

    def rule(value: Any) -> Section:
        try:
            names = named_loaders(value, key)
        except StratagemError:
            return Section(others=_FREE, validate=lambda given: named_loaders(given, key))
        return _EVALUATION_LOADER if names is None else Section(others=_EVALUATION_LOADER)

    return rule


_LOOP = Section(
    registry=LOOPS, supplied=frozenset({"run", "dataloader", "val_loop", "evaluator", "accumulative_counts"})
)


def _train_cfg(value: Any) -> Section:
    counts = value.keys() if isinstance(value, Mapping) else ()
    by_epoch = "max_epochs" in counts or not {"max_iters", "max_steps"}.intersection(counts)
    if isinstance(value, Mapping):
        by_epoch = value.get("by_epoch", by_epoch)
    return replace(
        _LOOP,
        default_type="EpochBasedTrainLoop" if by_epoch else "IterBasedTrainLoop",
        keys={} if "type" in counts else {"by_epoch": _FREE},
        validate=check_train_loop,
    )


def _evaluation_cfg(mode: str) -> Section:
    default = "ValLoop" if mode == "val" else "TestLoop"
    return replace(_LOOP, default_type=default, validate=lambda value: check_evaluation_loop(value, mode))


def _metrics(value: Any) -> Section:
    if isinstance(value, Mapping) and value.get("type") == "Evaluator":
        return Section(registry=EVALUATORS, supplied=frozenset({"device"}), keys={"metrics": _metrics})
    # The names are those of metrics or of sets, and each set may have several metrics.
    return Section(others=_metrics) if _is_by_name(value) else Section(registry=METRICS)


def _hook(default: str | None = None) -> Section:
    return Section(
        registry=HOOKS,
        default_type=default,
        keys={"priority": Section(validate=get_priority), "state_key": _FREE},
        validate=lambda hook: check_hook(hook, default),
    )


_DEFAULT_HOOKS = {
    "runtime_info": "RuntimeInfoHook",
    "timer": "IterTimerHook",
    "sampler_seed": "DistSamplerSeedHook",
    "logger": "LoggerHook",
    "nonfinite": "NonFiniteHook",
    "param_scheduler": "ParamSchedulerHook",
    "checkpoint": "CheckpointHook",
}


_STRATEGY = Section(registry=STRATEGIES, by_name=True, validate=check_strategy)


def _strategy(value: Any) -> Section:
    """Return the schema of a strategy, whose name may be short, such as "ddp"."""
    name = value.get("type") if isinstance(value, Mapping) else value
    if not isinstance(name, str):
        return _STRATEGY
    try:
        full = require_strategy_name(name)
    except ConfigKeyError:
        return Section(others=_FREE, validate=lambda _: require_strategy_name(name))
    if full == name:
        return _STRATEGY
    return (
        replace(_STRATEGY, registry=None, target=builtin_entries.STRATEGIES[full])
        if isinstance(value, Mapping)
        else _FREE
    )


def _keys(*names: str) -> Section:
    return Section(keys=dict.fromkeys(names, _FREE))


_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches")


def _limit(option: str) -> Section:
    return Section(validate=lambda value: BatchLimits(**{option: value}))


SECTIONS: Mapping[str, Rule] = {
    "model": replace(_MODEL, validate=check_model),
    "data_preprocessor": Section(registry=MODELS),
    "tokenizer": Section(registry=TOKENIZERS),
    "train_dataloader": _TRAIN_LOADER,
    "val_dataloader": _evaluation_loader("val_dataloader"),
    "test_dataloader": _evaluation_loader("test_dataloader"),
    "predict_dataloader": _EVALUATION_LOADER,
    "train_cfg": _train_cfg,
    "val_cfg": _evaluation_cfg("val"),
    "test_cfg": _evaluation_cfg("test"),
    "val_evaluator": _metrics,
    "test_evaluator": _metrics,
    "optim_wrapper": _optim_wrapper,
    "param_scheduler": _param_scheduler,
    "strategy": _strategy,
    "auto_scale_lr": replace(_keys("enable", "base_batch_size", "rule"), validate=AutoScale.parse),
    "default_hooks": Section(keys={name: _hook(default) for name, default in _DEFAULT_HOOKS.items()}),
    "custom_hooks": _hook(),
    "trackers": Section(
        registry=TRACKERS, by_name=True, keys=dict.fromkeys(("queue_size", "flush_s"), _FREE), validate=check_tracker
    ),
    "log_level": Section(validate=parse_level),
    "env_cfg": Section(
        keys={
            **dict.fromkeys(
                ("cudnn_benchmark", "cudnn_allow_tf32", "float32_matmul_precision", "resource_limit"), _FREE
            ),
            "mp_cfg": _keys("mp_start_method", "opencv_num_threads"),
            "dist_cfg": Section(target="stratagem.distributed:init_dist"),
        }
    ),
    "randomness": _keys("seed", "diff_rank_seed", "deterministic"),
    "compile": Section(
        target="torch:compile", keys={"target": _FREE}, supplied=frozenset({"model"}), validate=check_compile
    ),
    "work_dir": Section(validate=require_readable_path),
    "experiment_name": Section(validate=os.fspath),
    "requeue": Section(validate=require_requeue),
    "report": Section(validate=require_report),
    **{option: _limit(option) for option in _LIMITS},
    **dict.fromkeys(
        (
            "load_from",
            "resume",
            "resume_optimizer",
            "resume_param_scheduler",
            "new_parameters",
            "launcher",
            "default_scope",
            "runner_type",
        ),
        _FREE,
    ),
}


def _require_model(config: Config) -> None:
    if "model" not in config:
        raise ConfigKeyError(
            f"{config.filename or 'The configuration'} has no key 'model'. Add the model to train or evaluate."
        )


def _values(*keys: str) -> Callable[[Config], dict[str, Any]]:
    return lambda config: {key: config.get(key) for key in keys}


def _check_evaluator(mode: str) -> JointRule:
    loader, key = f"{mode}_dataloader", f"{mode}_evaluator"
    return JointRule(
        (key,), lambda config: check_evaluator(config.get(key), _sets(config, loader), key), context=(loader,)
    )


def _sets(config: Config, key: str) -> list[str]:
    """Return the names of the validation or test sets; an empty list if there is a single set without a name."""
    return list(named_loaders(config.get(key), key) or ())


def _check_limits(config: Config) -> None:
    loaders = _values("train_dataloader", "val_dataloader", "test_dataloader")(config)
    require_limited_data(BatchLimits(**_values(*_LIMITS)(config)), **loaders)


def _phase(*keys: str) -> JointRule:
    values = _values(*keys)
    return JointRule(keys, lambda config: require_complete_phase(**values(config)))


def _try_optim_wrapper(config: Config) -> AnyOptim | None:
    """Build the optimizer wrapper for a stand-in model, completed with the options of the strategy."""
    spec, strategy = config.get("optim_wrapper"), config.get("strategy")
    if spec is None:
        return None
    kind = strategy_class(strategy) or SingleDeviceStrategy
    if isinstance(strategy, BaseStrategy):
        return try_optim_wrapper(strategy.complete_optim_wrapper(spec))
    return kind.check_optim_wrapper(_arguments_of_strategy(strategy), spec, try_optim_wrapper)


def _check_optimizer(config: Config) -> None:
    optim = _try_optim_wrapper(config)
    if optim is not None and (config.get("train_cfg") or {}).get("max_steps") is not None:
        require_one_optimizer(optim)


def _check_schedules(config: Config) -> None:
    spec, optim, train_cfg = (config.get(key) for key in ("param_scheduler", "optim_wrapper", "train_cfg"))
    if spec is None:
        return
    schedulers = try_param_schedulers(
        spec, _try_optim_wrapper(config), train_cfg=train_cfg, custom_groups=_has_paramwise_rules(optim)
    )
    lengths = train_cfg if isinstance(train_cfg, Mapping) else {}
    if {"max_iters", "max_steps"} & lengths.keys():
        check_epoch_schedules(schedulers, None)
    require_monitored_sets((), schedulers, _sets(config, "val_dataloader"))


def _has_paramwise_rules(optim_wrapper: Any) -> bool:
    """Return whether the parameter groups of an optimizer depend on the model."""
    if not isinstance(optim_wrapper, Mapping):
        return False
    keys = {"paramwise_cfg", "constructor"}
    return bool(keys & optim_wrapper.keys()) or any(
        isinstance(value, Mapping) and keys & value.keys() for value in optim_wrapper.values()
    )


def _check_hooks(config: Config) -> None:
    hooks = check_hooks(**_values("default_hooks", "custom_hooks", "train_cfg")(config))
    require_monitored_sets(hooks, None, _sets(config, "val_dataloader"))


def _check_hooks_of_strategy(config: Config) -> None:
    strategy = config.get("strategy")
    kind = strategy_class(strategy)
    if kind is None or isinstance(strategy, BaseStrategy):
        return
    hooks = check_hooks(**_values("default_hooks", "custom_hooks")(config))
    kind.check_hooks(
        _arguments_of_strategy(strategy),
        averages=any(isinstance(hook, EMAHook) for hook in hooks),
        saves_in_background=any(isinstance(hook, CheckpointHook) and hook.saves_in_background for hook in hooks),
    )


def _arguments_of_strategy(strategy: Any) -> dict[str, Any]:
    """Return the arguments in the configuration of a strategy, which can be just its name."""
    return {key: value for key, value in strategy.items() if key != "type"} if isinstance(strategy, Mapping) else {}


def _check_resume(config: Config) -> None:
    ResumeSource(
        config.get("load_from"),
        config.get("resume", False),
        resume_optimizer=config.get("resume_optimizer", True),
        resume_param_scheduler=config.get("resume_param_scheduler", True),
        new_parameters=config.get("new_parameters", ()),
    )


_SETTINGS = ("launcher", "work_dir", "experiment_name", "env_cfg", "randomness", "auto_scale_lr", "log_level")

# The rules that concern several sections, each of which calls the function that building calls.
RULES: Sequence[JointRule] = (
    JointRule(("model",), _require_model),
    JointRule(
        ("data_preprocessor", "model"),
        lambda config: check_model(config["model"], config.get("data_preprocessor")),
    ),
    _phase("train_dataloader", "train_cfg", "optim_wrapper"),
    _phase("val_dataloader", "val_cfg", "val_evaluator"),
    _phase("test_dataloader", "test_cfg", "test_evaluator"),
    JointRule(_LIMITS, _check_limits, context=("train_dataloader", "val_dataloader", "test_dataloader")),
    _check_evaluator("val"),
    _check_evaluator("test"),
    JointRule(
        ("param_scheduler", "optim_wrapper"),
        lambda config: require_optimizer(config.get("param_scheduler"), config.get("optim_wrapper")),
    ),
    JointRule(
        ("env_cfg", "launcher", "randomness"),
        lambda config: check_environment_settings(**_values("launcher", "randomness", "env_cfg")(config)),
    ),
    JointRule(
        ("strategy", *_SETTINGS),
        lambda config: check_strategy_settings(config.get("strategy"), **_values(*_SETTINGS)(config)),
    ),
    JointRule(("optim_wrapper",), _check_optimizer, context=("strategy", "train_cfg")),
    JointRule(
        ("param_scheduler",), _check_schedules, context=("optim_wrapper", "strategy", "train_cfg", "val_dataloader")
    ),
    JointRule(("custom_hooks", "default_hooks"), _check_hooks, context=("train_cfg", "val_dataloader")),
    JointRule(("trackers",), lambda config: check_trackers(config.get("trackers"))),
    JointRule(("custom_hooks", "default_hooks"), _check_hooks_of_strategy, context=("train_cfg", "strategy")),
    JointRule(("resume", "load_from", "resume_optimizer", "resume_param_scheduler", "new_parameters"), _check_resume),
)


def check_run(config: Config) -> list[Problem]:
    """Return all problems of the configuration of a run that can be found without data, devices or other processes.

    These are unknown keys and arguments, and values that building the run or the start of training rejects. Values are
    checked by the functions that building calls. Small objects of this package, torch's optimizers and numeric
    torchmetrics metrics are built to check their arguments. Datasets, models, and objects of other packages are not built.
    """
    scope = config.get("default_scope")
    with switch_scope(scope):
        return check(config, SECTIONS, scope=scope, rules=RULES)


def require_valid(config: Config) -> None:
    """Check a configuration with :func:`check_run`, and raise an error that lists all problems.

    Raises:
        ConfigKeyError: if there are several problems, or if a key or an argument is unknown.
        StratagemError: of the same class as when the run is built, if the only problem is an invalid value.
    """
    scope = config.get("default_scope")
    with switch_scope(scope):
        require(config, SECTIONS, scope=scope, rules=RULES)
