"""The schema of a run's configuration: its sections and the keys that each section accepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stratagem.config import Rule, Section
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
from stratagem.strategies.state.synced_buffers import BUFFER_SOURCES

__all__ = ["SECTIONS"]

_FREE = Section()
_MODEL = Section(registry=MODELS, keys={"data_preprocessor": Section(registry=MODELS)})

_OPTIM_WRAPPER = Section(
    registry=OPTIM_WRAPPERS,
    default_type="OptimWrapper",
    # Not required, because some strategies create the optimizer themselves. Other strategies report a missing
    # optimizer.
    supplied=frozenset({"optimizer"}),
    keys={
        # The ColossalAI and DeepSpeed optimizers name this argument model_params.
        "optimizer": Section(registry=OPTIMIZERS, supplied=frozenset({"params", "model_params"})),
        "constructor": Section(registry=OPTIM_WRAPPER_CONSTRUCTORS, by_name=True),
        "paramwise_cfg": _FREE,
        "implementation": _FREE,
    },
)


def _optim_wrapper(value: Any) -> Section:
    # A custom constructor may define its own keys, for example one key per wrapper.
    default = "DefaultOptimWrapperConstructor"
    is_custom = isinstance(value, Mapping) and value.get("constructor", default) != default
    return Section(keys=_OPTIM_WRAPPER.keys, others=_FREE) if is_custom else _OPTIM_WRAPPER


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
    },
)


def _loop(default: str) -> Section:
    supplied = frozenset({"run", "dataloader", "val_loop", "evaluator", "accumulative_counts"})
    return Section(registry=LOOPS, default_type=default, supplied=supplied, keys={"by_epoch": _FREE})


def _train_cfg(value: Any) -> Section:
    by_epoch = isinstance(value, Mapping) and value.get("by_epoch", not {"max_iters", "max_steps"} & value.keys())
    return _loop("EpochBasedTrainLoop" if by_epoch else "IterBasedTrainLoop")


def _evaluator(value: Any) -> Section:
    if isinstance(value, Mapping) and value.get("type") == "Evaluator":
        return Section(registry=EVALUATORS, supplied=frozenset({"device"}), keys={"metrics": _evaluator})
    return Section(others=Section(registry=METRICS)) if _is_by_name(value) else Section(registry=METRICS)


def _hook(default: str | None = None) -> Section:
    return Section(registry=HOOKS, default_type=default, keys={"priority": _FREE, "state_key": _FREE})


_DEFAULT_HOOKS = {
    "runtime_info": "RuntimeInfoHook",
    "timer": "IterTimerHook",
    "sampler_seed": "DistSamplerSeedHook",
    "logger": "LoggerHook",
    "nonfinite": "NonFiniteHook",
    "param_scheduler": "ParamSchedulerHook",
    "checkpoint": "CheckpointHook",
}


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
    "strategy": Section(registry=STRATEGIES, by_name=True, choices={"buffers": BUFFER_SOURCES}),
    "auto_scale_lr": _keys("enable", "base_batch_size", "rule"),
    "default_hooks": Section(keys={name: _hook(default) for name, default in _DEFAULT_HOOKS.items()}),
    "custom_hooks": _hook(),
    "env_cfg": Section(
        keys={
            **dict.fromkeys(("cudnn_benchmark", "mp_cfg", "resource_limit"), _FREE),
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
            "log_level",
            "default_scope",
            "requeue",
            "runner_type",
        ),
        _FREE,
    ),
}
