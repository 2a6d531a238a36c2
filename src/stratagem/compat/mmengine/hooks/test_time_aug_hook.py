"""Test with augmented versions of each sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.hooks.hook import Hook
from stratagem.compat.mmengine.registry import HOOKS, MODELS, RUNNERS
from stratagem.utils import import_module

__all__ = ["PrepareTTAHook", "build_runner_with_tta"]


@HOOKS.register_module()
class PrepareTTAHook(Hook):
    """Wrap the model before a test with a model that merges the predictions for augmented versions of a sample.

    Args:
        tta_cfg: the config of the wrapper, a subclass of ``BaseTTAModel``.
    """

    def __init__(self, tta_cfg: dict[str, Any]) -> None:
        self.tta_cfg = tta_cfg

    def before_test(self, runner: Any) -> None:
        runner.model = MODELS.build({**self.tta_cfg, "module": runner.model})


def build_runner_with_tta(cfg: Any) -> Any:
    """Return a runner whose test uses the pipeline ``tta_pipeline`` and the model ``tta_model`` of a config.

    The config receives the pipeline.

    Raises:
        AssertionError: if the config lacks one of them.
    """
    for name in ("tta_model", "tta_pipeline"):
        require(hasattr(cfg, name), f"The config has no {name}. Define it.")
    cfg["test_dataloader"]["dataset"]["pipeline"] = cfg["tta_pipeline"]
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else _runner_class().from_cfg(cfg)
    tta_model: Mapping[str, Any] = cfg["tta_model"]
    runner.register_hook(PrepareTTAHook(tta_cfg=dict(tta_model)))
    return runner


def _runner_class() -> Any:
    # The runner imports the hooks.
    return import_module("stratagem.compat.mmengine.runner").Runner
