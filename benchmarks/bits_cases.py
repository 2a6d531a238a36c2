"""The training jobs that ``bits.py`` compares between two revisions. This module imports neither torch nor Stratagem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

__all__ = ["CASES", "CATEGORIES", "ITERATIONS", "SAMPLES", "Case"]

ITERATIONS: Final = 12
GLOBAL_BATCH: Final = 4
SAMPLES: Final = 24

# What is recorded, in the order in which the table shows it.
CATEGORIES: Final = (
    "samples",  # sample ids and the augmented inputs of each batch
    "losses",  # everything that train_step returns
    "options",  # learning rate, momentum, betas and weight decay of each group
    "gradients",  # gradients that the optimizer receives, after synchronization and clipping
    "parameters",  # parameters of the optimizer after each step, and of the model after each iteration
    "moments",  # the optimizer's state after each step
    "buffers",  # of the model after each iteration, such as BatchNorm's running statistics
    "generators",  # state of the random number generators after each iteration
    "metrics",  # of each validation
    "checkpoint",  # tensors and values of each checkpoint on disk
    "average",  # tensors of the averaged model in each checkpoint on disk
)

_ADAMW: Final = {
    "optimizer": {"type": "AdamW", "lr": 0.01, "weight_decay": 0.1},
    "paramwise_cfg": {
        "norm_decay_mult": 0.0,
        "bias_decay_mult": 0.0,
        "bias_lr_mult": 2.0,
        "custom_keys": {"head": {"lr_mult": 0.5}},
    },
    "accumulative_counts": 2,
    "clip_grad": {"max_norm": 0.3},
}
_SGD: Final = {
    "optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9},
    "clip_grad": {"type": "value", "clip_value": 0.02},
}
_PARTLY_FROZEN: Final = {**_ADAMW, "paramwise_cfg": {"norm_decay_mult": 0.0, "freeze": ["blocks.0.norm"]}}
_AMP: Final = {"type": "AmpOptimWrapper", "dtype": "bfloat16"}
_FLOAT16: Final = {
    "type": "AmpOptimWrapper",
    "dtype": "float16",
    # The first updates overflow, and later ones raise the scale.
    "loss_scale": {"init_scale": 2.0**20, "growth_interval": 2},
}
_TWO_OPTIMIZERS: Final = {
    "constructor": "MultiOptimWrapperConstructor",
    "generator": {"optimizer": {"type": "Adam", "lr": 0.01, "betas": (0.5, 0.999)}, "clip_grad": {"max_norm": 0.3}},
    "critic": {"optimizer": {"type": "SGD", "lr": 0.02, "momentum": 0.9}},
}
_WARM_UP_AND_COSINE: Final = (
    {"type": "LinearLR", "start_factor": 0.2, "by_epoch": False, "begin": 0, "end": 4},
    {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 4},
)
_MOMENTUM: Final = (
    *_WARM_UP_AND_COSINE,
    {"type": "LinearMomentum", "start_factor": 0.5, "by_epoch": False, "begin": 0, "end": 8},
)
_BY_EPOCH: Final = {"by_epoch": True, "max_epochs": ITERATIONS * GLOBAL_BATCH // SAMPLES}
_BY_ITER: Final = {"by_epoch": False, "max_iters": ITERATIONS, "val_interval": 4}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A training job.

    Attributes:
        processes: number of ranks.
        strategy: the configuration of the strategy.
        shared: number of ranks that train on the same samples.
        two_networks: whether the model has two networks and two optimizers.
        model: arguments of the model.
        optim_wrapper: the configuration of the optimizer wrapper.
        param_scheduler: the configurations of the schedules.
        train_cfg: the configuration of the training loop.
        workers: number of loader workers.
        average: whether ``EMAHook`` averages the weights.
        resume_at: the iteration whose checkpoint a second run resumes from.
        unavailable: categories that the job cannot record.
    """

    processes: int
    strategy: Mapping[str, Any]
    shared: int = 1
    two_networks: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    optim_wrapper: Mapping[str, Any] = field(default_factory=lambda: _ADAMW)
    param_scheduler: tuple[Mapping[str, Any], ...] = _WARM_UP_AND_COSINE
    train_cfg: Mapping[str, Any] = field(default_factory=lambda: _BY_ITER)
    workers: int = 0
    average: bool = True
    resume_at: int = 5
    unavailable: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int:
        """The batch size of each rank."""
        return GLOBAL_BATCH * self.shared // self.processes

    @property
    def expected(self) -> tuple[str, ...]:
        """The categories that a record of this job must contain."""
        missing = {*self.unavailable, *(() if self.average else ("average",))}
        if not self.model.get("batch_norm"):
            missing.add("buffers")
        return tuple(category for category in CATEGORIES if category not in missing)


def _single(**options: Any) -> Case:
    return Case(processes=1, strategy={"type": "SingleDeviceStrategy"}, **options)


def _ddp(strategy: Mapping[str, Any] | None = None, **options: Any) -> Case:
    return Case(processes=2, strategy={"type": "DDPStrategy", **(strategy or {})}, **options)


def _fsdp(strategy: Mapping[str, Any] | None = None, *, processes: int = 2, **options: Any) -> Case:
    return Case(processes=processes, strategy={"type": "FSDPStrategy", **(strategy or {})}, **options)


def _deepspeed(stage: int, further: Mapping[str, Any] | None = None, **options: Any) -> Case:
    strategy = {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}, **(further or {})}
    return Case(processes=2, strategy=strategy, **options)


def _colossalai(plugin: Mapping[str, Any], **options: Any) -> Case:
    return Case(processes=2, strategy={"type": "ColossalAIStrategy", "plugin": dict(plugin)}, **options)


_LAYERS: Final = {"batch_norm": True, "dropout": 0.2}
CASES: Final[Mapping[str, Case]] = {
    "single": _single(model=_LAYERS, train_cfg=_BY_EPOCH, workers=2),
    "single SGD": _single(
        model=_LAYERS, optim_wrapper=_SGD, param_scheduler=_MOMENTUM, workers=2, average=False, resume_at=6
    ),
    "single weighted": _single(
        model={"weighted": True, "dropout": 0.2}, optim_wrapper=_PARTLY_FROZEN, train_cfg=_BY_EPOCH, resume_at=6
    ),
    "single bfloat16": _single(model=_LAYERS, optim_wrapper={**_ADAMW, **_AMP}),
    "single float16": _single(model={"dropout": 0.2}, optim_wrapper={**_ADAMW, **_FLOAT16}, resume_at=7),
    "single two optimizers": _single(two_networks=True, optim_wrapper=_TWO_OPTIMIZERS),
    "DDP x2": _ddp(model=_LAYERS, train_cfg=_BY_EPOCH, workers=2),
    "DDP x2 no_sync": _ddp(
        model={"dropout": 0.2, "weighted": True},
        # The last window is shorter.
        optim_wrapper={**_SGD, "accumulative_counts": 5},
        param_scheduler=_MOMENTUM,
        average=False,
        resume_at=7,
    ),
    "DDP x2 float16": _ddp(model={"dropout": 0.2}, optim_wrapper={**_ADAMW, **_FLOAT16}, resume_at=6),
    "DDP x2 two optimizers": _ddp({"model_wrapper": "separate"}, two_networks=True, optim_wrapper=_TWO_OPTIMIZERS),
    "FSDP x2": _fsdp(model={"dropout": 0.2}, train_cfg=_BY_EPOCH, workers=2),
    "FSDP x2 policy": _fsdp(
        {"wrap_policy": {"modules": ["blocks.*.expand"]}, "reshard_after_forward": False, "state": "full"},
        optim_wrapper={**_SGD, "accumulative_counts": 2},
        param_scheduler=_MOMENTUM,
        average=False,
        resume_at=6,
    ),
    "FSDP x2 bfloat16": _fsdp({"mixed_precision": "bfloat16"}, model={"weighted": True}),
    "FSDP x2 recomputed": _fsdp(
        {"activation_checkpointing": True, "initial_weights": "per_rank"},
        model={"dropout": 0.2},
        optim_wrapper=_PARTLY_FROZEN,
    ),
    "HSDP 2x2": _fsdp({"replicate": 2}, processes=4, model={"dropout": 0.2}),
    "TP x2": _fsdp({"tp": 2}, shared=2),
    "FSDP x TP 2x2": _fsdp({"tp": 2}, processes=4, shared=2),
    "ZeRO 1 x2": _deepspeed(1),
    "ZeRO 2 x2": _deepspeed(2, train_cfg=_BY_EPOCH),
    "ZeRO 3 x2": _deepspeed(3, average=False),
    "ZeRO 2 x2 bfloat16": _deepspeed(2, {"bf16": {"enabled": True}}, model={"weighted": True}, average=False),
    "ColossalAI DDP x2": _colossalai({"type": "torch-ddp"}),
    "ColossalAI ZeRO 1 x2": _colossalai({"type": "lowlevel-zero", "stage": 1}),
    "ColossalAI ZeRO 2 x2": _colossalai({"type": "lowlevel-zero", "stage": 2}, average=False),
    "ColossalAI ZeRO 1 x2 bfloat16": _colossalai(
        {"type": "lowlevel-zero", "stage": 1, "precision": "bf16"}, model={"weighted": True}, average=False
    ),
    "ColossalAI TP x2": _colossalai({"type": "hybrid-parallel", "tp_size": 2}, shared=2, average=False),
}
