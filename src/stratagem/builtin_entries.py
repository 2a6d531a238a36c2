"""The built-in entries of the registries: for each registry, its names and the ``"module:name"`` strings that they refer to.

Entries are strings, so this table imports nothing; a registry imports an entry the first time its name is looked up. To add
a built-in hook, loop or strategy, add its name to this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

_DEEPSPEED: Final = "stratagem.engines.deepspeed"
_COLOSSALAI: Final = "stratagem.engines.colossalai"


def _in_module(module: str, names: Iterable[str]) -> dict[str, str]:
    return {name: f"{module}:{name}" for name in names}


MODELS: Final[Mapping[str, str]] = {
    **_in_module("stratagem.model.ready", ("SupervisedModel", "ModelWithLoss")),
    **_in_module("stratagem.model.preprocess", ("BaseDataPreprocessor",)),
    **_in_module(
        "stratagem.model.averaging",
        ("ExponentialMovingAverage", "MomentumAnnealingEMA", "StochasticWeightAverage"),
    ),
}

OPTIMIZERS: Final[Mapping[str, str]] = {
    "MixedOptimizer": "stratagem.optim.mixed:MixedOptimizer",
    # Do not use torch's class, because importing it imports the TorchScript compiler.
    "ZeroRedundancyOptimizer": "stratagem.optim.zero_redundancy:ZeroRedundancyOptimizer",
    "DeepSpeedCPUAdam": "deepspeed.ops.adam:DeepSpeedCPUAdam",
    "DeepSpeedCPULion": "deepspeed.ops.lion:DeepSpeedCPULion",
    "FusedAdam": "deepspeed.ops.adam:FusedAdam",
    "FusedLion": "deepspeed.ops.lion:FusedLion",
    "FusedLamb": "deepspeed.ops.lamb:FusedLamb",
    "OnebitAdam": "deepspeed.runtime.fp16.onebit.adam:OnebitAdam",
    "OnebitLamb": "deepspeed.runtime.fp16.onebit.lamb:OnebitLamb",
    "ZeroOneAdam": "deepspeed.runtime.fp16.onebit.zoadam:ZeroOneAdam",
    **_in_module(
        f"{_COLOSSALAI}.optimizers", ("CAME", "CPUAdam", "FusedLAMB", "FusedSGD", "HybridAdam", "Lamb", "Lars")
    ),
}

OPTIM_WRAPPERS: Final[Mapping[str, str]] = {
    "OptimWrapper": "stratagem.optim.optim_wrapper:OptimWrapper",
    "AmpOptimWrapper": "stratagem.optim.amp:AmpOptimWrapper",
    # MMEngine's names for the wrappers of engines. The strategy replaces this OptimWrapper with the wrapper of its engine.
    "ColossalAIOptimWrapper": "stratagem.optim.optim_wrapper:OptimWrapper",
    "DeepSpeedOptimWrapper": "stratagem.optim.optim_wrapper:OptimWrapper",
}

OPTIM_WRAPPER_CONSTRUCTORS: Final[Mapping[str, str]] = {
    "DefaultOptimWrapperConstructor": "stratagem.optim.groups.constructor:DefaultOptimWrapperConstructor",
    "MultiOptimWrapperConstructor": "stratagem.optim.groups.multi_optim_constructor:MultiOptimWrapperConstructor",
}

PARAM_SCHEDULERS: Final[Mapping[str, str]] = _in_module(
    "stratagem.optim.schedules.bindings",
    (
        *(
            f"{shape}{parameter}"
            for shape in (
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
            for parameter in ("LR", "Momentum", "ParamScheduler")
        ),
        "OneCycleLR",
        "OneCycleParamScheduler",
    ),
)

STRATEGIES: Final[Mapping[str, str]] = {
    "SingleDeviceStrategy": "stratagem.strategies.single:SingleDeviceStrategy",
    "DDPStrategy": "stratagem.strategies.ddp:DDPStrategy",
    "FSDPStrategy": "stratagem.strategies.fsdp:FSDPStrategy",
    "DeepSpeedStrategy": f"{_DEEPSPEED}:DeepSpeedStrategy",
    "ColossalAIStrategy": f"{_COLOSSALAI}.strategy:ColossalAIStrategy",
}

RUNNERS: Final[Mapping[str, str]] = {"Runner": "stratagem.runner:Runner"}

LOOPS: Final[Mapping[str, str]] = _in_module(
    "stratagem.train.loops", ("EpochBasedTrainLoop", "IterBasedTrainLoop", "ValLoop", "TestLoop")
)

HOOKS: Final[Mapping[str, str]] = {
    "CheckpointHook": "stratagem.train.hooks.checkpoint:CheckpointHook",
    "DistSamplerSeedHook": "stratagem.train.hooks.sampler_seed:DistSamplerSeedHook",
    "EarlyStoppingHook": "stratagem.train.hooks.early_stopping:EarlyStoppingHook",
    "EMAHook": "stratagem.train.hooks.averaging:EMAHook",
    "FlopsHook": "stratagem.train.hooks.flops:FlopsHook",
    "GarbageCollectionHook": "stratagem.train.hooks.garbage_collection:GarbageCollectionHook",
    "IterTimerHook": "stratagem.train.hooks.iter_timer:IterTimerHook",
    "LoggerHook": "stratagem.train.hooks.logger:LoggerHook",
    "NonFiniteHook": "stratagem.train.hooks.nonfinite:NonFiniteHook",
    "ParamSchedulerHook": "stratagem.train.hooks.schedule:ParamSchedulerHook",
    "ProfilerHook": "stratagem.train.hooks.profiler:ProfilerHook",
    "RuntimeInfoHook": "stratagem.train.hooks.runtime_info:RuntimeInfoHook",
    "TensorboardHook": "stratagem.train.hooks.tensorboard:TensorboardHook",
    "TraceHook": "stratagem.train.hooks.trace:TraceHook",
}

# The short names of trackers.
TRACKERS: Final[Mapping[str, str]] = {
    "csv": "stratagem.train.trackers.csv_file:CSVTracker",
    "mlflow": "stratagem.train.trackers.mlflow:MLflowTracker",
    "tensorboard": "stratagem.train.trackers.tensorboard:TensorBoardTracker",
    "trackio": "stratagem.train.trackers.trackio:TrackioTracker",
    "wandb": "stratagem.train.trackers.wandb:WandbTracker",
}

DATA_SAMPLERS: Final[Mapping[str, str]] = {
    **_in_module("stratagem.data.samplers", ("DefaultSampler", "InfiniteSampler")),
    "GroupedBatchSampler": "stratagem.data.grouped:GroupedBatchSampler",
    "WeightedSampler": "stratagem.data.weighted:WeightedSampler",
}

FUNCTIONS: Final[Mapping[str, str]] = {
    "default_collate": "torch.utils.data:default_collate",
    "pseudo_collate": "stratagem.data.collate:pseudo_collate",
}

EVALUATORS: Final[Mapping[str, str]] = {"Evaluator": "stratagem.train.evaluation.evaluator:Evaluator"}
