"""The top-level keys of MMCV 1, which MMEngine replaced, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["MMCV_KEYS"]

MMCV_KEYS: Final[Mapping[str, str]] = {
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
