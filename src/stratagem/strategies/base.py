"""The strategy: the one object that owns the training components of a process."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from stratagem.checkpoint import (
    DEFAULT_REVISE_KEYS,
    LoadReport,
    StateTree,
    load_state_dict,
    save_checkpoint,
    weights_to_cpu,
)
from stratagem.distributed import RankGroup, World
from stratagem.errors import (
    ConfigTypeError,
    ConfigValueError,
    StateError,
    WorkDirError,
)
from stratagem.logging import Logger, forward_library_logs
from stratagem.model import unwrap_model
from stratagem.model.weights import broadcast_weights
from stratagem.optim import build_param_schedulers
from stratagem.parallel import AnyOptim
from stratagem.strategies.prepared import Prepared
from stratagem.strategies.setup import building
from stratagem.strategies.setup.auto_scale import AutoScale
from stratagem.strategies.setup.environment import set_up_environment
from stratagem.strategies.setup.run_length import RunLength
from stratagem.strategies.state.configured_hyperparameters import schedule_differences
from stratagem.strategies.state.resuming import CheckpointCallback, Resuming, Schedulers
from stratagem.utils import absolute, collect_env, refuse_unknown

__all__ = ["BaseStrategy", "CheckpointCallback", "CheckpointWriter", "Schedulers"]

CheckpointWriter = Callable[[StateTree, str | os.PathLike[str], RankGroup], None]

_LOGGER_KEYS = tuple(inspect.signature(Logger).parameters)


class BaseStrategy(ABC):
    """Sets the environment up; builds, initialises, places, compiles, saves, loads and resumes the components.

    Derive from it, write the four abstract methods and register the class in ``STRATEGIES``; what is here serves them.

    Args:
        work_dir: the folder of the run, created where it is missing.
        experiment_name: the run's name; the timestamp is added to it.
        env_kwargs: ``launcher``, ``cudnn_benchmark``, ``mp_cfg``, ``dist_cfg``, ``resource_limit`` and ``randomness``
            (``seed``, ``diff_rank_seed``, ``deterministic``).
        log_kwargs: arguments of :meth:`build_logger`.
        auto_scale_lr: ``enable``, ``base_batch_size`` and ``rule``: learning rates are multiplied by the real batch size
            over the one they were chosen for (``"linear"``, the default), or by the square root of that (``"sqrt"``).

    Raises:
        WorkDirError: if ``work_dir`` cannot be created or written to.
        ConfigKeyError: if a key of one of the mappings is unknown.
        LaunchError: if the launcher named did not start this process.
    """

    model = Prepared[nn.Module]("Call prepare(model, ...) first.")
    optim_wrapper = Prepared[AnyOptim]("Call prepare(model, optim_wrapper=...) first.")
    param_schedulers = Prepared[Schedulers]("Call prepare(model, optim_wrapper=..., param_scheduler=...) first.")

    def __init__(
        self,
        *,
        work_dir: str | os.PathLike[str] = "work_dirs",
        experiment_name: str | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        log_kwargs: Mapping[str, Any] | None = None,
        auto_scale_lr: Mapping[str, Any] | None = None,
    ) -> None:
        self._auto_scale_lr = AutoScale.parse(auto_scale_lr)
        self._work_dir = _make_folder(absolute(work_dir))
        self._env_kwargs = dict(env_kwargs or {})
        self.dispatch_kwargs: dict[str, Any] = {}
        # The checkpoint from which load_or_resume went on.
        self.resumed_from: str | None = None
        self._env = set_up_environment(self._env_kwargs)
        with ExitStack() as undo:
            undo.callback(self._env.close)
            self._seed = self._env.world.seed
            self._experiment_name = f"{experiment_name}_{self.timestamp}" if experiment_name else self.timestamp
            self._log_dir = _make_folder(self._work_dir / self.timestamp)
            self.logger = self.build_logger(**(log_kwargs or {}))
            self._stop_forwarding = forward_library_logs(self.logger)
            undo.pop_all()
        for notice in self._env.notices:
            self.logger.info(notice)

    # ---- facts ----------------------------------------------------------------------------------------------------

    @property
    def work_dir(self) -> str:
        """The folder of the run, absolute."""
        return str(self._work_dir)

    @property
    def log_dir(self) -> str:
        """The folder of this start of the run: ``<work_dir>/<timestamp>``."""
        return str(self._log_dir)

    @property
    def experiment_name(self) -> str:
        """The run's name with the timestamp, or the timestamp alone."""
        return self._experiment_name

    @property
    def world(self) -> World:
        """What is true of this process in its run."""
        return self._env.world

    @property
    def timestamp(self) -> str:
        """When rank 0 started, in its local time, as ``YYYYmmdd_HHMMSS``; the same on every rank."""
        return self.world.timestamp

    @property
    def launcher(self) -> str:
        """What started this process: ``"pytorch"``, ``"slurm"``, ``"mpi"`` or ``"none"``."""
        return self.world.launcher

    @property
    def distributed(self) -> bool:
        """Whether a launcher started this process."""
        return self.world.distributed

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self.world.size

    @property
    def dp_rank(self) -> int:
        """The index of the part of the data that this process trains on: its rank, unless ranks share the same data."""
        return self.rank

    @property
    def dp_size(self) -> int:
        """The number of parts that the data is split into."""
        return self.world_size

    @property
    def dp_group(self) -> ProcessGroup | None:
        """The ranks that together process all data; None for all ranks."""
        return None

    @property
    def collective_forward(self) -> bool:
        """Whether the forward pass is collective, so that all ranks must make as many, also in an evaluation."""
        return False

    @property
    def params_are_master_weights(self) -> bool:
        """Whether the model's parameters hold the full-precision weights between steps, so that they can be averaged."""
        return True

    @property
    def params_accept_writes(self) -> bool:
        """Whether training continues from values that are written into the model's parameters."""
        return True

    def global_numel(self, parameter: nn.Parameter) -> int:
        """Return the number of elements of a parameter of the placed model, over all ranks that share it."""
        return parameter.numel()

    @property
    def seed(self) -> int:
        """The seed of the run, the same on every rank; that of the checkpoint after ``resume``."""
        return self._seed

    @property
    def randomness(self) -> dict[str, Any]:
        """The settings of randomness with the seed in use: a copy."""
        return {**self._env.randomness, "seed": self._seed}

    # ---- building -------------------------------------------------------------------------------------------------

    def build_model(self, model: nn.Module | Mapping[str, Any]) -> nn.Module:
        """Return a module as it is; build a mapping through ``MODELS``; see :func:`building.build_model`."""
        return building.build_model(model)

    def compile_model(self, model: nn.Module, compile: bool | Mapping[str, Any] = False) -> nn.Module:  # noqa: A002 -- the contract's
        """Compile a method of the model in place where asked; see :func:`building.compile_model`."""
        if building.compile_model(model, compile):
            self.logger.info("Compiling the model with torch.compile: the first iterations are slow.")
        return model

    def _init_model_weights(self, model: nn.Module) -> nn.Module:
        """Call the model's ``init_weights`` where it has one; give every rank rank 0's values. Collective."""
        self._init_local_model_weights(model)
        broadcast_weights(model)
        return model

    def _init_local_model_weights(self, model: nn.Module) -> nn.Module:
        """Call the model's ``init_weights`` where it has one, on this rank alone."""
        init = getattr(model, "init_weights", None)
        if callable(init) and RunLength.parse(self.dispatch_kwargs).init_weights_for_test_or_val:
            init()
        return model

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> AnyOptim:
        """Return the optimizer wrapper that stands for it; see :func:`building.build_optim_wrapper`."""
        return building.build_optim_wrapper(optim_wrapper, model)

    def complete_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Return an optimizer wrapper, or its configuration, with what the strategy's own options say of it: as it is.

        An engine whose configuration has a say in accumulation, clipping or the optimizer lets it stand there.
        """
        return optim_wrapper

    def build_param_scheduler(
        self, scheduler: Any, optim_wrapper: AnyOptim, default_args: Mapping[str, Any] | None = None
    ) -> Schedulers:
        """Return the schedulers: a list, or for several optimizers a dict of lists.

        ``default_args`` (``epoch_length``, ``max_epochs``, ``max_iters``) stand in for what ``dispatch_kwargs`` does
        not say.
        """
        known = ("epoch_length", "max_epochs", "max_iters")
        defaults = default_args or {}
        refuse_unknown(defaults, known, "default_args")
        said = {key: value for key, value in self.dispatch_kwargs.items() if value is not None}
        return build_param_schedulers(
            scheduler, optim_wrapper, **{key: said.get(key, defaults.get(key)) for key in known}
        )

    def _scale_lr(self) -> None:
        """Multiply the learning rates as ``auto_scale_lr`` says; a no-op where it is not enabled.

        Raises:
            StateError: if schedulers were built already: they have stored the learning rates.
            ConfigValueError: if the batch size of a rank is not known.
        """
        if self._auto_scale_lr is None:
            return
        wrappers = self.optim_wrapper.each()
        if BaseStrategy.param_schedulers.get(self) is not None or any(map(building.is_scheduled, wrappers.values())):
            raise StateError(
                "Learning rates are scaled before schedulers are built, since these store the initial values. Give "
                "param_scheduler as a mapping, or disable auto_scale_lr and give the optimizer the scaled values."
            )
        micro_batch = RunLength.parse(self.dispatch_kwargs).train_micro_batch_size_per_gpu
        if micro_batch is None:
            raise ConfigValueError(
                "auto_scale_lr needs dispatch_kwargs['train_micro_batch_size_per_gpu'], the samples that a rank trains on "
                "in one iteration."
            )
        for done in self._auto_scale_lr.apply(self.optim_wrapper, world_size=self.dp_size, micro_batch=micro_batch):
            self.logger.info(done)

    def build_logger(self, log_level: str | int = "INFO", log_file: str | None = None, **kwargs: Any) -> Logger:
        """Return the logger of the run; by default its file is ``<log_dir>/<timestamp>.log``, which is appended to.

        Raises:
            ConfigKeyError: if there is no such argument of :class:`~stratagem.logging.Logger`.
        """
        refuse_unknown(kwargs, _LOGGER_KEYS, "log_kwargs")
        settings: dict[str, Any] = {
            "name": self.experiment_name,
            "log_level": log_level,
            "log_file": log_file or str(self._log_dir / f"{self.timestamp}.log"),
            "rank": self.rank,
            **kwargs,
        }
        return Logger(**settings)

    # ---- the four that a strategy writes ----------------------------------------------------------------------------

    @abstractmethod
    def prepare(
        self,
        model: nn.Module | Mapping[str, Any],
        *,
        optim_wrapper: Any = None,
        param_scheduler: Any = None,
        compile: bool | Mapping[str, Any] = False,  # noqa: A002 -- the contract's name
        dispatch_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Build, initialise, place, compile and wire the model, its optimizers and their schedulers. Collective.

        Returns the model alone, or a list of the model, the optimizer wrapper and the schedulers that were asked for.
        A second call returns the same objects.
        """

    @abstractmethod
    def load_checkpoint(
        self,
        filename: str | os.PathLike[str],
        *,
        map_location: torch.device | str = "cpu",
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = DEFAULT_REVISE_KEYS,
        callback: CheckpointCallback | None = None,
    ) -> StateTree:
        """Load weights alone; return the rest of the checkpoint. Collective."""

    @abstractmethod
    def resume(
        self,
        filename: str | os.PathLike[str],
        *,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: torch.device | str = "default",
        callback: CheckpointCallback | None = None,
        new_parameters: Sequence[str] = (),
    ) -> StateTree:
        """Restore model, optimizers, schedulers and randomness; return the rest of the checkpoint. Collective.

        The checkpoint may lack the parameters and buffers whose names one of the regular expressions ``new_parameters``
        matches in whole; anything else that differs is an error.
        """

    @abstractmethod
    def save_checkpoint(
        self,
        filename: str | os.PathLike[str],
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: Mapping[str, Any] | None = None,
        callback: CheckpointCallback | None = None,
        write: CheckpointWriter = save_checkpoint,
    ) -> None:
        """Publish the state of the run under ``filename``, all of it or nothing. Collective.

        ``write`` is called with the state, ``filename`` and the ranks, such as
        :meth:`BackgroundSaver.save <stratagem.checkpoint.BackgroundSaver.save>` for a run that does not wait.
        """

    # ---- state ----------------------------------------------------------------------------------------------------

    def unwrap_model(self) -> nn.Module:
        """Return the model without what its placement put around it."""
        return unwrap_model(self.model)

    def model_state_dict(self) -> dict[str, Any]:
        """Return the bare model's state on the CPU.

        Tensors that are spread over ranks are a ``DTensor`` or :class:`~stratagem.checkpoint.ShardedTensorState`, of which
        ``full_tensor()`` gives the whole. Collective.
        """
        return weights_to_cpu(self._model_state())

    def _model_state(self) -> StateTree:
        """Return the bare model's state where it lies."""
        return self.unwrap_model().state_dict()

    def _load_model_state(
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool,
        revise_keys: Sequence[tuple[str, str]],
        allow_missing: Sequence[str],
    ) -> LoadReport:
        """Put the bare model's state into place."""
        return load_state_dict(
            self.unwrap_model(), state_dict, strict=strict, revise_keys=revise_keys, allow_missing=allow_missing
        )

    def optim_state_dict(self) -> dict[str, Any]:
        """Return the optimizer wrapper's state.

        Raises:
            ConfigTypeError: if there is no optimizer wrapper.
        """
        optim = BaseStrategy.optim_wrapper.get(self)
        if optim is None:
            raise ConfigTypeError(
                "There is no optimizer wrapper, so it has no state. Call prepare(model, optim_wrapper=...)."
            )
        return optim.state_dict()

    def scheduler_state_dict(self) -> list[dict[str, Any]] | dict[str, list[dict[str, Any]]]:
        """Return the schedulers' states: a list, or name -> list for several optimizers."""
        schedulers = self.param_schedulers
        if isinstance(schedulers, dict):
            return {name: [each.state_dict() for each in some] for name, some in schedulers.items()}
        return [each.state_dict() for each in schedulers]

    def load_model_state_dict(
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = DEFAULT_REVISE_KEYS,
        allow_missing: Sequence[str] = (),
    ) -> LoadReport:
        """Load the bare model's state; differences are logged once, on rank 0.

        With ``strict`` the state may lack what a pattern of ``allow_missing`` names.

        Raises:
            CheckpointMismatchError: if no key matches, or with ``strict`` if anything differs.
        """
        report = self._load_model_state(state_dict, strict=strict, revise_keys=revise_keys, allow_missing=allow_missing)
        if not report.exact:
            self.logger.warning(report.describe())
        return report

    def load_optim_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the optimizer wrapper's state, as :meth:`optim_state_dict` gave it."""
        self.optim_wrapper.load_state_dict(dict(state_dict))

    def load_scheduler_state_dict(self, state_dict: Sequence[Any] | Mapping[str, Sequence[Any]]) -> None:
        """Load the schedulers' states; they become what was saved, and the log names what that changes.

        Raises:
            CheckpointMismatchError: if there are more, fewer or others than this run has, or they belong to other
                optimizers.
        """
        own = self.scheduler_state_dict()
        building.load_schedulers(self.param_schedulers, state_dict)
        self._say_kept(schedule_differences(self.param_schedulers, own))

    def load_or_resume(
        self,
        *,
        load_from: str | os.PathLike[str] | None = None,
        resume: bool | str | os.PathLike[str] = False,
        callback: CheckpointCallback | None = None,
        resume_param_scheduler: bool = True,
        new_parameters: Sequence[str] = (),
    ) -> StateTree | None:
        """Load weights, resume, or do nothing, as the two arguments say. Collective.

        ``resume`` with a path resumes from there; ``True`` from ``load_from`` where that is given, otherwise from the
        latest checkpoint under ``work_dir``, and where there is none it does nothing. ``load_from`` alone loads the
        weights. ``callback`` is that of :meth:`load_checkpoint` and :meth:`resume`.

        With ``resume_param_scheduler=False`` the schedules and the optimizers' options are those of this run, from where
        the checkpoint stands; moments and other state go on. ``new_parameters`` is that of :meth:`resume`.
        """
        how = Resuming(
            callback=callback,
            resume_param_scheduler=resume_param_scheduler,
            new_parameters=tuple(new_parameters),
            optim=BaseStrategy.optim_wrapper.get(self),
            schedulers=BaseStrategy.param_schedulers.get(self),
        )
        if not resume:
            return None if load_from is None else self.load_checkpoint(load_from, callback=callback)
        if not isinstance(resume, bool):
            return how.resume(self, resume)
        return how.resume_latest(self) if load_from is None else how.resume(self, load_from)

    def _say_kept(self, differences: Iterable[str]) -> None:
        """Say in the log which values of a checkpoint go on in the place of this run's."""
        lines = list(differences)
        if lines:
            self.logger.warning(
                "These go on as the checkpoint has them:\n  %s\nTo follow the configuration from here on, resume with "
                "resume_param_scheduler=False.", "\n  ".join(lines),
            )  # fmt: skip

    def collect_env(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Return what this machine is, and how this run uses it."""
        runtime: dict[str, Any] = dict(self._env_kwargs)
        runtime.update(self.randomness)
        runtime["Distributed launcher"] = self.launcher
        runtime["Distributed training"] = self.distributed
        runtime["GPU number"] = self.world_size
        return collect_env(), runtime

    def _prepared_components(self) -> Any:
        """Return the model alone, or the list of all that was prepared."""
        rest = [part.get(self) for part in (BaseStrategy.optim_wrapper, BaseStrategy.param_schedulers)]
        components = [self.model, *(part for part in rest if part is not None)]
        return components[0] if len(components) == 1 else components

    def close(self) -> None:
        """Close the log file, end the process group if this strategy made it, undo process settings. Idempotent."""
        self._stop_forwarding()
        self.logger.close()
        self._env.close()


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkDirError(
            f"work_dir: {path} cannot be created: {error.strerror}. Choose another with --work-dir."
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise WorkDirError(f"work_dir: {path} cannot be written to. Choose another with --work-dir.")
    return path
