"""Detecting NaN and Inf in gradients and weights."""

import math

import pytest
import torch
from torch import Tensor, nn

from stratagem.optim import DeferredNonFiniteCheck, GradientPolicy, OptimWrapper, SyncNonFiniteCheck, all_finite

BAD = (math.nan, math.inf, -math.inf)
KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_all_data_types_are_checked(dtype: torch.dtype):
    """A NaN or Inf is found in any data type, next to finite, empty and integer tensors."""
    sound = torch.ones(3, 2).to(dtype)
    others = [torch.zeros(0), torch.tensor(1), torch.zeros(4)]
    assert all_finite([*others, sound])
    for value in BAD[: 1 if dtype.itemsize == 1 else 3]:
        bad = torch.ones(6).masked_fill(torch.arange(6) == 4, value).to(dtype).reshape(3, 2)
        assert not all_finite([*others, bad])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_large_numbers_are_finite(dtype: torch.dtype):
    """Large finite numbers pass the check, even if the sum of their squares overflows."""
    assert all_finite([torch.full((100,), torch.finfo(dtype).max, dtype=dtype)])


def watched(*parameters: Tensor) -> SyncNonFiniteCheck:
    """Return a check of the parameters, which are named first, second and third."""
    names = ("first", "second", "third")
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return SyncNonFiniteCheck(optimizer, {id(each): name for each, name in zip(parameters, names, strict=False)})


@pytest.mark.parametrize("dtype", KINDS[:5], ids=str)
@pytest.mark.parametrize("value", BAD)
def test_an_update_is_rejected_and_the_parameter_named(dtype: torch.dtype, value: float):
    """An update with a NaN or Inf in one of several data types is rejected; finite gradients keep their bits."""
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=dtype)), nn.Parameter(torch.ones(2))]
    watch = watched(*parameters)
    for each in parameters:
        each.grad = torch.rand(2, dtype=torch.float64).to(each.dtype)
    gradients = [each.grad for each in parameters]
    before = [gradient.clone() for gradient in gradients]
    assert watch.allows_step(gradients, None)
    assert all(torch.equal(now, was) for now, was in zip(gradients, before, strict=True))
    gradients[1][0] = value
    assert not watch.allows_step(gradients, None)
    assert watch.nonfinite_params == ("second",)
    gradients[1][0] = 0.0
    assert watch.allows_step(gradients, None)


def test_sparse_gradients_are_checked():
    """Sparse gradients, such as those of a large embedding, are checked."""
    embedding = nn.Embedding(5, 2, sparse=True)
    watch = watched(embedding.weight)
    embedding(torch.tensor([1, 3])).sum().backward()
    assert watch.allows_step([embedding.weight.grad], None)
    embedding(torch.tensor([1])).mul(math.nan).sum().backward()
    assert not watch.allows_step([embedding.weight.grad], None)
    assert watch.nonfinite_params == ("first",)


def test_gradients_are_checked_with_float64_as_the_default_dtype():
    """A default dtype of float64 does not break the check, whose kernel requires a float32 flag."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        parameter = nn.Parameter(torch.ones(2))
        check = watched(parameter)
        assert check.allows_step([torch.ones(2)], None)
        assert not check.allows_step([torch.tensor([1.0, math.nan])], None)
    finally:
        torch.set_default_dtype(before)


def test_gradients_may_become_sparse():
    """The gradients of an embedding are checked even if they change between dense and sparse."""
    embedding, other = nn.Embedding(5, 2), nn.Parameter(torch.ones(2))
    watch = watched(embedding.weight, other)
    for sparse, value, sound in [
        (False, 1.0, True),
        (True, 1.0, True),
        (True, math.nan, False),
        (False, math.nan, False),
    ]:
        embedding.weight.grad = None
        embedding.sparse = sparse
        embedding(torch.tensor([1, 3])).mul(value).sum().backward()
        assert watch.allows_step([embedding.weight.grad, torch.ones(2)], None) is sound


def test_gradients_of_a_later_group_are_checked():
    """Gradients of groups that are added later are checked, even with a new data type."""
    first, later = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([first], lr=0.1)
    watch = SyncNonFiniteCheck(optimizer, {})
    optimizer.add_param_group({"params": [later]})
    assert watch.allows_step([torch.ones(2), torch.ones(2, dtype=torch.complex64)], None)
    assert not watch.allows_step([torch.ones(2), torch.full((2,), complex(0, math.inf))], None)


def test_an_update_without_gradients_is_allowed():
    """An update without gradients is allowed."""
    parameter = nn.Parameter(torch.ones(2))
    assert watched(parameter).allows_step([], None)


def test_the_check_does_not_change_finite_gradients():
    """For a finite loss, the initial gradient of 1 + 0 * loss is exactly 1, so the results do not change."""
    torch.manual_seed(0)
    inputs = torch.randn(5, 4)
    gradients = []
    for watch in (False, True):
        layer = nn.Linear(4, 3)
        nn.init.constant_(layer.weight, 0.3)
        nn.init.zeros_(layer.bias)
        wrapper = OptimWrapper(torch.optim.SGD(layer.parameters(), lr=0.1), accumulative_counts=2)
        wrapper.gradient_policy = GradientPolicy(guard=SyncNonFiniteCheck(wrapper.optimizer, {}) if watch else None)
        wrapper.update_params(layer(inputs).exp().mean() - 1e30)
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)


def test_the_deferred_check_returns_the_first_bad_update():
    """The deferred check returns the first bad update since it was last read."""
    parameter = nn.Parameter(torch.ones(1))
    watch = DeferredNonFiniteCheck(torch.optim.SGD([parameter], lr=0.1, fused=True))
    sound, bad = torch.ones(1), torch.tensor([math.nan])
    assert watch.first_nonfinite() is None
    assert all(watch.allows_step([gradient], None) for gradient in (sound, sound))
    assert watch.first_nonfinite() is None
    assert all(watch.allows_step([gradient], None) for gradient in (sound, bad, sound))
    assert watch.first_nonfinite() == 1


@pytest.mark.parametrize(
    ("optimizer", "protects"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, fused=True), True),
        (lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True), False),
        (lambda p: torch.optim.RMSprop(p, lr=0.1), False),
    ],
)
def test_only_fused_optimizers_read_the_flag_on_the_device(optimizer, protects: bool):
    """Only fused optimizers read the flag and protect the weights; the flag is removed at the end."""
    parameter = nn.Parameter(torch.ones(1))
    made = optimizer([parameter])
    watch = DeferredNonFiniteCheck(made)
    parameter.grad = torch.tensor([math.nan])
    watch.allows_step([parameter.grad], None)
    made.step()
    assert watch.protects == protects == bool(parameter.isfinite())
    watch.end()
    with torch.no_grad():
        parameter.fill_(1.0)
    for slot in made.state.values():
        for value in slot.values():
            value.zero_()
    parameter.grad = torch.ones(1)
    made.step()
    assert parameter.isfinite()
    assert parameter.item() != 1.0


@pytest.mark.parametrize("synchronized", [False, True])
def test_a_nonfinite_loss_with_finite_gradients_is_rejected(synchronized: bool):
    """An infinite constant in the loss is rejected, although the gradients are finite."""
    parameter = torch.nn.Parameter(torch.ones(2))
    wrapper = OptimWrapper(torch.optim.SGD([parameter], lr=0.1))
    wrapper.gradient_policy = GradientPolicy(guard=SyncNonFiniteCheck(wrapper.optimizer, {}, synchronized=synchronized))
    wrapper.update_params(parameter.sum() + float("inf"))
    assert (wrapper.num_steps_applied, parameter.tolist()) == (0, [1, 1])
    wrapper.update_params(parameter.sum())
    assert (wrapper.num_steps_applied, parameter.tolist()) == (1, pytest.approx([0.9, 0.9]))
