"""Replays of CUDA graphs return their results in the same memory; here, models do so on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import Runner
from stratagem.errors import PlacementError
from stratagem.model import BaseModel
from stratagem.parallel.cuda_graphs import keep_outputs_of_replays, may_replay_cuda_graphs
from stratagem.parallel.single_device import OnDevice
from stratagem.strategies import BaseStrategy, composed
from stratagem.train import Hook
from tests.support.small_runs import make

Make = Callable[..., BaseStrategy]
CUDA = torch.device("cuda", 0)


class _Replay(torch.autograd.Function):
    """The sum of ``weight * inputs``, written into a fixed loss; its backward pass writes into a fixed gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, inputs: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.inputs, ctx.gradient = inputs.clone(), gradient
        return loss.copy_((weight * inputs).sum()).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # A new tensor in the same memory, which becomes the gradient of the parameter without a copy.
        return ctx.gradient.copy_(ctx.inputs * gradients[0]).detach(), None, None, None


class Replaying(BaseModel):
    """A model whose losses, predictions and gradients have the same memory in each iteration, as those of a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self._loss, self._gradient, self._prediction = torch.zeros(()), torch.zeros(2), torch.zeros(2)

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
        if mode == "loss":
            return {"loss": _Replay.apply(self.weight, inputs, self._loss, self._gradient)}
        return self._prediction.copy_(self.weight.detach() * inputs)


def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Let strategies expect CUDA graphs; return a list with an item for each start of an iteration that they mark."""
    marks: list[None] = []
    monkeypatch.setattr(composed, "may_replay_cuda_graphs", lambda *_: True)
    # Without this, torch would import its compiler, which takes seconds.
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    return marks


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that prepares the model as on a GPU whose compiler uses CUDA graphs."""
    pretend_graphs(monkeypatch)
    made: list[BaseStrategy] = []

    def prepare(optim: dict[str, Any], **options: Any) -> Any:
        made.append(make("single", tmp_path))
        wrapper = {"optimizer": {"type": "SGD", "lr": 1.0}, **optim}
        return made[-1].prepare(Replaying(), optim_wrapper=wrapper, dispatch_kwargs={"max_iters": 4}, **options)

    yield prepare
    for strategy in made:
        strategy.close()


INPUTS = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0]), torch.tensor([7.0, 11.0]), torch.tensor([13.0, 17.0])]


def test_losses_of_earlier_iterations_are_not_overwritten_by_a_replay(replays: Any) -> None:
    """Losses that are kept until a log line have the values of their iterations: the sums of weights times inputs."""
    model, optim = replays({"optimizer": {"type": "SGD", "lr": 0.0}})[:2]
    kept = [model.train_step(inputs, optim_wrapper=optim)["loss"] for inputs in INPUTS]
    assert [loss.item() for loss in kept] == [3.0, 8.0, 18.0, 30.0]


def test_gradients_of_earlier_micro_batches_are_not_overwritten_by_a_replay(replays: Any) -> None:
    """Two micro-batches are averaged: the gradients 1 and 3, 2 and 5 give the weights 1 - 2 and 1 - 3.5."""
    model, optim = replays({"accumulative_counts": 2})[:2]
    for inputs in INPUTS[:2]:
        model.train_step(inputs, optim_wrapper=optim)
    assert model.weight.tolist() == [-1.0, -2.5]
    for inputs in INPUTS[2:]:
        model.train_step(inputs, optim_wrapper=optim)
    assert model.weight.tolist() == [-11.0, -16.5]


def test_predictions_are_not_overwritten_by_a_replay(replays: Any) -> None:
    """Predictions of two batches that an evaluator keeps have their own values."""
    model = replays({})[0]
    predictions = [model.val_step(inputs) for inputs in INPUTS[:2]]
    assert [each.tolist() for each in predictions] == [[1.0, 2.0], [3.0, 5.0]]


def test_the_start_of_every_iteration_is_marked(replays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of the previous iteration are then no longer needed."""
    marks = pretend_graphs(monkeypatch)
    model, optim = replays({})[:2]
    for inputs in INPUTS:
        model.train_step(inputs, optim_wrapper=optim)
    assert len(marks) == 4


def test_graphs_are_rejected_if_gradients_are_accumulated_elsewhere(
    replays: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP accumulates gradients in its own buffers by reference, so the error suggests a mode without graphs."""
    monkeypatch.setattr(OnDevice, "has_gradients", False)
    replays({"accumulative_counts": 1})
    with pytest.raises(PlacementError, match="CUDA graphs overwrite the gradients.*'max-autotune-no-cudagraphs'"):
        replays({"accumulative_counts": 2})


def test_without_graphs_nothing_is_copied(tmp_path: Path) -> None:
    """A model that is not compiled keeps its methods, so its losses and predictions are not copied."""
    strategy = make("single", tmp_path)
    model, optim = strategy.prepare(Replaying(), optim_wrapper={"optimizer": {"type": "SGD", "lr": 1.0}})[:2]
    assert "train_step" not in vars(model)
    assert model.train_step(INPUTS[0], optim_wrapper=optim)["loss"].data_ptr() == model._loss.data_ptr()
    strategy.close()


class Logged(Hook):
    """Records the logged loss."""

    value = 0.0

    def before_run(self, run: Any) -> None:
        run.recorders.append(self)

    def write(self, record: Any) -> None:
        """Keep the loss of a record."""
        self.value = record.get("loss", self.value)

    def close(self) -> None:
        """Do nothing."""


def test_a_run_logs_the_losses_of_its_iterations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The log line of four iterations averages four different losses: (3 + 8 + 18 + 30) / 4."""
    pretend_graphs(monkeypatch)
    logged = Logged()
    runner = Runner(
        Replaying(),
        tmp_path,
        train_dataloader={
            "batch_size": None,
            "dataset": [{"inputs": each} for each in INPUTS],
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        },
        train_cfg={"max_iters": 4},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.0}},
        default_hooks={"logger": {"interval": 4}, "checkpoint": None},
        custom_hooks=[logged],
        log_level="ERROR",
    )
    runner.train()
    runner.close()
    assert logged.value == pytest.approx(59 / 4)


def _compiled(how: Callable[[nn.Module], Any]) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    how(model)
    return model


@pytest.mark.slow  # imports torch's compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (lambda model: None, False),
        (lambda model: model[0].compile(mode="reduce-overhead"), True),
        (lambda model: setattr(model, "forward", torch.compile(model.forward, mode="max-autotune")), True),
        (lambda model: model.add_module("0", torch.compile(model[0], options={"triton.cudagraphs": True})), True),
        (lambda model: model.compile(mode="max-autotune-no-cudagraphs"), False),
        (lambda model: model.compile(backend="eager"), False),
    ],
    ids=["plain", "block", "method", "part", "no graphs", "eager"],
)
def test_models_that_may_use_graphs_are_found(how: Callable[[nn.Module], Any], expected: bool) -> None:
    """The modes of every compiled part count, also of parts that the model compiles itself; on the CPU there are no graphs."""
    model = _compiled(how)
    assert may_replay_cuda_graphs(model, None, CUDA) is expected
    assert not may_replay_cuda_graphs(model, None, torch.device("cpu"))


def test_the_backend_cudagraphs_uses_graphs() -> None:
    """``compile=dict(backend="cudagraphs")`` is not visible in the model."""
    assert may_replay_cuda_graphs(nn.Linear(1, 1), {"backend": "cudagraphs"}, CUDA)


def test_steps_of_a_model_without_methods_are_not_added() -> None:
    """A plain module does not get methods that it did not have."""
    model = nn.Linear(1, 1)
    keep_outputs_of_replays(model)
    assert not {"train_step", "val_step", "test_step"} & set(vars(model))
