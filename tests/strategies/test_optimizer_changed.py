"""Resuming with a different optimizer in the configuration."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem.errors import CheckpointMismatchError
from stratagem.optim import OptimWrapper, OptimWrapperDict
from stratagem.strategies import SingleDeviceStrategy
from stratagem.strategies.state.optim_state import read_optim, require_same_class, write_optim
from tests.support.small_runs import Mlp, batch, train

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9},
    "Adam": {"weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "RMSprop": {},
    "Adagrad": {},
    "Adafactor": {},
    "Muon": {},
}


def trained(name: str, steps: int = 2, **options: Any) -> tuple[nn.Linear, OptimWrapper]:
    """Return a model and its optimizer after some updates."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    wrapper = OptimWrapper(getattr(torch.optim, name)(model.parameters(), lr=0.05, **{**OPTIMIZERS[name], **options}))
    for _ in range(steps):
        update(model, wrapper)
    return model, wrapper


def update(model: nn.Linear, wrapper: OptimWrapper) -> None:
    """Update the model once with the same batch."""
    wrapper.update_params(model(torch.linspace(-1.0, 1.0, 20).view(5, 4)).square().mean())


def state_of(name: str, *, before: bool, **options: Any) -> tuple[nn.Linear, dict[str, Any]]:
    """Return a trained model and its optimizer state; with ``before``, as earlier versions saved it."""
    model, wrapper = trained(name, **options)
    state = copy.deepcopy(read_optim(wrapper, model))
    if before:
        del state["class"]
    return model, state


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("own", OPTIMIZERS)
@pytest.mark.parametrize("saved", OPTIMIZERS)
def test_the_state_of_another_optimizer_is_refused_before_the_first_step(saved: str, own: str, *, before: bool) -> None:
    """Of 100 pairs of optimizers, the 10 equal ones continue like an uninterrupted run; the others raise an error with advice."""
    model, state = state_of(saved, before=before)
    resumed, wrapper = trained(own, steps=0)
    if own != saved:
        with pytest.raises(
            CheckpointMismatchError, match=f"uses the optimizer {own}, but .* resume_optimizer=False"
        ) as error:
            require_same_class(wrapper, state)
        assert before or f"it belongs to {saved}." in str(error.value)
        return
    require_same_class(wrapper, state)
    resumed.load_state_dict(model.state_dict())
    write_optim(wrapper, state, resumed)
    update(resumed, wrapper)
    assert torch.equal(resumed.weight, trained(saved, steps=3)[0].weight)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("saved", "own"), [("AdamW", "Adam"), ("Adam", "AdamW")])
def test_adam_and_adamw_continue_each_other_without_weight_decay(
    saved: str, own: str, caplog: pytest.LogCaptureFixture, *, before: bool
) -> None:
    """Without weight decay, both optimizers are equivalent. The configured one determines how weight decay is applied later."""
    model, state = state_of(saved, before=before, weight_decay=0.0)
    resumed, wrapper = trained(own, steps=0, weight_decay=0.0)
    with caplog.at_level("INFO", logger="stratagem"):
        require_same_class(wrapper, state)
    assert f"{own} continues from the optimizer state in the checkpoint, although it belongs to {saved}" in caplog.text
    resumed.load_state_dict(model.state_dict())
    write_optim(wrapper, state, resumed)
    assert wrapper.param_groups[0]["decoupled_weight_decay"] == (own == "AdamW")
    update(resumed, wrapper)
    assert torch.equal(resumed.weight, trained(own, steps=3, weight_decay=0.0)[0].weight)


def test_an_adam_with_decoupled_weight_decay_is_adamw() -> None:
    """Torch's ``Adam(decoupled_weight_decay=True)`` continues the state of AdamW."""
    _, state = state_of("AdamW", before=False)
    _, wrapper = trained("Adam", steps=0, decoupled_weight_decay=True)
    require_same_class(wrapper, state)


@pytest.mark.parametrize("options", [{"amsgrad": True}, {"weight_decay": 0.3, "betas": (0.5, 0.9)}])
def test_other_options_of_the_same_optimizer_are_accepted(options: dict[str, Any]) -> None:
    """A changed option does not change the class, also for states that do not contain the class."""
    for before in (False, True):
        _, state = state_of("AdamW", before=before, **options)
        require_same_class(trained("AdamW", steps=0)[1], state)


def test_a_momentum_that_was_enabled_starts_at_zero() -> None:
    """SGD with momentum accepts the state of SGD without momentum, which has no buffers."""
    _, state = state_of("SGD", before=True, momentum=0.0)
    require_same_class(trained("SGD", steps=0)[1], state)


def test_the_error_names_the_optimizer_among_several() -> None:
    """With several optimizers, the error contains the name of the one that differs."""
    _, state = state_of("Adam", before=False)
    both = OptimWrapperDict(generator=trained("Adam", 0)[1], critic=trained("RMSprop", 0)[1])
    with pytest.raises(CheckpointMismatchError, match="RMSprop for 'critic'"):
        require_same_class(both, {"generator": state, "critic": state})


def prepared(folder: Path, name: str) -> SingleDeviceStrategy:
    """Return a strategy with a model and an optimizer."""
    strategy = SingleDeviceStrategy(work_dir=str(folder), log_kwargs={"log_level": "ERROR"})
    strategy.prepare(Mlp(), optim_wrapper={"optimizer": {"type": name, "lr": 0.1}}, dispatch_kwargs={"max_iters": 9})
    return strategy


def test_a_refused_resume_changes_nothing_and_can_omit_the_optimizer(tmp_path: Path) -> None:
    """The weights are untouched after the error; with ``resume_optimizer=False``, they are loaded without a state."""
    saved = prepared(tmp_path / "a", "Adagrad")
    train(saved, [batch()])
    saved.save_checkpoint(tmp_path / "ckpt")
    resumed = prepared(tmp_path / "b", "RMSprop")
    before = {name: value.clone() for name, value in resumed.model_state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match="uses the optimizer RMSprop, .* it belongs to Adagrad"):
        resumed.load_or_resume(resume=tmp_path / "ckpt")
    assert all(torch.equal(before[name], value) for name, value in resumed.model_state_dict().items())
    resumed.load_or_resume(resume=tmp_path / "ckpt", resume_optimizer=False)
    after = saved.model_state_dict()
    assert all(torch.equal(after[name], value) for name, value in resumed.model_state_dict().items())
    assert not resumed.optim_wrapper.optimizer.state
    train(resumed, [batch()])
    saved.close()
    resumed.close()
