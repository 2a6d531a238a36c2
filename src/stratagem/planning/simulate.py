"""Run a step of a strategy on fake tensors: the code that trains, as rank 0 of any number of ranks."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, cast, final

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from stratagem.distributed.rendezvous import process_group
from stratagem.model import loss_weight
from stratagem.optim import AccumulatingOptimWrapper, DeferredNonFiniteCheck, OptimSpec, nonfinite
from stratagem.optim.mixed import parts_of
from stratagem.optim.sharded_updates import prepare_sharded_updates
from stratagem.parallel.ddp import Replica
from stratagem.planning.batch import fake_batch
from stratagem.planning.divided_state import OtherRanksState, other_ranks_state
from stratagem.planning.fake_world import (
    fake_copies,
    fake_unsharded,
    fake_world,
    new_fake_mode,
    replaced,
    without_fake_tensors,
)
from stratagem.planning.storage_history import StorageHistory
from stratagem.planning.trace import CollectiveCall, StepTrace, storage_bytes
from stratagem.planning.update_reads import UpdateReads
from stratagem.strategies import BaseStrategy, composed
from stratagem.strategies.choice import choose_strategy, strategy_class
from stratagem.strategies.setup import environment
from stratagem.tensors import dtensor
from stratagem.tensors.dtensor import is_sharded, to_local
from stratagem.utils import generator_state, import_object, restore_generator_state
from stratagem.utils.torch_private import local_shape_and_offset, settle_ddp_buckets

__all__ = ["Job", "Simulation", "simulating"]

_CPU: Final = torch.device("cpu")
# The number of ranks for which the small tensors of trial updates are made.
_TRIAL_RANKS: Final = 2


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is planned.

    Attributes:
        make_model: returns a new model on the meta device.
        optim_wrapper: the configuration of the optimizer wrapper.
        randomness: the randomness settings, which some strategies check.
    """

    make_model: Callable[[], nn.Module]
    optim_wrapper: OptimSpec
    randomness: Mapping[str, Any] | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One simulated step.

    Attributes:
        history: the sizes of all storages.
        gradients: the bytes of the gradients that the optimizer reads.
        calls: the collectives.
        flops: the number of floating-point operations.
        activations: the bytes of what the forward pass leaves to the backward pass.
        largest: the bytes of the largest storage that the step creates.
        main_dtype: the dtype of the operands of most operations.
    """

    history: StorageHistory
    gradients: int
    calls: tuple[CollectiveCall, ...]
    flops: int
    activations: int
    largest: int
    main_dtype: str


@final
class Simulation:
    """A strategy that is prepared with fake tensors.

    Args:
        strategy: the prepared strategy.
    """

    def __init__(self, strategy: BaseStrategy) -> None:
        self.strategy = strategy
        self._warm = False
        self._reads = UpdateReads()
        # The parameters that an optimizer has updated.
        self._updated: set[Tensor] = set()

    @property
    def model(self) -> nn.Module:
        return self.strategy.unwrap_model()

    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def buffers(self) -> list[Tensor]:
        return list(self.model.buffers())

    def optimizer_state(self) -> list[Tensor]:
        """Return the tensors of the optimizers' state."""
        return [
            each
            for wrapper in self.strategy.optim_wrapper.each().values()
            for each in tree_leaves(dict(wrapper.optimizer.state))
            if isinstance(each, Tensor) and not isinstance(each, nn.Parameter)
        ]

    def other_ranks_state(self) -> OtherRanksState | None:
        """Return the optimizer state of other ranks; None if no optimizer stores that of a parameter on one rank."""
        optimizers = [part for wrapper in self._wrappers() for part in parts_of(wrapper.optimizer).values()]
        with self._reads:
            return other_ranks_state(optimizers, self._updated)

    @property
    def reads_values(self) -> bool:
        """Whether an update read unknown values of tensors, for which numbers were assumed."""
        return self._reads.count > 0

    @property
    def accumulation(self) -> int:
        """The largest number of micro-batches before an update."""
        return max(int(wrapper.accumulative_counts) for wrapper in self._wrappers())

    def checkpoint_bytes(self) -> int:
        """Return the size of the weights and the optimizer state of all ranks in a checkpoint."""
        return sum(each.numel() * each.element_size() for each in (*self._saved_weights(), *self.optimizer_state()))

    def own_checkpoint_bytes(self) -> int:
        """Return the size of what this rank has of a checkpoint."""
        return sum(to_local(each).nbytes for each in (*self._saved_weights(), *self.optimizer_state()))

    def _saved_weights(self) -> list[Tensor]:
        """Return the tensors of a checkpoint, which has a shared parameter under each of its names."""
        return [each for each in self.model.state_dict().values() if isinstance(each, Tensor)]

    def _wrappers(self) -> list[Any]:
        return list(self.strategy.optim_wrapper.each().values())

    def gradients_only(self) -> int:
        """Create the optimizer state with an update that follows no forward pass; return the size of the gradients.

        Sparse gradients count as dense ones, because their number of rows depends on the data.
        """
        sparse = self.sparse_parameters()
        nbytes = 0
        for wrapper in self._wrappers():
            trainable = [
                each for group in wrapper.optimizer.param_groups for each in group["params"] if each.requires_grad
            ]
            for parameter in trainable:
                parameter.grad = _without_rows(parameter) if parameter in sparse else torch.zeros_like(parameter)
            self._updated.update(trainable)
            nbytes += storage_bytes(parameter.grad for parameter in trainable if parameter not in sparse)
            nbytes += sum(parameter.nbytes for parameter in trainable if parameter in sparse)
            with self._reads, self._reads.counting(wrapper.optimizer):
                wrapper.optimizer.step()
            wrapper.optimizer.zero_grad()
        return nbytes

    def sparse_parameters(self) -> set[Tensor]:
        """Return the parameters of layers such as ``nn.Embedding(sparse=True)``, whose gradients are sparse."""
        return {
            parameter
            for module in self.model.modules()
            if getattr(module, "sparse", False) is True
            for parameter in module.parameters(recurse=False)
        }

    def step(self, batch: Any) -> StepRecord:
        """Run one optimizer step with the same batch in each micro-batch, and record it.

        The first call also runs a step that is not recorded, which creates the optimizer state and lets FSDP learn the order of
        its modules. If more than three micro-batches are accumulated, three are run: the first, one that counts as often as
        there are others, and the last.

        Args:
            batch: a batch on the meta device.
        """
        batch = fake_batch(batch, self.strategy.world.device)
        if not self._warm:
            with self._settling_buckets():
                self._train(batch, trace=None)
            self._warm = True
        known = {
            "parameters": self.parameters(),
            "buffers": self.buffers(),
            "optimizer state": self.optimizer_state(),
            "batch": [each for each in tree_leaves(batch) if isinstance(each, Tensor)],
        }
        trace = StepTrace(known)
        gradients, (calls, flops) = self._train(batch, trace)
        return StepRecord(
            history=trace.history(),
            gradients=gradients,
            calls=calls,
            flops=flops,
            activations=trace.activations,
            largest=trace.largest,
            main_dtype=trace.main_dtype,
        )

    def micro_batch(self, batch: Any, hooked: Callable[[StepTrace], None]) -> tuple[StepTrace, int, int]:
        """Run one micro-batch of an accumulation window, without an update.

        Args:
            batch: a batch on the meta device.
            hooked: is called with the trace before the micro-batch.

        Returns:
            The trace, the bytes of the batch, and those of the weight of the loss; 0 without one.
        """
        batch = fake_batch(batch, self.strategy.world.device)
        tensors = [each for each in tree_leaves(batch) if isinstance(each, Tensor)]
        trace = StepTrace({"parameters": self.parameters(), "buffers": self.buffers(), "batch": tensors})
        hooked(trace)
        step: Any = self.strategy.model.train_step
        with trace:
            step(batch, optim_wrapper=self.strategy.optim_wrapper)
        weight = self._wrappers()[0].weight
        return trace, storage_bytes(tensors), weight.nbytes if isinstance(weight, Tensor) else 0

    @contextmanager
    def _settling_buckets(self) -> Iterator[None]:
        """Note the order of gradients in the first step, after which DDP decides which gradients are sent together."""
        replicas = [each for each in self.strategy.model.modules() if isinstance(each, Replica)]
        order: list[Tensor] = []
        hooks = [
            parameter.register_post_accumulate_grad_hook(order.append)
            for replica in replicas
            for parameter in replica.parameters()
            if parameter.requires_grad
        ]
        yield
        for hook in hooks:
            hook.remove()
        for replica in replicas:
            settle_ddp_buckets(replica, order)

    def _train(self, batch: Any, trace: StepTrace | None) -> tuple[int, tuple[tuple[CollectiveCall, ...], int]]:
        """Run a step; return the size of the gradients, the collectives and the number of floating-point operations."""
        step: Any = self.strategy.model.train_step
        wrappers = self._wrappers()
        skipped = max(0, self.accumulation - 3)
        seen: list[Tensor] = []
        calls: list[CollectiveCall] = []
        flops = 0
        with ExitStack() as stack:
            for wrapper in wrappers:
                stack.enter_context(_noting_gradients(wrapper, seen, trace, self._reads, self._updated))
            if trace is not None:
                stack.enter_context(trace)
            for index in range(self.accumulation - skipped):
                if trace is not None:
                    trace.begin_micro_batch()
                step(batch, optim_wrapper=self.strategy.optim_wrapper)
                repeated = 1
                if index == 1 and skipped:
                    repeated += skipped
                    for wrapper in wrappers:
                        _skip_micro_batches(wrapper, skipped)
                if trace is not None:
                    new_calls, new_flops = trace.take_counts()
                    calls += new_calls * repeated
                    flops += new_flops * repeated
        return storage_bytes(seen), (tuple(calls), flops)


def _without_rows(parameter: Tensor) -> Tensor:
    """Return a sparse gradient of a parameter without any row."""
    indices = torch.empty((1, 0), dtype=torch.int64, device=parameter.device)
    values = parameter.new_empty((0, *parameter.shape[1:]))
    return torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)


def _skip_micro_batches(wrapper: Any, count: int) -> None:
    """Count micro-batches as if they had been run."""
    state = wrapper.accumulation_state()
    wrapper.inner_count += count
    weighted = state["weighted"] + count if state["weighted"] else 0
    wrapper.resume_accumulation({**state, "pending": state["pending"] + count, "weighted": weighted})


@contextmanager
def _noting_gradients(
    wrapper: Any, seen: list[Tensor], trace: StepTrace | None, reads: UpdateReads, updated: set[Tensor]
) -> Iterator[None]:
    """Note the gradients that an optimizer reads in ``seen``, and their parameters in ``updated``."""
    original = wrapper.step

    def step(**kwargs: Any) -> Any:
        parameters = [
            each for group in wrapper.optimizer.param_groups for each in group["params"] if each.grad is not None
        ]
        updated.update(parameters)
        gradients = [each.grad for each in parameters]
        if trace is not None:
            trace.label(gradients, "gradients")
        seen.extend(gradients)
        with reads, reads.counting(wrapper.optimizer):
            return original(**kwargs)

    wrapper.step = step
    try:
        yield
    finally:
        del wrapper.step


@contextmanager
def simulating(
    job: Job, strategy: Mapping[str, Any] | str, world: int, *, ranks_per_node: int = 8
) -> Iterator[Simulation]:
    """Prepare a strategy as rank 0 of ``world`` ranks, without allocating memory for its tensors.

    Raises:
        StratagemError: (a subclass) if the strategy refuses this model or this number of ranks.
    """
    kind = strategy_class(strategy)
    own: dict[str, Any] = {"type": strategy} if isinstance(strategy, str) else dict(strategy)
    distributed = kind is None or kind.__name__ != "SingleDeviceStrategy"
    if kind is not None and kind.__name__ == "DDPStrategy":
        # The constructor would compare shapes between ranks and broadcast values.
        own["ddp_kwargs"] = {**(own.get("ddp_kwargs") or {}), "init_sync": False}
    generators = generator_state()
    mode = new_fake_mode()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Comparing addresses shows whether a tensor was copied; for fake tensors, the address is always 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", "Set timeout is now only supported")  # of a simulated process group
        stack.callback(restore_generator_state, generators)
        # With two meshes, it warns of each gather that is split in two.
        redistribution = logging.getLogger("torch.distributed.tensor._redistribute")
        stack.enter_context(replaced(redistribution, "disabled", True))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stratagem-plan-"))
        if distributed:
            stack.enter_context(fake_world(world, ranks_per_node))
        # On every machine, the kernels are those of the CPU.
        stack.enter_context(replaced(environment, "current_device", lambda: _CPU))
        stack.enter_context(replaced(process_group, "pick_device", lambda *_: _CPU))
        built = choose_strategy(
            own,
            launcher="pytorch" if distributed else "none",
            work_dir=folder,
            experiment_name=None,
            env_cfg=None,
            randomness=job.randomness,
            auto_scale_lr=None,
            log_level="ERROR",
        )
        stack.callback(built.close)
        for owner, name, value in _replacements(mode, stack):
            stack.enter_context(replaced(owner, name, value))
        model = job.make_model()
        stack.enter_context(_uncompiled())
        if kind is None or kind.__name__ != "FSDPStrategy":
            fake_copies(mode, model, built.world.device)
            stack.enter_context(mode)
        built.prepare(model, optim_wrapper=job.optim_wrapper, dispatch_kwargs={"max_iters": 10**9})
        _guard_against_nonfinite(built)
        for module in built.model.modules():
            if isinstance(module, Replica):
                # The reducer expects a result of each all-reduce, which the simulated process group does not have.
                module.register_comm_hook(None, lambda _, bucket: _all_reduced(bucket.buffer()))
        yield Simulation(built)


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled functions and modules without the compiler, whose kernels need memory."""
    # Importing the compiler takes a second, and nothing is compiled before it is imported.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _guard_against_nonfinite(strategy: BaseStrategy) -> None:
    """Check the gradients for NaN and Inf, as a run does by default on accelerators."""
    for wrapper in strategy.optim_wrapper.each().values():
        if isinstance(wrapper, AccumulatingOptimWrapper) and wrapper.nonfinite is None:
            guard = DeferredNonFiniteCheck(wrapper.optimizer)
            wrapper.gradient_policy = replace(wrapper.gradient_policy, guard=guard)


def _all_reduced(buffer: Tensor) -> torch.futures.Future[Tensor]:
    torch_dist.all_reduce(buffer)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


def _replacements(mode: FakeTensorMode, stack: ExitStack) -> list[tuple[Any, str, Any]]:
    """Return the methods that compute or move values, with functions that only create fake tensors."""
    # Imported here because importing torch's FSDP takes a second.
    fsdp = import_object("stratagem.parallel.fsdp.placement:FSDPPlacement")
    apply_before = nn.Module._apply
    allocate_before = fsdp._allocate
    register_before = fsdp._register_parameters

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        with torch.no_grad():
            tensors = [*module.parameters(recurse=recurse), *module.buffers(recurse=recurse)]
            if all(function(each) is each for each in tensors):
                return module
        return cast("nn.Module", apply_before(module, function, recurse))  # type: ignore[no-untyped-call]  # torch's

    # Fake parameters that replace those that are not sharded, which torch cannot swap with fake ones.
    unsharded: dict[Tensor, Tensor] = {}

    def allocate(placement: Any, model: nn.Module, world: Any) -> None:
        stack.enter_context(mode)
        with fake_unsharded(model, world.device, unsharded):
            allocate_before(placement, model, world)

    def register(placement: Any, before: Mapping[str, Tensor], model: nn.Module) -> None:
        register_before(placement, {name: unsharded.get(each, each) for name, each in before.items()}, model)

    def skip(*_: Any, **__: Any) -> None:
        """Leave the tensors without values."""

    def unchanged(_: BaseStrategy, model: nn.Module) -> nn.Module:
        return model

    # With fake tensors, transformers assumes that a batch may contain packed sequences, and creates masks that real tensors with
    # one sequence in each row do not need.
    masks = sys.modules.get("transformers.masking_utils")
    own_masks = [(masks, "find_packed_sequence_indices", lambda *_, **__: None)] if masks is not None else []
    return [
        *own_masks,
        # Decide how sharded parameters are updated, without comparing the values of trial updates. The small tensors need not be
        # divisible by a large number of ranks.
        (
            composed,
            "prepare_sharded_updates",
            without_fake_tensors(partial(prepare_sharded_updates, simulated_ranks=_TRIAL_RANKS)),
        ),
        (dtensor, "local_shape_and_offset", without_fake_tensors(local_shape_and_offset)),
        # As on accelerators, where the number of targets is not read.
        (nonfinite, "is_plain", lambda tensor: not is_sharded(tensor)),
        (loss_weight, "_count", lambda targets, ignored: (targets != ignored).sum()),
        # The scaler of float16 reads whether gradients are finite.
        (
            torch.amp.GradScaler,
            "_maybe_opt_step",
            lambda _, optimizer, __, *args, **kwargs: optimizer.step(*args, **kwargs),
        ),
        (torch, "get_rng_state", without_fake_tensors(torch.get_rng_state)),
        (torch, "set_rng_state", without_fake_tensors(torch.set_rng_state)),
        (nn.Module, "_apply", apply),
        (fsdp, "_allocate", allocate),
        (fsdp, "_register_parameters", register),
        (fsdp, "_materialize", skip),
        (BaseStrategy, "_init_model_weights", unchanged),
    ]
