"""The runner: MMEngine's interface on the engine of this package."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.config.acceptance import require_accepted
from stratagem.compat.mmengine.fileio import FileClient, join_path
from stratagem.compat.mmengine.hooks import Hook
from stratagem.compat.mmengine.logging.message_hub import MessageHub
from stratagem.compat.mmengine.model import BaseTTAModel, is_model_wrapper
from stratagem.compat.mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from stratagem.compat.mmengine.registry import RUNNERS, DefaultScope
from stratagem.compat.mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from stratagem.compat.mmengine.runner.base_loop import BaseLoop
from stratagem.compat.mmengine.runner.checkpoint import (
    _load_checkpoint,
    _load_checkpoint_to_model,
)
from stratagem.compat.mmengine.runner.collective_saves import is_called_on_all_ranks, require_all_ranks
from stratagem.compat.mmengine.runner.components import RunnerComponents
from stratagem.compat.mmengine.runner.facts import RunnerFacts
from stratagem.compat.mmengine.runner.hook_calls import HookCalls
from stratagem.compat.mmengine.runner.options import (
    require_complete,
    uses_global_random_numbers,
)
from stratagem.compat.mmengine.runner.placing import choose_placing
from stratagem.compat.mmengine.runner.session import RunSession, change_seed
from stratagem.compat.mmengine.version import __version__
from stratagem.train.resume.source import ResumeSource

__all__ = ["Runner"]

_KEYS = (
    "model", "work_dir", "train_dataloader", "val_dataloader", "test_dataloader", "train_cfg", "val_cfg", "test_cfg",
    "auto_scale_lr", "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator", "default_hooks",
    "custom_hooks", "data_preprocessor", "load_from", "resume", "launcher", "env_cfg", "log_processor", "log_level",
    "visualizer", "default_scope", "randomness", "experiment_name",
)  # fmt: skip

_ENV_CFG: Mapping[str, Any] = MappingProxyType({"dist_cfg": {"backend": "nccl"}})
_RANDOMNESS: Mapping[str, Any] = MappingProxyType({"seed": None})


@RUNNERS.register_module()
class Runner(RunnerFacts, HookCalls, RunnerComponents):
    """Train, validate and test a model as specified by a configuration of MMEngine.

    The engine of this package places the model, saves and resumes checkpoints, and stops at signals; see
    :mod:`stratagem.compat.mmengine.runner.session`. The keys ``strategy`` and ``stratagem`` of ``cfg``, which MMEngine ignores,
    are its options: ``strategy=dict(type="FSDPStrategy", ...)`` chooses a strategy, and
    ``stratagem=dict(data_order="mmengine")`` makes data loaders draw random numbers where those of MMEngine do.

    Args:
        model: the model or its configuration.
        work_dir: the folder of the run.
        train_dataloader: the training data: a ``DataLoader`` or its configuration.
        val_dataloader: the validation data.
        test_dataloader: the test data.
        train_cfg: the training loop: ``by_epoch`` or ``type``, and its arguments.
        val_cfg: the arguments of the validation loop.
        test_cfg: the arguments of the test loop.
        auto_scale_lr: ``enable`` and ``base_batch_size``: learning rates are multiplied by the ratio of the batch size to it.
        optim_wrapper: the optimizer wrapper or its configuration.
        param_scheduler: parameter schedulers or their configurations.
        val_evaluator: the evaluator of the validation, or its metrics.
        test_evaluator: the evaluator of the test, or its metrics.
        default_hooks: default hooks by name; None removes one.
        custom_hooks: other hooks or their configurations.
        data_preprocessor: the preprocessor of the model's configuration, if that has none.
        load_from: a checkpoint to load the weights from, or to resume from.
        resume: whether to resume from ``load_from`` or from the latest checkpoint.
        launcher: ``"none"``, ``"pytorch"``, ``"slurm"`` or ``"mpi"``.
        env_cfg: settings of the process.
        log_processor: the log processor or its configuration.
        log_level: the logging level.
        visualizer: the visualizer or its configuration.
        default_scope: the registry scope in which names are looked up first.
        randomness: ``seed``, ``diff_rank_seed`` and ``deterministic``.
        experiment_name: the name of the run; by default that of the configuration file.
        cfg: the whole configuration.

    Raises:
        ValueError: if only some arguments of training, validation or testing are given.
    """

    cfg: Config

    def __init__(
        self,
        model: nn.Module | dict[str, Any],
        work_dir: str,
        train_dataloader: DataLoader[Any] | dict[str, Any] | None = None,
        val_dataloader: DataLoader[Any] | dict[str, Any] | None = None,
        test_dataloader: DataLoader[Any] | dict[str, Any] | None = None,
        train_cfg: dict[str, Any] | None = None,
        val_cfg: dict[str, Any] | None = None,
        test_cfg: dict[str, Any] | None = None,
        auto_scale_lr: dict[str, Any] | None = None,
        optim_wrapper: Any = None,
        param_scheduler: Any = None,
        val_evaluator: Any = None,
        test_evaluator: Any = None,
        default_hooks: dict[str, Any] | None = None,
        custom_hooks: list[Any] | None = None,
        data_preprocessor: nn.Module | dict[str, Any] | None = None,
        load_from: str | None = None,
        resume: bool | str = False,
        launcher: str = "none",
        env_cfg: Mapping[str, Any] = _ENV_CFG,
        log_processor: Any = None,
        log_level: str = "INFO",
        visualizer: Any = None,
        default_scope: str = "mmengine",
        randomness: Mapping[str, Any] = _RANDOMNESS,
        experiment_name: str | None = None,
        cfg: Any = None,
    ) -> None:
        self._work_dir = os.path.abspath(work_dir)  # noqa: PTH100 -- MMEngine's attribute is a string
        Path(self._work_dir).mkdir(parents=True, exist_ok=True)
        self.cfg = copy.deepcopy(cfg) if isinstance(cfg, Config) else Config(dict(cfg or {}))
        require_complete(train_dataloader=train_dataloader, train_cfg=train_cfg, optim_wrapper=optim_wrapper)
        require_complete(val_dataloader=val_dataloader, val_cfg=val_cfg, val_evaluator=val_evaluator)
        require_complete(test_dataloader=test_dataloader, test_cfg=test_cfg, test_evaluator=test_evaluator)
        if param_scheduler is not None and optim_wrapper is None:
            raise ValueError(f"param_scheduler should be None without an optim_wrapper, but got {param_scheduler!r}")
        self._check_scheduler_cfg(param_scheduler)
        self._train_dataloader, self._train_loop = train_dataloader, train_cfg
        self._val_dataloader, self._val_loop, self._val_evaluator = val_dataloader, val_cfg, val_evaluator
        self._test_dataloader, self._test_loop, self._test_evaluator = test_dataloader, test_cfg, test_evaluator
        self.optim_wrapper, self.param_schedulers = optim_wrapper, param_scheduler
        self.auto_scale_lr = auto_scale_lr
        self._global_random_numbers = uses_global_random_numbers(self.cfg.get("stratagem"))
        self._launcher, self._distributed = launcher, launcher != "none"
        self._randomness_cfg: dict[str, Any] = {"seed": None, **randomness}
        self._load_from, self._resume, self._has_loaded = load_from, resume, False
        self._has_initialized = False
        strategy = choose_placing(
            cfg=self.cfg,
            strategy=self._strategy_cfg(),
            is_wrapped=isinstance(model, nn.Module) and is_model_wrapper(model),
            launcher=launcher,
            work_dir=self._work_dir,
            experiment_name=experiment_name or (Path(self.cfg.filename).stem if self.cfg.filename else None),
            env_cfg=env_cfg,
            randomness=self._randomness_cfg,
            log_level=log_level,
        )
        source = ResumeSource(load_from, resume, resume_param_scheduler=True, new_parameters=())
        self._session = RunSession(self, strategy, source)
        self._rank, self._world_size, self._timestamp = strategy.rank, strategy.world_size, strategy.timestamp
        self.set_randomness(**{**self._randomness_cfg, "seed": strategy.seed})
        # Runs that start in the same second must not share their message hubs, loggers and visualizers.
        self._experiment_name, self._log_dir = MessageHub.unused_name(strategy.experiment_name), strategy.log_dir
        self.default_scope = (
            None
            if default_scope is None
            else DefaultScope.get_instance(self._experiment_name, scope_name=default_scope)
        )
        self.log_processor = self.build_log_processor({} if log_processor is None else log_processor)
        self.logger = self.build_logger(log_level=log_level)
        self._log_env(env_cfg)
        self.message_hub = self.build_message_hub()
        self.visualizer = self.build_visualizer(visualizer)
        if len(self.cfg):
            self.visualizer.add_config(self.cfg)
        if isinstance(model, Mapping) and data_preprocessor is not None:
            model = {"data_preprocessor": data_preprocessor, **model}
        self.model = self.wrap_model(self.cfg.get("model_wrapper_cfg"), self.build_model(model))
        self._model_name = type(getattr(self.model, "module", self.model)).__name__
        self._hooks: list[Hook] = []
        self.register_hooks(default_hooks, custom_hooks)
        self.logger.info(f"Hooks will be executed in the following order:\n{self.get_hooks_info()}")
        self.dump_config()

    @classmethod
    def from_cfg(cls, cfg: Any) -> Runner:
        """Build a runner from a configuration whose top-level keys are its arguments.

        Raises:
            ConfigError: (or a subclass) if a top-level key is a misspelling of a section.
            KeyError: if ``model`` or ``work_dir`` is missing.
        """
        cfg = copy.deepcopy(cfg)
        require_accepted(cfg)
        given = {key: cfg[key] for key in _KEYS if key in cfg or key in ("model", "work_dir")}
        return cls(**given, cfg=cfg)

    @property
    def _initializes_to_evaluate(self) -> bool:
        """Whether ``init_weights`` of the model is called before a validation or test outside of a training."""
        return False

    def _strategy_cfg(self) -> Any:
        """Return the configuration of the engine's strategy, a key that MMEngine ignores."""
        return self.cfg.get("strategy")

    # ---- training and evaluation ----------------------------------------------------------------------------------

    def train(self) -> nn.Module:
        """Train from the current position to the end of the run; return the model. Collective.

        Signals (SIGINT, SIGTERM, SIGUSR1) to any rank stop all ranks after the same iteration: the run is saved as
        ``iter_N.pth``, and the signal is raised as an exception.

        Raises:
            AssertionError: if the model has no ``train_step``, or no ``val_step`` although the run validates.
            RuntimeError: if the arguments for training are missing.
            KeyboardInterrupt: after saving, if SIGINT was received.
            SystemExit: after saving, if another signal was received.
        """
        model = self._session.unwrap(self.model)
        if not hasattr(model, "train_step"):
            raise AssertionError(f"If you want to train {type(model).__name__}, implement its method train_step.")
        if self._val_loop is not None and not hasattr(model, "val_step"):
            raise AssertionError(f"If you want to validate {type(model).__name__}, implement its method val_step.")
        if self._train_loop is None:
            raise RuntimeError(
                "train_dataloader, train_cfg and optim_wrapper should not be None when train() is called. Pass them to the "
                "runner."
            )
        with self._session.training() as identify:
            self._prepare_training()
            identify()
            with self._session.recorded():
                self.train_loop.run()
            self.call_hook("after_run")
        return self.model  # type: ignore[no-any-return]

    def _prepare_training(self) -> None:
        self._train_loop = self.build_train_loop(self._train_loop)
        # If the model is sharded, its weights are initialized before, and the optimizer gets the shards. In other cases, the
        # model is already placed, unless it was replaced.
        self.model = self._session.place(self.model, initialize=self._session.shards, compile_cfg=self._compile_cfg)
        self._prepare_optim()
        if self._val_loop is not None:
            self._val_loop = self.build_val_loop(self._val_loop)
        self.call_hook("before_run")
        self._init_model_weights()
        self._change_modules()
        self._load_or_resume(training=True)
        self.optim_wrapper.initialize_count_status(self.model, self.iter, self.max_iters)

    def _prepare_optim(self) -> None:
        """Build the optimizer wrapper and the schedulers, unless they are built."""
        is_built = not isinstance(self.optim_wrapper, Mapping)
        self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
        self._session.adopt_optim(self.optim_wrapper, self.train_loop.dataloader)
        if not (is_built and self._has_loaded):
            self.scale_lr(self.optim_wrapper, self.auto_scale_lr)
        if self.param_schedulers is not None:
            self.param_schedulers = self.build_param_scheduler(self.param_schedulers)

    def _init_model_weights(self) -> None:
        """Initialize the weights, unless the strategy did it when it sharded the model. Collective."""
        self._has_initialized = True
        if not self._session.shards:
            self._session.initialize_weights()

    def _change_modules(self) -> None:
        """Apply the options ``activation_checkpointing`` and ``efficient_conv_bn_eval`` to modules of the model."""
        model = self._session.unwrap(self.model)
        for option, apply in (
            ("activation_checkpointing", turn_on_activation_checkpointing),
            ("efficient_conv_bn_eval", turn_on_efficient_conv_bn_eval),
        ):
            modules = self.cfg.get(option)
            if modules is not None:
                self.logger.info(f"{option} for the modules {modules}")
                apply(model, modules)

    def val(self) -> dict[str, Any]:
        """Validate the model; return the metrics. Collective.

        Raises:
            RuntimeError: if the arguments for validation are missing.
        """
        if self._val_loop is None:
            raise RuntimeError(
                "val_dataloader, val_cfg and val_evaluator should not be None when val() is called. Pass them to the runner."
            )
        self._val_loop = self.build_val_loop(self._val_loop)
        return self._evaluate(self._val_loop)

    def test(self) -> dict[str, Any]:
        """Test the model; return the metrics. Collective.

        Raises:
            RuntimeError: if the arguments for testing are missing.
        """
        if self._test_loop is None:
            raise RuntimeError(
                "test_dataloader, test_cfg and test_evaluator should not be None when test() is called. Pass them to the runner."
            )
        self._test_loop = self.build_test_loop(self._test_loop)
        return self._evaluate(self._test_loop)

    def _evaluate(self, loop: BaseLoop) -> dict[str, Any]:
        with self._session.evaluating():
            initialize = self._initializes_to_evaluate and not (self._has_loaded or self._has_initialized)
            if self._session.shards:
                self.model = self._session.place(self.model, initialize=initialize, compile_cfg=self._compile_cfg)
            self.call_hook("before_run")
            if initialize:
                self._init_model_weights()
            self._load_or_resume(training=False)
            metrics: dict[str, Any] = loop.run()
            self.call_hook("after_run")
        return metrics

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def load_or_resume(self) -> None:
        """Load or resume the configured checkpoint, unless one was loaded. Collective."""
        training = self._train_loop is not None
        if training and self._resume and not self._has_loaded:
            self._prepare_to_resume()
        self._load_or_resume(training=training and self._session.has_optim)

    def _load_or_resume(self, *, training: bool) -> None:
        if self._has_loaded:
            return
        is_averaging = isinstance(self._session.unwrap(self.model), BaseTTAModel)
        if is_averaging and self._load_from is not None and not self._session.shards:
            # The checkpoint contains the weights of the model inside, without the prefix of the wrapper.
            self.load_checkpoint(self._load_from)
            return
        self._has_loaded = self._session.load_or_resume(training=training)

    def _prepare_to_resume(self) -> None:
        if not self._session.has_optim:
            self.model = self._session.place(self.model, initialize=self._session.shards, compile_cfg=self._compile_cfg)
            self._prepare_optim()

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: Any = "default",
    ) -> None:
        """Resume the training from a checkpoint. Collective.

        Args:
            filename: the path, or the name with a scheme.
            resume_optimizer: whether to restore the optimizer.
            resume_param_scheduler: whether to restore the parameter schedulers.
            map_location: the device of the tensors that are read.

        Raises:
            CheckpointError: (or a subclass) if the checkpoint is missing, damaged or does not match the model.
        """
        self._prepare_to_resume()
        if resume_param_scheduler and self.param_schedulers is None:
            self.logger.warning(
                "resume_param_scheduler=True has no effect, because the run has no parameter schedulers."
            )
        self._session.resume(
            filename,
            resume_optimizer=resume_optimizer,
            resume_param_scheduler=resume_param_scheduler,
            map_location=map_location,
        )
        self._has_loaded = True

    def adopt_seed(self, seed: int) -> None:
        """Continue with the seed of a checkpoint, on which the order of the data depends."""
        if self._randomness_cfg.get("seed") is not None:
            self.logger.warning(
                f"The checkpoint was saved with the seed {seed}, and this run was started with {self._seed}. Using that of the "
                "checkpoint."
            )
        self._randomness_cfg["seed"] = seed
        self._seed = seed + (self.rank if self._randomness_cfg.get("diff_rank_seed") else 0)
        change_seed(self.train_loop.dataloader, seed)

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = "cpu",
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r"^module\.", ""),),
    ) -> Any:
        """Load the weights of a checkpoint, and return the checkpoint. Collective if the model is sharded.

        Args:
            filename: the path, or the name with a scheme.
            map_location: the device of the tensors that are read.
            strict: whether a difference between the keys is an error.
            revise_keys: pairs (regular expression, replacement) that are applied to the names in the checkpoint.

        Raises:
            RuntimeError: with ``strict``, if the weights do not match.
        """
        if self._session.shards:
            self.model = self._session.place(self.model, initialize=False, compile_cfg=self._compile_cfg)
            checkpoint = self._session.load_weights(filename, strict=strict, revise_keys=revise_keys)
        else:
            checkpoint = _load_checkpoint(filename, map_location=map_location)
            self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
            model = self._session.unwrap(self.model)
            checkpoint = _load_checkpoint_to_model(model, checkpoint, strict, revise_keys=revise_keys)
        self._has_loaded = True
        self.logger.info(f"Load checkpoint from {filename}")
        return checkpoint

    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: Mapping[str, Any] | None = None,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: dict[str, Any] | None = None,
        by_epoch: bool = True,
        backend_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a checkpoint atomically, in the layout of MMEngine.

        Calls by a :class:`CheckpointHook` whose methods are not overridden, and all calls if the model is sharded, are
        collective. In other cases, rank 0 saves without the other ranks, as in MMEngine, so that user code may call this method
        on rank 0 only or on all ranks; the checkpoint then lacks the random states of the other ranks.

        Args:
            out_dir: the folder or URL.
            filename: the name of the file.
            file_client_args: deprecated: the arguments of a ``FileClient``.
            save_optimizer: whether to save the optimizer.
            save_param_scheduler: whether to save the parameter schedulers.
            meta: further entries of ``meta``; ``epoch`` and ``iter`` replace the position of the run.
            by_epoch: whether this is called at the end of an epoch, rather than of an iteration.
            backend_args: the arguments of the file backend.

        Raises:
            TypeError: if ``meta`` is neither a dict nor None.
            CheckpointError: if the file cannot be written, or if the model is sharded and not all ranks call this method.
        """
        if meta is not None and not isinstance(meta, Mapping):
            raise TypeError(f"meta must be a dict or None, got {type(meta).__name__}.")
        position = {"epoch": self.epoch + by_epoch, "iter": self.iter + (not by_epoch)}
        if file_client_args is not None:
            warnings.warn("file_client_args is deprecated. Use backend_args.", DeprecationWarning, stacklevel=2)
            if backend_args is not None:
                raise ValueError("file_client_args and backend_args cannot both be set.")
            path = FileClient.infer_client(file_client_args, out_dir).join_path(out_dir, filename)
        else:
            path = join_path(out_dir, filename, backend_args=backend_args)
        if save_param_scheduler and self.param_schedulers is None:
            self.logger.warning("save_param_scheduler=True has no effect, because the run has no parameter schedulers.")
        arguments: dict[str, Any] = {"save_optimizer": save_optimizer, "save_param_scheduler": save_param_scheduler}
        meta = {**position, **(meta or {})}
        session = self._session
        if self.world_size > 1 and not is_called_on_all_ranks(session.active_method):
            if not session.shards:
                session.save_on_rank0(path, meta, **arguments)
                return
            require_all_ranks(path)
        # CheckpointHook updates the pointer, except for the best checkpoints, with which a run cannot resume.
        session.save(path, meta, update_pointer=False, **arguments)

    def checkpoint_meta(self) -> dict[str, Any]:
        """Return the entries of ``meta`` that MMEngine's checkpoints have."""
        meta = {
            "cfg": self.cfg.pretty_text,
            "experiment_name": self.experiment_name,
            "time": time.strftime("%Y%m%d_%H%M%S", time.localtime()),
            "mmengine_version": __version__,
        }
        loop = self.train_loop_or_none
        metainfo = getattr(getattr(getattr(loop, "dataloader", None), "dataset", None), "metainfo", None)
        return meta if metainfo is None else {**meta, "dataset_meta": metainfo}

    def dump_config(self) -> None:
        """Write the configuration to the work directory, on rank 0; the file from which it was read is not replaced."""
        if self.rank != 0:
            return
        source = None if self.cfg.filename is None else Path(self.cfg.filename)
        path = Path(self.work_dir) / (f"{self.timestamp}.py" if source is None else source.name)
        if source is None or not (path.exists() and source.exists() and path.samefile(source)):
            self.cfg.dump(str(path))
