"""All private torch names that this package uses, each with the reason. Any torch release may change them.

``tests/utils/test_torch_private.py`` has a test for each, so that a change in torch fails in the tests with a clear
message instead of in the middle of a run. Names that are called in each step are aliases rather than wrapper functions,
to avoid an additional call.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, wraps
from operator import itemgetter
from types import MethodType
from typing import Any, Final, cast

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch._utils import ExceptionWrapper
from torch.amp.grad_scaler import GradScaler, OptState
from torch.autograd import profiler as _profiler
from torch.autograd.graph import _engine_run_backward as _run_backward
from torch.nn.parallel import distributed as _ddp
from torch.optim import Optimizer
from torch.optim import optimizer as _optimizer
from torch.overrides import has_torch_function_unary

from stratagem.utils.imports import import_object

__all__ = [
    "CALL_ATTRIBUTE",
    "ExceptionWrapper",
    "backward_from_scalar",
    "backward_pass_id",
    "copy_gradient_hooks",
    "gradient_hooks",
    "checkpoint_module",
    "accumulate_in_reduce_dtype",
    "default_store",
    "flatten_mesh",
    "flight_record",
    "gather_scalars",
    "group_by_device_and_dtype",
    "group_ranks",
    "fused_adagrad",
    "fused_adam",
    "fused_adamw",
    "fused_sgd",
    "fused_step_reads_found_inf",
    "initialize_fsdp_root",
    "inverse_scale",
    "is_scaled",
    "record_found_inf",
    "is_plain_scalar",
    "local_tensor",
    "is_profiling",
    "is_step_observed",
    "inner_wrappers",
    "load_hook_modules",
    "local_shape_and_offset",
    "mark_nonfinite",
    "observe_backward",
    "observe_created_graphs",
    "observe_grad_norms",
    "observe_shape_propagation",
    "operator_schema",
    "process_groups",
    "rebuild_ddp_reducer",
    "refresh_fsdp_dtypes",
    "reduce_held_gradients",
    "set_grad_enabled",
    "settle_ddp_buckets",
    "set_group_timeout",
    "step_function",
    "storage_id",
    "storage_key",
    "stored_values",
    "tensors_in",
    "unsharded_class",
    "without_compiler_import",
    "without_global_step_hooks",
]

_INNER_WRAPPERS: Final = {
    "torch._dynamo.eval_frame": ("OptimizedModule", "_orig_mod"),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper": ("ActivationWrapper", "_checkpoint_wrapped_module"),
}

# The instance attribute that replaces what ``module(...)`` calls, and that ``Module.compile`` sets; None or absent by default.
# It is the only place where a call can be redirected before the forward hooks of the module.
CALL_ATTRIBUTE: Final = "_compiled_call_impl"

# The attribute of a function in which torch keeps the version that the compiler excludes.
_DISABLED: Final = "__dynamo_disable"

# tensors_in(output) returns the tensors in the output of a forward pass, as DistributedDataParallel finds them: only
# these tensors take part in its reduction.
tensors_in: Callable[[Any], Iterable[Tensor]] = _ddp._find_tensors

# backward_pass_id() returns the number of the current backward pass if called from a hook, and -1 outside of a backward
# pass. No public function distinguishes two backward passes.
backward_pass_id: Callable[[], int] = torch._C._current_graph_task_id

# group_by_device_and_dtype([tensors], False) returns {(device, dtype): ([tensors of this kind], [])} in a single call. torch's
# optimizers group their tensors with it.
group_by_device_and_dtype: Callable[
    [Sequence[Sequence[Tensor]], bool], dict[tuple[torch.device, torch.dtype], tuple[list[list[Tensor]], list[int]]]
] = cast("Any", torch._C._group_tensors_by_device_and_dtype)

# mark_nonfinite(tensors, found, scale) sets ``found`` to 1 if a value is NaN or Inf, and multiplies the tensors by ``scale``,
# in one pass on the device. It is the kernel of torch's GradScaler. All tensors must have the device and dtype of the first.
mark_nonfinite: Callable[[list[Tensor], Tensor, Tensor], None] = torch._amp_foreach_non_finite_check_and_unscale_


# The kernels of fused optimizers. They update parameters, state tensors and, for Adam and Adagrad, only read the step counters.
fused_sgd: Callable[..., None] = torch._fused_sgd_
fused_adam: Callable[..., None] = torch._fused_adam_
fused_adamw: Callable[..., None] = torch._fused_adamw_
fused_adagrad: Callable[..., None] = torch._fused_adagrad_

# set_grad_enabled(False) disables autograd until the next call; the public context manager makes five calls.
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled


def is_plain_scalar(tensor: Tensor) -> bool:
    """Return whether a tensor is a real floating-point scalar of the class ``Tensor``, whose operations nothing overrides."""
    return (
        type(tensor) is Tensor
        and not tensor.ndim
        and tensor.dtype.is_floating_point
        and not has_torch_function_unary(tensor)
    )


def backward_from_scalar(loss: Tensor, gradient: Tensor | None = None) -> None:
    """Call ``loss.backward(gradient)`` for a scalar, without most of the checks of its arguments.

    Private: ``torch.autograd.graph._engine_run_backward``, which ``torch.autograd.backward`` calls.
    """
    if gradient is None and is_plain_scalar(loss):
        gradient = torch.ones_like(loss, memory_format=torch.preserve_format)
    elif (
        gradient is None
        or not is_plain_scalar(gradient)
        or gradient.dtype is not loss.dtype
        or not is_plain_scalar(loss)
    ):
        loss.backward(gradient)
        return
    _run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


_GLOBAL_HOOKS: Final = (_optimizer._global_optimizer_pre_hooks, _optimizer._global_optimizer_post_hooks)
# Torch wraps the step of each optimizer class in a function with this code, which calls the hooks.
_HOOKED_STEP: Final = Optimizer.profile_hook_step(print).__code__
# The attribute that marks a step from replace_step.
_REPLACED: Final = "replaces_step"


def is_step_observed(optimizer: Optimizer) -> bool:
    """Return whether a step hook or an active profiler observes the steps of an optimizer.

    Private: the dictionaries of an optimizer's hooks and of global hooks, and the flag that torch's profilers set.
    """
    own: Any = optimizer
    return bool(
        own._optimizer_step_pre_hooks
        or own._optimizer_step_post_hooks
        or _GLOBAL_HOOKS[0]
        or _GLOBAL_HOOKS[1]
        or _profiler._is_profiler_enabled
    )


def is_profiling() -> bool:
    """Return whether a profiler of torch is active. Private: the flag that torch's profilers set."""
    return _profiler._is_profiler_enabled


def step_function(optimizer_type: type[Optimizer]) -> Callable[..., Any]:
    """Return the function ``step`` of an optimizer class without torch's wrapper that calls the hooks."""
    function: Any = optimizer_type.step
    return cast("Callable[..., Any]", function.__wrapped__ if function.__code__ is _HOOKED_STEP else function)


def replace_step(optimizer: Optimizer, step: Callable[[Optimizer], Any]) -> None:
    """Replace the method ``step`` of one optimizer by a function, around which step hooks are called as usual.

    Private: ``_opt_called``, which torch's schedulers read to warn about updates in the wrong order.

    Raises:
        ValueError: if ``step`` of this object has already been replaced, other than by this function or a torch scheduler.
    """
    replaced = vars(optimizer).get("step")
    if replaced is not None and not any(hasattr(replaced, mark) for mark in (_REPLACED, "_wrapped_by_lr_sched")):
        raise ValueError(f"step of the {type(optimizer).__name__} has been replaced by {replaced!r}")

    def call(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        step(self)
        self._opt_called = True
        return loss

    hooked: Any = Optimizer.profile_hook_step(call)
    setattr(hooked, _REPLACED, True)
    cast("Any", optimizer).step = MethodType(hooked, optimizer)


def fused_step_reads_found_inf(optimizer: Optimizer) -> bool:
    """Return whether the fused kernels of an optimizer read ``found_inf`` on the device and skip the update if it is set.

    Private: ``Optimizer._step_supports_amp_scaling``, which torch's ``GradScaler`` reads for the same purpose.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@contextmanager
def without_global_step_hooks() -> Iterator[None]:
    """Inside the ``with`` block, ``step`` of an optimizer does not call hooks that are registered for all optimizers.

    Private: ``_global_optimizer_pre_hooks`` and ``_global_optimizer_post_hooks`` of ``torch.optim.optimizer``. Hooks can be
    registered publicly but not listed.
    """
    registries: tuple[dict[int, Any], ...] = cast("Any", _GLOBAL_HOOKS)
    registered = [dict(each) for each in registries]
    for each in registries:
        each.clear()
    try:
        yield
    finally:
        for each, hooks in zip(registries, registered, strict=True):
            each.update(hooks)


def is_scaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Return whether the gradients of an optimizer are scaled and ``scaler.unscale_`` was not called since the last update.

    Private: ``GradScaler._scale`` and ``_per_optimizer_states``.
    """
    state: Any = scaler._per_optimizer_states[id(optimizer)]
    return scaler._scale is not None and state["stage"] is OptState.READY


def inverse_scale(scaler: GradScaler) -> Tensor:
    """Return ``1 / scale`` as a float32 scalar on the device. Private: ``GradScaler._scale``; the public method synchronizes."""
    return cast("Tensor", scaler._scale).double().reciprocal().float()


def record_found_inf(scaler: GradScaler, optimizer: Optimizer, found: Tensor) -> None:
    """Record whether gradients contain NaN or Inf (1, otherwise 0), as ``scaler.unscale_`` does, for ``scaler.update``.

    Private: ``GradScaler._per_optimizer_states``. ``unscale_`` always multiplies all gradients in a pass of its own.
    """
    state: Any = scaler._per_optimizer_states[id(optimizer)]
    state["found_inf_per_device"] = {found.device: found}


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the local tensor of a ``DTensor`` itself. Private: ``DTensor._local_tensor``; ``to_local`` returns a new view."""
    own: Any = tensor
    return cast("Tensor", own._local_tensor)


def stored_values(tensor: Tensor) -> Tensor:
    """Return the stored values of a sparse tensor, without coalescing it.

    Private: ``Tensor._values``; the public ``values`` requires a coalesced tensor, and coalescing copies.
    """
    return tensor._values()


def operator_schema(operator: Any) -> Any:
    """Return the schema of an operator: its name, and for each argument its type and whether it is written.

    Private: ``OpOverload._schema``, the only description of which arguments an operator modifies.
    """
    return operator._schema


def storage_id(tensor: Tensor) -> int:
    """Return a number that identifies the storage of a tensor, even on the meta device, where the data pointer is 0.

    Private: ``UntypedStorage._cdata``.
    """
    return storage_key(tensor.untyped_storage())


def storage_key(storage: torch.UntypedStorage) -> int:
    """Return the number that :func:`storage_id` returns for the tensors of a storage. Private: ``UntypedStorage._cdata``."""
    key: int = storage._cdata
    return key


def load_hook_modules(model: nn.Module) -> list[str]:
    """Return the modules that define the hooks which run before a state dict is loaded, and may rename its keys.

    Private: ``Module._load_state_dict_pre_hooks``. Hooks can be registered publicly but not listed.
    """
    hooks: list[Any] = [hook for module in model.modules() for hook in module._load_state_dict_pre_hooks.values()]
    return [str(getattr(hook.hook, "__module__", "")) for hook in hooks]


def initialize_fsdp_root(model: nn.Module) -> None:
    """Make the module of the last ``fully_shard`` call the root of the FSDP modules.

    Private: ``FSDPModule._get_fsdp_state()._lazy_init()``, which torch calls in the first forward pass. A step that calls a
    submodule first would otherwise make the submodule the root.
    """
    root: Any = model
    root._get_fsdp_state()._lazy_init()


def gradient_hooks(parameter: Tensor) -> tuple[list[Any], list[Any]]:
    """Return the hooks on the gradient of a parameter: from ``register_hook``, and from ``register_post_accumulate_grad_hook``.

    Private: ``Tensor._backward_hooks`` and ``Tensor._post_accumulate_grad_hooks``. Hooks can be registered publicly but not
    listed.
    """
    hooks, post_hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    return list((hooks or {}).values()), list((post_hooks or {}).values())


def copy_gradient_hooks(source: Tensor, target: Tensor) -> None:
    """Let ``target`` share the hooks of ``source``, so that handles returned at their registration also remove them there.

    Private: as in :func:`gradient_hooks`.
    """
    theirs, own = cast("Any", source), cast("Any", target)
    if theirs._backward_hooks:
        own._backward_hooks = theirs._backward_hooks
    if theirs._post_accumulate_grad_hooks:
        own._post_accumulate_grad_hooks = theirs._post_accumulate_grad_hooks


def rebuild_ddp_reducer(replica: nn.Module) -> None:
    """Replace the reducer of a ``DistributedDataParallel`` with one for the parameters that are trainable now. Collective.

    Private: ``_build_params_for_reducer``, ``_build_debug_param_to_name_mapping`` and ``_ddp_init_helper``, called as in
    ``DistributedDataParallel.__setstate__``, and ``_comm_hooks``. Wrapping the model again would lose its hooks and identity.
    """
    ddp: Any = replica
    parameters, expect_sparse_gradient = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    # Remove the autograd hooks of the old reducer before the new one registers its own.
    ddp.reducer._remove_autograd_hooks()
    ddp._ddp_init_helper(parameters, expect_sparse_gradient, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp._set_static_graph()
    for hook, state in ddp._comm_hooks:
        torch_dist._register_comm_hook(ddp.reducer, state, hook)  # type: ignore[attr-defined]  # private


class _SettledReducer:
    """A reducer that does not change its buckets."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def settle_ddp_buckets(replica: nn.Module, order: Sequence[Tensor]) -> None:
    """Give the reducer of a ``DistributedDataParallel`` the buckets that it has after the first step, for fake tensors.

    The reducer itself would send the order between ranks as values. Private: the names in :func:`rebuild_ddp_reducer`,
    ``bucket_bytes_cap``, ``bucket_bytes_cap_list``, ``bucket_bytes_cap_default``,
    ``torch.distributed._DEFAULT_FIRST_BUCKET_BYTES`` and ``_compute_bucket_assignment_by_size``.

    Args:
        replica: the module, after a step.
        order: its parameters in the order in which their gradients are complete.
    """
    ddp: Any = replica
    if ddp.static_graph or not ddp.find_unused_parameters:
        distributed: Any = torch_dist
        before = distributed._compute_bucket_assignment_by_size
        position = {id(parameter): index for index, parameter in enumerate(order)}

        def in_order(parameters: Sequence[Tensor], _: Any, expect_sparse: Sequence[bool]) -> tuple[Any, Any]:
            first = distributed._DEFAULT_FIRST_BUCKET_BYTES if ddp.bucket_bytes_cap_default else ddp.bucket_bytes_cap
            limits = getattr(ddp, "bucket_bytes_cap_list", None) or [first, ddp.bucket_bytes_cap]
            known = [index for index, each in enumerate(parameters) if id(each) in position]
            known.sort(key=lambda index: position[id(parameters[index])])
            sparse = [expect_sparse[index] for index in known]
            buckets, sizes = before([parameters[index] for index in known], limits, sparse, known)
            return buckets[::-1], sizes[::-1]  # the caller reverses them

        distributed._compute_bucket_assignment_by_size = in_order
        try:
            rebuild_ddp_reducer(replica)
        finally:
            distributed._compute_bucket_assignment_by_size = before
    ddp.reducer = _SettledReducer(ddp.reducer)


def refresh_fsdp_dtypes(model: nn.Module) -> None:
    """Update the dtypes in which FSDP reduces gradients, which depend on the parameters that are trainable.

    Private: ``FSDPParamGroup._init_mp_dtypes``, ``_orig_dtype`` and ``_reduce_dtype``. Torch determines them in the first forward
    pass and uses None for a group without trainable parameters, whose gradients then fail or are reduced in a wrong dtype.

    Raises:
        AssertionError: if the trainable parameters of a group have different dtypes.
    """
    for group in _fsdp_groups(model):
        group._init_mp_dtypes()
        dtypes = {
            (each.orig_dtype, each.reduce_dtype) for each in group.fsdp_params if each.orig_dtype.is_floating_point
        }
        if group._orig_dtype is None and len(dtypes) == 1:
            # If a parameter becomes trainable within a step, torch does not determine the dtypes again.
            group._orig_dtype, group._reduce_dtype = dtypes.pop()


def accumulate_in_reduce_dtype(model: nn.Module) -> None:
    """Make FSDP convert every gradient to the reduce dtype, also gradients of parameters that have none accumulated.

    Private: ``FSDPParam.accumulate_unsharded_grad_if_needed`` and ``to_accumulated_grad_if_needed``. In the last micro-batch
    of an accumulation window, torch converts only the gradients that it adds to earlier ones, and fails if the dtypes of a
    group differ.
    """

    def convert(param: Any, accumulate: Callable[[], None]) -> None:
        accumulate()
        if hasattr(param, "_unsharded_param"):
            param.to_accumulated_grad_if_needed()

    for group in _fsdp_groups(model):
        for param in group.fsdp_params:
            param.accumulate_unsharded_grad_if_needed = partial(
                convert, param, param.accumulate_unsharded_grad_if_needed
            )


def _fsdp_groups(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        if state is not None:
            yield from state()._fsdp_param_groups


def reduce_held_gradients(model: nn.Module) -> None:
    """Reduce the gradients that FSDP has accumulated without reducing them. Collective.

    Private: ``FSDPState._root_post_backward_final_callback``, which torch calls at the end of a backward pass.
    """
    root: Any = model
    root._get_fsdp_state()._root_post_backward_final_callback()


def unsharded_class(model: nn.Module) -> type:
    """Return the class that a module had before ``fully_shard`` replaced it with a subclass.

    Private: the layout of ``type(module).__mro__``: the new class, ``FSDPModule``, the original class.
    """
    return type(model).__mro__[2]


def flatten_mesh(mesh: Any, name: str) -> Any:
    """Return a one-dimensional view of a device mesh. Collective.

    Private: ``DeviceMesh._flatten``. No other function returns the group of several dimensions combined.
    """
    return mesh._flatten(name)


def gather_scalars(enabled: bool) -> None:
    """Specify whether ``item()``, ``float()`` and ``bool()`` of a ``DTensor`` return its global or, as in torch, its local value.

    In torch, the sum of a sharded tensor is a ``DTensor`` whose ``item()`` is the sum of the shard of this rank. With
    ``enabled=True``, these calls are collective.

    Private: ``DTensor._op_dispatcher._custom_op_handlers``. No public function changes what an operator does with a ``DTensor``.
    """
    handlers = import_object("torch.distributed.tensor:DTensor")._op_dispatcher._custom_op_handlers
    if enabled:
        handlers[_READ_SCALAR] = _read_whole_scalar
    else:
        handlers.pop(_READ_SCALAR, None)


_READ_SCALAR: Final = torch.ops.aten._local_scalar_dense.default


def _read_whole_scalar(operator: Callable[[Tensor], Any], args: Sequence[Any], _: Any) -> Any:
    return operator(args[0].full_tensor())


def local_shape_and_offset(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> tuple[Any, Any]:
    """Return the shape of this rank's shard of a tensor, and its offset in the tensor.

    Private: ``torch.distributed.tensor._utils.compute_local_shape_and_global_offset``.
    """
    compute = import_object("torch.distributed.tensor._utils:compute_local_shape_and_global_offset")
    return compute(shape, mesh, placements)  # type: ignore[no-any-return]  # imported by name


def inner_wrappers() -> dict[type[nn.Module], str]:
    """Return the torch classes that wrap a part of a model, and the attribute of each that holds the wrapped module.

    Private: ``torch._dynamo.OptimizedModule``, which ``torch.compile(module)`` returns, and the wrapper of activation
    checkpointing. A class is only returned once its module has been imported, since no instances exist before.
    """
    found = {}
    for module, (name, attribute) in _INNER_WRAPPERS.items():
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None:
            found[cls] = attribute
    return found


def checkpoint_module(module: nn.Module, **options: Any) -> None:
    """Recompute the activations of a module in the backward pass, without wrapping it.

    Private: ``torch.distributed._composable.checkpoint_activation.checkpoint``. The public wrapper changes parameter names.
    """
    import_object("torch.distributed._composable.checkpoint_activation:checkpoint")(module, **options)


def default_store() -> Any:
    """Return the key-value store of the default process group.

    Private: ``torch.distributed.distributed_c10d._get_default_store``.
    """
    return import_object("torch.distributed.distributed_c10d:_get_default_store")()


def group_ranks(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the global ranks of the group in the arguments of an operator for a collective.

    Private: such an operator has the group as a ``ScriptObject``, or its name as the last string, which
    ``torch.distributed.distributed_c10d._resolve_process_group`` resolves.
    """
    given = [*args, *kwargs.values()]
    for each in given:
        if isinstance(each, torch.ScriptObject) and "ProcessGroup" in str(each._type()):
            return tuple(torch_dist.get_process_group_ranks(torch_dist.ProcessGroup.unbox(each)))
    name = next(each for each in reversed(given) if isinstance(each, str))
    resolve = import_object("torch.distributed.distributed_c10d:_resolve_process_group")
    return tuple(torch_dist.get_process_group_ranks(resolve(name)))


def flight_record(*, stacks: bool) -> list[dict[str, Any]]:
    """Return the collectives that this rank has begun, as torch's flight recorder lists them; empty if it is disabled.

    Args:
        stacks: whether to include the Python stacks. The first time, this imports torch's compiler.

    Private: ``_dump_fr_trace`` and, if torch supports NCCL, ``_dump_nccl_trace`` of ``torch._C._distributed_c10d``. Torch writes
    the records to files only after an error of NCCL.
    """
    c10d: Any = torch._C._distributed_c10d
    dumps = [getattr(c10d, name, None) for name in ("_dump_fr_trace", "_dump_nccl_trace")]
    # The bytes come from torch in this process.
    found = [pickle.loads(dump(True, stacks, False)) for dump in dumps if dump is not None]  # noqa: S301
    return sorted((entry for each in found for entry in each.get("entries", ())), key=itemgetter("time_created_ns"))


def process_groups() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the description and the ranks of each process group of this rank, by the name in the flight recorder.

    Private: ``torch.distributed.distributed_c10d._world``. No public function lists the groups.
    """
    world = import_object("torch.distributed.distributed_c10d:_world")
    return {
        world.pg_names[group]: (group.group_desc, tuple(sorted(ranks)))
        for group, ranks in dict(world.pg_group_ranks).items()
        if group in world.pg_names
    }


def set_group_timeout(group: Any, timeout: timedelta) -> None:
    """Set the timeout of the collectives of a process group of this rank.

    Private: ``torch.distributed.distributed_c10d._set_pg_timeout``. Device meshes create their groups with the default timeout of
    torch: 10 minutes for NCCL and 30 minutes for Gloo.
    """
    import_object("torch.distributed.distributed_c10d:_set_pg_timeout")(timeout, group)


@contextmanager
def without_compiler_import() -> Iterator[None]:
    """Create optimizers without importing torch's compiler, which takes more than a second, if it is not imported yet.

    torch imports the compiler when the first optimizer is created, to exclude the function that adds parameter groups from
    compilation. This concerns only optimizers that are created in compiled code.
    """
    add_group = getattr(Optimizer.add_param_group, "__wrapped__", None)
    if add_group is None or _DISABLED in add_group.__dict__:
        yield
        return
    setattr(add_group, _DISABLED, add_group)
    try:
        yield
    finally:
        delattr(add_group, _DISABLED)


@contextmanager
def observe_backward(before: Callable[[Any], None], after: Callable[[], None]) -> Iterator[None]:
    """Inside the ``with`` block, call functions before and after each backward pass that Python code starts.

    ``Tensor.backward`` looks up ``torch.autograd.backward`` in each call.

    Args:
        before: called with the tensors that are differentiated.
        after: called when the gradients are accumulated, unless the backward pass failed.
    """
    original = torch.autograd.backward

    @wraps(original)
    def observed(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        before(tensors)
        result = original(tensors, *args, **kwargs)
        after()
        return result

    torch.autograd.backward = observed
    try:
        yield
    finally:
        torch.autograd.backward = original


@contextmanager
def observe_created_graphs(change: Callable[[int], None]) -> Iterator[None]:
    """Inside the ``with`` block, call a function with 1 before and with -1 after each backward pass that creates a graph.

    Private: ``torch.autograd._engine_run_backward``, which ``backward`` and ``grad`` call even if they were imported by name.
    """
    module: Any = torch.autograd
    original = module._engine_run_backward

    @wraps(original)
    def observed(tensors: Any, gradients: Any, retain_graph: Any, create_graph: Any, *args: Any, **kwargs: Any) -> Any:
        if not create_graph:
            return original(tensors, gradients, retain_graph, create_graph, *args, **kwargs)
        change(1)
        try:
            return original(tensors, gradients, retain_graph, create_graph, *args, **kwargs)
        finally:
            change(-1)

    module._engine_run_backward = observed
    try:
        yield
    finally:
        module._engine_run_backward = original


@contextmanager
def observe_grad_norms(before: Callable[[Any], None], after: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside the ``with`` block, call functions before and after ``torch.nn.utils.clip_grad_norm_`` computes a norm.

    Private: ``torch.nn.utils.clip_grad._get_total_norm``, which ``clip_grad_norm_`` calls even if it was imported by name.

    Args:
        before: called with the gradients.
        after: called with the norm.
    """
    module: Any = sys.modules["torch.nn.utils.clip_grad"]
    original = module._get_total_norm

    @wraps(original)
    def observed(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        gradients = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        before(gradients)
        norm = original(gradients, *args, **kwargs)
        after(norm)
        return norm

    module._get_total_norm = observed
    try:
        yield
    finally:
        module._get_total_norm = original


@contextmanager
def observe_shape_propagation(change: Callable[[int], None]) -> Iterator[None]:
    """Inside the ``with`` block, call a function with 1 before and with -1 after DTensor computes the shape of a result.

    For operations that it has not seen with these shapes, DTensor runs the operation on fake tensors with the shapes of the whole
    tensors. Private: ``ShardingPropagator._propagate_tensor_meta_non_cached``.
    """
    propagator: Any = import_object("torch.distributed.tensor._sharding_prop:ShardingPropagator")
    original = propagator._propagate_tensor_meta_non_cached

    @wraps(original)
    def observed(*args: Any) -> Any:
        change(1)
        try:
            return original(*args)
        finally:
            change(-1)

    propagator._propagate_tensor_meta_non_cached = observed
    try:
        yield
    finally:
        propagator._propagate_tensor_meta_non_cached = original
