"""The interface of all strategies, and the methods that they share."""

from __future__ import annotations

import inspect
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

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
    PlacementError,
    StateError,
    WorkDirError,
)
from stratagem.logging import Logger, forward_library_logs
from stratagem.model import unwrap_model
from stratagem.model.weights import broadcast_weights
from stratagem.optim import OptimSpec, SchedulerSpec, build_param_schedulers
from stratagem.parallel import AnyOptim
from stratagem.strategies.prepared import Prepared, PreparedComponents
from stratagem.strategies.setup import building
from stratagem.strategies.setup.auto_scale import AutoScale
from stratagem.strategies.setup.environment import check_environment, set_up_environment
from stratagem.strategies.setup.run_length import RunLength
from stratagem.strategies.state.configured_hyperparameters import schedule_differences
from stratagem.strategies.state.optim_state import whole_optim_state
from stratagem.strategies.state.resuming import CheckpointCallback, Resuming, Schedulers
from stratagem.strategies.state.synced_buffers import BufferSource, SyncedBuffers, iter_buffers, require_buffer_source
from stratagem.utils import absolute, collect_env, refuse_unknown, with_canonical_keys
from stratagem.utils.paths import path_fault
from stratagem.utils.torch_private import storage_id

__all__ = ["BaseStrategy", "CheckpointCallback", "CheckpointWriter", "Schedulers"]

CheckpointWriter = Callable[[StateTree, str | os.PathLike[str], RankGroup], None]

_LOGGER_KEYS = tuple(inspect.signature(Logger).parameters)


class BaseStrategy(ABC):
    """Base class of strategies, which build, initialize, place, compile, save, load and resume the components of a run.

    A subclass implements the four abstract methods and is registered in ``STRATEGIES``; the other methods support them.

    Args:
        work_dir: the folder of the run, created if it does not exist.
        experiment_name: the name of the run; the timestamp is appended to it.
        env_kwargs: ``launcher``, ``cudnn_benchmark``, ``cudnn_allow_tf32``, ``float32_matmul_precision``, ``mp_cfg``,
            ``dist_cfg``, ``resource_limit`` and ``randomness`` (``seed``, ``diff_rank_seed``, ``deterministic``).
        log_kwargs: arguments of :meth:`build_logger`.
        auto_scale_lr: ``enable``, ``base_batch_size`` and ``rule``: learning rates are multiplied by the ratio of the
            actual batch size to ``base_batch_size`` (``"linear"``, the default) or by the square root of this ratio
            (``"sqrt"``).
        buffers: which buffers evaluations and checkpoints use if each rank updates its buffers from its own samples, as in
            BatchNorm: ``"rank0"`` uses the buffers of rank 0, and ``"mean"`` averages the running means and variances of
            BatchNorm over the ranks. Training continues with the buffers of each rank.

    Raises:
        WorkDirError: if ``work_dir`` cannot be created or written to.
        ConfigValueError: if ``buffers`` is unknown.
        ConfigKeyError: if one of these mappings contains an unknown key.
        LaunchError: if the given launcher did not start this process.
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
        buffers: BufferSource = "rank0",
    ) -> None:
        self._auto_scale_lr = AutoScale.parse(auto_scale_lr)
        source = require_buffer_source(buffers)
        require_readable_path(work_dir)
        self._work_dir = _make_folder(absolute(work_dir))
        self._env_kwargs = dict(env_kwargs or {})
        self.dispatch_kwargs: dict[str, Any] = {}
        # The checkpoint that load_or_resume resumed from.
        self.resumed_from: str | None = None
        self._env = set_up_environment(self._env_kwargs)
        with ExitStack() as undo:
            undo.callback(self._env.close)
            self._seed = self._env.world.seed
            self._experiment_name = f"{experiment_name}_{self.timestamp}" if experiment_name else self.timestamp
            self._log_dir = _make_folder(self._work_dir / self.timestamp)
            self.logger = self.build_logger(**(log_kwargs or {}))
            self._synced_buffers = SyncedBuffers(self.world, self.logger, source)
            self._stop_forwarding = forward_library_logs(self.logger)
            undo.pop_all()
        for notice in self._env.notices:
            self.logger.info(notice)

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        """Check arguments of the constructor without building the strategy, as far as devices and processes do not matter.

        Subclasses check their own arguments and call this method of their base class. Both call the functions that the
        constructor calls.

        Args:
            arguments: the specified arguments. Those of other classes are not checked.

        Raises:
            StratagemError: (a subclass) if an argument is invalid.
        """
        AutoScale.parse(arguments.get("auto_scale_lr"))
        require_buffer_source(arguments.get("buffers", "rank0"))
        if arguments.get("work_dir") is not None:
            require_readable_path(arguments["work_dir"])
        check_environment(arguments.get("env_kwargs") or {})
        refuse_unknown(arguments.get("log_kwargs") or {}, _LOGGER_KEYS, "log_kwargs")

    @classmethod
    def check_optim_wrapper(
        cls, arguments: Mapping[str, Any], optim_wrapper: Any, build: Callable[[Any], AnyOptim | None]
    ) -> AnyOptim | None:
        """Check the configuration of an optimizer wrapper without a model, as :meth:`prepare` does.

        Args:
            arguments: the valid arguments of the constructor of the strategy.
            optim_wrapper: the configuration.
            build: builds a wrapper for a stand-in model; it returns None if that could have side effects.

        Returns:
            The result of ``build``.

        Raises:
            StratagemError: (a subclass) if the configuration is invalid.
        """
        del arguments
        return build(optim_wrapper)

    @classmethod
    def check_hooks(cls, arguments: Mapping[str, Any], *, averages: bool, saves_in_background: bool) -> None:
        """Check that the arguments of the constructor support the hooks of a run, as far as this is known without a model.

        Args:
            arguments: the valid arguments.
            averages: whether a hook averages the weights.
            saves_in_background: whether a hook saves checkpoints in the background.

        Raises:
            StratagemError: (a subclass) if they do not.
        """
        del arguments, averages, saves_in_background

    # ---- facts ----------------------------------------------------------------------------------------------------

    @property
    def work_dir(self) -> str:
        """The absolute path of the run's folder."""
        return str(self._work_dir)

    @property
    def log_dir(self) -> str:
        """The folder of this session of the run: ``<work_dir>/<timestamp>``."""
        return str(self._log_dir)

    @property
    def experiment_name(self) -> str:
        """The name of the run followed by the timestamp; only the timestamp if the run has no name."""
        return self._experiment_name

    @property
    def world(self) -> World:
        """The rank, device, launcher and seed of this process."""
        return self._env.world

    @property
    def timestamp(self) -> str:
        """The local time at which rank 0 started, as ``YYYYmmdd_HHMMSS``; the same on all ranks."""
        return self.world.timestamp

    @property
    def launcher(self) -> str:
        """The launcher of this process: ``"pytorch"``, ``"slurm"``, ``"mpi"`` or ``"none"``."""
        return self.world.launcher

    @property
    def distributed(self) -> bool:
        """Whether a launcher started this process."""
        return self.world.distributed

    @property
    def rank(self) -> int:
        """The global rank of this process."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """The number of processes in the run."""
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
        """Whether the forward pass is collective, so that all ranks must run the same number of passes, even in evaluation."""
        return False

    @property
    def params_are_master_weights(self) -> bool:
        """Whether the model's parameters hold the full-precision weights between steps, so that they can be averaged."""
        return True

    @property
    def params_accept_writes(self) -> bool:
        """Whether training continues from values that are written into the model's parameters."""
        return True

    @property
    def can_omit_frozen(self) -> bool:
        """Whether checkpoints can omit parameters that are frozen (``save_frozen=False``)."""
        return False

    def global_numel(self, parameter: nn.Parameter) -> int:
        """Return the total number of elements of a parameter of the placed model, including shards on other ranks."""
        return parameter.numel()

    @property
    def seed(self) -> int:
        """The seed of the run, the same on all ranks; after ``resume``, the checkpoint's seed."""
        return self._seed

    @property
    def randomness(self) -> dict[str, Any]:
        """A copy of the randomness settings, including the seed in use."""
        return {**self._env.randomness, "seed": self._seed}

    @property
    def model_or_none(self) -> nn.Module | None:
        """The placed model; None before :meth:`prepare`."""
        return BaseStrategy.model.get(self)

    @property
    def optim_wrapper_or_none(self) -> AnyOptim | None:
        """The optimizer wrapper; None if none was prepared."""
        return BaseStrategy.optim_wrapper.get(self)

    @property
    def param_schedulers_or_none(self) -> Schedulers | None:
        """The parameter schedulers; None if none were prepared."""
        return BaseStrategy.param_schedulers.get(self)

    # ---- building -------------------------------------------------------------------------------------------------

    def build_model(self, model: nn.Module | Mapping[str, Any]) -> nn.Module:
        """Return a module unchanged, or build it from a configuration with ``MODELS``; see :func:`building.build_model`."""
        return building.build_model(model)

    def compile_model(self, model: nn.Module, compile: bool | Mapping[str, Any] = False) -> nn.Module:  # noqa: A002 -- public name
        """Compile a method of the model in place if ``compile`` is set; see :func:`building.compile_model`."""
        if building.compile_model(model, compile):
            self.logger.info("Compiling the model with torch.compile: the first iterations are slow.")
        return model

    def _init_model_weights(self, model: nn.Module) -> nn.Module:
        """Call the model's ``init_weights`` if it has one, move it to the device, and broadcast the weights. Collective."""
        model = self._init_local_model_weights(model).to(self.world.device)
        # On an accelerator, the weights are sent by its backend, which is much faster than one for CPU tensors.
        broadcast_weights(model)
        return model

    def _init_local_model_weights(self, model: nn.Module) -> nn.Module:
        """Call the model's ``init_weights`` if it has one, on this rank only."""
        init = getattr(model, "init_weights", None)
        if callable(init) and RunLength.parse(self.dispatch_kwargs).init_weights_for_test_or_val:
            init()
        return model

    def build_optim_wrapper(self, optim_wrapper: OptimSpec, model: nn.Module | None = None) -> AnyOptim:
        """Return an optimizer wrapper, or build it from a configuration; see :func:`building.build_optim_wrapper`."""
        return building.build_optim_wrapper(optim_wrapper, model)

    def complete_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Return an optimizer wrapper, or its configuration, completed with the strategy's options.

        This implementation returns ``optim_wrapper`` unchanged. The strategy for an engine whose own configuration sets
        accumulation, clipping or the optimizer overrides this method to add these options.
        """
        return optim_wrapper

    def build_param_scheduler(
        self, scheduler: SchedulerSpec, optim_wrapper: AnyOptim, default_args: Mapping[str, Any] | None = None
    ) -> Schedulers:
        """Return the schedulers: a list, or for several optimizers a dict of lists.

        ``default_args`` (``epoch_length``, ``max_epochs``, ``max_iters``) are used for values that are missing from
        ``dispatch_kwargs``.
        """
        known = ("epoch_length", "max_epochs", "max_iters")
        defaults = default_args or {}
        refuse_unknown(defaults, known, "default_args")
        given = {key: value for key, value in self.dispatch_kwargs.items() if value is not None}
        return build_param_schedulers(
            scheduler, optim_wrapper, **{key: given.get(key, defaults.get(key)) for key in known}
        )

    def _scale_lr(self) -> None:
        """Scale the learning rates according to ``auto_scale_lr``, if it is enabled.

        Raises:
            StateError: if schedulers, which store the learning rates, were already built.
            ConfigValueError: if the batch size of a rank is unknown.
        """
        if self._auto_scale_lr is None:
            return
        wrappers = self.optim_wrapper.each()
        if self.param_schedulers_or_none is not None or any(map(building.is_scheduled, wrappers.values())):
            raise StateError(
                "Learning rates must be scaled before schedulers are built, because schedulers store the initial values. Pass "
                "param_scheduler as a configuration, or disable auto_scale_lr and build the optimizer with scaled values."
            )
        micro_batch = RunLength.parse(self.dispatch_kwargs).train_micro_batch_size_per_gpu
        if micro_batch is None:
            raise ConfigValueError(
                "auto_scale_lr requires the batch size per rank. Set "
                "dispatch_kwargs['train_micro_batch_size_per_gpu'] to the number of samples that a rank processes in "
                "one iteration."
            )
        for done in self._auto_scale_lr.apply(self.optim_wrapper, world_size=self.dp_size, micro_batch=micro_batch):
            self.logger.info(done)

    def build_logger(self, log_level: str | int = "INFO", log_file: str | None = None, **kwargs: Any) -> Logger:
        """Return the logger of the run. By default it appends to ``<log_dir>/<timestamp>.log``.

        Raises:
            ConfigKeyError: if :class:`~stratagem.logging.Logger` does not accept one of the arguments.
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

    # ---- the four methods of a strategy ----------------------------------------------------------------------------

    @overload
    def prepare(
        self,
        model: nn.Module | Mapping[str, Any],
        *,
        optim_wrapper: OptimSpec,
        param_scheduler: SchedulerSpec | None = None,
        compile: bool | Mapping[str, Any] = False,
        dispatch_kwargs: Mapping[str, Any] | None = None,
    ) -> PreparedComponents: ...

    @overload
    def prepare(
        self,
        model: nn.Module | Mapping[str, Any],
        *,
        optim_wrapper: OptimSpec | None = None,
        param_scheduler: SchedulerSpec | None = None,
        compile: bool | Mapping[str, Any] = False,
        dispatch_kwargs: Mapping[str, Any] | None = None,
    ) -> Any: ...

    @abstractmethod
    def prepare(
        self,
        model: nn.Module | Mapping[str, Any],
        *,
        optim_wrapper: OptimSpec | None = None,
        param_scheduler: SchedulerSpec | None = None,
        compile: bool | Mapping[str, Any] = False,  # noqa: A002 -- the public name
        dispatch_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Build, initialize, place, compile and connect the model, its optimizers and their schedulers. Collective.

        A second call returns the same objects.

        Args:
            model: a module or its configuration.
            optim_wrapper: an optimizer wrapper, an optimizer or a configuration; None prepares for evaluation.
            param_scheduler: schedulers or their configurations.
            compile: True, or the arguments of ``torch.compile``.
            dispatch_kwargs: the length of the run: ``epoch_length``, ``max_epochs``, ``max_iters``, ``cur_iter``,
                ``train_micro_batch_size_per_gpu``.

        Returns:
            The model if only a model has been prepared; otherwise, a :class:`PreparedComponents`, which unpacks in the order
            model, optimizer wrapper, schedulers.
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
        """Load only the weights; return the rest of the checkpoint. Collective."""

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
        """Restore the model, optimizers, schedulers and random states; return the rest of the checkpoint. Collective.

        The checkpoint may lack parameters and buffers whose full names match one of the regular expressions in
        ``new_parameters``. Any other difference is an error.

        The checkpoint is memory-mapped, and its tensors are copied one at a time to the device. If one process resumes on the
        CPU, weights and optimizer state are read to memory instead, and the optimizer keeps its tensors, so training changes the
        optimizer state that ``callback`` receives. ``map_location`` reads the whole checkpoint to another device first.
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
        save_frozen: bool = True,
    ) -> None:
        """Save the state of the run under ``filename`` atomically. Collective.

        With ``save_frozen=False``, the checkpoint omits parameters that have been frozen since the model was built and contains
        their digests instead. A model that loads it must have their values already; a different value is an error.

        ``write`` is called with the state, ``filename`` and the rank group. Use
        :meth:`BackgroundSaver.save <stratagem.checkpoint.BackgroundSaver.save>` to save in the background.
        """

    # ---- state ----------------------------------------------------------------------------------------------------

    def unwrap_model(self) -> nn.Module:
        """Return the model without the wrappers of its placement."""
        return unwrap_model(self.model)

    def model_state_dict(self) -> dict[str, Any]:
        """Return the state of the unwrapped model on the CPU. Collective.

        A tensor that is sharded across ranks is a ``DTensor`` or a :class:`~stratagem.checkpoint.ShardedTensorState`; its
        ``full_tensor()`` returns the whole tensor. Buffers that differ between ranks are synchronized; see
        :meth:`synchronized_buffers`.
        """
        with self.synchronized_buffers() as replaced:
            state = weights_to_cpu(self._model_state())
            # After the block, these tensors have the values of this rank again.
            shared = {storage_id(each) for each in replaced}
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and storage_id(value) in shared:
                    state[name] = value.clone()
            return state

    def synchronized_buffers(self) -> AbstractContextManager[tuple[torch.Tensor, ...]]:
        """Return a context in which all ranks have the same buffers, as the option ``buffers`` specifies.

        Evaluations run inside this context; a training loop that does not use the runner should enter it around
        ``val_step``. The context yields the buffers that are replaced. Entering the context is collective. On exit, the
        buffers of this rank are restored bit for bit.

        Raises:
            StateError: if a persistent buffer has different shapes or dtypes on the ranks.
        """
        return self._synced_buffers.applied(self.unwrap_model(), self.dp_group)

    def synchronized_copies(self, buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return copies of buffer values, such as averaged values, that are equal on all ranks. Collective.

        See :meth:`synchronized_buffers`. In a single process, the values themselves are returned.

        Args:
            buffers: the values of this rank, keyed by the names of buffers in the unwrapped model.
        """
        if not buffers or self.world_size == 1:
            return dict(buffers)
        statistics = [each.name for each in iter_buffers(self.unwrap_model()) if each.is_statistic]
        return self._synced_buffers.copies(buffers, statistics=statistics, group=self.dp_group)

    def release_gathered_parameters(self) -> None:  # noqa: B027 -- most strategies have nothing to do
        """Free parameters that a forward pass without a backward pass gathered, so that changes of the weights take effect."""

    def _model_state(self) -> StateTree:
        """Return the state of the unwrapped model on its device."""
        model = self.unwrap_model()
        return with_canonical_keys(model.state_dict(), model)

    def _load_model_state(
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool,
        revise_keys: Sequence[tuple[str, str]],
        allow_missing: Sequence[str],
    ) -> LoadReport:
        """Load the state into the unwrapped model."""
        return load_state_dict(
            self.unwrap_model(), state_dict, strict=strict, revise_keys=revise_keys, allow_missing=allow_missing
        )

    def optim_state_dict(self) -> dict[str, Any]:
        """Return the optimizer wrapper's state. Collective if each rank has the state of some parameters.

        Raises:
            ConfigTypeError: if there is no optimizer wrapper.
        """
        optim = self.optim_wrapper_or_none
        if optim is None:
            raise ConfigTypeError("There is no optimizer wrapper. Call prepare(model, optim_wrapper=...) first.")
        return whole_optim_state(optim)

    def scheduler_state_dict(self) -> list[dict[str, Any]] | dict[str, list[dict[str, Any]]]:
        """Return the states of the schedulers: a list, or for several optimizers a dict of lists keyed by name."""
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
        omitted: Collection[str] = (),
    ) -> LoadReport:
        """Load the state of the unwrapped model, and log differences on rank 0.

        With ``strict`` only keys that match a regular expression in ``allow_missing`` may be missing. Keys in ``omitted`` are not
        considered missing; the model keeps their values.

        Raises:
            CheckpointMismatchError: if no key matches, or, with ``strict``, if there is a difference.
        """
        may_lack = [*allow_missing, *map(re.escape, omitted)]
        report = self._load_model_state(state_dict, strict=strict, revise_keys=revise_keys, allow_missing=may_lack)
        report = replace(report, missing=tuple(name for name in report.missing if name not in omitted))
        if not report.exact:
            self.logger.warning(report.describe())
        return report

    def load_optim_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state that :meth:`optim_state_dict` returned."""
        self.optim_wrapper.load_state_dict(dict(state_dict))

    def load_scheduler_state_dict(self, state_dict: Sequence[Any] | Mapping[str, Sequence[Any]]) -> None:
        """Load the states of the schedulers, and log which of their options change.

        Raises:
            CheckpointMismatchError: if the schedulers of this run differ from the saved ones in number, type or optimizer.
        """
        own = self.scheduler_state_dict()
        building.load_schedulers(self.param_schedulers, state_dict)
        self._log_restored(schedule_differences(self.param_schedulers, own))

    def load_or_resume(
        self,
        *,
        load_from: str | os.PathLike[str] | None = None,
        resume: bool | str | os.PathLike[str] = False,
        callback: CheckpointCallback | None = None,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        new_parameters: Sequence[str] = (),
    ) -> StateTree | None:
        """Load weights, resume, or do nothing. Collective.

        If ``resume`` is a path, resume from it. If it is True, resume from ``load_from`` if it is given, otherwise from the
        latest checkpoint under ``work_dir``; without either, do nothing. ``load_from`` without ``resume`` loads the weights
        only.

        With ``resume_param_scheduler=False``, schedules and optimizer options are taken from this run's configuration
        and continue from the position of the checkpoint. The optimizer state is restored in both cases, unless
        ``resume_optimizer=False``. See :meth:`load_checkpoint` and :meth:`resume` for ``callback`` and ``new_parameters``.
        """
        how = Resuming(
            callback=callback,
            resume_optimizer=resume_optimizer,
            resume_param_scheduler=resume_param_scheduler,
            new_parameters=tuple(new_parameters),
            optim=self.optim_wrapper_or_none,
            schedulers=self.param_schedulers_or_none,
        )
        if not resume:
            return None if load_from is None else self.load_checkpoint(load_from, callback=callback)
        if not isinstance(resume, bool):
            return how.resume(self, resume)
        return how.resume_latest(self) if load_from is None else how.resume(self, load_from)

    def _log_restored(self, differences: Iterable[str]) -> None:
        """Log the configured values that were overridden by the checkpoint."""
        lines = list(differences)
        if lines:
            self.logger.warning(
                "The checkpoint overrides the configuration:\n  %s\nTo use the values of the configuration instead, resume with "
                "resume_param_scheduler=False.", "\n  ".join(lines),
            )  # fmt: skip

    def collect_env(self) -> tuple[dict[str, str], dict[str, Any]]:
        """Return a description of the hardware, the installed software and the settings of this run."""
        runtime: dict[str, Any] = dict(self._env_kwargs)
        runtime.update(self.randomness)
        runtime["Distributed launcher"] = self.launcher
        runtime["Distributed training"] = self.distributed
        runtime["GPU number"] = self.world_size
        return collect_env(), runtime

    def _prepared_components(self) -> Any:
        """Return the model, or a :class:`PreparedComponents` if there is an optimizer wrapper."""
        optim, schedulers = self.optim_wrapper_or_none, self.param_schedulers_or_none
        return self.model if optim is None else PreparedComponents(self.model, optim, schedulers)

    def close(self) -> None:
        """Close the log file, destroy the process group if this strategy created it, and undo process settings. Idempotent."""
        self._stop_forwarding()
        self.logger.close()
        self._env.close()


def require_master_weights(strategy: str, *, available: bool) -> None:
    """Require the master weights in the model, for a hook that averages them.

    Args:
        strategy: the name of the class of the strategy.
        available: its property ``params_are_master_weights``.

    Raises:
        PlacementError: if they are stored elsewhere.
    """
    if not available:
        raise PlacementError(
            f"EMAHook needs the master weights in the model, but {strategy} with these options stores them elsewhere. "
            "Use FSDPStrategy, or ZeRO stage 0, 1 or 2 in float32."
        )


def require_readable_path(work_dir: Any) -> None:
    """Check that every part of a run can read files in a work directory, judging by its path.

    Raises:
        ConfigTypeError: if it is not a path.
        WorkDirError: if libraries cannot read the path.
    """
    if not isinstance(work_dir, str | os.PathLike):
        raise ConfigTypeError(f"work_dir must be a path, got {work_dir!r}.")
    fault = path_fault(work_dir)
    if fault is not None:
        raise WorkDirError(f"work_dir: {fault}, so checkpoints in it could not be read. Choose a different directory.")


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkDirError(
            f"work_dir: {path} cannot be created: {error.strerror}. Choose a different directory with --work-dir."
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise WorkDirError(f"work_dir: {path} is not writable. Choose a different directory with --work-dir.")
    return path
