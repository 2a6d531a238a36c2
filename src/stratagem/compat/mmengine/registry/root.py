"""The root registries. The modules in ``locations`` register the built-in classes; they are imported at the first look-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stratagem.compat.mmengine.registry.build_functions import (
    build_model_from_cfg,
    build_optimizer_from_cfg,
    build_runner_from_cfg,
    build_scheduler_from_cfg,
)
from stratagem.compat.mmengine.registry.registry import Registry

__all__ = [
    "DATASETS",
    "DATA_SAMPLERS",
    "EVALUATOR",
    "FUNCTIONS",
    "HOOKS",
    "INFERENCERS",
    "LOG_PROCESSORS",
    "LOOPS",
    "METRICS",
    "MODELS",
    "MODEL_WRAPPERS",
    "OPTIMIZERS",
    "OPTIM_WRAPPERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "PARAM_SCHEDULERS",
    "RUNNERS",
    "RUNNER_CONSTRUCTORS",
    "STRATEGIES",
    "TASK_UTILS",
    "TRANSFORMS",
    "VISBACKENDS",
    "VISUALIZERS",
    "WEIGHT_INITIALIZERS",
]


def _root(name: str, *modules: str, build_func: Callable[..., Any] | None = None) -> Registry:
    locations = [f"stratagem.compat.mmengine.{module}" for module in modules]
    return Registry(name, build_func, scope="mmengine", locations=locations)


RUNNERS = _root("runner", "runner", build_func=build_runner_from_cfg)
RUNNER_CONSTRUCTORS = _root("runner constructor")
LOOPS = _root("loop", "runner")
HOOKS = _root("hook", "hooks")
STRATEGIES = _root("strategy", "_strategy")
DATASETS = _root("dataset", "dataset")
DATA_SAMPLERS = _root("data sampler", "dataset")
TRANSFORMS = _root("transform")
MODELS = _root("model", "model", build_func=build_model_from_cfg)
MODEL_WRAPPERS = _root("model_wrapper", "model")
WEIGHT_INITIALIZERS = _root("weight initializer", "model")
OPTIMIZERS = _root("optimizer", "optim", build_func=build_optimizer_from_cfg)
OPTIM_WRAPPERS = _root("optim_wrapper", "optim")
OPTIM_WRAPPER_CONSTRUCTORS = _root("optimizer wrapper constructor", "optim")
PARAM_SCHEDULERS = _root("parameter scheduler", "optim", build_func=build_scheduler_from_cfg)
METRICS = _root("metric", "evaluator")
EVALUATOR = _root("evaluator", "evaluator")
TASK_UTILS = _root("task util")
VISUALIZERS = _root("visualizer", "visualization")
VISBACKENDS = _root("vis_backend", "visualization")
LOG_PROCESSORS = _root("log_processor", "runner")
INFERENCERS = _root("inferencer")
FUNCTIONS = _root("function", "dataset")
