"""The schema of a run's configuration: its sections and the keys that each section accepts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stratagem import builtin_entries
from stratagem.config import Rule, Section
from stratagem.errors import StratagemError
from stratagem.logging.logger import parse_level
from stratagem.optim.groups.constructor import DefaultOptimWrapperConstructor
from stratagem.optim.groups.multi_optim_constructor import MultiOptimWrapperConstructor
from stratagem.optim.groups.paramwise import parse_paramwise
from stratagem.optim.implementation import check_implementation
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
)
from stratagem.registry.strategy_names import full_strategy_name
from stratagem.strategies.setup.auto_scale import AutoScale
from stratagem.strategies.state.synced_buffers import BUFFER_SOURCES
from stratagem.train.building import check_hook, loop_arguments
from stratagem.train.hook_priority import get_priority

__all__ = ["SECTIONS"]

_FREE = Section()
_MODEL = Section(registry=MODELS, keys={"data_preprocessor": Section(registry=MODELS)})

_OPTIM_WRAPPER = Section(
    registry=OPTIM_WRAPPERS,
    default_type="OptimWrapper",
    # The key 'optimizer' is not required here, because some strategies create the optimizer themselves. Other strategies
    # report a missing optimizer.
    supplied=frozenset({"optimizer"}),
    keys={
        # The ColossalAI and DeepSpeed optimizers name this argument model_params.
        "optimizer": Section(registry=OPTIMIZERS, supplied=frozenset({"params", "model_params"})),
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


_SCHEDULE = Section(registry=PARAM_SCHEDULERS, supplied=frozenset({"optimizer"}), keys={"convert_to_iter_based": _FREE})


def _is_by_name(value: Any) -> bool:
    """Return whether a mapping contains named configurations.

    A mapping with plain values is a single misspelled configuration.
    """
    plain = str | int | float | None
    return isinstance(value, Mapping) and "type" not in value and not any(isinstance(v, plain) for v in value.values())


def _param_scheduler(value: Any) -> Section:
    return Section(others=_SCHEDULE) if _is_by_name(value) else _SCHEDULE


_FUNCTION = Section(registry=FUNCTIONS, partial=True, by_name=True)
_LOADER = Section(
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
    },
)


_TRAIN_LOOPS = ("EpochBasedTrainLoop", "IterBasedTrainLoop")


def _loop(default: str) -> Section:
    supplied = frozenset({"run", "dataloader", "val_loop", "evaluator", "accumulative_counts"})
    return Section(
        registry=LOOPS,
        default_type=default,
        supplied=supplied,
        keys={"by_epoch": _FREE},
        validate=loop_arguments if default in _TRAIN_LOOPS else None,
    )


def _train_cfg(value: Any) -> Section:
    by_epoch = isinstance(value, Mapping) and value.get("by_epoch", not {"max_iters", "max_steps"} & value.keys())
    return _loop("EpochBasedTrainLoop" if by_epoch else "IterBasedTrainLoop")


def _evaluator(value: Any) -> Section:
    if isinstance(value, Mapping) and value.get("type") == "Evaluator":
        return Section(registry=EVALUATORS, supplied=frozenset({"device"}), keys={"metrics": _evaluator})
    return Section(others=Section(registry=METRICS)) if _is_by_name(value) else Section(registry=METRICS)


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


_STRATEGY = Section(registry=STRATEGIES, by_name=True, choices={"buffers": BUFFER_SOURCES})


def _strategy(value: Any) -> Section:
    """Return the schema of a strategy, whose name may be short, such as "ddp"."""
    name = value.get("type") if isinstance(value, Mapping) else value
    full = full_strategy_name(name) if isinstance(name, str) else None
    if full is None or full == name:
        return _STRATEGY
    return (
        replace(_STRATEGY, registry=None, target=builtin_entries.STRATEGIES[full])
        if isinstance(value, Mapping)
        else _FREE
    )


def _keys(*names: str) -> Section:
    return Section(keys=dict.fromkeys(names, _FREE))


SECTIONS: Mapping[str, Rule] = {
    "model": _MODEL,
    "data_preprocessor": Section(registry=MODELS),
    "tokenizer": Section(registry=TOKENIZERS),
    "train_dataloader": _LOADER,
    "val_dataloader": _LOADER,
    "test_dataloader": _LOADER,
    "train_cfg": _train_cfg,
    "val_cfg": _loop("ValLoop"),
    "test_cfg": _loop("TestLoop"),
    "val_evaluator": _evaluator,
    "test_evaluator": _evaluator,
    "optim_wrapper": _optim_wrapper,
    "param_scheduler": _param_scheduler,
    "strategy": _strategy,
    "auto_scale_lr": replace(_keys("enable", "base_batch_size", "rule"), validate=AutoScale.parse),
    "default_hooks": Section(keys={name: _hook(default) for name, default in _DEFAULT_HOOKS.items()}),
    "custom_hooks": _hook(),
    "log_level": Section(validate=parse_level),
    "env_cfg": Section(
        keys={
            **dict.fromkeys(("cudnn_benchmark", "resource_limit"), _FREE),
            "mp_cfg": _keys("mp_start_method", "opencv_num_threads"),
            "dist_cfg": Section(target="stratagem.distributed:init_dist"),
        }
    ),
    "randomness": _keys("seed", "diff_rank_seed", "deterministic"),
    "compile": Section(target="torch:compile", keys={"target": _FREE}, supplied=frozenset({"model"})),
    **dict.fromkeys(
        (
            "work_dir",
            "experiment_name",
            "load_from",
            "resume",
            "resume_optimizer",
            "resume_param_scheduler",
            "new_parameters",
            "launcher",
            "default_scope",
            "requeue",
            "runner_type",
        ),
        _FREE,
    ),
}
