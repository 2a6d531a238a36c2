"""Gradient accumulation, clipping and updates of the optimizer wrapper."""

from __future__ import annotations

import copy
import cProfile
import pstats
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from stratagem.errors import CheckpointMismatchError, ConfigKeyError, ConfigTypeError, ConfigValueError, TrainingError
from stratagem.optim import GradientPolicy, OptimWrapper


def parameter(*values: float) -> nn.Parameter:
    """Return a parameter, by default a single zero."""
    return nn.Parameter(torch.tensor(values or (0.0,)))


class Recorder(SGD):
    """SGD with a learning rate of 1 that records the gradients of each step."""

    def __init__(self, *parameters: nn.Parameter) -> None:
        super().__init__(parameters, lr=1.0)
        self.seen: list[list[float]] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.seen.append([value for group in self.param_groups for p in group["params"] for value in p.grad.tolist()])
        super().step()


def test_a_shorter_last_window_is_divided_by_its_length() -> None:
    """The last, shorter window is divided by its own length, which gives [1.0, 1.0] instead of [1.0, 0.5]."""
    weight = parameter()
    optimizer = Recorder(weight)
    wrapper = OptimWrapper(optimizer, accumulative_counts=4)
    wrapper.initialize_count_status(nn.Identity(), 0, 6)
    for _ in range(6):
        wrapper.update_params(weight.sum())
    assert optimizer.seen == [[1.0], [1.0]]
    assert (wrapper.inner_count, wrapper.num_steps_attempted, wrapper.num_steps_applied) == (6, 2, 2)


def test_windows_without_a_known_run_length() -> None:
    """If the length of the run is unknown, each window has ``accumulative_counts`` micro-batches."""
    weight = parameter()
    optimizer = Recorder(weight)
    wrapper = OptimWrapper(optimizer, accumulative_counts=2)
    for number in range(5):
        wrapper.update_params(weight.sum() * number)
    assert optimizer.seen == [[0.5], [2.5]]


def test_a_resume_inside_a_window_averages_the_remaining_micro_batches() -> None:
    """When resuming after 6 micro-batches in windows of 4, the remaining two are averaged, with a warning."""
    weight = parameter()
    optimizer = Recorder(weight)
    wrapper = OptimWrapper(optimizer, accumulative_counts=4)
    with pytest.warns(UserWarning, match="in the middle of an accumulation window"):
        wrapper.initialize_count_status(nn.Identity(), 6, 16)
    for _ in range(6):
        wrapper.update_params(weight.sum())
    assert optimizer.seen == [[1.0], [1.0]]


def test_a_loaded_state_starts_a_new_window() -> None:
    """After loading a state with 5 micro-batches in windows of 4, the next three are averaged."""
    weight = parameter()
    saved = OptimWrapper(SGD([weight], lr=1.0), accumulative_counts=4)
    for _ in range(5):
        saved.update_params(weight.sum())
    optimizer = Recorder(weight)
    wrapper = OptimWrapper(optimizer, accumulative_counts=4)
    wrapper.load_state_dict(saved.state_dict())
    wrapper.zero_grad()
    for _ in range(3):
        wrapper.update_params(weight.sum())
    assert optimizer.seen == [pytest.approx([1.0])]


def test_discarding_a_window_clears_its_gradients() -> None:
    """Discarding a window clears its gradients and returns the number of its micro-batches."""
    weight = parameter()
    wrapper = OptimWrapper(Recorder(weight), accumulative_counts=4)
    for _ in range(3):
        wrapper.update_params(weight.sum())
    assert wrapper.discard_accumulation() == 3
    assert weight.grad is None
    assert wrapper.discard_accumulation() == 0


def test_weighted_micro_batches_match_one_large_batch() -> None:
    """With weights, micro-batches of 1, 2 and 5 samples give the gradient of a batch of 8."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data, target = torch.randn(8, 3), torch.randn(8, 1)
    nn.functional.mse_loss(model(data), target).backward()
    assert model.weight.grad is not None
    whole = model.weight.grad.clone()
    model.zero_grad()
    wrapper = OptimWrapper(SGD(model.parameters(), lr=1.0), accumulative_counts=3)
    before = model.weight.detach().clone()
    for start, end in ((0, 1), (1, 3), (3, 8)):
        loss = nn.functional.mse_loss(model(data[start:end]), target[start:end])
        wrapper.update_params(loss, weight=end - start)
    torch.testing.assert_close(before - model.weight.detach(), whole)


def test_weights_may_be_tensors() -> None:
    """A weight may be a tensor: (1 * 1 + 3 * 4) / (1 + 3)."""
    weight = parameter()
    optimizer = Recorder(weight)
    wrapper = OptimWrapper(optimizer, accumulative_counts=2)
    wrapper.update_params(weight.sum() * 1, weight=torch.tensor(1.0))
    wrapper.update_params(weight.sum() * 4, weight=torch.tensor(3.0))
    assert optimizer.seen == [[3.25]]


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_weighted_windows_of_float64_models_are_exact(kind: Callable[[int], Any]) -> None:
    """Weights of 1 and 2 give (0.1 + 2 * 0.4) / 3 to the last digits of float64, although 1 / 3 is rounded in float32."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = Recorder(weight)
    wrapper = OptimWrapper(optimizer, accumulative_counts=2)
    wrapper.update_params(weight.sum() * 0.1, weight=kind(1))
    wrapper.update_params(weight.sum() * 0.4, weight=kind(2))
    assert optimizer.seen[0][0] == pytest.approx(0.3, rel=1e-15)


@pytest.mark.parametrize("kind", [int, torch.tensor, lambda count: torch.tensor(float(count))])
def test_counts_above_2_to_the_24_are_exact(kind: Callable[[int], Any]) -> None:
    """Three weights of 1 are not lost next to 2**24, the largest count up to which float32 has every integer."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = Recorder(weight)
    wrapper = OptimWrapper(optimizer, accumulative_counts=4)
    for count in (2**24, 1, 1, 1):
        wrapper.update_params(weight.sum() * (1.0 if count == 1 else 0.0), weight=kind(count))
    assert optimizer.seen[0][0] == pytest.approx(3 / (2**24 + 3), rel=1e-15)


def test_a_window_with_zero_weight_has_no_gradient() -> None:
    """If all weights of a window are zero, the gradient is zero instead of 0 / 0."""
    weight = parameter()
    optimizer = Recorder(weight)
    wrapper = OptimWrapper(optimizer, accumulative_counts=2)
    for _ in range(2):
        wrapper.update_params(weight.sum(), weight=0)
    assert optimizer.seen == [[0.0]]


def test_a_weight_for_only_some_micro_batches_is_rejected() -> None:
    """A window in which only some micro-batches have a weight raises an error with their number."""
    weight = parameter()
    wrapper = OptimWrapper(Recorder(weight), accumulative_counts=2)
    wrapper.update_params(weight.sum(), weight=2)
    with pytest.raises(RuntimeError, match="1 of the 2 micro-batches of the accumulation window had a weight"):
        wrapper.update_params(weight.sum())


def test_clipping_uses_the_norm_over_all_groups() -> None:
    """Gradients 3 and 4 in two groups have the norm 5 and are scaled together."""
    first, second = parameter(), parameter()
    optimizer = SGD([{"params": [first]}, {"params": [second]}], lr=1.0)
    wrapper = OptimWrapper(optimizer, clip_grad=dict(max_norm=1.0))
    assert wrapper.grad_norm is None
    wrapper.update_params((3 * first + 4 * second).sum())
    assert wrapper.grad_norm is not None
    assert wrapper.grad_norm.item() == pytest.approx(5.0)
    assert [-first.item(), -second.item()] == pytest.approx([0.6, 0.8], rel=1e-4)


def test_clipping_by_value_clips_each_value() -> None:
    """With ``type="value"``, each value is clipped separately."""
    weight = parameter(0.0, 0.0)
    optimizer = Recorder(weight)
    wrapper = OptimWrapper(optimizer, clip_grad=dict(type="value", clip_value=0.5))
    wrapper.update_params((weight * torch.tensor([0.25, -3.0])).sum())
    assert optimizer.seen == [[0.25, -0.5]]


def test_the_clipping_configuration_is_not_modified() -> None:
    """The caller's mapping is not modified."""
    config = dict(type="norm", max_norm=1.0)
    OptimWrapper(SGD([parameter()], lr=1.0), clip_grad=config)
    assert config == dict(type="norm", max_norm=1.0)


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        (dict(max_nrom=1.0), ConfigKeyError, "Did you mean 'max_norm'"),
        (dict(type="norms", max_norm=1.0), ConfigValueError, '"norm" or "value"'),
        (dict(), ConfigValueError, "Add max_norm"),
        (dict(type="value"), ConfigValueError, "Add clip_value"),
        (dict(max_norm=0), ConfigValueError, "must be positive"),
        (dict(max_norm="1"), ConfigTypeError, "must be a number"),
        (1.0, ConfigTypeError, "must be a mapping"),
    ],
)
def test_an_invalid_clipping_is_rejected(config: object, error: type[Exception], text: str) -> None:
    """An invalid clip_grad raises an error at construction, with the closest name."""
    with pytest.raises(error, match=text):
        OptimWrapper(SGD([parameter()], lr=1.0), clip_grad=config)  # type: ignore[arg-type]


def test_a_nonfinite_update_can_be_skipped() -> None:
    """With ``nonfinite="skip"``, the weights do not change, and the window only counts as an attempt."""
    weight = parameter()
    wrapper = OptimWrapper(SGD([weight], lr=1.0), nonfinite="skip")
    wrapper.update_params((weight * float("inf")).sum())
    assert (weight.item(), wrapper.num_steps_attempted, wrapper.num_steps_applied) == (0.0, 1, 0)
    assert weight.grad is None
    wrapper.update_params(weight.sum())
    assert (weight.item(), wrapper.num_steps_attempted, wrapper.num_steps_applied) == (-1.0, 2, 1)


def test_a_nonfinite_update_can_be_an_error() -> None:
    """With ``nonfinite="error"``, the error shows the norm, and the weights do not change."""
    weight = parameter()
    wrapper = OptimWrapper(SGD([weight], lr=1.0), nonfinite="error")
    with pytest.raises(TrainingError, match="norm of the gradients is nan"):
        wrapper.update_params((weight * float("nan")).sum())
    assert weight.item() == 0.0


def test_error_if_nonfinite_is_supported() -> None:
    """``error_if_nonfinite``, torch's name for the policy, is supported in clip_grad."""
    weight = parameter()
    wrapper = OptimWrapper(SGD([weight], lr=1.0), clip_grad=dict(max_norm=1.0, error_if_nonfinite=True))
    with pytest.raises(TrainingError, match="norm of the gradients"):
        wrapper.update_params((weight * float("inf")).sum())


@pytest.mark.parametrize("counts", [0, -1, 1.5, None])
def test_accumulative_counts_must_be_a_positive_integer(counts: object) -> None:
    """``accumulative_counts`` must be a positive integer."""
    with pytest.raises(ConfigValueError, match="accumulative_counts"):
        OptimWrapper(SGD([parameter()], lr=1.0), accumulative_counts=counts)  # type: ignore[arg-type]


def test_only_an_optimizer_can_be_wrapped() -> None:
    """Wrapping a configuration instead of an optimizer raises an error that names the function to use."""
    with pytest.raises(ConfigTypeError, match="build_optim_wrapper"):
        OptimWrapper(dict(type="SGD"))  # type: ignore[arg-type]


def test_later_groups_are_cleared() -> None:
    """``zero_grad`` clears groups that were added after the wrapper was built."""
    first, second = parameter(), parameter()
    wrapper = OptimWrapper(SGD([first], lr=1.0))
    wrapper.optimizer.add_param_group({"params": [second]})
    wrapper.update_params((first + second).sum())
    assert first.grad is None
    assert second.grad is None


def test_a_custom_zero_grad_is_called() -> None:
    """A custom ``zero_grad`` of the optimizer is called."""

    class Own(SGD):
        cleared = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.cleared += 1
            super().zero_grad(set_to_none)

    weight = parameter()
    optimizer = Own([weight], lr=1.0)
    OptimWrapper(optimizer).update_params(weight.sum())
    assert optimizer.cleared == 1


def test_step_and_zero_arguments_are_passed_on() -> None:
    """``step_kwargs`` are passed to the optimizer's ``step``, and ``zero_kwargs`` to its ``zero_grad``."""
    weight = parameter()
    wrapper = OptimWrapper(SGD([weight], lr=1.0))
    wrapper.update_params(weight.sum(), step_kwargs=dict(closure=None), zero_kwargs=dict(set_to_none=False))
    assert weight.grad is not None
    assert weight.grad.item() == 0.0


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (SGD([parameter()], lr=1.0, momentum=0.9), [0.9]),
        (Adam([parameter()], betas=(0.8, 0.99)), [0.8]),
        (torch.optim.Adagrad([parameter()]), [0.0]),
    ],
)
def test_momentum_is_read_from_the_optimizer(optimizer: Optimizer, expected: list[float]) -> None:
    """``get_momentum`` returns the momentum, the first beta, or 0."""
    assert OptimWrapper(optimizer).get_momentum() == {"momentum": expected}


def test_the_returned_learning_rates_are_those_used() -> None:
    """``get_lr`` returns the current learning rates of the groups."""
    wrapper = OptimWrapper(SGD([{"params": [parameter()], "lr": 0.5}, {"params": [parameter()]}], lr=0.1))
    wrapper.param_groups[0]["lr"] *= 2
    assert wrapper.get_lr() == {"lr": [1.0, 0.1]}


def test_state_round_trips() -> None:
    """A wrapper that loads a state continues bit for bit, and loading does not modify the mapping."""
    torch.manual_seed(0)
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (OptimWrapper(AdamW(model.parameters(), lr=0.1)) for model in models)
    data = torch.randn(4, 3)
    for _ in range(2):
        first.update_params(models[0](data).square().mean())
    models[1].load_state_dict(models[0].state_dict())
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    assert state.keys() == {"state", "param_groups", "class", "counts"}
    assert (second.inner_count, second.num_steps_applied, second.num_steps_attempted) == (2, 2, 2)
    for model, wrapper in zip(models, (first, second), strict=True):
        wrapper.update_params(model(data).square().mean())
    assert torch.equal(models[0].weight, models[1].weight)


def test_loading_a_state_does_not_change_the_implementation() -> None:
    """Loading a state from a non-fused optimizer keeps a fused optimizer fused."""
    weight = parameter()
    saved = OptimWrapper(AdamW([weight], lr=0.1, foreach=False))
    saved.update_params(weight.sum())
    loaded = OptimWrapper(AdamW([weight], lr=0.1, fused=True))
    loaded.load_state_dict(saved.state_dict())
    assert loaded.param_groups[0]["fused"] is True
    loaded.update_params(weight.sum())


def test_the_state_of_a_plain_optimizer_can_be_loaded() -> None:
    """The state of a plain torch optimizer can be loaded."""
    weight = parameter()
    bare = Adam([weight], lr=0.1)
    weight.sum().backward()
    bare.step()
    wrapper = OptimWrapper(Adam([weight], lr=0.5))
    wrapper.load_state_dict(bare.state_dict())
    assert wrapper.get_lr() == {"lr": [0.1]}


def test_a_state_with_different_groups_is_rejected() -> None:
    """A state with a different number of groups or parameters raises an error."""
    one = OptimWrapper(SGD([parameter()], lr=1.0))
    two = OptimWrapper(SGD([{"params": [parameter()]}, {"params": [parameter()]}], lr=1.0))
    with pytest.raises(CheckpointMismatchError, match="has 2 parameter groups, but this run has 1"):
        one.load_state_dict(two.state_dict())
    wide = OptimWrapper(SGD([parameter(), parameter()], lr=1.0))
    with pytest.raises(CheckpointMismatchError, match="cannot be loaded into the SGD"):
        one.load_state_dict(wide.state_dict())


def test_the_context_of_a_plain_step_is_one_shared_object() -> None:
    """Without accumulation, ``optim_context`` returns one shared context."""
    wrapper = OptimWrapper(SGD([parameter()], lr=1.0))
    contexts = {id(wrapper.optim_context(nn.Identity())) for _ in range(3)}
    assert len(contexts) == 1
    assert isinstance(wrapper.optim_context(nn.Identity()), nullcontext)


def test_the_placement_is_notified_of_the_last_micro_batch() -> None:
    """``accumulation_context`` receives False within a window and True for its last micro-batch."""
    weight = parameter()
    wrapper = OptimWrapper(SGD([weight], lr=1.0), accumulative_counts=3)
    wrapper.initialize_count_status(nn.Identity(), 0, 5)
    seen: list[bool] = []

    def context(model: nn.Module, sync: bool) -> nullcontext[None]:
        seen.append(sync)
        return nullcontext()

    wrapper.gradient_policy = GradientPolicy(sync_context=context)
    for _ in range(5):
        with wrapper.optim_context(nn.Identity()):
            loss = weight.sum()
        wrapper.update_params(loss)
    assert seen == [False, False, True, False, True]


def test_a_plain_step_adds_six_calls() -> None:
    """``update_params`` adds six calls to backward, step and clearing the gradients."""

    def calls(iteration: object) -> int:
        for _ in range(2):
            iteration()  # type: ignore[operator]
        profile = cProfile.Profile()
        profile.enable()
        iteration()  # type: ignore[operator]
        profile.disable()
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]

    model = nn.Linear(4, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    wrapper = OptimWrapper(optimizer)
    data = torch.randn(3, 4)

    def bare() -> None:
        loss = model(data).sum()
        loss.backward()
        optimizer.step()
        for weight in (model.weight, model.bias):
            weight.grad = None

    def ours() -> None:
        with wrapper.optim_context(model):
            loss = model(data).sum()
        wrapper.update_params(loss)

    # The context of optim_context adds three more calls.
    assert calls(ours) - calls(bare) <= 6 + 3


def test_schedule_free_optimizers_follow_the_mode_of_the_wrapper() -> None:
    """An optimizer with ``train`` and ``eval`` starts in training mode and follows the wrapper."""
    modes: list[str] = []

    class ScheduleFree(SGD):
        def train(self) -> None:
            modes.append("train")

        def eval(self) -> None:
            modes.append("eval")

    optimizer = ScheduleFree([parameter()], lr=1.0)
    wrapper = OptimWrapper(optimizer)
    wrapper.eval()
    wrapper.train()
    assert modes == ["train", "eval", "train"]
    OptimWrapper(SGD([parameter()], lr=1.0)).eval()


@pytest.mark.parametrize("clip_grad", [{"max_norm": 0.1}, {"type": "value", "clip_value": 0.05}])
def test_sparse_gradients_are_clipped_like_dense_ones(clip_grad: dict[str, Any]) -> None:
    """An embedding with sparse gradients, in which rows repeat, trains like a dense one with clipping and weights."""
    models = [nn.Embedding(5, 3, sparse=sparse) for sparse in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        wrapper = OptimWrapper(SGD(model.parameters(), lr=1.0), clip_grad=clip_grad, accumulative_counts=2)
        for rows, weight in (([0, 1, 1], 3), ([1, 4], 2)):
            wrapper.update_params(model(torch.tensor(rows)).square().mean(), weight=weight)
    torch.testing.assert_close(models[0].weight, models[1].weight)


class Separate(OptimWrapper):
    """A wrapper that overrides a stage, so that the loss is multiplied by its factor in an operation of its own."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        return super().scale_loss(loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "weights",
    [
        (None, None, None),
        (3, 5, 7),
        (0.1, 0.2, 0.3),
        tuple(map(torch.tensor, (3, 5, 7))),
        tuple(map(torch.tensor, (0.1, 0.7, 3e9))),
    ],
    ids=["unweighted", "integers", "floats", "integer tensors", "float tensors"],
)
def test_starting_the_backward_pass_with_a_factor_equals_multiplying_the_loss(
    dtype: torch.dtype, weights: tuple[Any, ...]
) -> None:
    """After four windows of three micro-batches, the weights equal those of a wrapper that multiplies each loss, to the bit."""
    results = []
    for kind in (OptimWrapper, Separate):
        weight = nn.Parameter(torch.linspace(0.1, 1.7, 9, dtype=dtype))
        optim = kind(SGD([weight], 0.1, momentum=0.9), accumulative_counts=3)
        for index in range(12):
            loss = (weight * weight * (index + 0.3)).sum()
            optim.update_params(loss, weight=weights[index % 3])
        results.append(weight.tolist())
    assert results[0] == results[1]


class OwnNorm(OptimWrapper):
    """A wrapper with another norm, whose method has only the gradients as its argument."""

    def compute_grad_norm(self, grads: list[Tensor]) -> Tensor:  # type: ignore[override]
        return super().compute_grad_norm(grads) * 2


def test_an_overridden_norm_needs_no_further_argument() -> None:
    """Clipping uses the norm of a subclass that knows nothing of loss scales."""
    weight = nn.Parameter(torch.zeros(()))
    optim = OwnNorm(SGD([weight], 1.0), clip_grad={"max_norm": 1.0})
    optim.update_params(weight * 3.0)
    assert weight.item() == pytest.approx(-0.5)  # the gradient 3 times 1 / 6


def test_a_loss_hook_sees_the_factor_and_cannot_change_later_ones() -> None:
    """A hook that changes the gradient of a loss in place does not affect the next micro-batch."""
    weight = nn.Parameter(torch.ones(()))
    optim = OptimWrapper(SGD([weight], 0.0), accumulative_counts=4)
    seen = []

    def spoil(gradient: Tensor) -> None:
        seen.append(gradient.item())
        gradient.mul_(100)

    for _ in range(3):
        loss = weight * 1.0
        loss.register_hook(spoil)
        optim.update_params(loss)
    assert seen == [0.25] * 3


def test_a_weight_that_requires_a_gradient_is_part_of_the_graph() -> None:
    """A weight that the model computes receives a gradient, as if the loss were multiplied by it."""
    weight = nn.Parameter(torch.tensor(2.0))
    optim = OptimWrapper(SGD([weight], 0.0), accumulative_counts=2)
    optim.update_params(weight * 3.0, weight=weight * 1.0)
    assert weight.grad is not None
    assert weight.grad.item() == 12.0  # the derivative of 3 w * w


@pytest.mark.parametrize("name", ["backward", "scale_loss", "weigh_loss"])
def test_a_replaced_stage_of_one_object_is_called(name: str) -> None:
    """A stage that the user assigns to the object is called, also after earlier steps."""
    weight = nn.Parameter(torch.ones(()))
    optim = OptimWrapper(SGD([weight], 0.1), accumulative_counts=2)
    given = 1.0 if name == "weigh_loss" else None
    optim.update_params(weight * 1.0, weight=given)
    called = []
    original = getattr(optim, name)
    setattr(optim, name, lambda *args: (called.append(name), original(*args))[1])
    optim.update_params(weight * 1.0, weight=given)
    assert called == [name]
