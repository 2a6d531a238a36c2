"""The composition root: the only place that wires everything."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from torch import nn
from torch.utils.data import DataLoader

from stratagem.checkpoint import Purpose, find_latest_checkpoint
from stratagem.config import Config, changed_values, require, show
from stratagem.data import EpochLoader, build_dataloader, naming_dead_workers
from stratagem.dist import Peer, Team, all_gather_object, infer_launcher
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, StateError
from stratagem.registry import STRATEGIES, switch_scope
from stratagem.sections import SECTIONS
from stratagem.storage import write_atomic
from stratagem.strategies import BaseStrategy
from stratagem.strategies.building import with_preprocessor
from stratagem.strategies.one_config import require_one_config
from stratagem.train import Hook, Position, Run
from stratagem.train.building import build_evaluation_loop, build_events, build_train_loop
from stratagem.train.lineage import Ending, Lineage, Start
from stratagem.train.loops import updates_of
from stratagem.train.requeue import requeue_job
from stratagem.train.restart import Launched, continue_launch
from stratagem.train.rollback import RollBackError, roll_back
from stratagem.train.run import INTERRUPTED
from stratagem.train.signals import JOB_ENDS
from stratagem.utils import mask_text

__all__ = ["Runner"]

# What of a configuration becomes the runner's arguments; sections.py says what else may stand at its top.
_ARGUMENTS = (
    "model", "work_dir", "experiment_name", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg",
    "val_dataloader", "val_evaluator", "val_cfg", "test_dataloader", "test_evaluator", "test_cfg", "strategy",
    "auto_scale_lr", "default_hooks", "custom_hooks", "data_preprocessor", "load_from", "resume",
    "resume_param_scheduler", "new_parameters", "launcher", "env_cfg", "log_level", "randomness", "compile", "default_scope",
    "requeue",
)  # fmt: skip

# What says that a run is resumed, and so is never what it was.
_RESUMING = ("resume", "load_from", "resume_param_scheduler", "new_parameters")

_TRAIN = ("train_dataloader", "train_cfg", "optim_wrapper")
_VAL = ("val_dataloader", "val_cfg", "val_evaluator")
_TEST = ("test_dataloader", "test_cfg", "test_evaluator")


@final
class Runner:
    """Trains, validates and tests what a configuration describes, under the strategy that it names.

    Args:
        model: a module or its configuration.
        work_dir: the folder of the run; ``work_dirs`` by default.
        experiment_name: the run's name; by default that of the configuration file.
        train_dataloader: a ``DataLoader`` or its configuration; likewise for validation and test.
        optim_wrapper: an optimizer wrapper, an optimizer, or its configuration.
        param_scheduler: schedules or their configurations.
        train_cfg: ``by_epoch``, ``max_epochs``, ``max_iters`` or ``max_steps``, ``val_interval`` ..., or a loop's configuration.
        val_dataloader: the data of the validation.
        val_evaluator: metrics, their configurations, or an evaluator.
        val_cfg: the arguments of the validation's loop; may be empty.
        test_dataloader: the data of the test.
        test_evaluator: metrics, their configurations, or an evaluator.
        test_cfg: the arguments of the test's loop; may be empty.
        strategy: a strategy or its configuration; by default one device, or DDP where a launcher started the process.
        auto_scale_lr: see :class:`~stratagem.strategies.BaseStrategy`.
        default_hooks: changes to the default hooks, by name; None removes one.
        custom_hooks: further hooks.
        data_preprocessor: goes into the model's configuration where that has none.
        load_from: a checkpoint whose weights are loaded, or that is resumed where ``resume`` is True.
        resume: False, True (from ``load_from`` or the latest checkpoint under ``work_dir``, if any), or a path.
        resume_param_scheduler: whether a run that is resumed keeps the checkpoint's schedules and optimizers' options
            (learning rate, weight decay ...) where these here are others; with False these here win.
        new_parameters: regular expressions; the model of a run that is resumed may have parameters and buffers whose whole
            names one of them matches and that the checkpoint lacks. They begin as they were initialised.
        launcher: what started the processes; inferred where not given.
        env_cfg: ``cudnn_benchmark``, ``mp_cfg``, ``dist_cfg``, ``resource_limit``.
        log_level: of the logger.
        randomness: ``seed``, ``diff_rank_seed``, ``deterministic``.
        compile: True, or arguments of ``torch.compile`` with ``target``, the model's method.
        default_scope: the scope in which names are looked up first.
        requeue: whether a run that SLURM's SIGUSR1 stops puts its job back into the queue, to go on later.
        cfg: the whole configuration, kept with the run.

    Raises:
        ConfigError: in one of its kinds, if the arguments do not fit together.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, Any],
        work_dir: str | os.PathLike[str] | None = None,
        *,
        experiment_name: str | None = None,
        train_dataloader: DataLoader[Any] | Mapping[str, Any] | None = None,
        optim_wrapper: Any = None,
        param_scheduler: Any = None,
        train_cfg: Mapping[str, Any] | None = None,
        val_dataloader: DataLoader[Any] | Mapping[str, Any] | None = None,
        val_evaluator: Any = None,
        val_cfg: Mapping[str, Any] | None = None,
        test_dataloader: DataLoader[Any] | Mapping[str, Any] | None = None,
        test_evaluator: Any = None,
        test_cfg: Mapping[str, Any] | None = None,
        strategy: BaseStrategy | Mapping[str, Any] | str | None = None,
        auto_scale_lr: Mapping[str, Any] | None = None,
        default_hooks: Mapping[str, Any] | None = None,
        custom_hooks: Sequence[Hook | Mapping[str, Any]] | None = None,
        data_preprocessor: nn.Module | Mapping[str, Any] | None = None,
        load_from: str | os.PathLike[str] | None = None,
        resume: bool | str | os.PathLike[str] = False,
        resume_param_scheduler: bool = True,
        new_parameters: Sequence[str] = (),
        launcher: str | None = None,
        env_cfg: Mapping[str, Any] | None = None,
        log_level: str | int = "INFO",
        randomness: Mapping[str, Any] | None = None,
        compile: bool | Mapping[str, Any] = False,  # noqa: A002 -- the name that configurations use
        default_scope: str | None = None,
        requeue: bool = False,
        cfg: Config | Mapping[str, Any] | None = None,
    ) -> None:
        self._parts: dict[str, Any] = {
            "train_dataloader": train_dataloader, "train_cfg": train_cfg, "optim_wrapper": optim_wrapper,
            "val_dataloader": val_dataloader, "val_cfg": val_cfg, "val_evaluator": val_evaluator,
            "test_dataloader": test_dataloader, "test_cfg": test_cfg, "test_evaluator": test_evaluator,
        }  # fmt: skip
        for group in (_TRAIN, _VAL, _TEST):
            self._refuse_half(group)
        if param_scheduler is not None and optim_wrapper is None:
            raise ConfigValueError("param_scheduler is given, but no optim_wrapper whose values it could schedule.")
        if not isinstance(compile, bool | Mapping):
            raise ConfigTypeError(
                f"compile is {compile!r}; True, False or a mapping of torch.compile's arguments is due."
            )
        if not isinstance(requeue, bool):
            raise ConfigTypeError(f"requeue is {requeue!r}; True or False is due.")
        if not isinstance(resume, bool) and load_from is not None:
            raise ConfigValueError(
                f"resume={os.fspath(resume)!r} and load_from={os.fspath(load_from)!r} both name a checkpoint. "
                "Give one of them."
            )
        self.cfg = cfg if isinstance(cfg, Config) else Config(cfg or {})
        self._model = with_preprocessor(model, data_preprocessor)
        self._param_scheduler = param_scheduler
        self._compile = compile
        self._load_from, self._resume = load_from, resume
        self._how_to_resume: dict[str, Any] = {
            "resume_param_scheduler": resume_param_scheduler,
            "new_parameters": _patterns(new_parameters),
        }
        self._scope = default_scope
        self._requeue = requeue
        self._changes: list[str] = []
        with switch_scope(default_scope):
            events = build_events(default_hooks, custom_hooks)
            self.strategy = _build_strategy(
                strategy,
                launcher=launcher,
                work_dir=work_dir,
                experiment_name=experiment_name or (Path(self.cfg.filename).stem if self.cfg.filename else None),
                env_cfg=env_cfg,
                randomness=randomness,
                auto_scale_lr=auto_scale_lr,
                log_level=log_level,
            )
        self.run = Run(self.strategy, events, config_text=self._config_text() if len(self.cfg) else None)

    @classmethod
    def from_cfg(cls, cfg: Config | Mapping[str, Any]) -> Runner:
        """Build a runner from a configuration, whose keys at the top are the arguments; ``vars`` holds free values.

        Before anything is built, every key and every argument of a ``type`` is checked.

        Raises:
            ConfigKeyError: if nobody would read a key or an argument, a ``type`` is unknown, or there is no model. All
                problems are listed.
        """
        config = cfg if isinstance(cfg, Config) else Config(cfg)
        require(config, SECTIONS, scope=config.get("default_scope"))
        if "model" not in config:
            raise ConfigKeyError(
                f"{config.filename or 'The configuration'} has no key 'model': there is nothing to train."
            )
        arguments = {key: config[key] for key in _ARGUMENTS if key in config}
        return cls(**arguments, cfg=config)

    @property
    def interrupted(self) -> int | None:
        """The number of the signal that stopped the training; None where none did."""
        return self.run.interrupt.received

    def latest_checkpoint(self) -> Path | None:
        """Return the checkpoint that this run saved last, or the latest under its folder; None where there is none."""
        return self.run.last_checkpoint or find_latest_checkpoint(self.strategy.work_dir)

    def prepare(self) -> Any:
        """Build what a training needs and take up where it stands, without training; return its loop. Collective.

        Raises:
            StateError: if the runner was given nothing to train with.
        """
        if self._parts["train_cfg"] is None:
            raise StateError(f"There is nothing to train with: {', '.join(_TRAIN)} are not given.")
        run, strategy = self.run, self.strategy
        with switch_scope(self._scope):
            val_loop = self._evaluation_loop("val") if self._parts["val_cfg"] is not None else None
            loader = self._training_data()
            _require_samples(loader, strategy.data_size)
            loop = build_train_loop(
                self._parts["train_cfg"], run, loader, val_loop, optim_wrapper=self._parts["optim_wrapper"]
            )
            strategy.prepare(
                self._model,
                optim_wrapper=self._parts["optim_wrapper"],
                param_scheduler=self._param_scheduler,
                compile=self._compile,
                dispatch_kwargs={
                    "epoch_length": run.progress.epoch_length,
                    "max_epochs": run.progress.max_epochs,
                    "max_iters": run.progress.max_iters,
                    "train_micro_batch_size_per_gpu": loader.batch_size,
                },
            )
            seed = strategy.seed
            rest = self._take_up(training=True)
            if strategy.seed != seed:
                # The order of the data hangs on the seed, and the checkpoint's is another.
                loop.dataloader = loader = self._loader("train")
            run.train_data = loader
            if rest is not None:
                self._go_on(rest, loader)
        return loop

    def train(self) -> nn.Module:
        """Train from where the run stands to its end, or until it is interrupted; return the model. Collective.

        Raises:
            LaunchError: if ranks have read different configurations.
            StateError: if the runner was given nothing to train with.
        """
        require_one_config(self._config_text() if len(self.cfg) else "")
        run = self.run
        folder = Path(run.work_dir)
        with run.guard.watching(), run.interrupt.listening(), run.claims.held(folder), run.saves.finished():
            loop = self.prepare()
            # Not earlier: a run that cannot begin leaves what an earlier one kept.
            self._keep_config()
            run.events.call("before_run", run)
            if self._is_complete():
                run.logger.info("The run is complete: %d iterations were trained already.", run.iter)
            run.progress.stop_training = False
            begin = run.iter
            with self._writing_lineage():
                if not run.interrupt.due_now():
                    with naming_dead_workers():
                        self._train_to_the_end(loop)
                if self.interrupted is not None:
                    self._end_interrupted(begin)
            run.events.call("after_run", run)
        return self.strategy.model

    @contextmanager
    def _writing_lineage(self) -> Iterator[None]:
        """Write down from where this start goes on, and at the end how it ended; on rank 0."""
        run, folder = self.run, Path(self.strategy.log_dir)
        start = Start(
            name=f"{Path(self.strategy.work_dir).name}/{self.strategy.timestamp}",
            epoch=run.epoch,
            iter=run.iter,
            checkpoint=mask_text(self.strategy.resumed_from) if self.strategy.resumed_from else None,
            changes=tuple(self._changes),
            strategy=type(self.strategy).__name__,
            world_size=self.strategy.world_size,
        )
        run.lineage = run.lineage.followed_by(start)
        how = "killed"
        if self.strategy.rank == 0:
            run.lineage.write(folder)
        try:
            yield
            name = None if self.interrupted is None else signal.Signals(self.interrupted).name
            how = f"stopped by {name}" if name else "complete" if self._is_complete() else "stopped early"
        except BaseException as error:
            how = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise
        finally:
            if self.strategy.rank == 0:
                run.lineage.write(folder, Ending.now(how, epoch=run.epoch, iteration=run.iter))

    def _train_to_the_end(self, loop: Any) -> None:
        run = self.run
        while True:
            try:
                loop.run()
            except RollBackError as request:
                run.logger.warning(request)
                roll_back(run, request)
                # What was just read is given to whoever takes it up when a run begins.
                run.events.call("before_run", run)
            else:
                return

    def val(self) -> dict[str, Any]:
        """Evaluate the validation data; return the metrics. Collective."""
        with self.run.guard.watching():
            return self._evaluate("val")

    def test(self, *, strict: bool = False) -> dict[str, Any]:
        """Evaluate the test data; return the metrics. Collective.

        Args:
            strict: whether the checkpoint that ``load_from`` names must have exactly the model's weights.
        """
        with self.run.guard.watching():
            return self._evaluate("test", strict=strict)

    def close(self) -> None:
        """Close files, and end the process group if the strategy made it. Idempotent."""
        self.run.close()
        self.strategy.close()

    def _evaluate(self, mode: str, *, strict: bool = False) -> dict[str, Any]:
        if self._parts[f"{mode}_cfg"] is None:
            names = _VAL if mode == "val" else _TEST
            raise StateError(f"There is nothing to evaluate with: {', '.join(names)} are not given.")
        require_one_config(self._config_text() if len(self.cfg) else "")
        with switch_scope(self._scope):
            loop = self._evaluation_loop(mode)
            self.strategy.prepare(self._model, compile=self._compile)
            self._take_up(training=False, strict=strict)
        self.run.events.call("before_run", self.run)
        with naming_dead_workers():
            metrics: dict[str, Any] = loop.run()
        self.run.events.call("after_run", self.run)
        return metrics

    def _take_up(self, *, training: bool, strict: bool = False) -> dict[str, Any] | None:
        """Load or resume as asked, once; return what a run that is resumed has saved beside the strategy's state.

        An evaluation resumes without optimizer and schedules, so a training that follows it resumes again.
        """
        load_from, resume = self._load_from, self._resume
        if training and self._is_started_again():
            load_from, resume = None, True
        if training or not resume:
            self._load_from, self._resume = None, False

        def tell(checkpoint: dict[str, Any]) -> None:
            self.run.events.call("after_load_checkpoint", self.run, checkpoint=checkpoint)

        if strict and load_from is not None and not resume:
            self.strategy.load_checkpoint(load_from, strict=True, callback=tell)
            return None
        rest = self.strategy.load_or_resume(load_from=load_from, resume=resume, callback=tell, **self._how_to_resume)
        if not resume or rest is None:
            return None
        meta = rest.get("meta") or {}
        self._changes = self._say_changes(meta)
        self.run.lineage = Lineage.of_checkpoint(meta)
        self.run.progress.move_to(Position.from_meta(meta))
        self.run.load_hooks(rest)
        self.run.adopt_id(meta)
        self.run.logger.info("Going on after epoch %d, iteration %d", self.run.epoch, self.run.iter)
        return rest

    def _is_started_again(self) -> bool:
        """Tell whether an earlier start of the same launch has saved a checkpoint. Collective."""
        launch = Launched.here(all_gather_object(Peer.of_parent()))
        folder = Path(self.strategy.work_dir)
        return Team.of().first(lambda: continue_launch(folder, launch, self.run.logger) is not None)

    def _say_changes(self, meta: Mapping[str, Any]) -> list[str]:
        """Say in the log which values of the configuration are others than those that the checkpoint was saved under."""
        saved = meta.get("cfg")
        changed = changed_values(saved, self._config_text(), ignored=_RESUMING) if isinstance(saved, str) else []
        if changed:
            self.run.logger.info("The configuration is not that of the checkpoint:\n  %s", "\n  ".join(changed))
        return changed

    def _go_on(self, rest: Mapping[str, Any], loader: EpochLoader) -> None:
        """Take up the position in the training data that was saved."""
        progress = self.run.progress
        data = rest.get("data")
        if not isinstance(data, Mapping) or not loader.positioned:
            progress.batch = self._batch_of_this_run(rest.get("meta") or {})
        if not isinstance(data, Mapping):
            return
        progress.batch = loader.go_on(progress.epoch, progress.batch, data.get("taken") or ())
        states = data.get("ranks")
        if not isinstance(states, Mapping):
            return
        world = self.strategy.world
        if len(states) != world.size:
            self.strategy.logger.warning(
                "The training data's loaders were saved by %d ranks, and this run has %d: the epoch does not go on exactly.",
                len(states), world.size,
            )  # fmt: skip
        if str(world.rank) in states:
            loader.load_state_dict(states[str(world.rank)], epoch=progress.epoch, batch=progress.batch)

    def _batch_of_this_run(self, meta: Mapping[str, Any]) -> int:
        """Return how much of the epoch the saved run had done, in the batches of this one."""
        position = Position.from_meta(meta)
        own = self.strategy.dispatch_kwargs.get("train_micro_batch_size_per_gpu")
        old = meta.get("train_micro_batch_size_per_gpu")
        if not (position.batch and own and old):
            return position.batch
        parts = meta.get("data_size", meta.get("world_size", 1))
        return position.in_batches_of(own * self.strategy.data_size, old * parts).batch

    def _is_complete(self) -> bool:
        progress = self.run.progress
        if progress.max_epochs is not None:
            return progress.epoch >= progress.max_epochs
        if progress.max_steps is not None:
            return updates_of(self.run) >= progress.max_steps
        return progress.max_iters is not None and progress.iter >= progress.max_iters

    def _end_interrupted(self, begin: int) -> None:
        """Save where the run stands, if that is not where it began, and have SLURM start it again if that was asked."""
        run = self.run
        if run.iter != begin:
            path = Path(run.work_dir) / f"iter_{run.iter}"
            run.save_checkpoint(path, run.progress.here(), purpose=Purpose(series=INTERRUPTED, number=run.iter))
            # Said only when it is true: it may be written in the background.
            run.saves.wait()
            run.logger.warning("Interrupted after %d iterations; saved checkpoint %s", run.iter, path)
        else:
            run.logger.warning("Interrupted before the first iteration of this start; nothing is to be saved.")
        if self._requeue and self.interrupted in JOB_ENDS:
            Team.of().first(lambda: requeue_job(run.logger))

    def _training_data(self) -> EpochLoader:
        """Return the loader that the run trains on, which knows where it stands if it was trained on before."""
        if self.run.train_data is not None:
            return self.run.train_data
        loader = self._loader("train")
        if loader.inexact is not None:
            self.strategy.logger.warning("%s", loader.inexact)
        return loader

    def _loader(self, mode: str) -> EpochLoader:
        return build_dataloader(
            self._parts[f"{mode}_dataloader"],
            seed=self.strategy.seed,
            rank=self.strategy.data_rank,
            world_size=self.strategy.data_size,
            training=mode == "train",
        )

    def _evaluation_loop(self, mode: str) -> Any:
        return build_evaluation_loop(
            self._parts[f"{mode}_cfg"], mode, self.run, self._loader(mode), self._parts[f"{mode}_evaluator"]
        )

    def _refuse_half(self, group: Sequence[str]) -> None:
        missing = [name for name in group if self._parts[name] is None]
        if missing and len(missing) < len(group):
            given = [name for name in group if name not in missing]
            raise ConfigValueError(f"{', '.join(given)} given, but not {', '.join(missing)}: give all of them or none.")

    def _keep_config(self) -> None:
        """Write the merged configuration into the run's folder, on rank 0."""
        if self.strategy.rank == 0 and len(self.cfg):
            name = Path(self.cfg.filename).stem if self.cfg.filename else self.strategy.timestamp
            suffix = ".yaml" if self.cfg.is_data else ".py"
            write_atomic(Path(self.strategy.work_dir) / f"{name}{suffix}", self._config_text())

    def _config_text(self) -> str:
        """Return the merged configuration; what was read as data stays data, or loading it again would run it."""
        return show(self.cfg, ".yaml" if self.cfg.is_data else ".py")


def _patterns(given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(pattern, str) for pattern in given):
        raise ConfigTypeError(f"new_parameters is {given!r}; a list of regular expressions is due.")
    for pattern in given:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigValueError(f"new_parameters: {pattern!r} is no regular expression: {error}.") from error
    return tuple(given)


def _require_samples(loader: EpochLoader, parts: int) -> None:
    """Refuse training data of which some ranks would have to repeat what others have.

    Raises:
        ConfigValueError: if there are fewer samples than ranks that see samples of their own.
    """
    samples = len(loader.dataset) if isinstance(loader.dataset, Sized) else parts
    if samples < parts:
        raise ConfigValueError(
            f"The training data has {samples} samples, and {parts} ranks are to have samples of their own. Start fewer "
            "processes."
        )


def _build_strategy(
    strategy: BaseStrategy | Mapping[str, Any] | str | None,
    *,
    launcher: str | None,
    work_dir: str | os.PathLike[str] | None,
    experiment_name: str | None,
    env_cfg: Mapping[str, Any] | None,
    randomness: Mapping[str, Any] | None,
    auto_scale_lr: Mapping[str, Any] | None,
    log_level: str | int,
) -> BaseStrategy:
    given = {
        "launcher": launcher,
        "work_dir": work_dir,
        "env_cfg": env_cfg,
        "randomness": randomness,
        "auto_scale_lr": auto_scale_lr,
    }
    if isinstance(strategy, BaseStrategy):
        ignored = [name for name, value in given.items() if value is not None]
        if ignored:
            raise ConfigValueError(
                f"The strategy is built already, so {', '.join(ignored)} would be ignored: give them to it."
            )
        return strategy
    if strategy is None:
        strategy = "SingleDeviceStrategy" if (launcher or infer_launcher()) == "none" else "DDPStrategy"
    cfg = {"type": strategy} if isinstance(strategy, str) else strategy
    defaults = {
        "work_dir": work_dir or "work_dirs",
        "experiment_name": experiment_name,
        "auto_scale_lr": auto_scale_lr,
        "env_kwargs": {"launcher": launcher, "randomness": randomness, **(env_cfg or {})},
        "log_kwargs": {"log_level": log_level},
    }
    built = STRATEGIES.build(cfg, default_args=defaults)
    if not isinstance(built, BaseStrategy):
        raise ConfigTypeError(f"strategy: {cfg.get('type')!r} made a {type(built).__name__}, which is no strategy.")
    return built
