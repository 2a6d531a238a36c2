"""Plans of models that a simulated step treats differently: compiled, lazy, sparse, or with an error in every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import stratagem
from stratagem import BaseModel, ModelWithLoss, SupervisedModel
from stratagem.errors import ConfigError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.planning.result import StepPlan
from stratagem.strategies import SingleDeviceStrategy
from stratagem.strategies.choice import choose_strategy
from tests.support.planned_models import bytes_of
from tests.support.ranks import Ranks

SGD = {"optimizer": {"type": "SGD", "lr": 0.1}}
MOMENTUM = {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}}


def steps_of(model: nn.Module, batch: str, *strategies: Any, optim: Any = SGD) -> tuple[StepPlan, ...]:
    return stratagem.plan(model, optim_wrapper=optim, batch=batch, strategies=strategies, worlds=[2]).steps


class Layers(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(torch.relu(self.first(x)))
        return hidden


@pytest.mark.slow
def test_a_compiled_part_does_not_prevent_a_simulated_step() -> None:
    """Compiled modules run without the compiler, so the plan is that of the same model without torch.compile."""
    batch = "float32[3,4],float32[3,4]"
    compiled = torch.compile(Layers(), backend="eager")
    assert isinstance(compiled, nn.Module)
    found = steps_of(SupervisedModel(compiled, nn.MSELoss()), batch, "single", "ddp", "fsdp")
    expected = steps_of(SupervisedModel(Layers(), nn.MSELoss()), batch, "single", "ddp", "fsdp")
    for step, plain in zip(found, expected, strict=True):
        assert step.failure is None
        assert (step.memory, step.flops) == (plain.memory, plain.flops)


@pytest.mark.parametrize("strategy", ["single", "fsdp"])
def test_a_lazy_module_is_refused_with_its_name(strategy: str) -> None:
    """The error names the parameter whose shape is unknown, instead of torch's message about empty_like."""
    model = SupervisedModel(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2)), nn.MSELoss())
    with pytest.raises(
        ConfigValueError, match=r"The shape of 'network\.1\.weight' is unknown until the first forward pass"
    ):
        steps_of(model, "float32[3,4],float32[3,2]", strategy)


def test_an_error_of_every_step_is_not_explained_by_missing_values() -> None:
    """A network without a loss fails in training as well, so the plan does not suggest to measure a real step."""
    [step] = steps_of(ModelWithLoss(nn.Linear(4, 4)), "float32[3,4]", "single")
    assert step.failure is not None
    assert "with loss=None. Include the targets in the batch" in step.failure
    assert step.failure.endswith("Only the static sizes of ModelWithLoss are known.")
    assert step.memory.parameters == 80


class Constant(BaseModel):
    """A model whose loss does not depend on its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, mode: str = "tensor") -> dict[str, Tensor]:
        return {"loss": x.sum()}


def test_an_error_without_a_line_of_the_model_refers_to_the_step() -> None:
    """Torch's message about a loss without a graph belongs to no line of the model."""
    [step] = steps_of(Constant(), "float32[3,4]", "single")
    assert step.failure is not None
    assert step.failure.startswith("RuntimeError: element 0 of tensors does not require grad")
    assert "If the step works in training, it probably needs values" in step.failure
    assert "this line" not in step.failure


class Words(BaseModel):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 4, sparse=True)

    def forward(self, x: Tensor, mode: str = "tensor") -> dict[str, Tensor]:
        return {"loss": self.words(x).sum()}


def test_sparse_gradients_are_explained() -> None:
    """The step is not simulated; its static sizes are those of dense gradients, and the plan mentions both."""
    for step in steps_of(Words(), "int64[3,4]", "single", "ddp"):
        assert step.failure is not None
        assert "Steps with sparse gradients are not simulated" in step.failure
        assert (step.memory.parameters, step.memory.gradients) == (1600, 1600)


def test_the_state_of_an_optimizer_for_sparse_gradients() -> None:
    """SparseAdam rejects dense gradients, and has two moments of the size of the embedding; Adam rejects sparse ones."""
    [step] = steps_of(Words(), "int64[3,4]", "single", optim={"optimizer": {"type": "SparseAdam", "lr": 0.1}})
    assert step.refusal is None
    assert (step.memory.gradients, step.memory.optimizer_state) == (1600, 3200)
    [step] = steps_of(Words(), "int64[3,4]", "single", optim={"optimizer": {"type": "Adam", "lr": 0.1}})
    assert "Adam does not support sparse gradients" in str(step.refusal)


class Scaled(BaseModel):
    """A layer whose output is multiplied by a trainable scalar, like the temperature of CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, mode: str = "tensor") -> dict[str, Tensor]:
        return {"loss": (self.layer(x) * self.scale).sum()}


def _scaled_sizes(strategy: dict[str, Any], folder: str) -> tuple[int, int]:
    """Train a step; return the bytes of the parameters and of the state of SGD with momentum on this rank."""
    built = choose_strategy(
        strategy, launcher="pytorch", work_dir=folder, experiment_name=None, env_cfg=None, randomness=None,
        auto_scale_lr=None, log_level="ERROR",
    )  # fmt: skip
    built.prepare(Scaled(), optim_wrapper=MOMENTUM, dispatch_kwargs={"max_iters": 9})
    built.model.train_step(torch.ones(3, 4), optim_wrapper=built.optim_wrapper)
    state = [each for each in tree_leaves(dict(built.optim_wrapper.optimizer.state)) if isinstance(each, Tensor)]
    found = (bytes_of(built.unwrap_model().parameters()), bytes_of(state))
    built.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "nbytes"),
    [({"type": "fsdp"}, 10 * 4 + 4), ({"type": "fsdp", "ignored": ["layer.bias"]}, 8 * 4 + 4 * 4 + 4)],
)
def test_parameters_that_fsdp_does_not_shard_are_planned(
    ranks: Ranks, tmp_path: Path, strategy: dict[str, Any], nbytes: int
) -> None:
    """A scalar and an ignored parameter are whole on each rank, as in a real run; planning failed to swap them."""
    [step] = stratagem.plan(
        Scaled(), optim_wrapper=MOMENTUM, batch="float32[3,4]", strategies=[strategy], worlds=[2]
    ).steps
    assert (step.refusal, step.failure) == (None, None)
    assert (step.memory.parameters, step.memory.gradients, step.memory.optimizer_state) == (nbytes, nbytes, nbytes)
    real = ranks.run(_scaled_sizes, {**strategy, "type": "FSDPStrategy"}, str(tmp_path))
    assert real == [(nbytes, nbytes)] * 2


def test_an_unknown_strategy_is_an_error_and_not_a_row() -> None:
    """A misspelled name stops before anything is planned, with similar names."""
    with pytest.raises(ConfigKeyError, match="unknown name 'fdsp'. Did you mean 'fsdp'"):
        steps_of(Constant(), "float32[3,4]", "ddp", "fdsp")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"memory": "80GiB"}, "memory must be a number of bytes >= 1, such as 80 * 2**30, got '80GiB'."),
        ({"memory": [2**30, -5]}, "memory must be a number of bytes >= 1, such as 80 * 2**30, got -5."),
        ({"gpus_per_node": 0}, "gpus_per_node must be an integer >= 1, got 0."),
        ({"worlds": 8}, "worlds must be a list of numbers of ranks, such as [8, 64], got 8."),
        ({"worlds": [True]}, "A number of ranks must be an integer >= 1, got True."),
        ({"strategies": "ddp"}, "strategies must be a list of names or configurations, got 'ddp'."),
        ({"optim_wrapper": None}, "Planning requires an optim_wrapper"),
    ],
)
def test_an_argument_of_plan_that_cannot_be_used_is_an_error_and_not_a_refused_strategy(
    option: dict[str, Any], message: str
) -> None:
    """The error has the value, instead of a TypeError in the row of each strategy."""
    options: dict[str, Any] = {"optim_wrapper": SGD, "batch": "float32[3,4]", "strategies": ["single"], **option}
    with pytest.raises(ConfigError) as caught:
        stratagem.plan(Constant(), **options)
    assert str(caught.value).startswith(message)


def test_a_strategy_without_a_type_is_an_error_with_an_example() -> None:
    """The error shows the configuration and what is missing."""
    with pytest.raises(ConfigKeyError, match=r"\{'tp': 2\} has no key 'type'"):
        steps_of(Constant(), "float32[3,4]", {"tp": 2})


def test_a_strategy_that_is_already_built_is_an_error_that_asks_for_its_configuration(tmp_path: Path) -> None:
    """A built strategy belongs to one number of ranks."""
    built = SingleDeviceStrategy(work_dir=str(tmp_path))
    with pytest.raises(ConfigTypeError, match="instead of an object of the class SingleDeviceStrategy"):
        steps_of(Constant(), "float32[3,4]", built)
    built.close()
