"""Prepare, load, resume and save, written once for every torch-native placement."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from stratagem._version import __version__
from stratagem.checkpoint import (
    DEFAULT_REVISE_KEYS,
    CheckpointLoader,
    LoadReport,
    StateTree,
    gather_tree,
    get_model_state,
    save_checkpoint,
)
from stratagem.distributed import RankGroup, all_gather_object, all_reduce, is_distributed
from stratagem.errors import CheckpointMismatchError, ConfigValueError, LaunchError, StratagemError
from stratagem.parallel import AnyOptim, Placement, Steps
from stratagem.strategies.base import BaseStrategy, CheckpointCallback, CheckpointWriter
from stratagem.strategies.setup.run_length import RunLength
from stratagem.strategies.state.accumulation_state import gather_accumulation_state, restore_accumulation_state
from stratagem.strategies.state.configured_hyperparameters import ConfiguredHyperparameters
from stratagem.strategies.state.per_rank_buffers import read_per_rank_buffers, write_per_rank_buffers
from stratagem.strategies.state.state_io import StateAccess, TorchState
from stratagem.utils import generator_state, mask_text, restore_generator_state

__all__ = ["ComposedStrategy"]


class ComposedStrategy(BaseStrategy):
    """A strategy made of a placement; a final class chooses which and adds nothing else."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        with ExitStack() as undo:
            undo.callback(self.close)
            self._placement = self._make_placement()
            self._access = self._make_access()
            undo.pop_all()

    @abstractmethod
    def _make_placement(self) -> Placement:
        """Return how this strategy places a model, or refuse to in this environment."""

    def _require_processes(self) -> None:
        """Refuse to work in a process that no launcher started.

        Raises:
            LaunchError: if none did.
        """
        if not is_distributed():
            raise LaunchError(
                f"{type(self).__name__} needs processes that a launcher started, and this one was started by none. Use "
                "`stratagem train CONFIG --nproc N`, `torchrun`, `srun` or `mpirun`; on one process use SingleDeviceStrategy."
            )

    def _make_access(self) -> StateAccess:
        """Return how the state of what this strategy's placement placed is read and written."""
        return TorchState()

    def _writer(self, write: CheckpointWriter) -> CheckpointWriter:
        """Return what writes a checkpoint where ``write`` was asked for: an engine may have a form of its own."""
        return write

    def prepare(
        self,
        model: nn.Module | Mapping[str, Any],
        *,
        optim_wrapper: Any = None,
        param_scheduler: Any = None,
        compile: bool | Mapping[str, Any] = False,  # noqa: A002 -- the contract's name
        dispatch_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        run_length = dispatch_kwargs or {}
        RunLength.parse(run_length)
        optim_due = optim_wrapper is not None and BaseStrategy.optim_wrapper.get(self) is None
        schedulers_due = param_scheduler is not None and BaseStrategy.param_schedulers.get(self) is None
        if schedulers_due and not optim_due and BaseStrategy.optim_wrapper.get(self) is None:
            raise ConfigValueError("param_scheduler schedules an optimizer's values, but no optim_wrapper was given.")
        if BaseStrategy.model.get(self) is None:
            self.dispatch_kwargs.update(run_length)
            self._place(model, optim_wrapper, compile)
        elif optim_due or schedulers_due:
            # Prepared for evaluation first; now it is to be trained.
            self.dispatch_kwargs.update(run_length)
            if optim_due:
                self._adopt_optim(self.build_optim_wrapper(optim_wrapper, self.unwrap_model()))
        if schedulers_due:
            self.param_schedulers = self.build_param_scheduler(param_scheduler, self.optim_wrapper)
        return self._prepared_components()

    def _place(
        self,
        model: nn.Module | Mapping[str, Any],
        optim_wrapper: Any,
        compile: bool | Mapping[str, Any],  # noqa: A002
    ) -> None:
        with self._placement.construction(self.world):
            built = self.build_model(model)
        steps = Steps(
            init_and_sync=self._init_model_weights,
            init_local=self._init_local_model_weights,
            compile=lambda module: self.compile_model(module, compile),
            make_optim=None
            if optim_wrapper is None
            else lambda module: self.build_optim_wrapper(optim_wrapper, module),
        )
        placed = self._placement.place(built, steps, self.world)
        self.model = placed.model
        if placed.optim is not None:
            self._adopt_optim(placed.optim)

    def _adopt_optim(self, optim: AnyOptim) -> None:
        """Wire an optimizer wrapper to the placed model: gradient exchange, accumulation, learning rates."""
        run_length = RunLength.parse(self.dispatch_kwargs)
        self._placement.bind(optim, self.unwrap_model())
        wrappers = optim.each()
        accumulates = any(wrapper.accumulative_counts > 1 for wrapper in wrappers.values())
        policy = self._placement.gradient_policy(self.model, accumulates=accumulates)
        for wrapper in wrappers.values():
            if wrapper.accumulative_counts > 1:
                if run_length.max_iters is None:
                    raise ConfigValueError(
                        f"accumulative_counts={wrapper.accumulative_counts} needs dispatch_kwargs['max_iters'], the "
                        "micro-batches of the run: the last window may be shorter, and is averaged over its own length."
                    )
                wrapper.initialize_count_status(self.model, run_length.cur_iter, run_length.max_iters)
            wrapper.gradient_policy = policy
        self.optim_wrapper = optim
        try:
            self._scale_lr()
        except StratagemError:
            # A second prepare must build it anew rather than train with learning rates that were not scaled.
            BaseStrategy.optim_wrapper.clear(self)
            raise

    def unwrap_model(self) -> nn.Module:
        return self._placement.unwrap(self.model)

    def _model_state(self) -> StateTree:
        return self._access.model_state(self.unwrap_model())

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
        self.logger.info("Load checkpoint from %s", mask_text(os.fspath(filename)))
        checkpoint = self._read(filename, map_location, callback)
        state = get_model_state(checkpoint, filename)
        self.load_model_state_dict(state, strict=strict, revise_keys=revise_keys)
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
        self.logger.info("Resume checkpoint from %s", mask_text(os.fspath(filename)))
        checkpoint = self._read(filename, map_location, callback)
        used = {"state_dict", "buffers", "generators", "window"}
        if resume_optimizer and BaseStrategy.optim_wrapper.get(self) is not None:
            used.add("optimizer")
        if resume_param_scheduler and BaseStrategy.param_schedulers.get(self) is not None:
            used.add("param_schedulers")
        # Before anything is changed.
        state = get_model_state(checkpoint, filename)
        parts = {key: _part(checkpoint, key, filename) for key in used & {"optimizer", "param_schedulers"}}
        # Another model's moments would be applied to this one's parameters.
        report = self.load_model_state_dict(state, strict=True, allow_missing=new_parameters)
        if report.missing:
            self.logger.warning(
                "New parameters begin as they were initialised, without optimizer state: %s. All others go on as saved, but "
                "the losses are another model's.", ", ".join(report.missing),
            )  # fmt: skip
        write_per_rank_buffers(checkpoint.get("buffers") or {}, self.unwrap_model(), self.world)
        if "optimizer" in parts:
            own = ConfiguredHyperparameters(self.optim_wrapper)
            self._access.load_optim_state(
                self.optim_wrapper, parts["optimizer"], self.unwrap_model(), allow_missing=new_parameters
            )
            self._resume_window(checkpoint)
            if resume_param_scheduler:
                self._say_kept(own.differences(self.optim_wrapper))
        if "param_schedulers" in parts:
            self.load_scheduler_state_dict(parts["param_schedulers"])
        meta = checkpoint.get("meta") or {}
        self._compare_runs(meta)
        self._resume_accumulation(meta)
        # Last: nothing after it may draw a random number.
        self._resume_randomness(checkpoint, meta)
        return {key: value for key, value in checkpoint.items() if key not in used}

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
        parts: StateTree = {}
        optim = BaseStrategy.optim_wrapper.get(self)
        # The weights to evaluate with, where an optimizer trains with others.
        with nullcontext() if optim is None else optim.evaluating():
            # On every rank: an optimizer whose state is spread over ranks puts it together in a collective.
            if save_optimizer and optim is not None:
                parts["optimizer"] = self._access.optim_state(optim, self.unwrap_model())
                parts.update(self._open_window(optim))
            if save_param_scheduler and BaseStrategy.param_schedulers.get(self) is not None:
                parts["param_schedulers"] = self.scheduler_state_dict()
            buffers = read_per_rank_buffers(self.unwrap_model(), self.world)
            if buffers:
                parts["buffers"] = buffers
            generators = all_gather_object(generator_state())
            parts["generators"] = {str(rank): state for rank, state in enumerate(generators)}
            finite = self._weights_are_finite()
            if not finite:
                self.logger.warning("%s holds weights that are not finite: no run will go on from it.", filename)
            rank_group = RankGroup.of()
            # Each rank makes the tree, for it writes what it holds of sharded tensors; all the rest is the first rank's.
            # Where the tensors are: the writer moves them to the CPU one at a time.
            parts = {"state_dict": self._model_state(), **parts}
            checkpoint = rank_group.run_checked(lambda: self._tree(parts, {"finite": finite}, extra_ckpt, callback))
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

    def _open_window(self, optim: AnyOptim) -> StateTree:
        """Return the part of a checkpoint with the gradients that wait for their update; none where none wait. Collective."""
        window = (
            gather_accumulation_state(optim, self.unwrap_model(), self.world) if self._placement.has_gradients else None
        )
        return {} if window is None else {"window": window}

    def _resume_window(self, checkpoint: StateTree) -> None:
        """Take up the gradients that waited for their update, in the place of any that are there."""
        self.optim_wrapper.zero_grad()
        if "window" in checkpoint and self._placement.has_gradients:
            restore_accumulation_state(
                self.optim_wrapper, checkpoint["window"], checkpoint["optimizer"], self.unwrap_model(), self.world
            )
            self._placement.note_restored_gradients(self.model)

    def _weights_are_finite(self) -> bool:
        """Tell whether every value of the parameters is finite, on every rank. Collective."""
        finite = torch.tensor(int(self._access.weights_are_finite(self.unwrap_model())))
        all_reduce(finite, "min")
        return bool(finite.item())

    def _meta(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "time": time.strftime("%Y%m%d_%H%M%S"),
            "stratagem": __version__,
            # A plain text: torch.load(weights_only=True) refuses the class that torch gives it.
            "torch": str(torch.__version__),
            "strategy": type(self).__name__,
            "world_size": self.world_size,
            "data_size": self.dp_size,
            "train_micro_batch_size_per_gpu": self.dispatch_kwargs.get("train_micro_batch_size_per_gpu"),
        }

    def _read(
        self, filename: str | os.PathLike[str], map_location: torch.device | str, callback: CheckpointCallback | None
    ) -> StateTree:
        # Each rank needs a part of the tensors, which it takes out of those that are mapped into the CPU's memory.
        own = torch.device("cpu") if self._placement.sharded else self.world.device
        device = own if map_location == "default" else map_location
        rank_group = RankGroup.of()
        checkpoint = CheckpointLoader.load_checkpoint(filename, device, rank_group=rank_group)
        if callback is not None:
            rank_group.run_checked(lambda: callback(checkpoint))
        return checkpoint

    def _compare_runs(self, meta: Mapping[str, Any]) -> None:
        """Say in the log what differs from the run that was saved, and what follows from it."""
        size, micro = meta.get("world_size"), meta.get("train_micro_batch_size_per_gpu")
        if size is not None and size != self.world_size:
            self.logger.warning(
                "The checkpoint was saved by %s ranks, this run has %d: parameters, optimizers and schedules go on equal; "
                "the global batch and each rank's random numbers differ.", size, self.world_size,
            )  # fmt: skip
        own = self.dispatch_kwargs.get("train_micro_batch_size_per_gpu")
        if None not in (micro, own) and micro != own:
            self.logger.warning(
                "The checkpoint was saved with %s samples in a rank's micro-batch, this run has %s: iterations are of another "
                "size, so epochs and schedules by iteration are counted differently.", micro, own,
            )  # fmt: skip

    def _resume_accumulation(self, meta: Mapping[str, Any]) -> None:
        """Have windows go on where they were: after the micro-batches that the optimizer's state, or else the meta, tells."""
        run_length = RunLength.parse(self.dispatch_kwargs)
        optim = BaseStrategy.optim_wrapper.get(self)
        for wrapper in optim.each().values() if optim is not None else ():
            # Also a run that accumulates no longer must warn of a window that it cannot finish.
            resumed_alone = wrapper.accumulative_counts == 1 and wrapper.inner_count > 0
            if resumed_alone or (wrapper.accumulative_counts > 1 and run_length.max_iters is not None):
                done = wrapper.inner_count or int(meta.get("iter", 0))
                most = -1 if run_length.max_iters is None else run_length.max_iters
                wrapper.initialize_count_status(self.model, done, most)

    def _resume_randomness(self, checkpoint: StateTree, meta: Mapping[str, Any]) -> None:
        """Take up the saved seed and this rank's generators where they were."""
        seed = meta.get("seed")
        if isinstance(seed, int) and seed != self._seed:
            if self._env.seed_given:
                self.logger.warning(
                    "The checkpoint's seed is %d, this run's is %d. The run goes on with the checkpoint's, since the order "
                    "of the data hangs on it.", seed, self._seed,
                )  # fmt: skip
            self._seed = seed
        generators = checkpoint.get("generators")
        state = generators.get(str(self.rank)) if isinstance(generators, Mapping) else None
        if state is None:
            self.logger.warning(
                "The checkpoint holds no state of the random generators for rank %d; they go on freshly seeded.",
                self.rank,
            )
            return
        unknown = restore_generator_state(state)
        if unknown:
            self.logger.warning(
                "The generators of %s are not those of the checkpoint; they go on freshly seeded.", unknown
            )


def _part(checkpoint: StateTree, key: str, filename: str | os.PathLike[str]) -> Any:
    if key not in checkpoint:
        argument = "resume_optimizer" if key == "optimizer" else "resume_param_scheduler"
        raise CheckpointMismatchError(
            f"{os.fspath(filename)} has no {key!r}, so the run cannot go on as it was. Load its weights alone with "
            f"load_from, or resume with {argument}=False."
        )
    return checkpoint[key]
