"""Record a hand-written loop, and find faults in each part of its steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import stratagem
from stratagem.errors import TraceError
from stratagem.trace import Difference, Part, RankStep, Recording, compare, read_trace


@dataclass
class Loop:
    """A hand-written loop with accumulation, clipping, a schedule and averaged weights; the functions are its faults."""

    steps: int = 3
    micro_batches: int = 2
    dropout: float = 0.0
    optimizer: Callable[[Any], torch.optim.Optimizer] = field(
        default=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    )
    on_batch: Callable[[int, Tensor], Tensor] = field(default=lambda step, inputs: inputs)
    on_loss: Callable[[int, Tensor], Tensor] = field(default=lambda step, loss: loss)
    on_gradients: Callable[[int, nn.Module], object] = field(default=lambda step, model: None)
    on_clipped: Callable[[int, nn.Module], object] = field(default=lambda step, model: None)
    on_rate: Callable[[int, float], float] = field(default=lambda step, rate: rate)
    on_updated: Callable[[int, nn.Module], object] = field(default=lambda step, model: None)
    decay: float = 0.9
    before_step: Callable[[int], object] = field(default=lambda step: None)

    def model(self) -> nn.Module:
        """Return the initial model."""
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(6, 3))

    def run(self, path: Path | None = None, **options: Any) -> nn.Module:
        """Train, and return the trained model; record a trace if there is a path."""
        model = self.model()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        optimizer = self.optimizer(model.parameters())
        data = torch.Generator().manual_seed(1)
        recording: Any = nullcontext()
        if path is not None:
            recording = stratagem.trace.record(path, model, **{"averaged": average, **options})
        with recording:
            for step in range(1, self.steps + 1):
                self.before_step(step)
                for _ in range(self.micro_batches):
                    inputs = self.on_batch(step, torch.randn(5, 4, generator=data))
                    labels = torch.randint(0, 3, (5,), generator=data)
                    if isinstance(recording, Recording):
                        recording.batch({"inputs": inputs, "labels": labels})
                    loss = cross_entropy(model(inputs), labels) / self.micro_batches
                    self.on_loss(step, loss).backward()
                self.on_gradients(step, model)
                clip_grad_norm_(model.parameters(), 0.5)
                self.on_clipped(step, model)
                for group in optimizer.param_groups:
                    group["lr"] = self.on_rate(step, 0.1 / step)
                optimizer.step()
                self.on_updated(step, model)
                optimizer.zero_grad()
                average.update_parameters(model)
        return model


def steps_of(path: Path) -> tuple[RankStep, ...]:
    """Return the recorded steps of a trace of one rank."""
    return read_trace(path).ranks[0].steps


def first_difference(folder: Path, one: Loop, other: Loop) -> Difference | None:
    """Return the first difference between two loops."""
    one.run(folder / "one.json")
    other.run(folder / "other.json")
    return compare(read_trace(folder / "one.json"), read_trace(folder / "other.json")).first


def in_step_2(change: Callable[[Any], Any], otherwise: Callable[[Any], Any] = lambda value: value) -> Any:
    """Return a function that changes a value in step 2."""
    return lambda step, value: change(value) if step == 2 else otherwise(value)


@torch.no_grad()
def scale_gradient(model: nn.Module) -> None:
    """Double the gradient of the last layer."""
    layer: Any = list(model.children())[-1]
    layer.weight.grad.mul_(2)


@torch.no_grad()
def move_weight(model: nn.Module) -> None:
    """Change a weight of the last layer."""
    layer: Any = list(model.children())[-1]
    layer.weight[0, 0] += 0.01


class Doubled(torch.autograd.Function):
    """The identity, with a wrong gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Return the value."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """Return twice the gradient."""
        return gradient * 2


class WrongSGD(torch.optim.SGD):
    """Stochastic gradient descent that moves a weight additionally in the second step."""

    num_steps = 0

    def step(self, closure: Any = None) -> Any:
        """Update the parameters."""
        self.num_steps += 1
        if self.num_steps == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] += 0.01
        return super().step(closure)


FAULTS = {
    Part.DATA: Loop(on_batch=in_step_2(lambda inputs: inputs + 1)),
    Part.FORWARD: Loop(on_loss=in_step_2(lambda loss: loss * 1.01)),
    Part.BACKWARD: Loop(on_loss=in_step_2(Doubled.apply)),
    Part.CLIP: Loop(on_clipped=in_step_2(scale_gradient)),
    Part.SCHEDULE: Loop(on_rate=in_step_2(lambda rate: rate * 2)),
    Part.UPDATE: Loop(optimizer=lambda parameters: WrongSGD(parameters, lr=0.1, momentum=0.9)),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", list(FAULTS))
def test_a_fault_in_a_hand_written_loop_is_found_in_its_part_and_step(tmp_path: Path, part: Part) -> None:
    """The loops differ in one statement of step 2."""
    first = first_difference(tmp_path, Loop(), FAULTS[part])
    assert first is not None
    assert (first.step, first.part, first.also_possible) == (2, part, ())


def test_wrong_averaged_weights_are_found_in_the_average(tmp_path: Path) -> None:
    """The averages have different decay rates, and the training is the same."""
    first = first_difference(tmp_path, Loop(), Loop(decay=0.8))
    assert first is not None
    assert (first.step, first.part) == (2, Part.AVERAGE)


@pytest.mark.slow
def test_parameters_that_change_between_two_steps_are_found_at_the_start_of_the_next(tmp_path: Path) -> None:
    """A weight is changed after the update of step 2."""
    Loop().run(tmp_path / "one.json", averaged=None)
    Loop(on_updated=in_step_2(move_weight)).run(tmp_path / "other.json", averaged=None)
    first = compare(read_trace(tmp_path / "one.json"), read_trace(tmp_path / "other.json")).first
    assert first is not None
    assert (first.step, first.part, first.name) == (3, Part.START, "4.weight")


@pytest.mark.slow
def test_other_dropout_is_found_in_the_forward_pass_with_the_generators(tmp_path: Path) -> None:
    """The generator is seeded again before step 2."""
    again = Loop(dropout=0.5, before_step=lambda step: torch.manual_seed(5) if step == 2 else None)
    first = first_difference(tmp_path, Loop(dropout=0.5), again)
    assert first is not None
    assert (first.step, first.part, first.kind) == (2, Part.FORWARD, "generator")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recording_does_not_change_the_training(tmp_path: Path, dropout: float) -> None:
    """With and without a recording, all bits of the parameters and buffers are equal."""
    plain, recorded = Loop(dropout=dropout).run(), Loop(dropout=dropout).run(tmp_path / "a.json")
    for name, value in plain.state_dict().items():
        assert torch.equal(value, recorded.state_dict()[name]), name


def test_all_values_of_a_step_are_recorded(tmp_path: Path) -> None:
    """The values of step 2 equal those of a loop that is written out here."""
    Loop(steps=2).run(tmp_path / "a.json")
    step = steps_of(tmp_path / "a.json")[1]
    model = Loop().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.Generator().manual_seed(1)
    for number in (1, 2):
        before = {name: each.detach().clone() for name, each in model.named_parameters()}
        losses = []
        for _ in range(2):
            inputs, labels = torch.randn(5, 4, generator=data), torch.randint(0, 3, (5,), generator=data)
            loss = cross_entropy(model(inputs), labels) / 2
            losses.append(loss.item())
            loss.backward()
        reduced = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        norm = clip_grad_norm_(model.parameters(), 0.5)
        clipped = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        optimizer.param_groups[0]["lr"] = 0.1 / number
        optimizer.step()
        optimizer.zero_grad()
    expected = {
        "before": before,
        "local": reduced,
        "reduced": reduced,
        "clipped": clipped,
        "after": dict(model.named_parameters()),
        "buffers": dict(model.named_buffers()),
    }
    for section, tensors in expected.items():
        found = step.section(section)
        assert found is not None
        assert found.keys() == tensors.keys()
        for name, value in found.items():
            assert torch.equal(value.numbers.view(value.shape), tensors[name]), (section, name)
    assert step.losses == tuple(losses)
    assert step.loss == sum(losses)
    assert step.grad_norm == norm.item()
    assert [len(batch) for batch in step.samples or ()] == [5, 5]
    [group] = step.groups or ()
    assert group.options == {"lr": 0.05, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}
    assert group.parameters == tuple(before)


def test_the_recording_ends_after_the_requested_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The trace has this number of steps, and no hook remains."""
    backward = torch.autograd.backward
    with caplog.at_level(logging.INFO, logger="stratagem"):
        Loop(steps=4).run(tmp_path / "a.json", steps=2)
    assert len(steps_of(tmp_path / "a.json")) == 2
    assert torch.autograd.backward is backward
    assert "Recorded 2 optimizer steps in" in caplog.text


def test_the_steps_before_an_exception_are_published(tmp_path: Path) -> None:
    """The trace of a loop that fails in step 3 has two steps."""

    def fail(step: int) -> None:
        if step == 3:
            raise RuntimeError("step 3")

    with pytest.raises(RuntimeError, match="step 3"):
        Loop(before_step=fail).run(tmp_path / "a.json")
    assert len(steps_of(tmp_path / "a.json")) == 2


def test_evaluation_between_steps_is_not_recorded(tmp_path: Path) -> None:
    """Forward passes without gradients or in evaluation mode do not add samples."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with stratagem.trace.record(tmp_path / "a.json", model):
        for _ in range(2):
            model(torch.ones(3, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            model(torch.ones(7, 2))
            model.train()
            with torch.no_grad():
                model(torch.ones(9, 2))
    assert [[len(batch) for batch in step.samples or ()] for step in steps_of(tmp_path / "a.json")] == [[3], [3]]


def test_a_skipped_update_is_not_part_of_the_next_step(tmp_path: Path) -> None:
    """The micro-batch whose gradients were discarded is not recorded."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with stratagem.trace.record(tmp_path / "a.json", model):
        for number in (1.0, 2.0, 3.0):
            model(torch.full((1, 2), number)).sum().backward()
            if number != 2:
                optimizer.step()
            optimizer.zero_grad()
    local = [(step.local or {})["weight"].numbers.tolist() for step in steps_of(tmp_path / "a.json")]
    assert local == [[1.0, 1.0], [3.0, 3.0]]


def test_the_gradients_of_an_optimizer_with_a_closure_are_recorded(tmp_path: Path) -> None:
    """The closure computes the gradients inside of ``step``, as Lightning does."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    with stratagem.trace.record(tmp_path / "a.json", model):
        for _ in range(2):
            optimizer.step(closure)
    steps = steps_of(tmp_path / "a.json")
    assert [(step.clipped or {})["weight"].numbers.tolist() for step in steps] == [[1.0, 1.0], [1.0, 1.0]]
    assert len(steps[0].samples or ()) == 1


def test_values_of_an_optimizer_that_evaluates_the_loss_several_times_are_reported_as_hidden(tmp_path: Path) -> None:
    """LBFGS computes several gradients per step, so none of them is the gradient of the step."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(1, 2)).square().sum()
        loss.backward()
        return loss

    with stratagem.trace.record(tmp_path / "a.json", model):
        optimizer.step(closure)
    [step] = steps_of(tmp_path / "a.json")
    assert step.local is None
    assert step.absent["local"] == "LBFGS calls its closure several times per step"
    assert step.before is not None
    assert step.after is not None


def test_several_optimizers_without_a_forward_pass_in_between_make_one_step(tmp_path: Path) -> None:
    """Each optimizer contributes its parameters and its groups."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizers = [torch.optim.SGD(layer.parameters(), lr=rate) for layer, rate in zip(model, (0.1, 0.2), strict=True)]
    with stratagem.trace.record(tmp_path / "a.json", model):
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    steps = steps_of(tmp_path / "a.json")
    assert len(steps) == 2
    assert sorted(steps[0].after or ()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert sorted(steps[0].reduced or ()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert [group.options["lr"] for group in steps[0].groups or ()] == [0.1, 0.2]


@pytest.mark.slow
def test_a_compiled_module_has_the_names_of_the_model(tmp_path: Path) -> None:
    """``torch.compile`` does not change the recorded names."""
    model = nn.Linear(2, 1)
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    with stratagem.trace.record(tmp_path / "a.json", compiled):
        compiled(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    [step] = steps_of(tmp_path / "a.json")
    assert sorted(step.after or ()) == sorted(step.local or ()) == ["bias", "weight"]


def test_a_scaled_loss_is_recorded_without_the_scale(tmp_path: Path) -> None:
    """With ``scaler``, losses and gradients are those of the loss."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with stratagem.trace.record(tmp_path / "a.json", model, scaler=scaler):
        loss = model(torch.ones(1, 2)).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 100.0)
        scaler.step(optimizer)
        scaler.update()
    [step] = steps_of(tmp_path / "a.json")
    for section in ("local", "reduced", "clipped"):
        assert (step.section(section) or {})["weight"].numbers.tolist() == [1.0, 1.0], section
    assert step.loss == loss.item()


def test_ids_of_samples_replace_the_digests(tmp_path: Path) -> None:
    """``batch`` accepts the indices of the samples."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with stratagem.trace.record(tmp_path / "a.json", model) as recording:
        recording.batch(None, ids=[7, 8])
        model(torch.ones(2, 2)).sum().backward()
        optimizer.step()
    assert steps_of(tmp_path / "a.json")[0].samples == (("7", "8"),)


@pytest.mark.parametrize(
    ("arguments", "message"), [((None,), "got a NoneType"), ((nn.Linear(1, 1), 0), "at least one step")]
)
def test_unusable_arguments_are_refused(tmp_path: Path, arguments: tuple[Any, ...], message: str) -> None:
    """The error describes what is required."""
    model, *steps = arguments
    with pytest.raises(TraceError, match=message):
        stratagem.trace.record(tmp_path / "a.json", model, **({"steps": steps[0]} if steps else {}))


def test_a_large_model_is_summarized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit, only tensors with more than 321 elements are summarized; a fault is still found in its part."""
    monkeypatch.setattr("stratagem.trace.recorder.FULL_LIMIT", 100)
    for name, factor in (("a.json", 1), ("b.json", 2)):
        torch.manual_seed(0)
        model = nn.Linear(40, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with stratagem.trace.record(tmp_path / name, model):
            model(torch.ones(3, 40)).square().sum().backward()
            model.weight.grad.mul_(factor)  # type: ignore[union-attr]
            clip_grad_norm_(model.parameters(), 1e6)
            optimizer.step()
    a, b = read_trace(tmp_path / "a.json"), read_trace(tmp_path / "b.json")
    step = a.ranks[0].steps[0]
    assert {name: value.is_summary for name, value in (step.after or {}).items()} == {"weight": True, "bias": False}
    first = compare(a, b).first
    assert first is not None
    assert (first.part, first.name, first.note) == (Part.REDUCTION, "weight", "2 times the value in the first trace")
