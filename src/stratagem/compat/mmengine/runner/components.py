"""The part of the runner that builds the components of a run."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.evaluator import Evaluator
from stratagem.compat.mmengine.logging import MessageHub, MMLogger
from stratagem.compat.mmengine.model import revert_sync_batchnorm
from stratagem.compat.mmengine.optim import OptimWrapperDict, _ParamScheduler
from stratagem.compat.mmengine.registry import MODELS, VISUALIZERS
from stratagem.compat.mmengine.runner import building
from stratagem.compat.mmengine.runner.base_loop import BaseLoop
from stratagem.compat.mmengine.runner.log_processor import LogProcessor
from stratagem.compat.mmengine.runner.loops import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, ValLoop
from stratagem.compat.mmengine.runner.session import RunSession
from stratagem.compat.mmengine.runner.utils import _get_batch_size, set_random_seed
from stratagem.compat.mmengine.utils.dl_utils import collect_env
from stratagem.compat.mmengine.visualization import Visualizer

__all__ = ["RunnerComponents"]


class RunnerComponents:
    """Builds the components of a run; the methods have the names and results of MMEngine's runner."""

    cfg: Config
    logger: Any
    model: Any
    optim_wrapper: Any
    param_schedulers: Any
    _session: RunSession
    _experiment_name: str
    _log_dir: str
    _launcher: str
    _distributed: bool
    _world_size: int
    _timestamp: str
    _randomness_cfg: dict[str, Any]
    _train_loop: Any
    _val_loop: Any
    _test_loop: Any
    _train_dataloader: Any
    _val_dataloader: Any
    _val_evaluator: Any
    _test_dataloader: Any
    _test_evaluator: Any
    # Whether data loaders use the global random number generators, as those of MMEngine do.
    _global_random_numbers = False

    def set_randomness(self, seed: int | None, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """Seed all generators. Collective if ``seed`` is None.

        Args:
            seed: the seed; by default, rank 0 draws one for all ranks.
            diff_rank_seed: whether the rank is added to the seed.
            deterministic: whether torch uses only deterministic algorithms.
        """
        self._deterministic = deterministic
        self._seed = set_random_seed(seed=seed, deterministic=deterministic, diff_rank_seed=diff_rank_seed)

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """Return the logger of the run, which by default writes to ``<log_dir>/<timestamp>.log``."""
        file = os.path.join(self._log_dir, f"{self._timestamp}.log") if log_file is None else log_file  # noqa: PTH118
        arguments = {"log_level": log_level, "log_file": file, **kwargs}
        arguments.setdefault("name", self._experiment_name)
        # `torchrun` may restart a run that has written to the file.
        arguments.setdefault("file_mode", "a")
        return MMLogger.get_instance(**arguments)

    def build_message_hub(self, message_hub: dict[str, Any] | None = None) -> MessageHub:
        """Return the message hub of the run.

        Raises:
            TypeError: if ``message_hub`` is neither a dict nor None.
        """
        if message_hub is not None and not isinstance(message_hub, Mapping):
            raise TypeError(f"message_hub should be a dict or None, but got {message_hub!r}.")
        return MessageHub.get_instance(**{"name": self._experiment_name, **(message_hub or {})})

    def build_visualizer(self, visualizer: Visualizer | dict[str, Any] | None = None) -> Visualizer:
        """Return a visualizer, or build it from its configuration; by default, it stores values in ``log_dir``.

        Raises:
            TypeError: if it has the wrong type.
        """
        if isinstance(visualizer, Visualizer):
            return visualizer
        own = {"name": self._experiment_name, "save_dir": self._log_dir}
        if visualizer is None:
            return Visualizer.get_instance(**own, vis_backends=[{"type": "LocalVisBackend"}])  # type: ignore[no-any-return]
        if isinstance(visualizer, Mapping):
            return VISUALIZERS.build({**own, **visualizer})  # type: ignore[no-any-return]
        raise TypeError(f"visualizer should be a Visualizer, a dict or None, but got {visualizer!r}.")

    def build_model(self, model: nn.Module | dict[str, Any]) -> nn.Module:
        """Return a model, or build it from its configuration.

        Raises:
            TypeError: if it has the wrong type.
        """
        if isinstance(model, nn.Module):
            return model
        if isinstance(model, Mapping):
            return MODELS.build(model)  # type: ignore[no-any-return]
        raise TypeError(f"model should be an nn.Module or a dict, but got {model!r}.")

    def wrap_model(self, model_wrapper_cfg: Mapping[str, Any] | None, model: nn.Module) -> nn.Module:
        """Move a model to the device and, in a distributed run, wrap it. Collective.

        A strategy that shards the model does so at the beginning of the training, after the weights have been initialized.

        Args:
            model_wrapper_cfg: the wrapper, which was chosen when the runner was built.
            model: the model.
        """
        if self._session.is_placed and model_wrapper_cfg != self.cfg.get("model_wrapper_cfg"):
            raise ValueError(
                "The wrapper of the model is chosen when the runner is built. Set model_wrapper_cfg in cfg."
            )
        if self._session.shards:
            return model
        if not self._distributed:
            model = revert_sync_batchnorm(model)
        return self._session.place(model, initialize=False, compile_cfg=self._compile_cfg)

    @property
    def _compile_cfg(self) -> Any:
        cfg = self.cfg.get("compile")
        return dict(cfg) if isinstance(cfg, Mapping) else bool(cfg)

    def scale_lr(self, optim_wrapper: Any, auto_scale_lr: Mapping[str, Any] | None = None) -> None:
        """Multiply the learning rates by the ratio of the batch size of all ranks to ``base_batch_size``.

        Args:
            optim_wrapper: the optimizer wrapper or wrappers.
            auto_scale_lr: ``enable`` and ``base_batch_size``.

        Raises:
            AssertionError: if ``base_batch_size`` is missing, or the wrapper is not built.
            RuntimeError: if schedulers, which store the learning rates, are already built.
        """
        if auto_scale_lr is None or not auto_scale_lr.get("enable", False):
            return
        if "base_batch_size" not in auto_scale_lr:
            raise AssertionError("auto_scale_lr needs base_batch_size.")
        size = self._world_size * _get_batch_size(self._train_dataloader)
        base = auto_scale_lr["base_batch_size"]
        self.logger.info(f"auto_scale_lr: the learning rates for batches of {base} are multiplied by {size / base}.")
        if _has_built_scheduler(self.param_schedulers):
            raise RuntimeError(
                "Learning rates must be scaled before schedulers are built, because schedulers store them."
            )
        if isinstance(optim_wrapper, Mapping) or not hasattr(optim_wrapper, "param_groups"):
            raise AssertionError("Build the optimizer wrapper before its learning rates are scaled.")
        wrappers = optim_wrapper.values() if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]
        for wrapper in wrappers:
            for group in wrapper.optimizer.param_groups:
                group["lr"] *= size / base

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Return an optimizer wrapper, or build it from its configuration for the model of the run.

        Raises:
            TypeError: if it has the wrong type.
            ValueError: if a mapping without ``optimizer`` and ``constructor`` contains anything but optimizer wrappers.
        """
        return building.build_optim(optim_wrapper, self.model)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """Return the schedulers of the run: a list, or for several optimizers a dict of lists.

        Raises:
            TypeError: if a scheduler has the wrong type.
            AssertionError: if the optimizer wrapper is not built.
        """
        loop: Any = self._train_loop if isinstance(self._train_loop, BaseLoop) else None
        return building.build_schedulers(
            scheduler,
            self.optim_wrapper,
            epoch_length=lambda: len(self.train_dataloader),  # type: ignore[attr-defined]
            ends=None if loop is None else (loop.max_epochs, loop.max_iters),
        )

    def _check_scheduler_cfg(self, param_scheduler: Any) -> None:
        """Check the type of the argument ``param_scheduler``."""
        building.check_scheduler_cfg(param_scheduler)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        """Return an evaluator, or build it from its configuration or those of its metrics.

        Raises:
            TypeError: if it has the wrong type.
        """
        return building.build_evaluator(evaluator)

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader[Any] | dict[str, Any], seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader[Any]:
        """Return a data loader, or build it from its configuration.

        Args:
            dataloader: the loader or its configuration.
            seed: the seed of the sampler.
            diff_rank_seed: whether the ranks have different seeds; the sampler then draws a common one.

        Raises:
            TypeError: if a function has the wrong type.
        """
        return building.build_dataloader(dataloader, seed=seed, diff_rank_seed=diff_rank_seed)

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        """Return a training loop, or build it: the one that ``type`` or ``by_epoch`` specifies.

        Raises:
            TypeError: if it has the wrong type.
            RuntimeError: if both keys are given.
        """
        default = None
        if isinstance(loop, Mapping):
            if "type" in loop and "by_epoch" in loop:
                raise RuntimeError("Only one of type and by_epoch can be set in train_cfg, but both are.")
            if "type" not in loop:
                loop = dict(loop)
                default = EpochBasedTrainLoop if loop.pop("by_epoch") else IterBasedTrainLoop
        return self._build_loop(loop, "train_loop", default, dataloader=self._train_dataloader)

    def build_val_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        """Return a validation loop, or build it; by default :class:`ValLoop`.

        Raises:
            TypeError: if it has the wrong type.
        """
        data = {"dataloader": self._val_dataloader, "evaluator": self._val_evaluator}
        return self._build_loop(loop, "val_loop", ValLoop, **data)

    def build_test_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        """Return a test loop, or build it; by default :class:`TestLoop`.

        Raises:
            TypeError: if it has the wrong type.
        """
        data = {"dataloader": self._test_dataloader, "evaluator": self._test_evaluator}
        return self._build_loop(loop, "test_loop", TestLoop, **data)

    def _build_loop(self, loop: Any, kind: str, default: type[BaseLoop] | None, **data: Any) -> BaseLoop:
        with building.random_numbers(global_=self._global_random_numbers):
            return building.build_loop(loop, kind, default, runner=self, **data)

    def build_log_processor(self, log_processor: Any) -> LogProcessor:
        """Return a log processor, or build it from its configuration.

        Raises:
            TypeError: if it has the wrong type.
        """
        return building.build_log_processor(log_processor)

    def _log_env(self, env_cfg: Mapping[str, Any]) -> None:
        """Log the hardware, the installed software, the settings of the process, and the configuration."""
        runtime: OrderedDict[str, Any] = OrderedDict(env_cfg)
        runtime.update(self._randomness_cfg)
        runtime["seed"] = self._seed
        runtime["Distributed launcher"] = self._launcher
        runtime["Distributed training"] = self._distributed
        runtime["GPU number"] = self._world_size
        line = "-" * 60
        parts = [
            "\n    ".join([f"{title}:", *(f"{key}: {value}" for key, value in facts.items())])
            for title, facts in (("System environment", collect_env()), ("Runtime environment", runtime))
        ]
        self.logger.info("\n".join(["", line, *parts, line, ""]))
        if len(self.cfg):
            self.logger.info(f"Config:\n{self.cfg.pretty_text}")


def _has_built_scheduler(schedulers: Any) -> bool:
    if isinstance(schedulers, Mapping):
        return "type" not in schedulers and any(map(_has_built_scheduler, schedulers.values()))
    if isinstance(schedulers, list | tuple):
        return any(map(_has_built_scheduler, schedulers))
    return isinstance(schedulers, _ParamScheduler)
