"""Several optimizers that update different parameters as one optimizer, compared with separate torch optimizers."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Muon, Optimizer

from stratagem.errors import CheckpointMismatchError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim import (
    AmpOptimWrapper,
    BaseOptimWrapper,
    CosineAnnealingLR,
    MixedOptimizer,
    OptimWrapper,
    build_optim_wrapper,
    build_param_schedulers,
)
from stratagem.optim.prepared import PreparedUpdate
from stratagem.optim.probe import probe_copy, state_keys_of
from stratagem.strategies.setup.building import scale_lr
from stratagem.strategies.state.optim_state import read_optim, require_same_class, require_same_parts, write_optim

MUON: Mapping[str, Any] = {"type": "Muon", "lr": 0.02, "momentum": 0.9}
ADAMW: Mapping[str, Any] = {"type": "AdamW", "lr": 1e-3, "betas": (0.8, 0.9)}


class Net(nn.Module):
    """An embedding, two hidden layers with a norm, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 7)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.down(torch.tanh(self.norm(self.up(self.embedding(words)))))
        logits: Tensor = self.head(hidden)
        return logits


HIDDEN = ("up.weight", "down.weight")


def mixed(**options: Any) -> dict[str, Any]:
    """Return the configuration of a mixed optimizer."""
    parts = {"muon": MUON, "adamw": ADAMW}
    return {"type": "MixedOptimizer", "parts": parts, "hidden_matrices": "muon", "others": "adamw", **options}


def wrapped(model: nn.Module, *, wrapper: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """Return a wrapper of a mixed optimizer that was built from a configuration."""
    return build_optim_wrapper(model, {"optimizer": mixed(**options), **(wrapper or {})})


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Return the loss of a fixed batch for a step."""
    words = torch.randint(7, (5,), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(words), (words + 1) % 7)


def separate(model: nn.Module) -> list[Optimizer]:
    """Return the two optimizers that a user would write by hand."""
    hidden = [each for name, each in model.named_parameters() if name in HIDDEN]
    others = [each for name, each in model.named_parameters() if name not in HIDDEN]
    return [
        Muon(hidden, lr=0.02, momentum=0.9),
        AdamW(others, lr=1e-3, betas=(0.8, 0.9), fused=True),
    ]


def groups_of(optimizer: Optimizer, model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the parameters of each part."""
    names = {id(each): name for name, each in model.named_parameters()}
    found: dict[str, list[str]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group["part"], []).extend(names[id(each)] for each in group["params"])
    return found


# ---- the assignment ---------------------------------------------------------------------------------------------------


def test_hidden_matrices_and_other_parameters_belong_to_different_parts(caplog: pytest.LogCaptureFixture) -> None:
    """Each part has its parameters, and one log line names the parts, counts and examples, and the excluded matrices."""
    model = Net()
    with caplog.at_level(logging.INFO, logger="stratagem"):
        optimizer = wrapped(model).optimizer
    everything = [name for name, _ in model.named_parameters()]
    others = [name for name in everything if name not in HIDDEN]
    assert groups_of(optimizer, model) == {"muon": list(HIDDEN), "adamw": others}
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        "MixedOptimizer: muon (Muon) updates 2 parameters with 96 elements: up.weight, down.weight; adamw (AdamW) updates 7 "
        "parameters with 121 elements: embedding.weight, up.bias, norm.weight and 4 more. Not hidden matrices: "
        "embedding.weight (embedding), head.weight (output layer)."
    )


def test_the_first_rule_that_matches_takes_precedence() -> None:
    """A regular expression moves a hidden matrix to another part, and one that follows it does not apply."""
    model = Net()
    optimizer = wrapped(model, rules={r"^up\.": "adamw", r"\.weight$": "muon"}, parts={"muon": SGDM, "adamw": ADAMW})
    assert groups_of(optimizer.optimizer, model) == {
        "muon": ["embedding.weight", "norm.weight", "down.weight", "head.weight"],
        "adamw": ["up.weight", "up.bias", "norm.bias", "down.bias", "head.bias"],
    }


SGDM: Mapping[str, Any] = {"type": "SGD", "lr": 0.1, "momentum": 0.9}


def test_parameters_can_be_assigned_by_rules_alone() -> None:
    """Without ``hidden_matrices``, all parameters that no rule matches belong to ``others``."""
    model = Net()
    options = {"parts": {"head": SGDM, "rest": ADAMW}, "hidden_matrices": None, "others": "rest"}
    optimizer = wrapped(model, rules={r"^head\.": "head"}, **options).optimizer
    assert groups_of(optimizer, model)["head"] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": {"^upp": "adamw"}}, "rules['^upp'] matches no parameter. The names are embedding.weight"),
        ({"rules": {"up": "adam"}}, "rules['up']: 'adam' is not known. Did you mean 'adamw'?"),
        ({"rules": {"(": "adamw"}}, "'(' in rules is not a valid regular expression"),
        ({"hidden_matrices": "mouon"}, "hidden_matrices: 'mouon' is not known. Did you mean 'muon'?"),
        ({"others": "adam"}, "others: 'adam' is not known. Did you mean 'adamw'?"),
        ({"rule": {}}, "takes no argument 'rule'. Did you mean 'rules'?"),
        ({"rules": {"weight$": "adamw"}}, "no parameter belongs to the part 'muon'"),
        ({"rules": {"norm": "muon"}}, "Muon only updates parameters with two dimensions, but norm.weight with the shape [8]"),
        ({"parts": {"muon": {"lr": 1}, "adamw": ADAMW}}, "the part 'muon' must be a mapping with a type"),
    ],
)  # fmt: skip
def test_an_invalid_rule_is_refused(options: Any, message: str) -> None:
    """The error names the rule and what is wrong with it."""
    with pytest.raises((ConfigKeyError, ConfigTypeError, ConfigValueError), match=re.escape(message)):
        wrapped(Net(), **options)


def test_the_names_of_a_shared_parameter_must_not_match_rules_for_different_parts() -> None:
    """The error names both names and both parts."""
    model = Net()
    model.head.weight = nn.Parameter(torch.zeros(7, 6))
    model.embedding.weight = model.head.weight
    with pytest.raises(ConfigValueError, match=r"embedding.weight and head.weight are the same parameter"):
        wrapped(model, rules={"embedding": "adamw", "head.weight": "muon"})


def test_options_per_parameter_apply_within_each_part() -> None:
    """``lr_mult`` multiplies the learning rate of the part that has the parameter."""
    rules = {"paramwise_cfg": {"custom_keys": {"up": {"lr_mult": 0.5}}}}
    optimizer = wrapped(Net(), wrapper=rules).optimizer
    assert {(group["part"], group["lr"]) for group in optimizer.param_groups} == {
        ("muon", 0.02), ("muon", 0.01), ("adamw", 1e-3), ("adamw", 5e-4),
    }  # fmt: skip


# ---- the update -------------------------------------------------------------------------------------------------------


def test_updates_have_the_bits_of_two_separate_optimizers_with_one_clipped_norm() -> None:
    """Over 10 steps, the parameters equal those of torch's Muon and AdamW after clipping the norm of all gradients."""
    model = Net()
    reference = copy.deepcopy(model)
    wrapper = wrapped(model, wrapper={"clip_grad": {"max_norm": 0.5}})
    optimizers = separate(reference)
    clipped = 0
    for step in range(10):
        wrapper.update_params(loss_of(model, step))
        loss_of(reference, step).backward()
        # In another order, the norm would have other rounding errors.
        parameters = [each for own in optimizers for group in own.param_groups for each in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, 0.5)
        clipped += float(norm) > 0.5
        assert wrapper.grad_norm == pytest.approx(float(norm), rel=1e-6)
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert clipped >= 5
    for (name, own), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=0, msg=name)


def test_accumulated_gradients_are_applied_to_all_parts_together() -> None:
    """With two micro-batches per update, the parameters equal those of separate optimizers with the mean gradient."""
    model = Net()
    reference = copy.deepcopy(model)
    wrapper = wrapped(model, wrapper={"accumulative_counts": 2})
    wrapper.initialize_count_status(model, 0, 4)
    optimizers = separate(reference)
    for step in range(4):
        wrapper.update_params(loss_of(model, step))
        (loss_of(reference, step) / 2).backward()
        for each in optimizers if step % 2 else ():
            each.step()
            each.zero_grad()
    assert wrapper.num_steps_applied == 2
    for own, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(own, expected)


def test_an_update_whose_gradients_overflow_is_skipped_for_all_parts() -> None:
    """In float16, an Inf in the gradient of one part prevents the update of the other part, too."""
    model = Net()
    wrapper = wrapped(model, wrapper={"type": "AmpOptimWrapper", "dtype": "float16"})
    assert isinstance(wrapper, AmpOptimWrapper)
    before = copy.deepcopy(model.state_dict())
    wrapper.update_params(loss_of(model, 0) * float("inf"))
    assert (wrapper.num_steps_attempted, wrapper.num_steps_applied) == (1, 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_closure_is_called_once() -> None:
    """``step(closure)`` computes the gradients before the updates and returns the loss."""
    model, calls = Net(), []
    optimizer = wrapped(model).optimizer

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    before = loss_of(model, 0)
    assert torch.equal(optimizer.step(closure), before)
    assert calls == [True]
    assert loss_of(model, 0) < before


def test_the_prepared_update_of_a_part_is_used_with_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on, AdamW is updated without its own step; every parameter equals that without ``prepared``."""
    model = Net()
    other = copy.deepcopy(model)
    wrapper, plain = wrapped(model), wrapped(other, wrapper={"prepared": False})
    applied: list[tuple[str, bool]] = []
    own = PreparedUpdate.apply

    def recorded(update: PreparedUpdate, optimizer: Optimizer) -> bool:
        applied.append((type(optimizer).__name__, own(update, optimizer)))
        return applied[-1][1]

    monkeypatch.setattr(PreparedUpdate, "apply", recorded)
    for step in range(4):
        wrapper.update_params(loss_of(model, step))
        plain.update_params(loss_of(other, step))
    assert applied == [("AdamW", False), *[("AdamW", True)] * 3]
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, expected)


def test_a_step_hook_of_a_mixed_optimizer_is_called() -> None:
    """With a hook, the optimizer is updated with its own step instead of the prepared updates of its parts."""
    model, called = Net(), []
    wrapper = wrapped(model)
    wrapper.optimizer.register_step_post_hook(lambda optimizer, *_: called.append(type(optimizer).__name__))
    for step in range(3):
        wrapper.update_params(loss_of(model, step))
    assert called == ["MixedOptimizer"] * 3


# ---- schedules --------------------------------------------------------------------------------------------------------


def rates(wrapper: BaseOptimWrapper) -> dict[str, list[float]]:
    """Return the learning rates of the parts."""
    return wrapper.get_lr()


def test_a_schedule_applies_to_each_part_with_its_own_rate() -> None:
    """A cosine with ``eta_min`` reaches this value in both parts, and each starts from its own learning rate."""
    wrapper = wrapped(Net())
    built = build_param_schedulers(
        {"type": "CosineAnnealingLR", "by": "step", "T_max": 4, "eta_min": 1e-4}, wrapper, max_steps=5
    )
    assert isinstance(built, list)
    assert rates(wrapper) == {"muon.lr": [0.02], "adamw.lr": [1e-3]}
    for _ in range(2):
        for each in built:
            each.step()
    half = {"muon.lr": [(0.02 + 1e-4) / 2], "adamw.lr": [(1e-3 + 1e-4) / 2]}
    assert rates(wrapper) == {name: pytest.approx(value) for name, value in half.items()}
    for _ in range(2):
        for each in built:
            each.step()
    assert rates(wrapper) == {"muon.lr": [pytest.approx(1e-4)], "adamw.lr": [pytest.approx(1e-4)]}


def test_a_schedule_can_name_a_part() -> None:
    """A schedule with ``part`` changes only the groups of this part."""
    wrapper = wrapped(Net())
    spec = {"type": "LinearLR", "part": "muon", "start_factor": 0.5, "by": "step", "end": 4}
    build_param_schedulers(spec, wrapper)
    assert rates(wrapper) == {"muon.lr": [0.01], "adamw.lr": [1e-3]}


def test_a_momentum_schedule_changes_the_momentum_of_muon_and_the_first_beta_of_adamw() -> None:
    """Each part has its own name for the momentum."""
    wrapper = wrapped(Net())
    build_param_schedulers({"type": "ConstantMomentum", "factor": 0.5, "by": "step", "end": 4}, wrapper)
    assert wrapper.get_momentum() == {"muon.momentum": [0.45], "adamw.momentum": [0.4]}
    assert wrapper.optimizer.parts["adamw"].param_groups[0]["betas"] == (0.4, 0.9)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (mixed(), "part='moun' is unknown. Did you mean 'muon'?"),
        (ADAMW, "part='moun' requires a MixedOptimizer, and the optimizer is AdamW"),
    ],
)
def test_a_schedule_for_an_unknown_part_is_refused(optimizer: Any, message: str) -> None:
    """The error names the known parts, or the optimizer that has no parts."""
    wrapper = build_optim_wrapper(Net(), {"optimizer": optimizer})
    with pytest.raises(ConfigKeyError, match=re.escape(message)):
        build_param_schedulers({"type": "ConstantLR", "part": "moun", "end": 4}, wrapper)


def test_a_schedule_object_is_built_on_one_part() -> None:
    """A schedule of the whole optimizer is refused, and one of a part is accepted."""
    wrapper = wrapped(Net())
    with pytest.raises(ConfigValueError, match=r"Pass one of its parts, such as optimizer.parts\['muon'\]"):
        CosineAnnealingLR(wrapper, T_max=4)
    schedule = CosineAnnealingLR(wrapper.optimizer.parts["muon"], T_max=4)
    assert build_param_schedulers([schedule], wrapper) == [schedule]


def test_learning_rates_are_scaled_in_each_part_and_schedules_keep_their_ratios() -> None:
    """After ``auto_scale_lr``, ``eta_min`` still applies to each part unchanged."""
    wrapper = wrapped(Net())
    scale_lr(wrapper, base_batch=4, real_batch=8)
    assert rates(wrapper) == {"muon.lr": [0.04], "adamw.lr": [2e-3]}
    built = build_param_schedulers(
        {"type": "CosineAnnealingLR", "by": "step", "T_max": 1, "eta_min": 1e-4, "end": 3}, wrapper
    )
    for each in built:
        each.step()  # type: ignore[union-attr]
    assert rates(wrapper) == {"muon.lr": [pytest.approx(1e-4)], "adamw.lr": [pytest.approx(1e-4)]}


# ---- state ------------------------------------------------------------------------------------------------------------


def test_a_resumed_optimizer_continues_with_the_same_bits() -> None:
    """The state by parameter name restores all parts; five more steps equal an uninterrupted run."""
    model = Net()
    wrapper = wrapped(model)
    for step in range(5):
        wrapper.update_params(loss_of(model, step))
    saved = copy.deepcopy(read_optim(wrapper, model))
    weights = copy.deepcopy(model.state_dict())
    for step in range(5, 10):
        wrapper.update_params(loss_of(model, step))
    resumed = Net()
    resumed.load_state_dict(weights)
    again = wrapped(resumed)
    write_optim(again, saved, resumed)
    for step in range(5, 10):
        again.update_params(loss_of(resumed, step))
    assert again.num_steps_applied == 10
    for own, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, expected)


def test_schedules_follow_the_groups_after_a_state_is_loaded() -> None:
    """Loading replaces the groups of the parts, and the schedules change the new ones."""
    model = Net()
    wrapper = wrapped(model)
    (own, _) = build_param_schedulers({"type": "StepLR", "step_size": 1, "by": "step", "end": 9}, wrapper)
    wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    own.step()  # type: ignore[union-attr]
    assert rates(wrapper)["muon.lr"] == [pytest.approx(0.002)]


def test_a_changed_rule_is_refused_before_anything_is_loaded() -> None:
    """The error names the parameters with their parts in the checkpoint and in this run, and what to do."""
    model = Net()
    saved = read_optim(wrapped(model), model)
    changed = wrapped(model, rules={r"^up\.weight": "adamw"})
    require_same_class(changed, saved)
    message = (
        "1 of 9 parameters belong to another part of the MixedOptimizer than in the checkpoint: up.weight (checkpoint: muon, "
        "this run: adamw). Use hidden_matrices, others and rules"
    )
    with pytest.raises(CheckpointMismatchError, match=re.escape(message)):
        require_same_parts(changed, saved, model)


@pytest.mark.parametrize(
    ("saved", "own", "difference"),
    [
        (mixed(), ADAMW, "it belongs to MixedOptimizer(muon=Muon, adamw=AdamW)"),
        (ADAMW, mixed(), "it belongs to AdamW"),
        (mixed(), mixed(parts={"muon": SGDM, "adamw": ADAMW}), "it belongs to MixedOptimizer(muon=Muon, adamw=AdamW)"),
    ],
)
def test_the_state_of_other_optimizers_is_refused(saved: Any, own: Any, difference: str) -> None:
    """The classes of all parts are compared."""
    model = Net()
    state = read_optim(build_optim_wrapper(model, {"optimizer": saved}), model)
    with pytest.raises(CheckpointMismatchError, match=re.escape(difference)):
        require_same_class(build_optim_wrapper(model, {"optimizer": own}), state)


def test_the_state_of_a_bare_mixed_optimizer_is_compared_by_its_parts() -> None:
    """A state without a class, as torch saves it, is accepted for the same parts and refused for others."""
    model = Net()
    wrapper = wrapped(model)
    require_same_class(wrapper, wrapper.optimizer.state_dict())
    renamed = wrapped(model, parts={"a": MUON, "b": ADAMW}, hidden_matrices="a", others="b")
    with pytest.raises(
        CheckpointMismatchError, match=r"belong to the parts \['muon', 'adamw'\] instead of \['a', 'b'\]"
    ):
        require_same_class(renamed, wrapper.optimizer.state_dict())


class Averaging(SGD):
    """Schedule-free in principle: in evaluation, the parameters are half of what they are in training."""

    mode = "train"

    def train(self) -> None:
        """Double the parameters if they are halved."""
        self._set("train", 2.0)

    def eval(self) -> None:
        """Halve the parameters."""
        self._set("eval", 0.5)

    @torch.no_grad()
    def _set(self, mode: str, factor: float) -> None:
        if mode != self.mode:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(factor)
        self.mode = mode


def test_a_part_may_have_separate_evaluation_weights() -> None:
    """In an evaluation, the parameters of a schedule-free part are switched, and all others keep their values."""
    model = Net()
    averaging = {"type": Averaging, "lr": 0.1}
    wrapper = wrapped(model, parts={"muon": MUON, "free": averaging}, others="free")
    wrapper.update_params(loss_of(model, 0))
    before = copy.deepcopy(model.state_dict())
    with wrapper.evaluating():
        saved = copy.deepcopy(read_optim(wrapper, model))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name] if name in HIDDEN else before[name] / 2)
        evaluated = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    resumed = Net()
    again = wrapped(resumed, parts={"muon": MUON, "free": averaging}, others="free")
    again.optimizer.parts["free"].mode = "eval"
    resumed.load_state_dict(evaluated)
    write_optim(again, saved, resumed)
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name)


# ---- the class --------------------------------------------------------------------------------------------------------


def by_hand(model: Net) -> MixedOptimizer:
    """Return a mixed optimizer from two optimizers."""
    muon, adamw = separate(model)
    return MixedOptimizer({"muon": muon, "adamw": adamw})


def test_optimizers_that_were_built_by_hand_can_be_combined() -> None:
    """The groups are those of the parts, not copies, and the parts share their state."""
    model = Net()
    optimizer = by_hand(model)
    wrapper = OptimWrapper(optimizer)
    wrapper.update_params(loss_of(model, 0))
    assert optimizer.param_groups[0] is optimizer.parts["muon"].param_groups[0]
    assert set(optimizer.state) == set(model.parameters())
    optimizer.state.clear()
    assert not any(part.state for part in optimizer.parts.values())


def test_a_group_is_added_to_the_part_that_it_names() -> None:
    """A group without the name of a part, or with a parameter of another part, is refused."""
    model = Net()
    optimizer = by_hand(model)
    extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigKeyError, match="Set part in the group"):
        optimizer.add_param_group({"params": [extra]})
    with pytest.raises(ConfigValueError, match="already belongs to the part 'muon'"):
        optimizer.add_param_group({"params": [model.up.weight], "part": "adamw"})
    optimizer.add_param_group({"params": [extra], "part": "adamw"})
    assert optimizer.param_groups[2]["params"] == [extra]
    assert optimizer.param_groups[2]["betas"] == (0.8, 0.9)


class OwnState(SGD):
    """Stores its state elsewhere, such as ZeroRedundancyOptimizer does."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


def test_optimizers_that_cannot_be_parts_are_refused() -> None:
    """A part must have a step without a closure and store its state in ``state``, and no parameter belongs to two parts."""
    parameter = nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigValueError, match="LBFGS cannot be the part 'a'. It calls a closure"):
        MixedOptimizer({"a": LBFGS([parameter])})
    with pytest.raises(ConfigValueError, match="MixedOptimizer cannot be the part 'a'. Pass its parts"):
        MixedOptimizer({"a": by_hand(Net())})
    with pytest.raises(ConfigValueError, match=r"the shape \[2\] belongs to both 'a' and 'b'"):
        MixedOptimizer({"a": SGD([parameter]), "b": SGD([parameter])})
    with pytest.raises(ConfigValueError, match="OwnState cannot be the part 'a'. It stores its state in its own way"):
        MixedOptimizer({"a": OwnState([parameter])})


def test_a_copy_has_its_own_parts() -> None:
    """``copy.deepcopy`` copies the parts and their state."""
    model = Net()
    optimizer = by_hand(model)
    OptimWrapper(optimizer).update_params(loss_of(model, 0))
    copied = copy.deepcopy(optimizer)
    assert copied.parts["muon"] is not optimizer.parts["muon"]
    assert len(copied.state) == len(optimizer.state)
    assert copied.param_groups[0]["params"][0] is not model.up.weight


def test_a_trial_update_does_not_change_the_parameters() -> None:
    """``probe_copy`` copies the parts, so that the trial does not update the parameters of the model."""
    model = Net()
    optimizer = by_hand(model)
    loss_of(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    assert state_keys_of(optimizer) == {"momentum_buffer"}
    probe = probe_copy(optimizer, [[], [nn.Parameter(torch.zeros(2))]])
    assert [group["part"] for group in probe.param_groups] == ["adamw"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state
