"""The top-level keys of MMEngine's configurations."""

from __future__ import annotations

from typing import Final

__all__ = ["KEYS"]

# The keys that MMEngine's Runner, FlexibleRunner and Config read, those that the test scripts of OpenMMLab's packages read, and
# the options of this layer.
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
        "stratagem",
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
