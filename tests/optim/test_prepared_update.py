"""The prepared update equals torch's own step to the bit, and leaves every other case to torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from stratagem.optim import AmpOptimWrapper, OptimWrapper
from stratagem.optim.prepared import PreparedUpdate

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda groups: SGD(groups, 0.1, fused=True),
    "SGD, momentum": lambda groups: SGD(groups, 0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "SGD, Nesterov": lambda groups: SGD(groups, 0.1, momentum=0.9, nesterov=True, fused=True),
    "SGD, dampening": lambda groups: SGD(groups, 0.1, momentum=0.9, dampening=0.3, fused=True),
    "SGD, foreach": lambda groups: SGD(groups, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=True),
    "SGD, foreach, no momentum": lambda groups: SGD(groups, 0.1, foreach=True),
    "Adam": lambda groups: Adam(groups, 0.1, weight_decay=0.01, fused=True),
    "AdamW": lambda groups: AdamW(groups, 0.1, betas=(0.8, 0.95), fused=True),
    "Adagrad": lambda groups: Adagrad(groups, 0.1, lr_decay=0.1, weight_decay=0.01, fused=True),
}


def make(name: str = "AdamW", *, dtypes: tuple[torch.dtype, ...] = (torch.float32,), groups: int = 2) -> Optimizer:
    """Return an optimizer whose groups have three parameters of each dtype, one of them a scalar."""
    generator = torch.Generator().manual_seed(0)
    sizes: list[tuple[int, ...]] = [(3, 5), (7,), ()]
    parameters = [
        {
            "params": [
                nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for dtype in dtypes for size in sizes
            ],
            "lr": 0.1 if group != 1 else 0.01,
        }
        for group in range(groups)
    ]
    return OPTIMIZERS[name](parameters)


def set_gradients(optimizer: Optimizer, seed: int) -> None:
    """Set random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def values_of(optimizer: Optimizer) -> list[Any]:
    """Return all parameters and state tensors, as lists."""
    states = [
        {name: value.tolist() if isinstance(value, Tensor) else value for name, value in optimizer.state[each].items()}
        for each in parameters_of(optimizer)
        if each in optimizer.state
    ]
    return [[parameter.tolist() for parameter in parameters_of(optimizer)], states]


def started(name: str = "AdamW", **options: Any) -> tuple[Optimizer, PreparedUpdate]:
    """Return an optimizer after its first step, which creates the state, and its prepared update."""
    optimizer = make(name, **options)
    prepared = PreparedUpdate.of(optimizer)
    assert prepared is not None
    set_gradients(optimizer, 0)
    optimizer.step()
    set_gradients(optimizer, 1)
    return optimizer, prepared


def require_equal_step(optimizer: Optimizer, prepared: PreparedUpdate, *, applied: bool = True) -> None:
    """Check that the prepared update of an optimizer equals torch's step of a copy, or that it does nothing."""
    reference = copy.deepcopy(optimizer)
    vars(reference).update(
        {name: vars(optimizer)[name] for name in ("found_inf", "grad_scale") if name in vars(optimizer)}
    )
    for mine, own in zip(parameters_of(reference), parameters_of(optimizer), strict=True):
        mine.grad = None if own.grad is None else own.grad.clone()
    before = values_of(optimizer)
    assert prepared.apply(optimizer) == applied
    if not applied:
        assert values_of(optimizer) == before
        return
    assert torch.is_grad_enabled()
    reference.step()
    assert values_of(optimizer) == values_of(reference)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float64,), (torch.float32, torch.float64, torch.bfloat16)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_equals_the_step_of_torch(name: str, groups: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """After five updates, parameters and state have the same bits, for one or several groups and dtypes."""
    optimizer, prepared = started(name, groups=groups, dtypes=dtypes)
    for seed in range(5):
        set_gradients(optimizer, seed)
        require_equal_step(optimizer, prepared)


def replace_parameter(optimizer: Optimizer) -> None:
    """Replace a parameter and give it the state of the old one."""
    old = optimizer.param_groups[0]["params"][0]
    new = nn.Parameter(old.detach() * 2)
    optimizer.param_groups[0]["params"][0] = new
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)
    new.grad = torch.ones_like(new)


def reload(optimizer: Optimizer) -> None:
    """Load the optimizer's own state."""
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def replace_state(optimizer: Optimizer) -> None:
    """Replace a state tensor by a changed copy."""
    state = optimizer.state.get(optimizer.param_groups[-1]["params"][-1], {})
    for key in state:
        state[key] = state[key] + 1


def replace_states(optimizer: Optimizer) -> None:
    """Replace the state of a parameter, with the same tensors."""
    parameter = optimizer.param_groups[0]["params"][1]
    if parameter in optimizer.state:
        optimizer.state[parameter] = {key: value.clone() for key, value in optimizer.state[parameter].items()}


def change_options(optimizer: Optimizer) -> None:
    """Change numbers of one group, as schedules do."""
    group = optimizer.param_groups[0]
    group["lr"] *= 0.5
    group["weight_decay"] += 0.125


def add_group(optimizer: Optimizer) -> None:
    """Add a parameter, which has no state yet."""
    new = nn.Parameter(torch.ones(4))
    new.grad = torch.ones(4)
    optimizer.add_param_group({"params": [new]})


def remove_group(optimizer: Optimizer) -> None:
    """Remove the last group and its state."""
    if len(optimizer.param_groups) > 1:
        for parameter in optimizer.param_groups.pop()["params"]:
            optimizer.state.pop(parameter, None)


def drop_gradient(optimizer: Optimizer) -> None:
    """Leave a parameter without a gradient."""
    optimizer.param_groups[0]["params"][1].grad = None


def swap_data(optimizer: Optimizer) -> None:
    """Give a parameter other storage."""
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.data = parameter.data + 1


def toggle_maximize(optimizer: Optimizer) -> None:
    """Change the direction of one group."""
    optimizer.param_groups[0]["maximize"] = not optimizer.param_groups[0]["maximize"]


CHANGES = [
    replace_parameter, reload, replace_state, replace_states, change_options, add_group, remove_group, drop_gradient,
    swap_data, toggle_maximize,
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@given(changes=st.lists(st.lists(st.sampled_from(CHANGES), max_size=2), min_size=1, max_size=6))
def test_it_equals_the_step_of_torch_after_any_changes(
    name: str, changes: list[list[Callable[[Optimizer], None]]]
) -> None:
    """Whatever a user changes in the optimizer between two steps, each step has the bits of torch's step."""
    optimizer, prepared = started(name)
    reference = copy.deepcopy(optimizer)
    for number, step in enumerate(changes):
        for each in (optimizer, reference):
            set_gradients(each, number)
            for change in step:
                change(each)
        if not prepared.apply(optimizer):
            optimizer.step()
        reference.step()
        assert values_of(optimizer) == values_of(reference)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_number_of_kernel_calls_does_not_depend_on_the_number_of_groups(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Eight groups with two learning rates need two calls of the kernel."""
    optimizer, prepared = started(name, groups=8)
    launched = []
    kernel = prepared._kernel
    spy = copy.copy(kernel)
    object.__setattr__(spy, "launch", lambda *arguments: (launched.append(1), kernel.launch(*arguments)))
    monkeypatch.setattr(prepared, "_kernel", spy)
    require_equal_step(optimizer, prepared)
    assert len(launched) == 2


def test_a_flag_of_bad_gradients_skips_the_update_as_in_torch() -> None:
    """``found_inf``, which the deferred check sets, is passed to the kernel; skipped updates are not counted."""
    for found in (0.0, 1.0):
        for name in ("SGD, momentum", "AdamW", "Adagrad"):
            optimizer, prepared = started(name)
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), None  # type: ignore[attr-defined]
            before = values_of(optimizer)
            require_equal_step(optimizer, prepared)
            assert (values_of(optimizer) == before) == bool(found)


def test_the_first_step_is_left_to_torch() -> None:
    """The first step creates the state."""
    optimizer = make()
    set_gradients(optimizer, 0)
    prepared = PreparedUpdate.of(optimizer)
    assert prepared is not None
    require_equal_step(optimizer, prepared, applied=False)


def pre_hook(optimizer: Optimizer) -> Callable[[], None]:
    return optimizer.register_step_pre_hook(lambda *_: None).remove


def post_hook(optimizer: Optimizer) -> Callable[[], None]:
    return optimizer.register_step_post_hook(lambda *_: None).remove


def global_pre_hook(_: Optimizer) -> Callable[[], None]:
    return register_optimizer_step_pre_hook(lambda *_: None).remove


def global_post_hook(_: Optimizer) -> Callable[[], None]:
    return register_optimizer_step_post_hook(lambda *_: None).remove


def profiler(_: Optimizer) -> Callable[[], None]:
    context = torch.profiler.profile()
    context.start()
    return context.stop


def patched_object(optimizer: Optimizer) -> Callable[[], None]:
    StepLR(optimizer, 1)  # replaces optimizer.step
    return lambda: None


def patched_class(optimizer: Optimizer) -> Callable[[], None]:
    original = type(optimizer).step
    type(optimizer).step = lambda self, closure=None: original(self, closure)  # type: ignore[method-assign]
    return lambda: setattr(type(optimizer), "step", original)


def another_optimizer(optimizer: Optimizer) -> Callable[[], None]:
    """Another object with the same contents."""
    optimizer.__class__ = type("Subclass", (type(optimizer),), {"step": lambda self: None})
    return lambda: None


def gradient_scale(optimizer: Optimizer) -> Callable[[], None]:
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    return lambda: None


def no_gradient(optimizer: Optimizer) -> Callable[[], None]:
    drop_gradient(optimizer)
    return lambda: None


def sparse_gradient(optimizer: Optimizer) -> Callable[[], None]:
    optimizer.param_groups[1]["params"][0].grad = torch.ones(3, 5).to_sparse()
    return lambda: None


def another_dtype(optimizer: Optimizer) -> Callable[[], None]:
    parameter = optimizer.param_groups[1]["params"][0]
    parameter.grad_dtype = None
    parameter.grad = torch.ones(3, 5, dtype=torch.float64)
    return lambda: None


def option(name: str, value: Any) -> Callable[[Optimizer], Callable[[], None]]:
    """Return a case that sets an option of the second group."""

    def case(optimizer: Optimizer) -> Callable[[], None]:
        optimizer.param_groups[1][name] = value
        return lambda: None

    return case


CASES: dict[str, Callable[[Optimizer], Callable[[], None]]] = {
    "a hook before the step": pre_hook,
    "a hook after the step": post_hook,
    "a global hook before the step": global_pre_hook,
    "a global hook after the step": global_post_hook,
    "an active profiler": profiler,
    "a patched object": patched_object,
    "a patched class": patched_class,
    "a subclass": another_optimizer,
    "a gradient scale": gradient_scale,
    "a missing gradient": no_gradient,
    "a sparse gradient": sparse_gradient,
    "a gradient of another dtype": another_dtype,
    "a tensor as learning rate": option("lr", torch.tensor(0.1)),
    "capturable": option("capturable", True),
    "differentiable": option("differentiable", True),
    "amsgrad": option("amsgrad", True),
    "maximize": option("maximize", True),
    "no fused kernel in one group": option("fused", False),
}


@pytest.mark.parametrize("case", CASES)
def test_every_other_case_is_left_to_torch(case: str) -> None:
    """Nothing is updated if torch's own step does more than the kernel."""
    optimizer, prepared = started()
    undo = CASES[case](optimizer)
    try:
        before = values_of(optimizer)
        assert not prepared.apply(optimizer)
        assert values_of(optimizer) == before
    finally:
        undo()


def test_it_is_used_again_once_torch_is_not_required() -> None:
    """A hook that was removed, or a gradient that exists again, does not disable the prepared update."""
    optimizer, prepared = started()
    handle = optimizer.register_step_pre_hook(lambda *_: None)
    assert not prepared.apply(optimizer)
    handle.remove()
    drop_gradient(optimizer)
    assert not prepared.apply(optimizer)
    set_gradients(optimizer, 3)
    require_equal_step(optimizer, prepared)


class OwnTensor(nn.Parameter):
    """A parameter of another class."""


@pytest.mark.parametrize(
    "parameter",
    [OwnTensor(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.complex64))],
    ids=["class", "complex"],
)
def test_other_tensors_are_left_to_torch(parameter: nn.Parameter) -> None:
    """Subclasses of tensors, and complex parameters, are updated by torch."""
    optimizer = SGD([parameter], 0.1, fused=True)
    prepared = PreparedUpdate.of(optimizer)
    assert prepared is not None
    parameter.grad = torch.ones_like(parameter)
    assert not prepared.apply(optimizer)


def test_an_optimizer_that_is_not_fused_has_no_prepared_update() -> None:
    """Without a fused kernel, torch's own step runs."""
    assert PreparedUpdate.of(SGD([nn.Parameter(torch.ones(3))], 0.1)) is None


def test_a_subclass_has_no_prepared_update() -> None:
    """A subclass may do anything in its step."""

    class Own(SGD):
        pass

    assert PreparedUpdate.of(Own([nn.Parameter(torch.ones(3))], 0.1, fused=True)) is None


@pytest.mark.parametrize(("options", "by_torch"), [({}, 1), ({"prepared": False}, 3)])
@pytest.mark.parametrize("wrapper_type", [OptimWrapper, AmpOptimWrapper])
def test_wrappers_use_it_unless_it_is_disabled(
    monkeypatch: pytest.MonkeyPatch, wrapper_type: Callable[..., OptimWrapper], options: dict[str, Any], by_torch: int
) -> None:
    """``prepared=False`` of a wrapper leaves all steps to torch; by default, torch's step runs only once."""
    steps: list[int] = []
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, **__: steps.append(1))
    wrapper = wrapper_type(SGD([weight := nn.Parameter(torch.ones(3))], 0.125, momentum=0.5, fused=True), **options)
    for _ in range(3):
        wrapper.update_params(weight.sum())
    assert len(steps) == by_torch
    assert wrapper.num_steps_applied == 3


def test_arguments_of_the_step_are_passed_to_torch() -> None:
    """A closure is called, because torch's step runs."""
    weight = nn.Parameter(torch.ones(3))
    wrapper = OptimWrapper(SGD([weight], 0.125, fused=True))
    called = []
    wrapper.update_params(weight.sum(), step_kwargs={"closure": lambda: called.append(1)})
    assert called == [1]
    assert weight.tolist() == [0.875] * 3


def test_the_steps_of_all_groups_are_counted_with_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a different learning rate in each group, the kernel is called for each group, but the steps are counted once."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(5)]
    optimizer = AdamW([{"params": [each], "lr": 0.1 * (i + 1)} for i, each in enumerate(parameters)], fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    prepared = PreparedUpdate.of(optimizer)
    assert prepared is not None
    counted: list[int] = []
    add = torch._foreach_add_
    monkeypatch.setattr(torch, "_foreach_add_", lambda steps, one: (counted.append(len(steps)), add(steps, one)))
    assert prepared.apply(optimizer)
    assert counted == [5]
    assert [optimizer.state[each]["step"].item() for each in parameters] == [2.0] * 5


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "nesterov": True}, {"weight_decay": 0.1, "dampening": 0.5}]
)
def test_a_parameter_that_joins_late_gets_momentum(options: dict[str, Any]):
    """SGD with momentum, which uses the fused kernel, continues if a parameter is unfrozen; torch's own step fails."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))]
    models.append(copy.deepcopy(models[0]))
    loop, fused = (
        SGD(model.parameters(), lr=0.1, momentum=0.9, fused=i == 1, **options) for i, model in enumerate(models)
    )
    wrapper, inputs = OptimWrapper(optimizer=fused), torch.randn(5, 3)
    for i in range(4):
        for model in models:
            model[1].requires_grad_(i > 1)
        wrapper.update_params(models[1](inputs).square().sum())
        loop.zero_grad()
        models[0](inputs).square().sum().backward()
        loop.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
