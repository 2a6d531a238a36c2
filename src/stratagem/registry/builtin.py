"""The registries of this package, with their built-in entries and the libraries that they search for classes."""

from __future__ import annotations

from stratagem import builtin_entries
from stratagem.registry.build import build_model_from_cfg, build_runner_from_cfg
from stratagem.registry.name_sources import ClassesOf, ModelZoo, PretrainedFactories
from stratagem.registry.registry import Registry

_SCOPE = "stratagem"
_MODULE = "torch.nn:Module"
_OPTIMIZER = "torch.optim:Optimizer"
_METRIC = "torchmetrics:Metric"

MODELS = Registry(
    "model",
    scope=_SCOPE,
    build_func=build_model_from_cfg,
    builtin_entries=builtin_entries.MODELS,
    name_sources=(
        ClassesOf("torch.nn", _MODULE),
        ModelZoo("timm.", "timm:create_model", "timm:list_models"),
        ModelZoo("torchvision.", "torchvision.models:get_model", "torchvision.models:list_models"),
        PretrainedFactories(
            "transformers",
            ("transformers:PreTrainedModel", "transformers.models.auto.auto_factory:_BaseAutoModelClass"),
            ("from_pretrained", "from_config"),
        ),
    ),
)
MODEL_WRAPPERS = Registry("model wrapper", scope=_SCOPE)
WEIGHT_INITIALIZERS = Registry("weight initializer", scope=_SCOPE)

OPTIMIZERS = Registry(
    "optimizer",
    scope=_SCOPE,
    builtin_entries=builtin_entries.OPTIMIZERS,
    name_sources=(
        ClassesOf("torch.optim", _OPTIMIZER, {"TorchAdafactor": "Adafactor"}),
        ClassesOf("schedulefree", _OPTIMIZER, prefix="schedulefree."),
        ClassesOf("heavyball", _OPTIMIZER, prefix="heavyball."),
        ClassesOf("bitsandbytes.optim", _OPTIMIZER, prefix="bitsandbytes."),
        ClassesOf("stratagem.engines.colossalai.optimizers", _OPTIMIZER, prefix="colossalai."),
    ),
)
OPTIM_WRAPPERS = Registry("optimizer wrapper", scope=_SCOPE, builtin_entries=builtin_entries.OPTIM_WRAPPERS)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor", scope=_SCOPE, builtin_entries=builtin_entries.OPTIM_WRAPPER_CONSTRUCTORS
)
PARAM_SCHEDULERS = Registry("parameter scheduler", scope=_SCOPE, builtin_entries=builtin_entries.PARAM_SCHEDULERS)

STRATEGIES = Registry("strategy", scope=_SCOPE, builtin_entries=builtin_entries.STRATEGIES)
RUNNERS = Registry("runner", scope=_SCOPE, build_func=build_runner_from_cfg, builtin_entries=builtin_entries.RUNNERS)
LOOPS = Registry("loop", scope=_SCOPE, builtin_entries=builtin_entries.LOOPS)
HOOKS = Registry("hook", scope=_SCOPE, builtin_entries=builtin_entries.HOOKS)
TRACKERS = Registry("tracker", scope=_SCOPE, builtin_entries=builtin_entries.TRACKERS)

DATASETS = Registry("dataset", scope=_SCOPE)
DATA_SAMPLERS = Registry("data sampler", scope=_SCOPE, builtin_entries=builtin_entries.DATA_SAMPLERS)
TRANSFORMS = Registry("transform", scope=_SCOPE)
TOKENIZERS = Registry("tokenizer", scope=_SCOPE)
FUNCTIONS = Registry("function", scope=_SCOPE, builtin_entries=builtin_entries.FUNCTIONS)

METRICS = Registry(
    "metric",
    scope=_SCOPE,
    name_sources=(ClassesOf("torchmetrics", _METRIC), ClassesOf("torchmetrics.classification", _METRIC)),
)
EVALUATORS = Registry("evaluator", scope=_SCOPE, builtin_entries=builtin_entries.EVALUATORS)
EVALUATOR = EVALUATORS  # MMEngine's name
LOG_PROCESSORS = Registry("log processor", scope=_SCOPE)
VISUALIZERS = Registry("visualizer", scope=_SCOPE)
VISBACKENDS = Registry("visualizer backend", scope=_SCOPE)
TASK_UTILS = Registry("task util", scope=_SCOPE)
INFERENCERS = Registry("inferencer", scope=_SCOPE)
