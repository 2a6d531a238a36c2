"""The runner with a strategy as an argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.registry import RUNNERS
from stratagem.compat.mmengine.runner.runner import Runner
from stratagem.strategies import BaseStrategy

__all__ = ["FlexibleRunner"]


@RUNNERS.register_module()
class FlexibleRunner(Runner):
    """A :class:`Runner` whose strategy is an argument.

    Args:
        model: the model or its configuration.
        work_dir: the folder of the run.
        experiment_name: the name of the run.
        train_dataloader: the training data: a ``DataLoader`` or its configuration.
        optim_wrapper: the optimizer wrapper or its configuration.
        param_scheduler: parameter schedulers or their configurations.
        train_cfg: the training loop.
        val_dataloader: the validation data.
        val_evaluator: the evaluator of the validation, or its metrics.
        val_cfg: the arguments of the validation loop.
        test_dataloader: the test data.
        test_evaluator: the evaluator of the test, or its metrics.
        test_cfg: the arguments of the test loop.
        strategy: the strategy or its configuration.
        auto_scale_lr: ``enable`` and ``base_batch_size``.
        default_hooks: default hooks by name; None removes one.
        custom_hooks: other hooks or their configurations.
        data_preprocessor: the preprocessor of the model's configuration, if that has none.
        load_from: a checkpoint to load the weights from, or to resume from.
        resume: whether to resume from ``load_from`` or from the latest checkpoint; or the path of a checkpoint.
        launcher: ``"none"``, ``"pytorch"``, ``"slurm"`` or ``"mpi"``.
        env_cfg: settings of the process.
        log_processor: the log processor or its configuration.
        log_level: the logging level.
        visualizer: the visualizer or its configuration.
        default_scope: the registry scope in which names are looked up first.
        randomness: ``seed``, ``diff_rank_seed`` and ``deterministic``.
        compile: True, or the arguments of ``torch.compile`` and ``target``, the method of the model to compile.
        cfg: the whole configuration.
    """

    def __init__(
        self,
        model: nn.Module | dict[str, Any],
        work_dir: str = "work_dirs",
        experiment_name: str | None = None,
        train_dataloader: DataLoader[Any] | dict[str, Any] | None = None,
        optim_wrapper: Any = None,
        param_scheduler: Any = None,
        train_cfg: dict[str, Any] | None = None,
        val_dataloader: DataLoader[Any] | dict[str, Any] | None = None,
        val_evaluator: Any = None,
        val_cfg: dict[str, Any] | None = None,
        test_dataloader: DataLoader[Any] | dict[str, Any] | None = None,
        test_evaluator: Any = None,
        test_cfg: dict[str, Any] | None = None,
        strategy: BaseStrategy | dict[str, Any] | None = None,
        auto_scale_lr: dict[str, Any] | None = None,
        default_hooks: dict[str, Any] | None = None,
        custom_hooks: list[Any] | None = None,
        data_preprocessor: nn.Module | dict[str, Any] | None = None,
        load_from: str | None = None,
        resume: bool | str = False,
        launcher: str | None = None,
        env_cfg: Mapping[str, Any] | None = None,
        log_processor: Any = None,
        log_level: str = "INFO",
        visualizer: Any = None,
        default_scope: str = "mmengine",
        randomness: Mapping[str, Any] | None = None,
        compile: bool | dict[str, Any] = False,  # noqa: A002 -- the name that configurations use
        cfg: Any = None,
    ) -> None:
        if not isinstance(compile, bool | Mapping):
            raise TypeError(f"compile must be a bool or a dict, got {compile!r}.")
        whole = cfg if isinstance(cfg, Config) else Config(dict(cfg or {}))
        self._strategy_given = strategy
        self._compile_given = compile
        super().__init__(
            model=model,
            work_dir=work_dir,
            experiment_name=experiment_name,
            train_dataloader=train_dataloader,
            optim_wrapper=optim_wrapper,
            param_scheduler=param_scheduler,
            train_cfg=train_cfg,
            val_dataloader=val_dataloader,
            val_evaluator=val_evaluator,
            val_cfg=val_cfg,
            test_dataloader=test_dataloader,
            test_evaluator=test_evaluator,
            test_cfg=test_cfg,
            auto_scale_lr=auto_scale_lr,
            default_hooks=default_hooks,
            custom_hooks=custom_hooks,
            data_preprocessor=data_preprocessor,
            load_from=load_from,
            resume=resume,
            launcher="none" if launcher is None else launcher,
            env_cfg=env_cfg or {},
            log_processor=log_processor,
            log_level=log_level,
            visualizer=visualizer,
            default_scope=default_scope,
            randomness=randomness or {},
            cfg=whole,
        )

    def _strategy_cfg(self) -> Any:
        return super()._strategy_cfg() if self._strategy_given is None else self._strategy_given

    @property
    def _initializes_to_evaluate(self) -> bool:
        return bool(self.cfg.get("init_weights_for_test_or_val", True))

    @property
    def _compile_cfg(self) -> Any:
        return self._compile_given or super()._compile_cfg
