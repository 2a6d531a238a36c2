"""Prepare, load, resume and save with any placement."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy

from stratagem._version import __version__
from stratagem.checkpoint import (
    DEFAULT_REVISE_KEYS,
    OMITTED,
    CheckpointLoader,
    FrozenWeights,
    LoadReport,
    StateTree,
    gather_tree,
    get_model_state,
    omitted_digests,
    require_omitted_weights,
    save_checkpoint,
)
from stratagem.distributed import RankGroup, all_gather_object, all_reduce, is_distributed
from stratagem.errors import CheckpointMismatchError, ConfigValueError, LaunchError, PlacementError, StratagemError
from stratagem.model import BaseModel
from stratagem.model.recomputation import update_buffers_once
from stratagem.optim import OptimSpec, SchedulerSpec
from stratagem.optim.amp import autocast_dtype
from stratagem.optim.gradient_policy import NO_CONTEXT
from stratagem.optim.mixed import parts_of
from stratagem.optim.probe import require_step_without_closure
from stratagem.optim.sharded_updates import prepare_sharded_updates
from stratagem.parallel import AnyOptim, Placement, Steps
from stratagem.parallel.cuda_graphs import keep_outputs_of_replays, may_replay_cuda_graphs
from stratagem.parallel.gradient_hooks import hooks_of_parameters, log_gradient_hooks
from stratagem.parallel.trainable import TrainableParameters
from stratagem.strategies.base import BaseStrategy, CheckpointCallback, CheckpointWriter
from stratagem.strategies.setup.building import parse_compile, require_optimizer
from stratagem.strategies.setup.run_length import RunLength
from stratagem.strategies.state.accumulation_state import gather_accumulation_state, restore_accumulation_state
from stratagem.strategies.state.configured_hyperparameters import ConfiguredHyperparameters
from stratagem.strategies.state.optim_state import require_same_class, require_same_parts
from stratagem.strategies.state.per_rank_buffers import stack_per_rank_buffers, write_per_rank_buffers
from stratagem.strategies.state.state_io import StateAccess, TorchState
from stratagem.strategies.state.trainable_state import apply_trainable, find_trainable_difference, read_trainable
from stratagem.utils import generator_state, mask_text, restore_generator_state, with_canonical_keys
from stratagem.utils.names import some_names

__all__ = ["ComposedStrategy"]


class ComposedStrategy(BaseStrategy):
    """A strategy that delegates to a placement; subclasses only choose the placement."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._placement = self._make_placement()
            self._trainable: TrainableParameters | None = None
            self._frozen: FrozenWeights | None = None
            # Whether compiled parts of the model may use CUDA graphs.
            self._replays_graphs = False
            self._access = self._make_access()
            undo.pop_all()

    @abstractmethod
    def _make_placement(self) -> Placement:
        """Return the placement of this strategy, or raise an error if this environment does not support it."""

    def _require_processes(self) -> None:
        """Require that a launcher started this process.

        Raises:
            LaunchError: if no launcher started this process.
        """
        if not is_distributed():
            raise LaunchError(
                f"{type(self).__name__} requires a launcher, and no launcher started this process. Use "
                "`stratagem train CONFIG --nproc N`, `torchrun`, `srun` or `mpirun`, or SingleDeviceStrategy for one process."
            )

    def _make_access(self) -> StateAccess:
        """Return the object that reads and writes the state of the placed model and its optimizers."""
        return TorchState()

    def _writer(self, write: CheckpointWriter) -> CheckpointWriter:
        """Return the function that writes checkpoints; an engine may replace ``write`` to save its own format."""
        return write

    def prepare(
        self,
        model: nn.Module | Mapping[str, Any],
        *,
        optim_wrapper: OptimSpec | None = None,
        param_scheduler: SchedulerSpec | None = None,
        compile: bool | Mapping[str, Any] = False,  # noqa: A002 -- the public name
        dispatch_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        run_length = dispatch_kwargs or {}
        RunLength.parse(run_length)
        if self.param_schedulers_or_none is not None:
            param_scheduler = None
        if self.optim_wrapper_or_none is None:
            require_optimizer(param_scheduler, optim_wrapper)
        if self.model_or_none is None:
            self.dispatch_kwargs.update(run_length)
            self._place(model, optim_wrapper, compile)
        elif optim_wrapper is not None and self.optim_wrapper_or_none is None:
            # The model was prepared for evaluation and is now prepared for training.
            self.dispatch_kwargs.update(run_length)
            self._adopt_optim(self.build_optim_wrapper(optim_wrapper, self.unwrap_model()))
        elif param_scheduler is not None:
            self.dispatch_kwargs.update(run_length)
        if param_scheduler is not None:
            self.param_schedulers = self.build_param_scheduler(param_scheduler, self.optim_wrapper)
        return self._prepared_components()

    def _place(
        self,
        model: nn.Module | Mapping[str, Any],
        optim_wrapper: OptimSpec | None,
        compile: bool | Mapping[str, Any],  # noqa: A002
    ) -> None:
        with self._placement.construction(self.world):
            built = self.build_model(model)
        if optim_wrapper is not None:
            _refuse_lazy_parameters(built)
        steps = Steps(
            init_and_sync=self._init_model_weights,
            init_local=self._init_local_model_weights,
            compile=lambda module: self.compile_model(module, compile),
            make_optim=None
            if optim_wrapper is None
            else lambda module: self.build_optim_wrapper(optim_wrapper, module),
            compile_options=parse_compile(compile),
        )
        hooked = list(hooks_of_parameters(built))
        placed = self._placement.place(built, steps, self.world)
        if optim_wrapper is not None and self.dp_size > 1 and not self._placement.reports_gradient_hooks:
            log_gradient_hooks(hooked, self.logger)
        self.model = placed.model
        self._replays_graphs = may_replay_cuda_graphs(placed.model, parse_compile(compile), self.world.device)
        if self._replays_graphs:
            keep_outputs_of_replays(placed.model)
            self.logger.info(
                "CUDA graphs may be used: losses and predictions are copied before the next iteration overwrites them."
            )
        if placed.optim is not None:
            self._adopt_optim(placed.optim)
        self._frozen = FrozenWeights(self.unwrap_model())

    @property
    def can_omit_frozen(self) -> bool:
        return isinstance(self._access, TorchState)

    def _adopt_optim(self, optim: AnyOptim) -> None:
        """Connect an optimizer wrapper to the placed model: gradient policy, accumulation, learning rates."""
        run_length = RunLength.parse(self.dispatch_kwargs)
        self._placement.bind(optim, self.unwrap_model())
        wrappers = optim.each()
        accumulates = any(wrapper.accumulative_counts > 1 for wrapper in wrappers.values())
        policy = self._placement.gradient_policy(self.model, accumulates=accumulates)
        model = self.unwrap_model()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for name, wrapper in wrappers.items():
            wrapper.use_device(self.world.device)
            if getattr(type(model), "train_step", None) is BaseModel.train_step:
                require_step_without_closure(wrapper.optimizer)
            for part, optimizer in parts_of(wrapper.optimizer).items():
                whose = ".".join(filter(None, (name, part)))
                route = prepare_sharded_updates(optimizer, names, whose, form=self._placement.matrix_updates)
                if route is not None:
                    self.logger.info(route)
        if isinstance(model, BaseModel):
            model.needs_loss_weight = accumulates or self.world.size > 1
        if accumulates and self._replays_graphs and not self._placement.has_gradients:
            raise PlacementError(
                "CUDA graphs overwrite the gradients of compiled modules in each micro-batch, and with accumulative_counts > 1, "
                f"{type(self).__name__} keeps references to them. Compile with mode='default' or "
                "'max-autotune-no-cudagraphs', or do not accumulate gradients."
            )
        for wrapper in wrappers.values():
            if wrapper.accumulative_counts > 1:
                if run_length.max_iters is None:
                    raise ConfigValueError(
                        f"accumulative_counts={wrapper.accumulative_counts} requires dispatch_kwargs['max_iters'], the "
                        "number of micro-batches in the run, because the last accumulation window may be shorter than "
                        "the others."
                    )
                wrapper.initialize_count_status(self.model, run_length.cur_iter, run_length.max_iters)
            wrapper.gradient_policy = policy
        self.optim_wrapper = optim
        self._watch_trainable(optim)
        try:
            self._scale_lr()
        except StratagemError:
            # A second call of prepare() must rebuild the wrapper, because its learning rates were not scaled.
            BaseStrategy.optim_wrapper.clear(self)
            raise
        update_buffers_once(self.unwrap_model())
        self._synced_buffers.announce(self.unwrap_model())

    def _watch_trainable(self, optim: AnyOptim) -> None:
        """Detect changes of ``requires_grad`` before each training step or, if no wrapper calls it, before each update."""
        self._trainable = TrainableParameters(
            self.unwrap_model(),
            lambda: optim.each().values(),
            lambda change: self._placement.apply_trainable_change(self.model, change),
            self.logger,
            fixed=self._placement.trainable_is_fixed,
        )
        description = self._trainable.describe()
        if description is not None:
            self.logger.info(description)
        self._placement.before_train_step = self._trainable.check
        if not self._placement.wraps_train_step:
            for wrapper in optim.each().values():
                wrapper.gradient_policy = replace(
                    wrapper.gradient_policy,
                    sync_context=self._check_in_window,  # for each micro-batch of an accumulation window
                    complete=self._trainable.check_update,
                )

    def _check_in_window(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        self._placement.before_train_step()
        return NO_CONTEXT

    def unwrap_model(self) -> nn.Module:
        return self._placement.unwrap(self.model)

    def release_gathered_parameters(self) -> None:
        self._placement.release_gathered(self.unwrap_model())

    def _model_state(self) -> StateTree:
        model = self.unwrap_model()
        return with_canonical_keys(self._access.model_state(model), model)

    def _load_model_state(
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool,
        revise_keys: Sequence[tuple[str, str]],
        allow_missing: Sequence[str],
    ) -> LoadReport:
        return self._access.load_model_state(
            self.unwrap_model(), state_dict, strict=strict, revise_keys=revise_keys, allow_missing=allow_missing
        )

    @property
    def dp_rank(self) -> int:
        return self._placement.dp_rank(self.world)

    @property
    def dp_size(self) -> int:
        return self._placement.dp_size(self.world)

    @property
    def dp_group(self) -> ProcessGroup | None:
        return self._placement.dp_group

    @property
    def collective_forward(self) -> bool:
        return self._placement.sharded

    @property
    def params_are_master_weights(self) -> bool:
        return self._placement.params_are_master_weights

    @property
    def params_accept_writes(self) -> bool:
        return self._placement.params_accept_writes

    def global_numel(self, parameter: nn.Parameter) -> int:
        return self._placement.global_numel(parameter)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def load_checkpoint(
        self,
        filename: str | os.PathLike[str],
        *,
        map_location: torch.device | str = "cpu",
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = DEFAULT_REVISE_KEYS,
        callback: CheckpointCallback | None = None,
    ) -> StateTree:
        self.logger.info("Loading weights from %s", mask_text(os.fspath(filename)))
        checkpoint = self._read(filename, map_location, callback)
        state = get_model_state(checkpoint, filename)
        omitted = self._require_omitted(checkpoint, filename)
        self.load_model_state_dict(state, strict=strict, revise_keys=revise_keys, omitted=omitted)
        self._frozen = FrozenWeights(self.unwrap_model())
        return {key: value for key, value in checkpoint.items() if key != "state_dict"}

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
        self.logger.info("Resuming from %s", mask_text(os.fspath(filename)))
        used = {"state_dict", "buffers", "generators", "window"}
        if resume_optimizer and self.optim_wrapper_or_none is not None:
            used.add("optimizer")
        checkpoint = self._read(filename, map_location, callback, in_memory=self._parts_in_memory(used))
        if resume_param_scheduler and self.param_schedulers_or_none is not None:
            used.add("param_schedulers")
        # Check for missing parts before changing anything.
        state = get_model_state(checkpoint, filename)
        parts = {key: _part(checkpoint, key, filename) for key in used & {"optimizer", "param_schedulers"}}
        if "optimizer" in parts:
            require_same_class(self.optim_wrapper, parts["optimizer"])
            require_same_parts(self.optim_wrapper, parts["optimizer"], self.unwrap_model())
        omitted = self._require_omitted(checkpoint, filename)
        # Load strictly, because the optimizer state of a different model must not be applied to these parameters.
        report = self.load_model_state_dict(state, strict=True, allow_missing=new_parameters, omitted=omitted)
        if report.missing:
            self.logger.warning(
                "New parameters keep their initial values and have no optimizer state: %s. All other parameters were "
                "restored, but the loss is not comparable to the loss of the saved model.", ", ".join(report.missing),
            )  # fmt: skip
        self._restore_trainable(checkpoint, report.missing, restore="optimizer" in parts)
        write_per_rank_buffers(checkpoint.get("buffers") or {}, self.unwrap_model(), self.world)
        if "optimizer" in parts:
            own = ConfiguredHyperparameters(self.optim_wrapper)
            self._access.load_optim_state(
                self.optim_wrapper, parts["optimizer"], self.unwrap_model(), allow_missing=new_parameters
            )
            self._restore_gradients(checkpoint)
            if resume_param_scheduler:
                self._log_restored(own.differences(self.optim_wrapper))
        if "param_schedulers" in parts:
            self.load_scheduler_state_dict(parts["param_schedulers"])
        meta = checkpoint.get("meta") or {}
        self._compare_runs(meta)
        self._resume_accumulation(meta)
        # Restore the random state last, since no random numbers may be drawn afterwards.
        self._resume_randomness(checkpoint, meta)
        return {key: value for key, value in checkpoint.items() if key not in used}

    def _require_omitted(self, checkpoint: StateTree, filename: str | os.PathLike[str]) -> Collection[str]:
        """Return the names of the frozen parameters that a checkpoint omits; require that the model has their values. Collective.

        Raises:
            CheckpointMismatchError: if it does not, or the strategy cannot find out.
        """
        omitted = omitted_digests(checkpoint)
        if omitted and not self.can_omit_frozen:
            raise CheckpointMismatchError(
                f"{mask_text(os.fspath(filename))} omits {len(omitted)} frozen parameters (save_frozen=False), which "
                f"{type(self).__name__} cannot compare with the weights of its model. Resume with SingleDeviceStrategy, "
                "DDPStrategy or FSDPStrategy, and save a checkpoint with save_frozen=True for this strategy."
            )
        require_omitted_weights(self.unwrap_model(), checkpoint, filename, RankGroup.of())
        return omitted.keys()

    def _find_omittable(self) -> Mapping[str, str]:
        """Return the digests of the frozen parameters that a checkpoint can omit, by name. Collective."""
        if not self.can_omit_frozen or self._frozen is None:
            raise PlacementError(
                f"{type(self).__name__} cannot save checkpoints without frozen parameters, because its engine stores them. Omit "
                "save_frozen=False, or use SingleDeviceStrategy, DDPStrategy or FSDPStrategy."
            )
        unfrozen = () if self._trainable is None else self._trainable.unfrozen
        return self._frozen.find_omittable(self.unwrap_model(), unfrozen, RankGroup.of())

    def _restore_trainable(self, checkpoint: StateTree, new: Sequence[str], *, restore: bool) -> None:
        """Freeze and unfreeze parameters as in the saved run, since hooks may have changed them; log differences.

        Raises:
            CheckpointMismatchError: if the placement determined the trainable parameters when it was prepared.
        """
        model = self.unwrap_model()
        change = find_trainable_difference((checkpoint.get("meta") or {}).get("trainable"), model, new=new)
        if self._trainable is None or not (change.unfrozen or change.frozen):
            return
        if not restore:
            self.logger.warning(
                "Compared with this run, the checkpoint was saved with different trainable parameters: %s. With "
                "resume_optimizer=False, this run keeps its own.", change,
            )  # fmt: skip
            return
        if self._placement.trainable_is_fixed:
            raise CheckpointMismatchError(
                f"When the checkpoint was saved, other parameters were trainable than in this run: {change}. "
                f"{type(self).__name__} determines them before it reads a checkpoint. Set requires_grad of these parameters in "
                "the model as in the checkpoint, or resume with DDPStrategy or FSDPStrategy."
            )
        apply_trainable(change, model)
        self._trainable.adopt()
        self.logger.warning("As in the checkpoint, %s.", change)

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
        parts: StateTree = {}
        omitted = {} if save_frozen else self._find_omittable()
        optim = self.optim_wrapper_or_none
        local_buffers = self._synced_buffers.local_values(self.unwrap_model(), self.dp_group)
        with ExitStack() as evaluating:
            if local_buffers and self._synced_buffers.changes_rank0:
                local_buffers = {name: value.clone() for name, value in local_buffers.items()}
                evaluating.enter_context(self.synchronized_buffers())
            if optim is not None:
                # A schedule-free optimizer has separate training weights; the checkpoint contains the evaluation weights.
                evaluating.enter_context(optim.evaluating())
            # Run this on all ranks, because gathering the sharded state of an optimizer is collective.
            if save_optimizer and optim is not None:
                parts["optimizer"] = self._access.optim_state(optim, self.unwrap_model())
                parts.update(self._accumulation_part(optim))
            if save_param_scheduler and self.param_schedulers_or_none is not None:
                parts["param_schedulers"] = self.scheduler_state_dict()
            if local_buffers:
                parts["buffers"] = stack_per_rank_buffers(local_buffers, self.world)
            generators = all_gather_object(generator_state())
            parts["generators"] = {str(rank): state for rank, state in enumerate(generators)}
            finite = self._weights_are_finite()
            if not finite:
                self.logger.warning(
                    "%s contains NaN or Inf weights: no run will resume from it automatically.", filename
                )
            rank_group = RankGroup.of()
            # Each rank builds the tree because it writes its own shards; rank 0 writes everything else. Tensors stay on
            # their device: the writer moves them to the CPU one at a time.
            parts = {"state_dict": _without_keys(self._model_state(), omitted), **parts}
            facts = {"finite": finite, **({OMITTED: dict(omitted)} if omitted else {})}
            checkpoint = rank_group.run_checked(lambda: self._tree(parts, facts, extra_ckpt, callback))
            if self._placement.full_state:
                checkpoint = gather_tree(checkpoint, rank_group)
            self._writer(write)(checkpoint, filename, rank_group)

    def _tree(
        self,
        parts: StateTree,
        facts: Mapping[str, Any],
        extra_ckpt: Mapping[str, Any] | None,
        callback: CheckpointCallback | None,
    ) -> StateTree:
        checkpoint = dict(parts)
        extra = dict(extra_ckpt or {})
        checkpoint["meta"] = {**extra.pop("meta", {}), **self._meta(), **facts}
        checkpoint.update(extra)
        if callback is not None:
            callback(checkpoint)
        return checkpoint

    def _accumulation_part(self, optim: AnyOptim) -> StateTree:
        """Return the gradients of an incomplete accumulation window as a part of the checkpoint. Collective."""
        window = (
            gather_accumulation_state(optim, self.unwrap_model(), self.world) if self._placement.has_gradients else None
        )
        return {} if window is None else {"window": window}

    def _restore_gradients(self, checkpoint: StateTree) -> None:
        """Replace all gradients with the gradients of the incomplete accumulation window in the checkpoint."""
        self.optim_wrapper.zero_grad()
        if "window" in checkpoint and self._placement.has_gradients:
            restore_accumulation_state(
                self.optim_wrapper, checkpoint["window"], checkpoint["optimizer"], self.unwrap_model(), self.world
            )
            self._placement.note_restored_gradients(self.model)

    def _weights_are_finite(self) -> bool:
        """Return whether all parameters are finite on all ranks. Collective."""
        finite = torch.tensor(int(self._access.weights_are_finite(self.unwrap_model())))
        all_reduce(finite, "min")
        return bool(finite.item())

    def _meta(self) -> dict[str, Any]:
        optim = self.optim_wrapper_or_none
        dtype = None if optim is None else autocast_dtype(optim)
        return {
            "seed": self.seed,
            "time": time.strftime("%Y%m%d_%H%M%S"),
            "stratagem": __version__,
            # torch.load(weights_only=True) rejects torch.__version__, which is a subclass of str, so convert it to str.
            "torch": str(torch.__version__),
            "strategy": type(self).__name__,
            # An evaluation of the checkpoint uses the same precision.
            "autocast": None if dtype is None else str(dtype).removeprefix("torch."),
            "world_size": self.world_size,
            "data_size": self.dp_size,
            "trainable": read_trainable(self.unwrap_model()),
            "train_micro_batch_size_per_gpu": self.dispatch_kwargs.get("train_micro_batch_size_per_gpu"),
        }

    def _read(
        self,
        filename: str | os.PathLike[str],
        map_location: torch.device | str,
        callback: CheckpointCallback | None,
        *,
        in_memory: Collection[str] = (),
    ) -> StateTree:
        # Tensors are copied one at a time from the memory-mapped file to the device, which need not hold the checkpoint too.
        device = "cpu" if map_location == "default" else map_location
        rank_group = RankGroup.of()
        checkpoint = CheckpointLoader.load_checkpoint(filename, device, rank_group=rank_group, in_memory=in_memory)
        if callback is not None:
            rank_group.run_checked(lambda: callback(checkpoint))
        return checkpoint

    def _parts_in_memory(self, restored: Collection[str]) -> Collection[str]:
        """Return the parts of a checkpoint to read to memory instead of mapping them, given those that are restored.

        A single process on the CPU reads its files only once, and the optimizer keeps the memory. The weights are copied to the
        parameters, so until then, they need the memory that the gradients need later. Several ranks map the files, because each
        of them verifies only a part, and so do accelerators, and an optimizer that already has a state.
        """
        if (
            "optimizer" not in restored
            or self.world_size > 1
            or self.world.device.type != "cpu"
            or self._placement.sharded
        ):
            return ()
        has_state = any(wrapper.optimizer.state for wrapper in self.optim_wrapper.each().values())
        return () if has_state else {"state_dict", "optimizer"}

    def _compare_runs(self, meta: Mapping[str, Any]) -> None:
        """Log the differences between this run and the saved run, and their consequences."""
        size, micro = meta.get("world_size"), meta.get("train_micro_batch_size_per_gpu")
        if size is not None and size != self.world_size:
            self.logger.warning(
                "The checkpoint was saved by %s ranks, but this run has %d. Parameters, optimizers and schedules are "
                "restored exactly, but the global batch size and the random numbers of each rank differ.", size, self.world_size,
            )  # fmt: skip
        own = self.dispatch_kwargs.get("train_micro_batch_size_per_gpu")
        if None not in (micro, own) and micro != own:
            self.logger.warning(
                "The checkpoint was saved with micro-batches of %s samples per rank, but this run uses %s. The number "
                "of iterations per epoch changes, and schedules that advance by iteration advance at a different rate "
                "per sample.", micro, own,
            )  # fmt: skip

    def _resume_accumulation(self, meta: Mapping[str, Any]) -> None:
        """Restore the micro-batch counts from the optimizer state, or from ``meta`` if the optimizer was not restored."""
        run_length = RunLength.parse(self.dispatch_kwargs)
        optim = self.optim_wrapper_or_none
        for wrapper in optim.each().values() if optim is not None else ():
            # If this run does not accumulate gradients, this warns about a saved accumulation window that the run cannot
            # complete.
            resumed_alone = wrapper.accumulative_counts == 1 and wrapper.inner_count > 0
            if resumed_alone or (wrapper.accumulative_counts > 1 and run_length.max_iters is not None):
                done = wrapper.inner_count or int(meta.get("iter", 0))
                max_iters = -1 if run_length.max_iters is None else run_length.max_iters
                wrapper.initialize_count_status(self.model, done, max_iters)

    def _resume_randomness(self, checkpoint: StateTree, meta: Mapping[str, Any]) -> None:
        """Restore the seed and the random generators of this rank."""
        seed = meta.get("seed")
        if isinstance(seed, int) and seed != self._seed:
            if self._env.seed_given:
                self.logger.warning(
                    "The checkpoint was saved with seed %d, but this run was started with seed %d. Using the seed of "
                    "the checkpoint, because the data order depends on it.", seed, self._seed,
                )  # fmt: skip
            self._seed = seed
        generators = checkpoint.get("generators")
        state = generators.get(str(self.rank)) if isinstance(generators, Mapping) else None
        if state is None:
            self.logger.warning(
                "The checkpoint does not contain the random states of rank %d. Seeding its random number generators "
                "again.",
                self.rank,
            )
            return
        unknown = restore_generator_state(state)
        if unknown:
            self.logger.warning(
                "The checkpoint does not contain the random states of %s. Seeding these random number generators "
                "again.",
                unknown,
            )


def _without_keys(state: StateTree, omitted: Collection[str]) -> StateTree:
    """Return a state dict without some of its keys; unchanged if there are none to omit."""
    if not omitted:
        return state
    kept = type(state)((key, value) for key, value in state.items() if key not in omitted)
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        kept._metadata = versions  # type: ignore[attr-defined]  # torch's versions of modules
    return kept


def _refuse_lazy_parameters(model: nn.Module) -> None:
    """Require that all parameters have a shape, which those of lazy layers get in their first forward pass.

    Raises:
        PlacementError: if some have none.
    """
    names = [name for name, each in model.named_parameters() if is_lazy(each)]
    if names:
        raise PlacementError(
            f"{len(names)} parameters of {type(model).__name__} have no shape yet, because they belong to lazy layers: "
            f"{some_names(names)}. The optimizer and the strategy require all shapes. Call the model on a batch before you pass "
            "it, or at the end of its constructor, or use layers with explicit sizes, such as nn.Linear instead of nn.LazyLinear."
        )


def _part(checkpoint: StateTree, key: str, filename: str | os.PathLike[str]) -> Any:
    if key not in checkpoint:
        argument = "resume_optimizer" if key == "optimizer" else "resume_param_scheduler"
        raise CheckpointMismatchError(
            f"{os.fspath(filename)} does not contain {key!r}, so the run cannot be resumed exactly. Load only its weights with "
            f"load_from, or resume with {argument}=False."
        )
    return checkpoint[key]
