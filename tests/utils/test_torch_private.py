"""Each private name of torch that the package uses behaves as the package expects.

If one of these tests fails on a new torch, the name was changed there: adapt ``stratagem/utils/torch_private.py``.
"""

from __future__ import annotations

import ast
import contextlib
import math
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from stratagem.distributed.polling import poll_until
from stratagem.utils import torch_private

SOURCE = Path(torch_private.__file__)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch):
    """A process group of this process alone."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_call_attribute_redirects_before_the_forward_hooks() -> None:
    """If the attribute is a function, it is called instead of the module and its hooks; None restores the usual call."""
    module, hooks = nn.Linear(1, 1), []
    module.register_forward_pre_hook(lambda *_: hooks.append("pre"))
    module.__dict__[torch_private.CALL_ATTRIBUTE] = lambda *args: ("redirected", *args)
    assert module(3) == ("redirected", 3)
    assert hooks == []
    module.__dict__[torch_private.CALL_ATTRIBUTE] = None
    assert isinstance(module(torch.ones(1)), Tensor)
    assert hooks == ["pre"]


def test_tensors_in_finds_tensors_in_containers() -> None:
    """DDP finds tensors in lists, tuples and dicts, but not in other objects."""
    first, second = torch.ones(1), torch.zeros(2)
    found = list(torch_private.tensors_in({"a": [first, 3], "b": (second, "text")}))
    assert [id(each) for each in found] == [id(first), id(second)]


def test_backward_pass_id_distinguishes_backward_passes() -> None:
    """The ID is the same in all hooks of a backward pass, differs between passes, and is -1 outside of a pass."""
    seen: list[int] = []
    weight = torch.ones(1, requires_grad=True)
    for _ in range(2):
        outputs = [weight * 2, weight * 3]
        for each in outputs:
            each.register_hook(lambda grad: seen.append(torch_private.backward_pass_id()))
        sum(outputs).backward()
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert torch_private.backward_pass_id() == -1


def test_observe_created_graphs_counts_passes_that_create_a_graph() -> None:
    """The function is called around passes with ``create_graph=True``, not around others or after the block."""
    calls: list[int] = []
    weight = torch.ones(1, requires_grad=True)

    def passes() -> None:
        torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
        (weight**2).sum().backward(inputs=[weight])
        torch.autograd.grad((weight**2).sum(), weight)

    with torch_private.observe_created_graphs(calls.append):
        passes()
        assert calls == [1, -1]
        with pytest.raises(RuntimeError):
            torch.autograd.grad(torch.zeros(1).sum(), weight, create_graph=True)
    assert sum(calls) == 0
    count = len(calls)
    passes()
    assert len(calls) == count


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_fused_optimizers_read_found_inf(optimizer: Any) -> None:
    """An optimizer for which the function returns True skips the update if ``found_inf`` is 1."""
    parameter = nn.Parameter(torch.ones(2))
    made = optimizer([parameter], lr=0.1, fused=True)
    assert torch_private.fused_step_reads_found_inf(made)
    made.found_inf, made.grad_scale = torch.ones(()), None
    parameter.grad = torch.ones(2)
    made.step()
    assert parameter.tolist() == [1.0, 1.0]


def test_without_global_step_hooks_calls_no_global_hook() -> None:
    """Global hooks are not called inside the block, and are called after it, also if it raised."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    called: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: called.append("pre")),
        register_optimizer_step_post_hook(lambda *_: called.append("post")),
    ]
    try:
        with contextlib.suppress(ZeroDivisionError), torch_private.without_global_step_hooks():
            optimizer.step()
            raise ZeroDivisionError
        assert called == []
        optimizer.step()
        assert called == ["pre", "post"]
    finally:
        for handle in handles:
            handle.remove()


def test_unfused_optimizers_do_not_claim_to_read_found_inf() -> None:
    """The function returns False for an optimizer without fused kernels, which ignores ``found_inf``."""
    assert not torch_private.fused_step_reads_found_inf(torch.optim.RMSprop([nn.Parameter(torch.ones(1))], lr=0.1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_mark_nonfinite_sets_the_flag_and_scales(value: float) -> None:
    """The flag is set to 1 only if there is a NaN or Inf, and finite values are multiplied by the scale."""
    found, finite = torch.zeros(()), torch.tensor([2.0, 4.0])
    torch_private.mark_nonfinite([finite], found, torch.tensor(0.5))
    assert (finite.tolist(), found.item()) == ([1.0, 2.0], 0.0)
    torch_private.mark_nonfinite([finite, torch.tensor([1.0, value])], found, torch.ones(()))
    assert found.item() == 1.0


def test_group_by_device_and_dtype_returns_the_same_tensors() -> None:
    """The groups contain the given tensors in their order."""
    tensors = [torch.ones(1), torch.ones(2, dtype=torch.float64), torch.ones(3)]
    groups = torch_private.group_by_device_and_dtype([tensors], False)
    cpu = torch.device("cpu")
    assert list(map(id, groups[cpu, torch.float32][0][0])) == [id(tensors[0]), id(tensors[2])]
    assert list(map(id, groups[cpu, torch.float64][0][0])) == [id(tensors[1])]


def test_a_recorded_overflow_has_the_effect_of_unscaling() -> None:
    """After ``record_found_inf``, ``update`` of the scaler halves its scale for an overflow, and keeps it otherwise."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([parameter], lr=1.0), torch.amp.GradScaler("cpu", init_scale=8.0)
    assert not torch_private.is_scaled(scaler, optimizer)
    for overflow, expected in ((0.0, 8.0), (1.0, 4.0), (0.0, 4.0)):
        scaler.scale(torch.zeros(()))
        assert torch_private.is_scaled(scaler, optimizer)
        assert torch_private.inverse_scale(scaler).item() == 1 / scaler.get_scale()
        torch_private.record_found_inf(scaler, optimizer, torch.tensor(overflow))
        scaler.update()
        assert scaler.get_scale() == expected
    parameter.grad = torch.ones(2)
    scaler.unscale_(optimizer)
    assert not torch_private.is_scaled(scaler, optimizer)


def test_stored_values_do_not_coalesce() -> None:
    """For a repeated index, both stored values are returned instead of their sum."""
    sparse = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,), check_invariants=True)
    assert torch_private.stored_values(sparse).tolist() == [1.0, 2.0]


def test_operator_schema_names_the_operator_and_its_written_arguments() -> None:
    """The schema contains the name of the operator, and marks the argument that an in-place operator modifies."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            schemas.append(torch_private.operator_schema(func))
            return func(*args, **(kwargs or {}))

    schemas: list[Any] = []
    with Recorder():
        torch.ones(2).mul_(3)
    schema = schemas[-1]
    assert schema.name == "aten::mul_"
    assert [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments] == [
        True,
        False,
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storage_id_is_shared_by_views_only(device: str) -> None:
    """A view has the same storage ID as its base, and other tensors have different ones, also on the meta device."""
    base, other = torch.empty(4, device=device), torch.empty(4, device=device)
    assert torch_private.storage_id(base[1:]) == torch_private.storage_id(base)
    assert torch_private.storage_id(other) != torch_private.storage_id(base)


def test_storage_key_identifies_the_storage_of_a_tensor() -> None:
    """The key of a storage is the storage ID of its tensors."""
    tensor = torch.empty(4)
    assert torch_private.storage_key(tensor.untyped_storage()) == torch_private.storage_id(tensor)


def test_group_ranks_finds_the_group_of_a_collective(one_rank: None) -> None:
    """Both an operator that has the group as an object and one that has its name are resolved to the ranks of the group."""
    found = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "_c10d_functional") and func.__name__.startswith("all"):
                found.append((func.namespace, torch_private.group_ranks(args, kwargs or {})))
            return func(*args, **(kwargs or {}))

    with Mode():
        dist.all_reduce(torch.ones(2))
        functional_collectives.wait_tensor(functional_collectives.all_reduce(torch.ones(2), "sum", dist.group.WORLD))
    assert found == [("c10d", (0,)), ("_c10d_functional", (0,))]


def test_load_hook_modules_finds_hooks_of_submodules() -> None:
    """A hook that runs before loading is found, with the module that defines it."""
    model = nn.Sequential(nn.Linear(1, 1))
    assert torch_private.load_hook_modules(model) == []
    model[0].register_load_state_dict_pre_hook(lambda *_: None)
    assert torch_private.load_hook_modules(model) == [__name__]


def test_initialize_fsdp_root_makes_the_whole_model_the_root(one_rank: None) -> None:
    """After initialization of the model, a submodule that is called first does not become the FSDP root."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(model[0])
    fully_shard(model)
    torch_private.initialize_fsdp_root(model)
    model[0](torch.ones(1, 2))
    model(torch.ones(1, 2)).sum().backward()
    assert model[1].weight.grad is not None


def test_reduce_held_gradients_reduces_what_no_sync_left(one_rank: None) -> None:
    """Gradients of a backward pass without reduction are stored in ``grad`` afterwards."""
    model = nn.Linear(2, 1, bias=False)
    fully_shard(model)
    model.set_requires_gradient_sync(False)
    model(torch.tensor([[1.0, 2.0]])).sum().backward()
    assert model.weight.grad is None
    model.set_requires_gradient_sync(True)
    torch_private.reduce_held_gradients(model)
    assert model.weight.grad.full_tensor().tolist() == [[1.0, 2.0]]


def test_rebuild_ddp_reducer_follows_the_trainable_parameters(one_rank: None) -> None:
    """The new reducer waits for the parameters that are trainable now, and calls the communication hook as before."""

    def count(calls: list[int], bucket: Any) -> Any:
        calls.append(bucket.buffer().numel())
        future: Any = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    replica, sizes = nn.parallel.DistributedDataParallel(model), []
    replica.register_comm_hook(
        sizes, lambda calls, bucket: count(calls, bucket)
    )  # torch rejects annotations as strings
    replica(torch.ones(1, 2)).sum().backward()
    model[0].requires_grad_(True)
    torch_private.rebuild_ddp_reducer(replica)
    replica(torch.ones(1, 2)).sum().backward()
    model[1].requires_grad_(False)
    torch_private.rebuild_ddp_reducer(replica)
    replica(torch.ones(1, 2)).sum().backward()
    assert sizes == [3, 9, 6]


def test_settle_ddp_buckets_sends_what_ddp_sends_after_the_first_step(one_rank: None) -> None:
    """The buckets are those of a reducer that has rebuilt its buckets, and they stay the same."""

    def bucket_sizes(*, settled: bool) -> list[int]:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
        replica = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=600 / 2**20)
        sizes: list[int] = []

        def note(bucket: Any) -> Any:
            sizes.append(bucket.buffer().numel())
            future: Any = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        replica.register_comm_hook(None, lambda _, bucket: note(bucket))
        order: list[Tensor] = []
        hooks = [each.register_post_accumulate_grad_hook(order.append) for each in model.parameters()]
        replica(torch.ones(1, 8)).sum().backward()
        for hook in hooks:
            hook.remove()
        if settled:
            torch_private.settle_ddp_buckets(replica, order)
        sizes.clear()
        for _ in range(2):
            replica(torch.ones(1, 8)).sum().backward()
        return sizes

    expected = bucket_sizes(settled=False)
    assert len(expected) == 4
    assert bucket_sizes(settled=True) == expected


def test_refresh_fsdp_dtypes_knows_the_dtypes_of_a_frozen_module(one_rank: None) -> None:
    """Gradients of a module that was frozen in the first forward pass have the dtype of its parameters."""
    model = nn.Linear(2, 1, bias=False).requires_grad_(False)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    model(torch.ones(1, 2))
    torch_private.refresh_fsdp_dtypes(model)
    model.weight.requires_grad_(True)
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad.full_tensor().tolist() == [[1.0, 1.0]]
    assert model.weight.grad.dtype == torch.float32


def test_accumulate_in_reduce_dtype_allows_a_parameter_to_join_late(one_rank: None) -> None:
    """A parameter that gets its first gradient in the last micro-batch is reduced together with the others."""
    model = nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    torch_private.initialize_fsdp_root(model)
    torch_private.accumulate_in_reduce_dtype(model)
    model.set_requires_gradient_sync(False)
    model(torch.ones(1, 1)).sum().backward()
    model.set_requires_gradient_sync(True)
    model.bias.requires_grad_(True)
    model(torch.ones(1, 1)).sum().backward()
    assert [each.grad.full_tensor().item() for each in (model.weight, model.bias)] == [2.0, 1.0]


def test_gradient_hooks_are_listed_and_shared() -> None:
    """Both kinds of hooks are found; copied hooks are called, and the original handle removes them."""
    source, target = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    assert torch_private.gradient_hooks(source) == ([], [])

    def hook(grad: Tensor) -> Tensor:
        return grad * 2

    def post_hook(each: Tensor) -> None:
        each.grad.add_(1)

    source.register_hook(hook)
    handle = source.register_post_accumulate_grad_hook(post_hook)
    assert torch_private.gradient_hooks(source) == ([hook], [post_hook])
    torch_private.copy_gradient_hooks(source, target)
    target.sum().backward()
    assert target.grad.item() == 3
    handle.remove()
    target.grad = None
    target.sum().backward()
    assert target.grad.item() == 2


def test_unsharded_class_is_the_class_before_sharding(one_rank: None) -> None:
    """``fully_shard`` replaces the class of a module, and the original one is found."""
    model = nn.Linear(2, 2)
    fully_shard(model)
    assert isinstance(model, FSDPModule)
    assert type(model) is not nn.Linear
    assert torch_private.unsharded_class(model) is nn.Linear


def test_flatten_mesh_gives_one_group_for_all_dimensions(one_rank: None) -> None:
    """The flattened mesh has one dimension with all ranks."""
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    flat = torch_private.flatten_mesh(mesh, "data")
    assert (flat.ndim, flat.size(), flat.get_group().size()) == (1, 1, 1)


def test_local_shape_and_offset_describe_the_shard(one_rank: None) -> None:
    """On one rank the shard is the whole tensor, at offset 0."""
    mesh = init_device_mesh("cpu", (1,))
    shape, offset = torch_private.local_shape_and_offset((5, 3), mesh, [Shard(0)])
    assert (tuple(shape), tuple(offset)) == ((5, 3), (0, 0))


def test_gather_scalars_gathers_only_while_it_is_enabled(one_rank: None) -> None:
    """``item()`` of a ``DTensor`` calls ``full_tensor`` while it is enabled, and its result does not change in one process."""
    gathered: list[int] = []

    class Whole:
        def full_tensor(self) -> Tensor:
            gathered.append(1)
            return torch.tensor(5.0)

    total = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (1,)), [Shard(0)]).sum()
    for enabled in (True, False):
        torch_private.gather_scalars(enabled)
        assert total.item() == 6
    torch_private.gather_scalars(True)
    handler = type(total)._op_dispatcher._custom_op_handlers[torch.ops.aten._local_scalar_dense.default]
    torch_private.gather_scalars(False)
    assert handler(torch.ops.aten._local_scalar_dense.default, (Whole(),), {}) == 5
    assert gathered == [1]


def test_checkpoint_module_recomputes_and_keeps_names() -> None:
    """The forward pass runs again in the backward pass, gradients are equal, and parameters keep their names."""

    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x).tanh()

    module = Counting(2, 2)
    inputs = torch.ones(1, 2, requires_grad=True)
    module(inputs).sum().backward()
    expected = module.weight.grad.clone()
    module.weight.grad, module.calls = None, 0
    torch_private.checkpoint_module(module)
    module(inputs).sum().backward()
    assert module.calls == 2
    assert torch.equal(module.weight.grad, expected)
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]


def test_default_store_is_the_store_of_the_process_group(one_rank: None) -> None:
    """A value that was set in the store can be read."""
    store = torch_private.default_store()
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_flight_record_lists_the_collectives_of_a_group(one_rank: None) -> None:
    """An entry has the number, operation, input and state of a collective, and the stack on request; groups have names."""
    dist.all_reduce(torch.ones(2, 3))
    # A thread of Gloo marks it as completed.
    assert poll_until(lambda: torch_private.flight_record(stacks=False)[-1]["retired"], 10, longest_pause_s=0.1)
    assert "frames" not in torch_private.flight_record(stacks=False)[-1]
    entry = torch_private.flight_record(stacks=True)[-1]
    assert entry["profiling_name"] == "gloo:all_reduce"
    assert (entry["input_dtypes"], entry["input_sizes"]) == (["Float"], [[2, 3]])
    assert any(frame["filename"] == __file__ for frame in entry["frames"])
    name, description = entry["process_group"]
    assert torch_private.process_groups()[name] == (description, (0,)) == ("default_pg", (0,))


def test_set_group_timeout_changes_the_timeout_of_the_backend(one_rank: None) -> None:
    """The timeout of collectives of a group that was created with another one changes."""
    group = dist.new_group([0])
    torch_private.set_group_timeout(group, timedelta(seconds=7))
    dist.all_reduce(torch.ones(1), group=group)
    assert torch_private.flight_record(stacks=False)[-1]["timeout_ms"] == 7000


def test_the_wrappers_inside_a_model_hold_the_module_in_an_attribute() -> None:
    """The original module is the attribute ``_orig_mod`` or ``_checkpoint_wrapped_module`` of its wrapper."""
    linear = nn.Linear(1, 1)
    for wrapper in (torch.compile(linear, backend="eager"), checkpoint_wrapper(linear)):
        (attribute,) = (name for cls, name in torch_private.inner_wrappers().items() if isinstance(wrapper, cls))
        assert wrapper._modules == {attribute: linear}


def test_the_fused_kernels_update_in_place() -> None:
    """Each kernel updates the parameters; the steps of Adam and Adagrad are counted by the caller."""

    def tensors(count: int) -> list[list[Tensor]]:
        return [[torch.full((2,), 1.0)] for _ in range(count)]

    shared: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.0, "maximize": False, "grad_scale": None, "found_inf": None}
    parameters, gradients, momenta = tensors(3)
    sgd = {"momentum": 0.5, "dampening": 0.0, "nesterov": False, "is_first_step": False}
    torch_private.fused_sgd(parameters, gradients, momenta, **shared, **sgd)
    assert momenta[0].tolist() == [1.5, 1.5]
    assert parameters[0].tolist() == [0.25, 0.25]
    adam = {"beta1": 0.5, "beta2": 0.5, "eps": 0.0, "amsgrad": False}
    for kernel in (torch_private.fused_adam, torch_private.fused_adamw):
        parameters, gradients, averages, squares = tensors(4)
        steps = [torch.tensor(1.0)]
        kernel(parameters, gradients, averages, squares, [], steps, **shared, **adam)
        # Both averages stay 1 and are divided by 1 - 0.5.
        assert parameters[0].tolist() == pytest.approx([1 - 0.5 * 2 / math.sqrt(2)] * 2)
        assert steps[0] == 1
    parameters, gradients, sums = tensors(3)
    steps = [torch.tensor(1.0)]
    torch_private.fused_adagrad(parameters, gradients, sums, steps, lr_decay=0.0, eps=0.0, **shared)
    assert sums[0].tolist() == [2, 2]
    assert parameters[0].tolist() == pytest.approx([1 - 0.5 / math.sqrt(2)] * 2)


class OwnTensor(Tensor):
    """A tensor that records calls of torch functions."""

    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs)


def test_backward_from_scalar_computes_the_gradients_of_backward() -> None:
    """Gradients, hooks and errors are those of ``loss.backward()``, also for a tensor with one element and a subclass."""
    for shape in ((), (1,)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            weight, seen = nn.Parameter(torch.full(shape, 3.0, dtype=dtype)), []
            loss = weight * weight
            loss.register_hook(seen.append)
            torch_private.backward_from_scalar(loss)
            assert weight.grad is not None
            assert weight.grad.tolist() == (torch.full(shape, 6.0)).tolist()
            assert [gradient.tolist() for gradient in seen] == [torch.ones(shape).tolist()]
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch_private.backward_from_scalar(torch.ones(()))
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        torch_private.backward_from_scalar(nn.Parameter(torch.ones(2)) * 2)
    with pytest.raises(RuntimeError, match="real scalar outputs|complex"):
        torch_private.backward_from_scalar(nn.Parameter(torch.ones((), dtype=torch.complex64)) * 2)
    own = nn.Parameter(torch.ones(())).sum().as_subclass(OwnTensor)
    torch_private.backward_from_scalar(own)
    assert "backward" in OwnTensor.calls


def test_backward_from_scalar_starts_with_a_gradient() -> None:
    """A gradient of the same dtype multiplies the result; one of another dtype or shape is left to torch, which rejects it."""
    weight = nn.Parameter(torch.tensor(3.0))
    torch_private.backward_from_scalar(weight * weight, torch.tensor(0.5))
    assert weight.grad is not None
    assert weight.grad.item() == 3.0
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        torch_private.backward_from_scalar(weight * weight, torch.ones(2))


def test_the_local_tensor_of_a_sharded_tensor_is_always_the_same_object(one_rank: None) -> None:
    """It has the memory of ``to_local()``, which returns a new view in each call."""
    sharded = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (1,)), [Shard(0)])
    local = torch_private.local_tensor(sharded)
    assert local is torch_private.local_tensor(sharded)
    assert local.data_ptr() == sharded.to_local().data_ptr()


def test_only_real_scalars_of_the_class_tensor_are_plain_scalars() -> None:
    """Parameters, subclasses, vectors, integers and complex numbers are not."""
    assert torch_private.is_plain_scalar(torch.ones(()))
    assert torch_private.is_plain_scalar(torch.ones((), dtype=torch.bfloat16))
    others = [
        torch.ones(1),
        torch.tensor(1),
        torch.tensor(1j),
        nn.Parameter(torch.ones(())),
        torch.ones(()).as_subclass(OwnTensor),
    ]
    assert not any(map(torch_private.is_plain_scalar, others))


def test_set_grad_enabled_switches_autograd() -> None:
    """It switches autograd until the next call."""
    torch_private.set_grad_enabled(False)
    try:
        assert not torch.is_grad_enabled()
    finally:
        torch_private.set_grad_enabled(True)
    assert torch.is_grad_enabled()


def test_is_step_observed_finds_hooks_and_profilers() -> None:
    """Hooks of the optimizer, global hooks and an active profiler observe a step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    assert not torch_private.is_step_observed(optimizer)
    for register in (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        handle = register(lambda *_: None)
        assert torch_private.is_step_observed(optimizer)
        handle.remove()
    with torch.profiler.profile():
        assert torch_private.is_step_observed(optimizer)
    assert not torch_private.is_step_observed(optimizer)


def test_is_profiling_follows_both_profilers() -> None:
    """Both profilers of torch set the flag while they are active."""
    for profile in (torch.profiler.profile, torch.autograd.profiler.profile):
        assert not torch_private.is_profiling()
        with profile():
            assert torch_private.is_profiling()
    assert not torch_private.is_profiling()


def test_step_function_ignores_the_wrapper_that_calls_hooks() -> None:
    """Torch wraps ``step`` of a class when the first object is created; a replaced ``step`` is another function."""
    before = torch_private.step_function(torch.optim.SGD)
    torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    assert torch_private.step_function(torch.optim.SGD) is before

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            pass

    assert torch_private.step_function(Own) is not before


def test_exception_wrapper_carries_an_error_to_another_process() -> None:
    """The error that is raised has the class and the text of the one in the wrapper, which pickle supports."""
    wrapper = torch_private.ExceptionWrapper((ValueError, ValueError("seven"), None), where="in a data worker")
    with pytest.raises(ValueError, match=r"in a data worker[\s\S]*seven"):
        pickle.loads(pickle.dumps(wrapper)).reraise()


def test_every_name_has_a_test() -> None:
    """Each public name of the module is used by a test in this file."""
    tested = {
        node.attr
        for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch_private"
    }
    assert set(torch_private.__all__) <= tested


@pytest.mark.slow
def test_private_names_of_torch_are_used_in_one_module() -> None:
    """No other module reads a private attribute that ``torch_private`` wraps."""
    wrapped = {
        "_amp_foreach_non_finite_check_and_unscale_", "_cdata", "_compiled_call_impl", "_current_graph_task_id",
        "_custom_op_handlers", "_find_tensors", "_get_default_store", "_get_fsdp_state", "_lazy_init",
        "_load_state_dict_pre_hooks", "_schema", "_step_supports_amp_scaling", "_values",
    }  # fmt: skip
    found = [
        f"{path.relative_to(SOURCE.parents[1])}:{node.lineno}: {node.attr}"
        for path in SOURCE.parents[1].rglob("*.py")
        if path != SOURCE
        # Parsing all modules takes seconds, and few of them contain one of the names.
        if any(name in (text := path.read_text(encoding="utf-8")) for name in wrapped)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and node.attr in wrapped
        # Attributes of Stratagem's own objects.
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]
    assert found == []


def test_optimizers_are_excluded_from_compilation_again_after_a_trial() -> None:
    """Within the context, parameter groups are added by torch's function itself; afterwards, torch's attribute is as before."""
    add_group: Any = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    before = dict(add_group.__dict__)
    with torch_private.without_compiler_import():
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
        assert "__dynamo_disable" in add_group.__dict__
    assert add_group.__dict__ == before
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_observe_backward_sees_every_backward_pass_that_python_starts() -> None:
    """``Tensor.backward`` and ``torch.autograd.backward`` call the functions; after the block, they do not."""
    seen: list[Any] = []
    weight = torch.ones(1, requires_grad=True)
    with torch_private.observe_backward(seen.append, lambda: seen.append(weight.grad)):
        loss = weight * 2
        loss.backward()
        assert len(seen) == 2
        assert seen[0] is loss
        assert torch.equal(seen[1], torch.full((1,), 2.0))
        torch.autograd.backward([weight * 3])
    assert len(seen) == 4
    (weight * 2).backward()
    assert len(seen) == 4


def test_observe_grad_norms_sees_clipping_that_was_imported_by_name() -> None:
    """The functions receive the gradients before they are clipped, and the norm."""
    clip = nn.utils.clip_grad_norm_
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.full((1,), 3.0)
    seen: list[Any] = []
    with torch_private.observe_grad_norms(lambda grads: seen.extend(each.clone() for each in grads), seen.append):
        clip([weight], 1.0)
    assert [each.item() for each in seen] == [3.0, 3.0]
    clip([weight], 1.0)
    assert len(seen) == 2


def test_observe_shape_propagation_sees_operations_that_dtensor_does_not_know(one_rank: None) -> None:
    """The first sum of a shape calls the function with 1 and -1, the second one does not; after the block, none does."""
    mesh = init_device_mesh("cpu", (1,))
    first, other = (distribute_tensor(torch.ones(size), mesh, [Shard(0)]) for size in (1237, 1249))
    seen: list[int] = []
    with torch_private.observe_shape_propagation(seen.append):
        first.cumsum(0)
        assert seen == [1, -1]
        first.cumsum(0)
    other.cumsum(0)
    assert seen == [1, -1]
