"""Parameters sharded across ranks with torch's ``fully_shard``, optionally with tensor parallelism."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast, final

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from stratagem.distributed import World, all_reduce, broadcast_object
from stratagem.errors import ConfigValueError, PlacementError, StateError
from stratagem.model import convert_sync_batchnorm, is_model_wrapper
from stratagem.optim import BaseOptimWrapper
from stratagem.optim.gradient_policy import NO_CONTEXT, GradientPolicy
from stratagem.optim.mixed import parts_of
from stratagem.parallel.activation_checkpointing import checkpoint_activations
from stratagem.parallel.deferred_init.materialize import InitialWeights, make_contiguous, require_same_model
from stratagem.parallel.fsdp.gradient_hooks import keep_gradient_hooks, require_no_gradient_hooks
from stratagem.parallel.fsdp.mesh import Layout, Meshes
from stratagem.parallel.fsdp.options import FSDPOptions, Precision, require_equal_randomness
from stratagem.parallel.fsdp.tensor_parallel import apply_plan
from stratagem.parallel.local_gradients import average_gradients
from stratagem.parallel.placement import AnyOptim, Placed, Placement, Steps
from stratagem.parallel.trainable import TrainableChange
from stratagem.parallel.wrap_policy import select_modules, tied_outside
from stratagem.tensors.dtensor import is_sharded
from stratagem.utils import generator_state, restore_generator_state
from stratagem.utils.names import did_you_mean, some_names
from stratagem.utils.torch_private import (
    accumulate_in_reduce_dtype,
    gather_scalars,
    initialize_fsdp_root,
    reduce_held_gradients,
    refresh_fsdp_dtypes,
    unsharded_class,
)

__all__ = ["FSDPPlacement"]

_STEPS = ("train_step", "val_step", "test_step")


@final
class FSDPPlacement(Placement):
    """Shards parameters, gradients and the optimizer state across ranks.

    Args:
        logger: the logger for the names of wrapped modules.
        options: the FSDP options.
        world: the ranks and the device of this process.
        diff_rank_rng: whether ranks draw different random numbers in training.
        full_state: whether checkpoints are gathered and written by rank 0.

    Raises:
        PlacementError: if ``replicate`` and ``tp`` do not divide the world size.
    """

    sharded = True
    reports_gradient_hooks = True
    # Until gradients are reduced, torch keeps them unsharded in internal attributes.
    has_gradients = False

    def __init__(
        self,
        logger: logging.Logger,
        options: FSDPOptions,
        world: World,
        *,
        diff_rank_rng: bool = False,
        full_state: bool = False,
    ) -> None:
        self._logger = logger
        self._options = options
        self._layout = Layout.divide(world.size, replicate=options.replicate, tp=options.tp)
        require_equal_randomness(options.tp, diff_rank_seed=diff_rank_rng)
        self._diff_rank_rng = diff_rank_rng
        self.full_state = full_state
        self.matrix_updates = options.matrix_updates
        self._weights = InitialWeights(world, options.initial_weights)
        self._meshes: Meshes | None = None
        self._sync = True
        self._weights_missing = options.skip_init_weights
        self._names_before: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._frozen_in_window: list[nn.Parameter] = []

    def construction(self, world: World) -> AbstractContextManager[object]:
        return self._weights.recording()

    def dp_rank(self, world: World) -> int:
        return self._layout.dp_rank(world.rank)

    def dp_size(self, world: World) -> int:
        return self._layout.dp_size

    @property
    def dp_group(self) -> torch_dist.ProcessGroup | None:
        return None if self._meshes is None else self._meshes.data

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        self._refuse(model)
        if not self._options.skip_init_weights:
            self._weights.initialize(model, steps.init_local)
        if self._options.sync_bn is not None:
            model = convert_sync_batchnorm(model, self._options.sync_bn)
        require_same_model(model)
        parameters_before = dict(model.named_parameters())
        require_no_gradient_hooks(model, self._options.ignored_parameters(model))
        metas = self._weights.detach_storage(model)
        converted = make_contiguous(model)
        if converted:
            self._logger.info(
                "FSDP shards contiguous parameters, so these were converted from another memory format: %s.",
                some_names(converted),
            )
        self._meshes = Meshes.make(self._layout, world)
        compiled = self._shard(model, world, steps.compile_options)
        self._allocate(model, world)
        self._materialize(model, metas)
        self._register_parameters(parameters_before, model)
        keep_gradient_hooks(parameters_before, model, self._logger)
        if not compiled:
            model = steps.compile(model)
        self._guard(model)
        return Placed(model=model, optim=steps.make_optim(model) if steps.make_optim else None)

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def gradient_policy(self, model: nn.Module, *, accumulates: bool) -> GradientPolicy:
        if accumulates:
            accumulate_in_reduce_dtype(model)
        return GradientPolicy(
            sync_context=self._set_grad_sync,
            always_set_grad_sync=accumulates,
            complete=functools.partial(self._complete_gradients, model),
            discard_pending=cast("FSDPModule", model).reset_iter_state,
        )

    def _set_grad_sync(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        # The backward pass reads this flag after the context exits, so the flag is not reset here.
        if sync != self._sync:
            for module in _sharded_modules(model):
                module.set_requires_gradient_sync(sync, recurse=False)
            self._sync = sync
        return NO_CONTEXT

    def bind(self, optim: AnyOptim, model: nn.Module) -> None:
        for wrapper in optim.each().values():
            self._bind(wrapper, dict(model.named_parameters()))

    # ---- building ---------------------------------------------------------------------------------------------------

    def _refuse(self, model: nn.Module) -> None:
        if is_model_wrapper(model) or isinstance(model, FSDPModule):
            raise PlacementError(
                f"The model is already wrapped, in a {type(model).__name__}. Pass the model itself: the strategy shards it."
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            self._logger.warning("%s has no trainable parameters but will still be sharded.", type(model).__name__)
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
                raise PlacementError(
                    f"{name!r} has sparse gradients (sparse=True), which FSDP cannot reduce. Use sparse=False, or DDPStrategy."
                )
        self._log_cast_inputs()
        if self._options.sync_bn is not None and not torch.accelerator.is_available():
            raise PlacementError(
                "torch's SyncBatchNorm requires an accelerator, and this run is on the CPU. Omit sync_bn and use BatchNorm, or "
                "a normalization that does not depend on the batch, such as GroupNorm."
            )

    def _log_cast_inputs(self) -> None:
        precision = self._options.precision
        if precision.param_dtype in (torch.bfloat16, torch.float16) and precision.cast_forward_inputs:
            self._logger.info(
                "mixed_precision casts all floating-point tensors of a batch to %s, including regression targets. If that is too "
                "inaccurate, set mixed_precision=dict(..., cast_forward_inputs=False) and cast the inputs in the model.",
                str(precision.param_dtype).removeprefix("torch."),
            )

    def _shard(self, model: nn.Module, world: World, compile_options: Mapping[str, Any] | None) -> bool:
        """Shard a model on the meta device: layers of the tensor-parallel plan, then each block, then the rest.

        Return whether the blocks were compiled as the option ``compile`` requests.
        """
        options, meshes = self._options, cast("Meshes", self._meshes)
        blocks = self._blocks(model)
        ignored = options.ignored_parameters(model)
        if options.tp > 1:
            apply_plan(model, options.tp_plan, meshes.tp)
        checkpointed = checkpoint_activations(model, options.activation_checkpointing, options.wrap_policy)
        self._compile(blocks)
        compiled = self._compile_blocks_instead(blocks, compile_options)
        arguments: dict[str, Any] = {
            "mesh": meshes.shard,
            "mp_policy": _precision(options.precision),
            # Pin the memory, because copies from pinned memory to an accelerator are faster.
            "offload_policy": CPUOffloadPolicy(pin_memory=world.device.type != "cpu")
            if options.cpu_offload
            else OffloadPolicy(),
            "ignored_params": set(ignored.values()),
        }
        last = next(reversed(blocks), None)
        # Innermost first: the parameters of a nested block belong to the nested block, not to the block around it.
        for name, block in sorted(blocks.items(), key=lambda item: -item[0].count(".")):
            reshard = _reshard(options.reshard_of(name), self._layout.shard)
            if reshard is None and name == last:
                reshard = False  # The backward pass begins with this block and would gather its parameters again.
            fully_shard(block, reshard_after_forward=reshard, **arguments)
        fully_shard(model, reshard_after_forward=_reshard(options.reshard_of(""), self._layout.shard), **arguments)
        self._prefetch(list(blocks.values()))
        self._logger.info(
            "Sharded %s across %d ranks (replicate %d, tp %d): %d wrapped modules%s, %d unsharded parameters, %d "
            "checkpointed modules.",
            unsharded_class(model).__name__, self._layout.shard, self._layout.replicate, self._layout.tp, len(blocks),
            f" ({_some(list(blocks))})" if blocks else "", len(ignored), len(checkpointed),
        )  # fmt: skip
        return compiled

    def _blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        options = self._options
        blocks = select_modules(model, options.wrap_policy, "wrap_policy")
        options.require_reshard_patterns(list(blocks))
        for name, block in blocks.items():
            ties = tied_outside(model, block)
            if ties:
                raise PlacementError(
                    f"wrap_policy selects {name!r}, which shares a weight with {ties[0]!r} outside of it. The weight "
                    "would be sharded twice and would no longer be tied. Exclude one of them, or select the module "
                    "that contains both."
                )
        return blocks

    def _compile(self, blocks: Mapping[str, nn.Module]) -> None:
        options = self._options.compile_blocks
        if options is False:
            return
        if not blocks:
            raise ConfigValueError("compile_blocks compiles the modules that wrap_policy selects, but it selects none.")
        for block in blocks.values():
            block.compile(**({} if options is True else options))

    def _compile_blocks_instead(self, blocks: Mapping[str, nn.Module], options: Mapping[str, Any] | None) -> bool:
        """Compile each block if ``compile`` requests to compile the model; return whether that was possible.

        FSDP gathers the parameters of a block in hooks, which the compiler cannot trace. A compiled model would be split at each
        block, and ``fullgraph=True`` would fail.
        """
        if options is None or not blocks:
            return False
        arguments = {name: value for name, value in options.items() if name != "target"}
        if self._options.compile_blocks or options.get("target", "forward") != "forward":
            self._logger.warning(
                "compile: the compiler cannot trace how FSDP gathers parameters, so the model is split at each of the %d modules "
                "that wrap_policy selects. To compile only these modules, set compile_blocks=%s in the strategy, and omit "
                "compile.", len(blocks), arguments or True,
            )  # fmt: skip
            return False
        self._logger.info(
            "Compiling each of the %d modules that wrap_policy selects with torch.compile, because the compiler cannot trace how "
            "FSDP gathers their parameters: the first iterations are slow. The rest of the model is not compiled.", len(blocks),
        )  # fmt: skip
        for block in blocks.values():
            block.compile(**arguments)
        return True

    def _prefetch(self, blocks: Sequence[nn.Module]) -> None:
        """Make each block prefetch the parameters of the next blocks while it computes."""
        ahead, behind = self._options.forward_prefetch, self._options.backward_prefetch
        sharded = cast("Sequence[FSDPModule]", blocks)
        for index, block in enumerate(sharded):
            if ahead:
                block.set_modules_to_forward_prefetch(list(sharded[index + 1 : index + 1 + ahead]))
            if behind:
                block.set_modules_to_backward_prefetch(list(sharded[max(0, index - behind) : index])[::-1])

    def _allocate(self, model: nn.Module, world: World) -> None:
        with _swapping_parameters():
            model.to_empty(device="cpu" if self._options.cpu_offload else world.device)
        if self._options.cpu_offload:
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else buffer.to(world.device)

    def _materialize(self, model: nn.Module, metas: Mapping[str, Tensor]) -> None:
        own = generator_state()
        # As in a single process, training continues from the random state after the weights were drawn.
        restore_generator_state(broadcast_object(own))
        self._weights.materialize_into(model, metas, parameters=not self._options.skip_init_weights)
        restore_generator_state(own if self._diff_rank_rng else broadcast_object(generator_state()))
        if self._options.skip_init_weights:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(torch.nan)
        if self._options.precision.buffer_dtype is not None:
            for module in model.modules():
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_floating_point():
                        module._buffers[name] = buffer.to(self._options.precision.buffer_dtype)

    def _register_parameters(self, before: Mapping[str, nn.Parameter], model: nn.Module) -> None:
        """Store the original parameter names for :meth:`bind`, and add hooks that average unsharded gradients."""
        for name, parameter in before.items():
            self._names_before[parameter] = name
        for parameter in _whole_parameters(model):
            # Also on frozen parameters, since they may become trainable. A hook requires requires_grad when it is added.
            is_trainable = parameter.requires_grad
            parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._average_gradient)
            parameter.requires_grad_(is_trainable)

    def _average_gradient(self, parameter: Tensor) -> None:
        """Average the gradient of an unsharded parameter in the last micro-batch of an accumulation window."""
        if self._sync and parameter.grad is not None and self._layout.dp_size > 1:
            all_reduce(parameter.grad, "mean", self.dp_group)

    def apply_trainable_change(self, model: nn.Module, change: TrainableChange) -> None:
        try:
            refresh_fsdp_dtypes(model)
        except AssertionError as error:
            raise PlacementError(
                f"{change}, but FSDP reduces the gradients of a wrapped module together: {error}. Select modules in wrap_policy "
                "such that the trainable parameters of each have the same dtype, or list these parameters in ignored."
            ) from error
        if not self._sync:
            # In the middle of an accumulation window, the last backward pass no longer reaches these parameters.
            frozen = set(change.frozen)
            self._frozen_in_window += [
                each for name, each in model.named_parameters() if name in frozen and not is_sharded(each)
            ]

    def _complete_gradients(self, model: nn.Module) -> None:
        """Reduce the gradients that the last backward pass did not reduce. Collective.

        This is needed if the update takes place in the middle of an accumulation window, for example because a step
        calls ``backward`` without the optimizer wrapper, and for unsharded parameters that were frozen in the window.
        """
        if self._sync:
            if self._frozen_in_window and self._layout.dp_size > 1:
                average_gradients(self._frozen_in_window, self.dp_group)
            self._frozen_in_window = []
            return
        self._frozen_in_window = []
        self._set_grad_sync(model, sync=True)
        reduce_held_gradients(model)
        if self._layout.dp_size > 1:
            average_gradients(_whole_parameters(model), self.dp_group)

    # ---- the model's methods ----------------------------------------------------------------------------------------

    def _guard(self, model: nn.Module) -> None:
        if "train_step" in vars(model):
            raise PlacementError(
                "compile: target='train_step' cannot be used under FSDP, because it bypasses FSDP's forward hooks. "
                "Use target='forward', or compile_blocks=True."
            )
        for path in self._options.forward_methods:
            _register_method(model, path)
        # FSDP treats the first module that is called as the root. Make the model the root, even if a step only calls
        # submodules.
        initialize_fsdp_root(model)
        refresh_fsdp_dtypes(model)
        if self._weights_missing:
            model.register_load_state_dict_post_hook(self._note_loaded)
        for name in _STEPS:
            method = getattr(model, name, None)
            if callable(method):
                setattr(model, name, self._guarded(model, method, is_training=name == "train_step"))

    def _guarded(self, model: nn.Module, method: Callable[..., Any], *, is_training: bool) -> Callable[..., Any]:
        @functools.wraps(method)
        def step(*args: Any, **kwargs: Any) -> Any:
            if is_training:
                self.before_train_step()
            if self._weights_missing:
                raise StateError(
                    "skip_init_weights=True left the model uninitialized, and no weights were loaded. Load a checkpoint with "
                    "load_from or resume before the first step, or omit skip_init_weights."
                )
            try:
                return method(*args, **kwargs)
            except RuntimeError as error:
                if "mixed torch.Tensor and DTensor" not in str(error):
                    raise
                raise PlacementError(
                    f"{method.__qualname__} used parameters of {unsharded_class(model).__name__} that were not "
                    "gathered, so each rank only has its shards. Parameters are gathered when a wrapped module is "
                    "called. Use self.submodule(...), or list the method in forward_methods=['submodule.method']."
                ) from error
            finally:
                if not is_training:
                    # Without a backward pass, torch does not free the gathered parameters. Later changes to the shards,
                    # such as averaged weights, would then have no effect.
                    self.release_gathered(model)

        return step

    def release_gathered(self, model: nn.Module) -> None:
        for module in _sharded_modules(model):
            module.reshard()

    def _note_loaded(self, module: nn.Module, keys: Any) -> None:
        self._weights_missing = self._weights_missing and bool(keys.missing_keys)

    # ---- optimizers -------------------------------------------------------------------------------------------------

    def _bind(self, wrapper: BaseOptimWrapper, now: Mapping[str, nn.Parameter]) -> None:
        """Replace the original parameters in an optimizer with the sharded ones."""
        optimizer = wrapper.optimizer
        if any(map(_reads_values, parts_of(optimizer).values())):
            optimizer.register_step_pre_hook(_begin_step)
            optimizer.register_step_post_hook(_end_step)
        if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
            raise PlacementError(
                "FSDP already shards the optimizer state. Use the optimizer itself instead of ZeroRedundancyOptimizer."
            )
        stale = [each for group in optimizer.param_groups for each in group["params"] if each in self._names_before]
        if not stale or all(now.get(self._names_before[each]) is each for each in stale):
            return
        _require_fresh(optimizer)
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["params"] = [
                now[self._names_before[each]] if each in self._names_before else each for each in group["params"]
            ]


def _reads_values(optimizer: Optimizer) -> bool:
    """Return whether a step of the optimizer may call ``item()``, for example on the norm of a parameter."""
    of_torch = type(optimizer).__module__.startswith("torch.optim.")
    return not of_torch or isinstance(optimizer, torch.optim.Adafactor | torch.optim.LBFGS)


def _begin_step(*_: object) -> None:
    """Make ``item()`` return the same value on all ranks; otherwise, each rank would silently make a different step."""
    gather_scalars(True)


def _end_step(*_: object) -> None:
    gather_scalars(False)


def _require_fresh(optimizer: Optimizer) -> None:
    # train() of a schedule-free optimizer adds an empty state for each parameter.
    if any(optimizer.state.values()):
        raise PlacementError(
            f"The {type(optimizer).__name__} has already updated the unsharded parameters, and its state cannot be "
            "sharded. Pass a configuration or a new optimizer, and resume from a checkpoint."
        )


def _precision(precision: Precision) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=precision.param_dtype,
        reduce_dtype=precision.reduce_dtype,
        output_dtype=precision.output_dtype,
        cast_forward_inputs=precision.cast_forward_inputs,
    )


def _reshard(value: Any, size: int) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and (value < 2 or size % value):
        raise PlacementError(
            f"reshard_after_forward={value}: the number of ranks to reshard to must be at least 2 and divide the {size} ranks "
            "that the parameters are sharded across."
        )
    return value


def _register_method(model: nn.Module, path: str) -> None:
    owner, _, name = path.rpartition(".")
    modules = dict(model.named_modules())
    if owner not in modules or not callable(getattr(modules[owner], name, None)):
        raise ConfigValueError(f"forward_methods: the model has no method {path!r}. {did_you_mean(owner, modules)}")
    if not isinstance(modules[owner], FSDPModule):
        raise ConfigValueError(
            f"forward_methods: {path!r} is a method of a module that is not wrapped. Select {owner!r} in wrap_policy, or use a "
            f"method of a wrapped module: {_some([n for n, m in modules.items() if isinstance(m, FSDPModule)])}."
        )
    register_fsdp_forward_method(modules[owner], name)


def _sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are not sharded and may be trainable."""
    return [
        each for each in model.parameters() if not is_sharded(each) and (each.is_floating_point() or each.is_complex())
    ]


@contextmanager
def _swapping_parameters() -> Iterator[None]:
    """Keep the same parameter objects when parameters are moved off the meta device, so that tied parameters stay tied."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")
