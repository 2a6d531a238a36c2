"""The runner: connects the components of a run and is the only module that imports all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import torch
from torch import nn
from torch.utils.data import DataLoader

from stratagem.checkpoint import find_best_checkpoint, find_latest_checkpoint
from stratagem.config import Config, show
from stratagem.config.redact import redacted
from stratagem.config.text import text_of
from stratagem.config_schema import require_valid
from stratagem.data import BatchLimits, EpochLoader, build_dataloader, in_dataset_order, report_dead_workers
from stratagem.errors import ConfigValueError, StateError
from stratagem.optim import AmpOptimWrapper, OptimSpec, SchedulerSpec
from stratagem.registry import switch_scope
from stratagem.report.automatic import reporting, require_report
from stratagem.storage import write_record
from stratagem.strategies import BaseStrategy
from stratagem.strategies.base import require_readable_path
from stratagem.strategies.choice import choose_strategy
from stratagem.strategies.setup.building import parse_compile, require_optimizer, with_preprocessor
from stratagem.strategies.setup.same_config_check import require_one_config
from stratagem.train import (
    BaseMetric,
    EMAHook,
    EpochBasedTrainLoop,
    Evaluator,
    Hook,
    IterBasedTrainLoop,
    Run,
    TestLoop,
    ValLoop,
)
from stratagem.train.building import (
    build_evaluation_loop,
    build_events,
    build_train_loop,
    require_complete_phase,
    require_limited_data,
    require_monitored_sets,
)
from stratagem.train.evaluation.sets import named_loaders
from stratagem.train.goodput.session import identify_session, measured_session
from stratagem.train.prediction.files import require_prediction_file
from stratagem.train.prediction.predict import predict_to_file, predict_to_list
from stratagem.train.resume.preemption import require_requeue, save_interrupted
from stratagem.train.resume.rollback import RollBackError, roll_back
from stratagem.train.resume.session_record import is_complete, session_record
from stratagem.train.resume.source import ResumeSource, restore_data_position
from stratagem.train.resume.tracked_sessions import tracked_session
from stratagem.train.run.closing import closing_rows, closing_summary, trained_length
from stratagem.train.tools.dry_run import DryRun, dry_run
from stratagem.train.trackers.building import TrackerSpec, build_trackers
from stratagem.train.trackers.tracking import Tracking
from stratagem.utils import absolute
from stratagem.utils.secrets.values import allow_in_texts

__all__ = ["Runner", "runner_arguments"]

# The sections of a configuration that are arguments of the runner; config_schema.py lists the other top-level keys.
_ARGUMENTS = (
    "model", "work_dir", "experiment_name", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg",
    "val_dataloader", "val_evaluator", "val_cfg", "test_dataloader", "test_evaluator", "test_cfg", "strategy",
    "auto_scale_lr", "default_hooks", "custom_hooks", "trackers", "data_preprocessor", "load_from", "resume",
    "resume_optimizer", "resume_param_scheduler", "new_parameters", "launcher", "env_cfg", "log_level", "randomness",
    "compile", "default_scope", "requeue", "report", "limit_train_batches", "limit_val_batches", "limit_test_batches",
    "overfit_batches", "predict_dataloader",
)  # fmt: skip

# What to do if only validation data is specified.
_VALIDATION_HINT = (
    " To use the validation data: test_dataloader, test_cfg, test_evaluator = val_dataloader, val_cfg, val_evaluator."
)
_DATA_NAMES = {"train": "Training", "val": "Validation", "test": "Test", "predict": "Prediction"}

# For validation and testing, a mapping may also contain the dataloaders of several sets by name.
DataLoaderSpec = DataLoader[Any] | Mapping[str, Any]
EvaluatorSpec = Evaluator | BaseMetric | Mapping[str, Any] | Sequence[BaseMetric | Mapping[str, Any]]
TrainLoop = EpochBasedTrainLoop | IterBasedTrainLoop

Third = TypeVar("Third")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Phase(Generic[Third]):
    """The three arguments that training, validation or testing requires. Either all or none of them must be given.

    Attributes:
        mode: ``"train"``, ``"val"`` or ``"test"``.
        dataloader: the data, or its configuration.
        cfg: the arguments of the loop.
        third: the optimizer wrapper for training, or the evaluator for validation and testing.
        third_name: the name of the third argument.

    Raises:
        ConfigValueError: if only some of the arguments are given.
    """

    mode: str
    dataloader: DataLoaderSpec | None
    cfg: Mapping[str, Any] | None
    third: Third | None
    third_name: str

    def __post_init__(self) -> None:
        require_complete_phase(
            **{f"{self.mode}_dataloader": self.dataloader, f"{self.mode}_cfg": self.cfg, self.third_name: self.third}
        )

    def required(self, what: str) -> tuple[DataLoaderSpec, Mapping[str, Any], Third]:
        """Return the three arguments.

        Raises:
            StateError: if they were not given.
        """
        if self.dataloader is None or self.cfg is None or self.third is None:
            raise StateError(
                f"{what} requires {self.mode}_dataloader, {self.mode}_cfg and {self.third_name}, which were not "
                f"specified.{_VALIDATION_HINT if self.mode == 'test' else ''}"
            )
        return self.dataloader, self.cfg, self.third


@final
class Runner:
    """Train, validate and test a model as specified by a configuration.

    Args:
        model: a module or its configuration.
        work_dir: the folder of the run; ``work_dirs`` by default.
        experiment_name: the name of the run; by default, the name of the configuration file.
        train_dataloader: a ``DataLoader`` or its configuration.
        optim_wrapper: an optimizer wrapper, an optimizer, or a configuration of one.
        param_scheduler: parameter schedulers or their configurations.
        train_cfg: ``by_epoch``, ``max_epochs``, ``max_iters`` or ``max_steps``, ``val_interval`` ..., or a loop's configuration.
        val_dataloader: as ``train_dataloader``, for validation; or a mapping from the names of several validation sets to their
            dataloaders. The names of metrics are then ``<set>/<metric>``.
        val_evaluator: metrics, their configurations, or an evaluator; or a mapping from the names of the sets to them.
        val_cfg: the arguments of the validation loop; may be empty.
        test_dataloader: as ``val_dataloader``, for testing.
        test_evaluator: as ``val_evaluator``, for testing.
        test_cfg: the arguments of the test loop; may be empty.
        predict_dataloader: the data for :meth:`predict`: a ``DataLoader`` or its configuration; by default ``test_dataloader``.
        strategy: a strategy, its configuration or its name, which may be short, such as ``"ddp"`` or ``"fsdp"``; by default a
            single device, or DDP if a launcher started the process.
        auto_scale_lr: see :class:`~stratagem.strategies.BaseStrategy`.
        default_hooks: a mapping from the names of default hooks to changed options; None removes a hook.
        custom_hooks: additional hooks or their configurations.
        trackers: experiment trackers, their names ("csv", "tensorboard", "wandb", "mlflow", "trackio") or configurations.
        data_preprocessor: added to the model's configuration if it has none.
        load_from: a checkpoint whose weights are loaded, or which is resumed if ``resume`` is True.
        resume: False, a path, or True to resume from ``load_from`` or from the latest checkpoint under ``work_dir``.
        resume_optimizer: whether a resumed run continues the optimizer state of the checkpoint. Set it to False in the
            session that changes the optimizer.
        resume_param_scheduler: whether a resumed run uses the schedules and optimizer options (learning rate, weight decay
            ...) of the checkpoint; if False, it uses the configured ones.
        new_parameters: regular expressions; parameters and buffers whose full names match one of them may be missing from
            the checkpoint that is resumed. They keep their initial values.
        launcher: the launcher that started the processes; detected by default.
        env_cfg: ``cudnn_benchmark``, ``cudnn_allow_tf32``, ``float32_matmul_precision``, ``mp_cfg``, ``dist_cfg``,
            ``resource_limit``.
        log_level: the logging level; ``"INFO"`` by default.
        randomness: ``seed``, ``diff_rank_seed``, ``deterministic``.
        compile: True, or the arguments of ``torch.compile`` and ``target``, the method of the model to compile.
        default_scope: the registry scope in which names are looked up first.
        requeue: whether a run that is stopped by SIGUSR1 requeues its SLURM job, to be resumed later.
        report: whether to write ``<work_dir>/report.html`` at the end of each training session.
        limit_train_batches: the number of training batches of an epoch on each rank (an integer), or their fraction (a float).
        limit_val_batches: the same for each validation set.
        limit_test_batches: the same for each test set.
        overfit_batches: train and validate on this number of training batches, in every epoch in the same order; for debugging.
        cfg: the whole configuration, which is stored with the run.

    Raises:
        ConfigError: (or a subclass) if the arguments are invalid or inconsistent.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Any],
        work_dir: str | os.PathLike[str] | None = None,
        *,
        experiment_name: str | None = None,
        train_dataloader: DataLoaderSpec | None = None,
        optim_wrapper: OptimSpec | None = None,
        param_scheduler: SchedulerSpec | None = None,
        train_cfg: Mapping[str, Any] | None = None,
        val_dataloader: DataLoaderSpec | None = None,
        val_evaluator: EvaluatorSpec | None = None,
        val_cfg: Mapping[str, Any] | None = None,
        test_dataloader: DataLoaderSpec | None = None,
        test_evaluator: EvaluatorSpec | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        predict_dataloader: DataLoaderSpec | None = None,
        strategy: BaseStrategy | Mapping[str, Any] | str | None = None,
        auto_scale_lr: Mapping[str, Any] | None = None,
        default_hooks: Mapping[str, Any] | None = None,
        custom_hooks: Sequence[Hook | Mapping[str, Any]] | None = None,
        trackers: Sequence[TrackerSpec] | None = None,
        data_preprocessor: nn.Module | Mapping[str, Any] | None = None,
        load_from: str | os.PathLike[str] | None = None,
        resume: bool | str | os.PathLike[str] = False,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        new_parameters: Sequence[str] = (),
        launcher: str | None = None,
        env_cfg: Mapping[str, Any] | None = None,
        log_level: str | int | None = None,
        randomness: Mapping[str, Any] | None = None,
        compile: bool | Mapping[str, Any] = False,  # noqa: A002 -- the name that configurations use
        default_scope: str | None = None,
        requeue: bool = False,
        report: bool = True,
        limit_train_batches: float | None = None,
        limit_val_batches: float | None = None,
        limit_test_batches: float | None = None,
        overfit_batches: int | None = None,
        cfg: Config | Mapping[str, Any] | None = None,
    ) -> None:
        given = locals()
        self._arguments = {name: given[name] for name in (*_ARGUMENTS, "cfg")}
        self._train: _Phase[OptimSpec] = _Phase(
            mode="train", dataloader=train_dataloader, cfg=train_cfg, third=optim_wrapper, third_name="optim_wrapper"
        )
        self._val: _Phase[EvaluatorSpec] = _Phase(
            mode="val", dataloader=val_dataloader, cfg=val_cfg, third=val_evaluator, third_name="val_evaluator"
        )
        self._test: _Phase[EvaluatorSpec] = _Phase(
            mode="test", dataloader=test_dataloader, cfg=test_cfg, third=test_evaluator, third_name="test_evaluator"
        )
        self._limits = BatchLimits(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            overfit_batches=overfit_batches,
        )
        require_limited_data(
            self._limits,
            train_dataloader=train_dataloader,
            val_dataloader=val_dataloader,
            test_dataloader=test_dataloader,
        )
        self._predict_data = predict_dataloader
        require_optimizer(param_scheduler, optim_wrapper)
        parse_compile(compile)
        if work_dir is not None:
            require_readable_path(work_dir)
        for name in (work_dir, experiment_name):
            # These values are part of folder names and logs, so they are never masked, even if they come from an
            # environment variable.
            if name is not None:
                allow_in_texts(os.fspath(name))
        self._resume_source = ResumeSource(
            load_from,
            resume,
            resume_optimizer=resume_optimizer,
            resume_param_scheduler=resume_param_scheduler,
            new_parameters=new_parameters,
        )
        self.cfg = cfg if isinstance(cfg, Config) else Config(cfg or {})
        self._model = with_preprocessor(model, data_preprocessor)
        self._param_scheduler = param_scheduler
        self._compile = compile
        self._scope = default_scope
        self._described: dict[str, str] = {}
        self._requeue = require_requeue(requeue)
        self._report = require_report(report)
        with switch_scope(default_scope):
            events = build_events(default_hooks, custom_hooks)
            built_trackers = build_trackers(trackers)
            self.strategy = choose_strategy(
                strategy,
                launcher=launcher,
                work_dir=work_dir,
                experiment_name=experiment_name,
                default_name=Path(self.cfg.filename).stem if self.cfg.filename else None,
                env_cfg=env_cfg,
                randomness=randomness,
                auto_scale_lr=auto_scale_lr,
                log_level=log_level,
            )
        self.run = Run(self.strategy, events, config_text=self._config_text() if len(self.cfg) else None)
        self.run.tracking = Tracking(self.strategy.logger, built_trackers, redacted(self.cfg.to_dict()))

    @classmethod
    def from_cfg(cls, cfg: Config | Mapping[str, Any]) -> Runner:
        """Build a runner from a configuration whose top-level keys are its arguments; the key ``vars`` may contain anything.

        The configuration is checked before anything is built, see :func:`~stratagem.config_schema.check_run`.

        Raises:
            ConfigKeyError: if a key or an argument is unused, a ``type`` is unknown, there is no model, or there are several
                problems. The message lists all of them.
            StratagemError: of another class, if the only problem is an invalid value.
        """
        config = cfg if isinstance(cfg, Config) else Config(cfg)
        require_valid(config)
        return cls(**runner_arguments(config))

    def dry_run(self) -> DryRun:
        """Try all parts of this run for a few iterations in a temporary folder; return what was tried. Collective.

        Two complete accumulation windows, a validation and a test on two batches, the saves, and loading the last checkpoint in a
        new run are tried with the strategy and the processes of this run. Models, optimizers and hooks are copied, so this run
        does not change, and trackers are not started.

        Raises:
            ConfigValueError: if the strategy was passed as an object, or there is nothing to train.
            Exception: if a part of the run fails; a note names the part.
        """
        return dry_run(type(self), self._arguments)

    @property
    def interrupted(self) -> int | None:
        """The number of the signal that stopped the last call to ``train()`` early; None if no signal stopped it."""
        return self.run.interrupt.received

    def latest_checkpoint(self) -> Path | None:
        """Return the checkpoint that this run saved last, or the latest in its folder; None if there is none."""
        return self.run.last_checkpoint or find_latest_checkpoint(self.strategy.work_dir)

    def best_checkpoint(self, metric: str | None = None) -> Path | None:
        """Return the checkpoint of this run with the best value of a metric in ``save_best``; None if there is none.

        Args:
            metric: the name of the metric; it can be omitted if ``save_best`` has only one.

        Raises:
            ConfigValueError: if ``metric`` is None although there are several, or has no checkpoint.
        """
        run_id = self.run.id if self.run.iter else None
        return find_best_checkpoint(self.strategy.work_dir, metric, run_id=run_id)

    def summary(self) -> str:
        """Return the results of the training as text: its length, the last metrics, the checkpoints, and where the logs are."""
        return closing_summary(f"Trained {trained_length(self.run)}.", closing_rows(self.run))

    def prepare(self) -> TrainLoop:
        """Build everything for training and resume if configured, without training; return the loop. Collective.

        Raises:
            StateError: if the arguments for training are missing.
        """
        _, train_cfg, optim_spec = self._train.required("Training")
        run, strategy = self.run, self.strategy
        with switch_scope(self._scope):
            val_loop = None if self._val.cfg is None else self._evaluation_loop(self._val)
            loader = self._training_data()
            _require_samples(loader, strategy.dp_size)
            optim_wrapper = strategy.complete_optim_wrapper(optim_spec)
            loop: TrainLoop = build_train_loop(train_cfg, run, loader, val_loop, optim_wrapper=optim_wrapper)
            strategy.prepare(
                self._model,
                optim_wrapper=optim_spec,
                param_scheduler=self._param_scheduler,
                compile=self._compile,
                dispatch_kwargs={
                    "epoch_length": run.progress.epoch_length,
                    "max_epochs": run.progress.max_epochs,
                    "max_iters": run.progress.max_iters,
                    "train_micro_batch_size_per_gpu": loader.batch_size,
                },
            )
            names = None if val_loop is None else list(named_loaders(self._val.dataloader, "val_dataloader") or ())
            require_monitored_sets(run.events.hooks, strategy.param_schedulers_or_none, names)
            seed = strategy.seed
            rest = self._resume_source.restore(run, self._config_text(), training=True)
            if strategy.seed != seed:
                # The data order depends on the seed, and the checkpoint was saved with a different seed.
                loop.dataloader = loader = self._loader(self._train)
            run.train_data = loader
            if rest is not None:
                restore_data_position(run, rest, loader)
        return loop

    def train(self) -> nn.Module:
        """Train from the current position to the end of the run; return the model. Collective.

        A signal to any rank stops all ranks after the same iteration. The run is saved, the hooks are called as at the
        end of a run, and the signal is raised as an exception, which also stops a program with several runs.

        Raises:
            KeyboardInterrupt: after saving, if SIGINT (Ctrl-C) was received; immediately on a second signal.
            SystemExit: after saving, if SIGTERM (code 143) or SIGUSR1 (code 138) was received.
            LaunchError: if ranks have read different configurations.
            StateError: if the arguments for training are missing.
        """
        self._require_one_config()
        run = self.run
        folder = Path(run.work_dir)
        with (
            run.releasing_files(),
            run.guard.monitored(),
            # Torch may report a dead worker at any point in the main thread, even while the run is recorded or its folder
            # unlocked.
            report_dead_workers(),
            run.interrupt.listening(),
            run.work_dir_locks.holding(folder),
            reporting(run, enabled=self._report),
            # The goodput, which is logged when the inner context exits, is tracked as well.
            tracked_session(run),
            measured_session(run) as times,
            run.checkpoint_writer.flushing(),
        ):
            run.save_counter.begin_session()
            loop = self.prepare()
            identify_session(run, times, resumes=self._resume_source.resumes)
            # Write the configuration only now: a run that cannot start must not replace the configuration of an earlier
            # run.
            self._keep_config()
            run.events.call("before_run", run)
            if is_complete(run):
                run.logger.info("The run is already complete after %d iterations.", run.iter)
            run.progress.stop_training = False
            begin = run.iter
            with session_record(run, self._resume_source.changes):
                if not run.interrupt.due_now():
                    with report_dead_workers():
                        self._train_to_the_end(loop)
                if self.interrupted is not None and run.saves_if_interrupted:
                    save_interrupted(run, begin, requeue=self._requeue)
            run.events.call("after_run", run)
        run.interrupt.raise_heard()
        return self.strategy.model

    def _train_to_the_end(self, loop: TrainLoop) -> None:
        run = self.run
        run.clock.end_start_up(measured=isinstance(loop, EpochBasedTrainLoop | IterBasedTrainLoop))
        while True:
            try:
                loop.run()
            except RollBackError as request:
                run.logger.warning(request)
                run.clock.mark("discarded", run.iter)
                roll_back(run, request)
                run.clock.mark("rolled back", run.iter)
                # Hooks restore their state from the checkpoint in before_run.
                run.events.call("before_run", run)
            else:
                return

    def val(self) -> dict[str, Any]:
        """Evaluate the model on the validation data; return the metrics. Collective."""
        with self.run.releasing_files(), self.run.guard.monitored():
            return self._evaluate(self._val)

    def test(self, *, strict: bool = False) -> dict[str, Any]:
        """Evaluate the model on the test data; return the metrics. Collective.

        Args:
            strict: whether the weights in ``load_from`` must match the model's weights exactly.
        """
        with self.run.releasing_files(), self.run.guard.monitored():
            return self._evaluate(self._test, strict=strict)

    def predict(
        self,
        dataloader: DataLoaderSpec | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        strict: bool = False,
    ) -> list[Any] | None:
        """Return the results of the model for all samples in the order of the data. Collective.

        The model runs ``predict_step(batch)`` if it has this method, and ``test_step(batch)`` otherwise, in evaluation mode with
        the weights and the precision of a test. Each sample is predicted once, under any strategy and for any number of samples.
        The state of the run does not change.

        A tensor or array in the output for a batch must have one row for each sample, and a list one item. Mappings and tuples
        may contain them. The result of a sample has the same structure, with tensors on the CPU.

        Args:
            dataloader: a ``DataLoader`` or its configuration; by default ``predict_dataloader``, or else ``test_dataloader``.
                It is read without shuffling, unless it has its own sampler.
            out: a file to which rank 0 writes the results instead of returning them: ``.jsonl``, ``.csv``, ``.npz`` or ``.pt``.
                The other ranks write their results to temporary files in its folder.
            strict: whether the weights in ``load_from`` must match the model's weights exactly.

        Returns:
            The results on rank 0, and None on the other ranks or if they are written to a file.

        Raises:
            ConfigValueError: if there is no data, it has several sets, or the format of the file is unknown.
            TrainingError: if an output does not have one part for each sample, or does not fit the format.
        """
        path = None if out is None else absolute(out)
        if path is not None:
            require_prediction_file(path)
        spec, mode = self._data_to_predict(dataloader)
        with self.run.releasing_files(), self.run.guard.monitored():
            self._require_one_config()
            with switch_scope(self._scope):
                loader = self._build_loader(spec, mode)
                self._prepare_evaluation(strict=strict)
            fp16 = (self._test.cfg or {}).get("fp16")
            with report_dead_workers():
                if path is None:
                    results = predict_to_list(self.run, loader, fp16=fp16)
                else:
                    results, count = None, predict_to_file(self.run, loader, path, fp16=fp16)
                    self.strategy.logger.info("Wrote the results of %d samples to %s", count, path)
            self.run.events.call("after_run", self.run)
        return results

    def _data_to_predict(self, dataloader: DataLoaderSpec | None) -> tuple[DataLoaderSpec, str]:
        """Return the data for a prediction, which is read in order, and its mode for the log and the limits."""
        given = dataloader if dataloader is not None else self._predict_data
        spec, mode = (given, "predict") if given is not None else (self._test.dataloader, "test")
        if spec is None:
            raise ConfigValueError(
                "There is no data to predict. Pass a dataloader, or add predict_dataloader or test_dataloader to the "
                "configuration."
            )
        named = named_loaders(spec, f"{mode}_dataloader")
        if named is not None:
            raise ConfigValueError(
                f"{mode}_dataloader has the sets {', '.join(named)}, but a prediction has a single order of samples. Specify one "
                "of them: pass it to predict(), or set predict_dataloader."
            )
        return in_dataset_order(spec, every_sample=True), mode

    def close(self) -> None:
        """Close files, and destroy the process group if the strategy created it. Idempotent."""
        self.run.close()
        self.strategy.close()

    def _evaluate(self, phase: _Phase[EvaluatorSpec], *, strict: bool = False) -> dict[str, Any]:
        phase.required("Evaluation")
        self._require_one_config()
        with switch_scope(self._scope):
            loop = self._evaluation_loop(phase)
            self._prepare_evaluation(strict=strict)
        with report_dead_workers():
            metrics: dict[str, Any] = loop.run()
        self.run.events.call("after_run", self.run)
        return metrics

    def _prepare_evaluation(self, *, strict: bool) -> None:
        """Prepare the model, load its weights, and call the hooks at the start of a run. Collective."""
        self.strategy.prepare(self._model, compile=self._compile)
        self._resume_source.restore(self.run, self._config_text(), training=False, strict=strict)
        saved = self._resume_source.meta
        self.run.saved_autocast = saved["autocast"] if "autocast" in saved else _configured_autocast(self._train.third)
        if self._resume_source.has_average and not any(isinstance(hook, EMAHook) for hook in self.run.events.hooks):
            self.strategy.logger.warning(
                "The checkpoint contains averaged weights, which the saved run used for evaluation. This evaluation uses the "
                "trained weights, because there is no EMAHook. To use the averaged weights, add EMAHook to custom_hooks."
            )
        self.run.events.call("before_run", self.run)

    def _training_data(self) -> EpochLoader:
        """Return the training loader, which keeps its position if it was used before."""
        if self.run.train_data is not None:
            return self.run.train_data
        loader = self._loader(self._train)
        if self._limits.overfit_batches is not None:
            self.strategy.logger.warning(
                "overfit_batches=%d: every epoch trains on the same batches in the same order, and validations use these batches "
                "as well. This is for debugging: the metrics do not show how the model generalizes.",
                self._limits.overfit_batches,
            )
        if loader.resume_warning is not None:
            self.strategy.logger.warning("%s", loader.resume_warning)
        if loader.resume_note is not None:
            self.strategy.logger.info("%s", loader.resume_note)
        return loader

    def _loader(self, phase: _Phase[Any]) -> EpochLoader:
        return self._build_loader(phase.required(_DATA_NAMES[phase.mode])[0], phase.mode)

    def _build_loader(self, spec: DataLoaderSpec, mode: str, name: str | None = None) -> EpochLoader:
        loader = build_dataloader(
            spec,
            seed=self.strategy.seed,
            rank=self.strategy.dp_rank,
            world_size=self.strategy.dp_size,
            training=mode == "train",
            device=self.strategy.world.device,
            limit=None if mode == "predict" else self._limits.of(mode),
        )
        copies = loader.describe_copies(self.strategy.world.device)
        what = f"{_DATA_NAMES[mode]} data" if name is None else f"{_DATA_NAMES[mode]} data {name!r}"
        description = f"{what}: {loader.describe()}{copies}."
        if self._described.get(what) != description:
            self.strategy.logger.info("%s", description)
            self._described[what] = description
        return loader

    def _evaluation_loop(self, phase: _Phase[EvaluatorSpec]) -> ValLoop | TestLoop:
        spec, cfg, evaluator = phase.required("Evaluation")
        if self._limits.overfit_batches is not None and phase.mode == "val":
            spec = self._train.required("overfit_batches")[0]
        named = named_loaders(spec, f"{phase.mode}_dataloader")
        loaders = (
            self._build_loader(spec, phase.mode)
            if named is None
            else {name: self._build_loader(each, phase.mode, name) for name, each in named.items()}
        )
        loop: ValLoop | TestLoop = build_evaluation_loop(cfg, phase.mode, self.run, loaders, evaluator)
        return loop

    def _keep_config(self) -> None:
        """Write the merged configuration to the work directory, on rank 0. Never overwrite the file that it was read from."""
        if self.strategy.rank != 0 or not len(self.cfg):
            return
        folder, suffix, text = Path(self.strategy.work_dir), self._config_suffix(), self._config_text()
        source = Path(self.cfg.filename) if self.cfg.filename else None
        kept = folder / f"{source.stem if source else self.strategy.timestamp}{suffix}"
        if source is not None and kept.exists() and source.exists() and kept.samefile(source):
            if kept.read_text(encoding="utf-8") == text:
                return
            # The file may contain secrets, which are masked in the stored text.
            kept = folder / f"{self.strategy.timestamp}{suffix}"
        write_record(kept, text, self.strategy.logger)

    def _require_one_config(self) -> None:
        every_value = text_of(self.cfg.to_dict(), self._config_suffix(), mark_unsupported=True) if len(self.cfg) else ""
        require_one_config(every_value, self._config_text() if len(self.cfg) else "")

    def _config_text(self) -> str:
        """Return the text of the merged configuration to store, with placeholders and with secrets masked."""
        return show(self.cfg, self._config_suffix(), mark_unsupported=True)

    def _config_suffix(self) -> str:
        """Return the suffix of the stored configuration.

        A data file is never stored as Python, because loading it would execute code.
        """
        return ".yaml" if self.cfg.is_data else ".py"


def runner_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments of the runner for a valid configuration."""
    return {**{key: config[key] for key in _ARGUMENTS if key in config}, "cfg": config}


def _configured_autocast(spec: OptimSpec | None) -> str | None:
    """Return the dtype of autocast in the configuration of an optimizer wrapper."""
    if isinstance(spec, AmpOptimWrapper):
        return str(spec.dtype).removeprefix("torch.")
    if not isinstance(spec, Mapping) or spec.get("type") not in ("AmpOptimWrapper", AmpOptimWrapper):
        return None
    dtype = spec.get("dtype")
    if dtype is None:
        accelerator = torch.accelerator.current_accelerator()
        dtype = torch.get_autocast_dtype("cpu" if accelerator is None else accelerator.type)
    return str(dtype).removeprefix("torch.")


def _require_samples(loader: EpochLoader, parts: int) -> None:
    """Require at least one sample per data-parallel rank, because ranks would otherwise repeat samples.

    Raises:
        ConfigValueError: if there are fewer samples than data-parallel ranks.
    """
    samples = len(loader.dataset) if isinstance(loader.dataset, Sized) else parts
    if samples < parts:
        raise ConfigValueError(
            f"The training data has {samples} samples for {parts} data-parallel ranks. Start fewer processes or add data."
        )
