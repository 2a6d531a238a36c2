"""Automatic mixed precision on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim import AmpOptimWrapper
from tests.support.small_runs import make


def wrapped(**options: object) -> tuple[nn.Linear, AmpOptimWrapper]:
    """Return a model and its wrapper."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return model, AmpOptimWrapper(SGD(model.parameters(), lr=0.1), **options)  # type: ignore[arg-type]


def train(model: nn.Module, wrapper: AmpOptimWrapper, factor: float = 1.0) -> torch.dtype:
    """Train on one micro-batch and return the data type of the outputs."""
    with wrapper.optim_context(model):
        outputs = model(torch.ones(3, 4))
    wrapper.update_params(outputs.float().mean() * factor)
    return outputs.dtype


def test_bfloat16_is_the_default_on_the_cpu() -> None:
    """On the CPU, the default is bfloat16 for the forward pass, without a gradient scaler."""
    model, wrapper = wrapped()
    before = model.bias.detach().clone()
    assert train(model, wrapper) is torch.bfloat16
    assert wrapper.loss_scaler is None
    # The loss is the mean over 2 outputs, so the gradient of each bias is 0.5.
    torch.testing.assert_close(before - model.bias.detach(), torch.full((2,), 0.05))


def test_autocast_uses_the_device_that_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If the parameters are in CPU memory, as with FSDP's ``cpu_offload``, autocast has the device of the strategy."""
    devices: list[str] = []
    monkeypatch.setattr(torch, "autocast", lambda device, **_: [devices.append(device), nullcontext()][1])
    model, wrapper = wrapped(dtype="bfloat16")
    strategy = make("single", tmp_path)
    strategy.prepare(model)
    world = replace(strategy.world, device=torch.device("cuda", 0))
    monkeypatch.setattr(type(strategy), "world", property(lambda _: world))
    strategy.prepare(model, optim_wrapper=wrapper)
    with wrapper.optim_context(model):
        assert devices == ["cuda"]
    strategy.close()


def test_the_default_dtype_is_that_of_the_device_that_computes() -> None:
    """Without ``dtype``, a wrapper of parameters in CPU memory uses float16 on CUDA with a loss scaler there, as torch does."""
    _, wrapper = wrapped(clip_grad=dict(max_norm=1.0, error_if_nonfinite=False))
    assert (wrapper.dtype, wrapper.nonfinite) == (torch.bfloat16, None)
    with pytest.warns(UserWarning, match="CUDA is not available"):
        wrapper.use_device(torch.device("cuda"))
    assert (wrapper.dtype, wrapper.nonfinite) == (torch.float16, "skip")
    assert wrapper.grad_scaler is not None
    wrapper.use_device(torch.device("cpu"))
    assert (wrapper.dtype, wrapper.nonfinite, wrapper.grad_scaler) == (torch.bfloat16, None, None)


def test_autocast_ends_with_the_context() -> None:
    """Autocast is disabled outside ``optim_context``."""
    model, wrapper = wrapped(dtype="bfloat16")
    train(model, wrapper)
    assert model(torch.ones(3, 4)).dtype is torch.float32


def test_float16_scales_the_loss_and_unscales_the_gradients() -> None:
    """With float16, the update is that of the unscaled loss."""
    model, wrapper = wrapped(dtype="float16", loss_scale=dict(init_scale=1024.0))
    before = model.bias.detach().clone()
    assert train(model, wrapper) is torch.float16
    assert wrapper.loss_scaler is not None
    torch.testing.assert_close(before - model.bias.detach(), torch.full((2,), 0.05))


def test_weights_do_not_overflow_the_scaled_loss() -> None:
    """Micro-batches with 60,000 and 20,000 tokens keep the loss scale of float16: gradients of 0.5 stay 0.5."""
    model, wrapper = wrapped(dtype="float16", loss_scale=2.0**15, accumulative_counts=2)
    before = model.bias.detach().clone()
    for count in (60_000, 20_000):
        with wrapper.optim_context(model):
            outputs = model(torch.ones(3, 4))
        # The gradient of the scaled loss is computed in float16, whose largest value is 65,504.
        wrapper.update_params(outputs.mean(), weight=count)
    torch.testing.assert_close(before - model.bias.detach(), torch.full((2,), 0.05))
    assert wrapper.num_steps_applied == 1


def test_an_overflow_skips_the_update_and_halves_the_scale() -> None:
    """A skipped update only counts as an attempt, so schedules and averages do not advance."""
    model, wrapper = wrapped(dtype=torch.float16, loss_scale=dict(init_scale=1024.0))
    before = model.weight.detach().clone()
    train(model, wrapper, factor=float("inf"))
    assert wrapper.loss_scaler is not None
    assert torch.equal(model.weight, before)
    assert (wrapper.num_steps_attempted, wrapper.num_steps_applied) == (1, 0)
    assert wrapper.loss_scaler.get_scale() == 512.0
    train(model, wrapper)
    assert (wrapper.num_steps_attempted, wrapper.num_steps_applied) == (2, 1)


@pytest.mark.parametrize("scale", [256, 256.0])
def test_a_fixed_scale_does_not_change(scale: float) -> None:
    """A fixed scale, which may be an integer, does not change after an overflow."""
    model, wrapper = wrapped(dtype="float16", loss_scale=scale)
    train(model, wrapper, factor=float("inf"))
    assert wrapper.loss_scaler is not None
    assert wrapper.loss_scaler.get_scale() == 256.0


def test_gradients_are_clipped_after_unscaling() -> None:
    """Clipping uses the norm of the unscaled gradients: sqrt(8 * 0.5**2 + 2 * 0.5**2)."""
    model, wrapper = wrapped(dtype="float16", loss_scale=1024.0, clip_grad=dict(max_norm=0.1))
    before = model.bias.detach().clone()
    train(model, wrapper)
    assert wrapper.grad_norm is not None
    assert wrapper.grad_norm.item() == pytest.approx(2.5**0.5, rel=1e-3)
    expected = 0.1 * 0.5 * 0.1 / 2.5**0.5
    torch.testing.assert_close(before - model.bias.detach(), torch.full((2,), expected), rtol=1e-3, atol=0)


def test_every_micro_batch_uses_autocast() -> None:
    """Every micro-batch of an accumulation window uses autocast."""
    model, wrapper = wrapped(dtype="bfloat16", accumulative_counts=2)
    assert [train(model, wrapper) for _ in range(2)] == [torch.bfloat16] * 2
    assert wrapper.num_steps_applied == 1


def test_the_loss_scale_is_part_of_the_state() -> None:
    """A resumed run continues with the saved loss scale."""
    model, first = wrapped(dtype="float16", loss_scale=dict(init_scale=1024.0))
    train(model, first, factor=float("inf"))
    _, second = wrapped(dtype="float16")
    state = first.state_dict()
    second.load_state_dict(state)
    assert "loss_scaler" in state
    assert second.loss_scaler is not None
    assert second.loss_scaler.get_scale() == 512.0


def test_a_state_of_a_different_precision_can_be_loaded() -> None:
    """A float16 run that resumes from bfloat16 starts with its configured scale."""
    _, first = wrapped(dtype="bfloat16")
    _, second = wrapped(dtype="float16", loss_scale=dict(init_scale=8.0))
    second.load_state_dict(first.state_dict())
    assert second.loss_scaler is not None
    assert second.loss_scaler.get_scale() == 8.0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(dtype="float64"), ConfigValueError, "is not supported by autocast"),
        (dict(dtype=torch.int8), ConfigValueError, "is not supported by autocast"),
        (dict(dtype="bfloat16", loss_scale=128.0), ConfigValueError, "only applies to float16"),
        (dict(dtype="float16", loss_scale="dynamik"), ConfigTypeError, "loss_scale must be"),
        (dict(dtype="float16", loss_scale=True), ConfigTypeError, "loss_scale must be"),
        (dict(dtype="float16", loss_scale=dict(initscale=2.0)), ConfigKeyError, "Did you mean 'init_scale'"),
        (dict(dtype="float16", nonfinite="error"), ConfigValueError, "first overflow"),
    ],
)
def test_invalid_arguments_are_rejected(options: dict[str, object], error: type[Exception], text: str) -> None:
    """Invalid arguments raise errors when the wrapper is built."""
    with pytest.raises(error, match=text):
        wrapped(**options)
