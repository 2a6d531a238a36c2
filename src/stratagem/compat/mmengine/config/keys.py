"""The top-level keys of MMEngine's configurations, and the keys of MMCV 1 that MMEngine replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["KEYS", "LEGACY_KEYS"]

# The keys that MMEngine's Runner, FlexibleRunner and Config read, and those that the test scripts of OpenMMLab's packages read.
KEYS: Final = frozenset(
    {
        "activation_checkpointing",
        "auto_scale_lr",
        "compile",
        "custom_hooks",
        "custom_imports",
        "data_preprocessor",
        "default_hooks",
        "default_scope",
        "efficient_conv_bn_eval",
        "env_cfg",
        "experiment_name",
        "find_unused_parameters",
        "init_weights_for_test_or_val",
        "launcher",
        "load_from",
        "log_level",
        "log_processor",
        "model",
        "model_path",
        "model_wrapper_cfg",
        "optim_wrapper",
        "param_scheduler",
        "randomness",
        "resume",
        "runner_type",
        "strategy",
        "sync_bn",
        "test_cfg",
        "test_dataloader",
        "test_evaluator",
        "train_cfg",
        "train_dataloader",
        "tta_model",
        "tta_pipeline",
        "val_cfg",
        "val_dataloader",
        "val_evaluator",
        "vis_backends",
        "visualizer",
        "work_dir",
    }
)

# Key of MMCV 1 -> what to write instead.
LEGACY_KEYS: Final[Mapping[str, str]] = {
    "auto_resume": "resume=True",
    "checkpoint_config": "default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=...))",
    "cudnn_benchmark": "env_cfg=dict(cudnn_benchmark=...)",
    "data": "train_dataloader, val_dataloader and test_dataloader, each with its dataset, sampler and batch_size",
    "deterministic": "randomness=dict(seed=..., deterministic=True)",
    "device": "the launcher and CUDA_VISIBLE_DEVICES, which select the devices",
    "dist_params": "env_cfg=dict(dist_cfg=dict(backend=...))",
    "evaluation": "val_cfg=dict(), train_cfg=dict(val_interval=...) and val_evaluator=dict(type=...); "
    "save_best belongs to default_hooks.checkpoint",
    "fp16": "optim_wrapper=dict(type='AmpOptimWrapper', loss_scale=..., optimizer=...)",
    "gpu_ids": "the launcher and CUDA_VISIBLE_DEVICES, which select the devices",
    "log_config": "default_hooks=dict(logger=dict(type='LoggerHook', interval=...)) and visualizer=dict(vis_backends=[...])",
    "lr_config": "param_scheduler=[dict(type='LinearLR', ...), dict(type='MultiStepLR', ...)]",
    "momentum_config": "param_scheduler=[dict(type='CosineAnnealingMomentum', ...)]",
    "mp_start_method": "env_cfg=dict(mp_cfg=dict(mp_start_method=...))",
    "opencv_num_threads": "env_cfg=dict(mp_cfg=dict(opencv_num_threads=...))",
    "optimizer": "optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type=..., lr=...))",
    "optimizer_config": "optim_wrapper=dict(clip_grad=dict(max_norm=...), accumulative_counts=...)",
    "resume_from": "resume=True and load_from=...",
    "runner": "train_cfg=dict(by_epoch=True, max_epochs=...)",
    "seed": "randomness=dict(seed=...)",
    "total_epochs": "train_cfg=dict(by_epoch=True, max_epochs=...)",
    "total_iters": "train_cfg=dict(by_epoch=False, max_iters=...)",
    "workflow": "train_cfg=dict(val_interval=...); training and validation are separate loops",
}
