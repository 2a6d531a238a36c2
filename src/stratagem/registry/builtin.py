"""The registries that configurations name things from, and what is ready in each."""

from __future__ import annotations

from stratagem.registry.build import build_model_from_cfg, build_runner_from_cfg
from stratagem.registry.name_sources import Constructors, Loaders, Members
from stratagem.registry.registry import Registry

_SCOPE = "stratagem"
_MODULE = "torch.nn:Module"
_OPTIMIZER = "torch.optim:Optimizer"
_METRIC = "torchmetrics:Metric"
_DEEPSPEED = "stratagem.engines.deepspeed"
_COLOSSALAI = "stratagem.engines.colossalai"
_SCHEDULES = "stratagem.optim.schedules.bindings"
_SCHEDULE_NAMES = (
    *(
        f"{family}{kind}"
        for family in (
            "Constant",
            "CosineAnnealing",
            "CosineRestart",
            "Exponential",
            "Linear",
            "MultiStep",
            "Poly",
            "ReduceOnPlateau",
            "Step",
            "WarmupStableDecay",
        )
        for kind in ("LR", "Momentum", "ParamScheduler")
    ),
    "OneCycleLR",
    "OneCycleParamScheduler",
)

MODELS = Registry(
    "model",
    scope=_SCOPE,
    build_func=build_model_from_cfg,
    ready={name: f"stratagem.model.ready:{name}" for name in ("SupervisedModel", "ModelWithLoss")}
    | {"BaseDataPreprocessor": "stratagem.model.preprocess:BaseDataPreprocessor"}
    | {
        name: f"stratagem.model.averaging:{name}"
        for name in ("ExponentialMovingAverage", "MomentumAnnealingEMA", "StochasticWeightAverage")
    },
    families=(
        Members("torch.nn", _MODULE),
        Constructors("timm.", "timm:create_model", "timm:list_models"),
        Constructors("torchvision.", "torchvision.models:get_model", "torchvision.models:list_models"),
        Loaders(
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
    # torch's own imports a compiler of scripts, so it is loaded when it is named.
    ready={
        "ZeroRedundancyOptimizer": "stratagem.optim.zero_redundancy:ZeroRedundancyOptimizer",
        "DeepSpeedCPUAdam": "deepspeed.ops.adam:DeepSpeedCPUAdam",
        "DeepSpeedCPULion": "deepspeed.ops.lion:DeepSpeedCPULion",
        "FusedAdam": "deepspeed.ops.adam:FusedAdam",
        "FusedLion": "deepspeed.ops.lion:FusedLion",
        "FusedLamb": "deepspeed.ops.lamb:FusedLamb",
        "OnebitAdam": "deepspeed.runtime.fp16.onebit.adam:OnebitAdam",
        "OnebitLamb": "deepspeed.runtime.fp16.onebit.lamb:OnebitLamb",
        "ZeroOneAdam": "deepspeed.runtime.fp16.onebit.zoadam:ZeroOneAdam",
    }
    | {
        name: f"{_COLOSSALAI}.optimizers:{name}"
        for name in ("CAME", "CPUAdam", "FusedLAMB", "FusedSGD", "HybridAdam", "Lamb", "Lars")
    },
    families=(
        Members("torch.optim", _OPTIMIZER, {"TorchAdafactor": "Adafactor"}),
        Members("schedulefree", _OPTIMIZER, prefix="schedulefree."),
        Members("heavyball", _OPTIMIZER, prefix="heavyball."),
        Members("bitsandbytes.optim", _OPTIMIZER, prefix="bitsandbytes."),
        Members(f"{_COLOSSALAI}.optimizers", _OPTIMIZER, prefix="colossalai."),
    ),
)
OPTIM_WRAPPERS = Registry(
    "optimizer wrapper",
    scope=_SCOPE,
    ready={
        "OptimWrapper": "stratagem.optim.optim_wrapper:OptimWrapper",
        # What MMEngine-style configurations say: the strategy puts the engine's own in its place anyway.
        "ColossalAIOptimWrapper": "stratagem.optim.optim_wrapper:OptimWrapper",
        "AmpOptimWrapper": "stratagem.optim.amp:AmpOptimWrapper",
        # MMEngine's name: the strategy makes what DeepSpeed needs of it.
        "DeepSpeedOptimWrapper": "stratagem.optim.optim_wrapper:OptimWrapper",
    },
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    scope=_SCOPE,
    ready={
        "DefaultOptimWrapperConstructor": "stratagem.optim.groups.constructor:DefaultOptimWrapperConstructor",
        "MultiOptimWrapperConstructor": "stratagem.optim.groups.multi_optim_constructor:MultiOptimWrapperConstructor",
    },
)
PARAM_SCHEDULERS = Registry(
    "parameter scheduler", scope=_SCOPE, ready={name: f"{_SCHEDULES}:{name}" for name in _SCHEDULE_NAMES}
)

STRATEGIES = Registry(
    "strategy",
    scope=_SCOPE,
    ready={
        "ColossalAIStrategy": f"{_COLOSSALAI}.strategy:ColossalAIStrategy",
        "SingleDeviceStrategy": "stratagem.strategies.single:SingleDeviceStrategy",
        "DDPStrategy": "stratagem.strategies.ddp:DDPStrategy",
        "FSDPStrategy": "stratagem.strategies.fsdp:FSDPStrategy",
        "DeepSpeedStrategy": f"{_DEEPSPEED}:DeepSpeedStrategy",
    },
)
RUNNERS = Registry(
    "runner", scope=_SCOPE, build_func=build_runner_from_cfg, ready={"Runner": "stratagem.runner:Runner"}
)
LOOPS = Registry(
    "loop",
    scope=_SCOPE,
    ready={
        name: f"stratagem.train.loops:{name}"
        for name in ("EpochBasedTrainLoop", "IterBasedTrainLoop", "ValLoop", "TestLoop")
    },
)
HOOKS = Registry(
    "hook",
    scope=_SCOPE,
    ready={
        "CheckpointHook": "stratagem.train.hooks.checkpoint:CheckpointHook",
        "DistSamplerSeedHook": "stratagem.train.hooks.sampler_seed:DistSamplerSeedHook",
        "EarlyStoppingHook": "stratagem.train.hooks.early_stopping:EarlyStoppingHook",
        "EMAHook": "stratagem.train.hooks.averaging:EMAHook",
        "IterTimerHook": "stratagem.train.hooks.timing:IterTimerHook",
        "LoggerHook": "stratagem.train.hooks.logger:LoggerHook",
        "NonFiniteHook": "stratagem.train.hooks.nonfinite:NonFiniteHook",
        "ParamSchedulerHook": "stratagem.train.hooks.schedule:ParamSchedulerHook",
        "RuntimeInfoHook": "stratagem.train.hooks.runtime_info:RuntimeInfoHook",
        "TensorboardHook": "stratagem.train.hooks.tensorboard:TensorboardHook",
    },
)

DATASETS = Registry("dataset", scope=_SCOPE)
DATA_SAMPLERS = Registry(
    "data sampler",
    scope=_SCOPE,
    ready={name: f"stratagem.data.samplers:{name}" for name in ("DefaultSampler", "InfiniteSampler")}
    | {
        "GroupedBatchSampler": "stratagem.data.grouped:GroupedBatchSampler",
        "WeightedSampler": "stratagem.data.weighted:WeightedSampler",
    },
)
TRANSFORMS = Registry("transform", scope=_SCOPE)
TOKENIZERS = Registry("tokenizer", scope=_SCOPE)
FUNCTIONS = Registry(
    "function",
    scope=_SCOPE,
    ready={
        "default_collate": "torch.utils.data:default_collate",
        "pseudo_collate": "stratagem.data.collate:pseudo_collate",
    },
)

METRICS = Registry(
    "metric",
    scope=_SCOPE,
    families=(Members("torchmetrics", _METRIC), Members("torchmetrics.classification", _METRIC)),
)
EVALUATORS = Registry("evaluator", scope=_SCOPE, ready={"Evaluator": "stratagem.train.evaluation.evaluator:Evaluator"})
EVALUATOR = EVALUATORS  # the name that other libraries know it by
LOG_PROCESSORS = Registry("log processor", scope=_SCOPE)
VISUALIZERS = Registry("visualizer", scope=_SCOPE)
VISBACKENDS = Registry("visualizer backend", scope=_SCOPE)
TASK_UTILS = Registry("task util", scope=_SCOPE)
INFERENCERS = Registry("inferencer", scope=_SCOPE)
