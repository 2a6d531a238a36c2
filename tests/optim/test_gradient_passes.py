"""How often an update reads and writes the gradients, and how often it waits for the device.

The tests count operators that have the gradients among their arguments, so that they hold for any device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode

from stratagem.optim import (
    AccumulatingOptimWrapper,
    AmpOptimWrapper,
    DeferredNonFiniteCheck,
    OptimWrapper,
    SyncNonFiniteCheck,
)


class Passes(TorchDispatchMode):
    """Counts reads and writes of whole lists of gradients, and synchronizations."""

    def __init__(self, gradients: list[Tensor]) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self._gradients = {id(each) for each in gradients}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":
            self.count["synchronizations"] += 1
        first = args[0] if args else None
        tensors = first if isinstance(first, list | tuple) else [first]
        if any(id(each) in self._gradients for each in tensors):
            self.count["writes" if name.rstrip("_") != name else "reads"] += 1
        return function(*args, **(kwargs or {}))


def passes(wrapper: AccumulatingOptimWrapper, model: nn.Module) -> dict[str, int]:
    """Update once with gradients of 1, and return the counts without those of the optimizer."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if wrapper.grad_scaler is not None:
        wrapper.grad_scaler.scale(torch.zeros(()))  # creates the loss scale
    wrapper.inner_count += 1
    wrapper.prepared = None
    wrapper.optimizer.step = lambda *_: None  # type: ignore[assignment,method-assign,misc]
    with Passes([each.grad for each in model.parameters() if each.grad is not None]) as seen:
        wrapper.step()
    assert wrapper.num_steps_applied == 1
    return {name: seen.count[name] for name in ("reads", "writes", "synchronizations")}


def guarded(wrapper: AccumulatingOptimWrapper, *, waits: bool) -> AccumulatingOptimWrapper:
    """Add the guard of a run on an accelerator."""
    guard = SyncNonFiniteCheck(wrapper.optimizer, {}) if waits else DeferredNonFiniteCheck(wrapper.optimizer)
    wrapper.gradient_policy = replace(wrapper.gradient_policy, guard=guard)
    return wrapper


def model_of() -> nn.Sequential:
    """Return layers that are large enough for the kernels of large tensors."""
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


CLIP = {"max_norm": 0.5}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clip_grad": CLIP}, {"reads": 1, "writes": 1, "synchronizations": 1}),
        ({}, {"reads": 1, "writes": 1, "synchronizations": 1}),
    ],
    ids=["clipping", "no clipping"],
)
@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no guard"])
def test_float16_unscales_and_clips_in_one_pass_and_synchronizes_once(
    options: dict[str, Any], expected: dict[str, int], guard: bool
) -> None:
    """The norm is that of the scaled gradients, and one pass divides by the loss scale and clips, after a single wait."""
    model = model_of()
    wrapper: AccumulatingOptimWrapper = AmpOptimWrapper(SGD(model.parameters(), lr=0.1), dtype="float16", **options)
    assert passes(guarded(wrapper, waits=True) if guard else wrapper, model) == expected


def test_bfloat16_with_clipping_reads_and_writes_the_gradients_once_and_never_waits() -> None:
    """The guard of an accelerator uses the norm that clipping needs."""
    model = model_of()
    wrapper = AmpOptimWrapper(SGD(model.parameters(), lr=0.1), dtype="bfloat16", clip_grad=CLIP)
    assert passes(guarded(wrapper, waits=False), model) == {"reads": 1, "writes": 1, "synchronizations": 0}


@pytest.mark.parametrize("wrap", [AmpOptimWrapper, OptimWrapper])
def test_on_an_accelerator_the_guard_only_reads_gradients(wrap: Callable[..., AccumulatingOptimWrapper]) -> None:
    """Without clipping, an update in bfloat16 or float32 reads the gradients once, writes none and never waits."""
    options = {"dtype": "bfloat16"} if wrap is AmpOptimWrapper else {}
    model = nn.Sequential(nn.Linear(64, 64, device="meta"), nn.Linear(64, 64, device="meta"))
    wrapper = guarded(wrap(SGD(model.parameters(), lr=0.1), **options), waits=False)
    assert passes(wrapper, model) == {"reads": 1, "writes": 0, "synchronizations": 0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_the_check_that_only_reads_finds_nan_and_inf(bad: float | None) -> None:
    """The maximum of the gradients finds NaN and Inf in any of them, and not the largest finite values."""
    model = model_of()
    check = DeferredNonFiniteCheck(SGD(model.parameters(), lr=0.1))
    check._flag._only_reads = True
    gradients = [torch.full_like(parameter, 3e38) for parameter in model.parameters()]
    if bad is not None:
        gradients[2].view(-1)[-1] = bad
    check.allows_step(gradients, None)
    assert check.first_nonfinite() == (None if bad is None else 0)


@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
@pytest.mark.parametrize("clip", [None, CLIP, {"type": "value", "clip_value": 0.01}, {"max_norm": 0.5, "norm_type": 3}])
def test_float16_updates_equal_a_hand_written_loop(scale: float, clip: dict[str, Any] | None) -> None:
    """Six updates, the third with an overflow, have the bits of torch's scaler, clipping and optimizer."""
    torch.manual_seed(0)
    expected, model = model_of(), model_of()
    model.load_state_dict(expected.state_dict())
    optimizer = SGD(expected.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    wrapper = AmpOptimWrapper(
        SGD(model.parameters(), lr=0.1, momentum=0.9),
        dtype="float16",
        loss_scale={"init_scale": scale, "growth_interval": 2},
        clip_grad=clip,
    )
    for step in range(6):
        inputs = torch.randn(8, 64) * (1e30 if step == 2 else 1.0)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = expected(inputs).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if clip is not None and "clip_value" in clip:
            nn.utils.clip_grad_value_(expected.parameters(), clip["clip_value"])
        elif clip is not None:
            clip_grad_norm_(expected.parameters(), clip["max_norm"], clip.get("norm_type", 2.0))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with wrapper.optim_context(model):
            loss = model(inputs).square().mean()
        wrapper.update_params(loss)
        assert wrapper.loss_scale == scaler.get_scale()
    assert wrapper.num_steps_attempted == 6
    assert 4 <= wrapper.num_steps_applied <= 5  # the initial scale may be too large as well
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradients_that_were_unscaled_by_hand_are_not_unscaled_again() -> None:
    """The error of torch about a second call of ``unscale_`` is raised, instead of dividing by the loss scale twice."""
    model = model_of()
    wrapper = AmpOptimWrapper(SGD(model.parameters(), lr=0.1), dtype="float16")
    with wrapper.optim_context(model):
        loss = model(torch.ones(2, 64)).mean()
    wrapper.backward(wrapper.scale_loss(loss))
    assert wrapper.loss_scaler is not None
    wrapper.loss_scaler.unscale_(wrapper.optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        wrapper.step()
