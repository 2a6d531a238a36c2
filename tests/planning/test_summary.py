"""Summaries of models against counts by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stratagem
from stratagem import Config
from stratagem.errors import ConfigValueError, StateError
from stratagem.model import BaseModel, SupervisedModel
from stratagem.planning.summary import ModelSummary, summarize_config
from tests.train.test_flops import cnn, gpt, mlp


def rows(found: ModelSummary, *names: str) -> dict[str, tuple[Any, ...]]:
    """Return attributes of all modules by the names of the modules."""
    return {each.name: tuple(getattr(each, name) for name in names) for each in found.modules}


@pytest.mark.slow
@pytest.mark.parametrize("build", [mlp, cnn, gpt])
def test_the_operations_of_training_are_those_counted_by_hand(
    build: Callable[[], tuple[nn.Module, Tensor, int]],
) -> None:
    """A forward and backward pass of an MLP, a CNN and a GPT has the operations of their formulas."""
    network, inputs, expected = build()
    assert stratagem.summary(network, inputs).training_flops == expected


def test_each_module_has_its_shape_parameters_operations_and_activations() -> None:
    """Of layers 5 -> 7 -> 3 with four samples, only the output of the activation is saved: 4 x 7 float32 values."""
    network, inputs, _ = mlp()
    network[0].bias.requires_grad_(False)
    found = stratagem.summary(network, inputs)
    names = ("output_shapes", "parameters", "trainable", "flops", "activation_bytes")
    assert rows(found, *names) == {
        "": (((4, 3),), 66, 59, 2 * 4 * (35 + 21), 112),
        "0": (((4, 7),), 42, 35, 2 * 4 * 35, 0),
        "1": (((4, 7),), 0, 0, 0, 112),
        "2": (((4, 3),), 24, 24, 2 * 4 * 21, 0),
    }
    assert (found.parameters, found.parameter_bytes, found.batch_size) == (66, 264, 4)


class Tied(nn.Module):
    """A module with a tied weight and a layer that is called twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.second(self.first(self.embedding(tokens))))


def test_shared_parameters_and_modules_count_once() -> None:
    """The tied weight counts for the embedding, and the layer with two names for the first name, with both calls."""
    found = stratagem.summary(Tied(), "int64[2,3]")
    assert found.parameters == 20 + 20
    assert rows(found, "parameters", "calls", "shares", "flops") == {
        "": (40, 1, (), 2 * 6 * (16 + 16 + 20)),
        "embedding": (20, 1, (), 0),
        "first": (20, 2, (), 2 * 2 * 6 * 16),
        "second": (0, None, ("first",), None),
        "head": (0, 1, ("embedding.weight",), 2 * 6 * 20),
    }


def test_repeated_forward_passes_are_separate_and_save_nothing() -> None:
    """With activation checkpointing, a block saves no activations, and its forward pass is repeated."""

    class Checkpointed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.block, x.requires_grad_(), use_reentrant=False)

    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    found = stratagem.summary(Checkpointed(block), torch.rand(2, 4))
    assert found.activation_bytes == 0
    # Torch stops before the last operation, a ReLU, whose output it needs as well.
    assert found.recomputed_flops == 2 * 2 * (16 + 16)
    assert found.training_flops == 3 * 2 * 2 * (16 + 16)


class Dependent(nn.Module):
    """A module whose shapes depend on values, with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.norm(x[x[:, 0] > 0]))


def test_a_module_that_depends_on_values_runs_with_the_given_ones() -> None:
    """Two of three samples are selected; statistics, gradients and random states are restored."""
    model, inputs = Dependent(), torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [2.0, 1.0, 0.0]])
    state = torch.get_rng_state()
    found = stratagem.summary(model, inputs)
    assert rows(found, "output_shapes")["linear"] == (((2, 2),),)
    assert "run with real values, because it depends on them" in found.notes[0]
    assert int(model.norm.num_batches_tracked) == 0
    assert model.linear.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(StateError, match=r"float32\[3, 3\] on tensors without values.*pass real inputs"):
        stratagem.summary(model, "float32[3,3]")


@pytest.mark.slow
def test_a_summary_changes_nothing() -> None:
    """Parameters, gradients, modes and random states are as before; a model on the meta device needs no memory."""
    network, inputs, _ = cnn()
    network.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    stratagem.summary(network, inputs)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network.training
    assert all(each.grad is None for each in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        large = nn.Linear(10**6, 10**6, bias=False)
    assert stratagem.summary(large, "float32[2,1000000]").forward_flops == 2 * 2 * 10**12


def test_without_inputs_only_parameters_are_listed() -> None:
    """The shapes are unknown then, and deeper modules can be omitted."""
    found = stratagem.summary(SupervisedModel(mlp()[0], nn.MSELoss()), depth=1)
    assert rows(found, "parameters", "flops") == {"": (66, None), "network": (66, None), "loss": (0, None)}
    assert found.forward_flops is None
    with pytest.raises(ConfigValueError, match="depth=-1 must be at least 0"):
        stratagem.summary(mlp()[0], depth=-1)


def config(**changes: Any) -> Config:
    """Return a configuration with a model, data and an optimizer."""
    return Config(
        {
            "model": SupervisedModel(nn.Linear(4, 2), nn.MSELoss()),
            "train_dataloader": {"dataset": [(torch.rand(4), torch.rand(2))] * 6, "batch_size": 3},
            "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}},
            **changes,
        }
    )


@pytest.mark.slow
def test_a_configuration_is_summarized_with_its_first_batch_and_precision() -> None:
    """The batch has three samples; under autocast, the layer returns bfloat16, and its input is saved as a copy."""
    found = summarize_config(config())
    assert (found.batch, found.batch_size) == (("float32[3, 4]", "float32[3, 2]"), 3)
    assert found.training_flops == 2 * 2 * 3 * 8
    amp = {"type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": {"type": "SGD", "lr": 0.1}}
    saved = [rows(summarize_config(config(optim_wrapper=each)), "activation_bytes")["network"] for each in (amp, None)]
    # The copy of the inputs in bfloat16; the inputs themselves are the batch.
    assert saved == [(2 * 12,), (0,)]


class OwnStep(BaseModel):
    """A model that implements its training step, and has no losses in ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(4, 2)

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
        return self.network(inputs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        loss = self(data[0]).mean()
        optim_wrapper.update_params(loss)
        return {"loss": loss.detach()}


@pytest.mark.slow
def test_a_model_with_its_own_training_step_is_summarized_with_it() -> None:
    """The step of a model without ``mode="loss"`` is simulated."""
    found = summarize_config(config(model=OwnStep()))
    assert (found.forward_flops, found.training_flops) == (2 * 3 * 8, 2 * 2 * 3 * 8)
    assert found.notes == ("The numbers are those of OwnStep.train_step, which the model implements.",)


def test_the_table_is_aligned_and_has_the_totals() -> None:
    """Each module is one line, nested modules are indented, and numbers are aligned to the right."""
    lines = str(stratagem.summary(mlp()[0], "float32[4,5]")).splitlines()
    assert lines[0].split() == ["module", "type", "output", "shape", "parameters", "trainable", "FLOPs", "activations"]
    assert lines[3] == "  0         Linear      [4, 7]                42         42    280          0 B"
    assert lines[-2].endswith("1,064, 266 per sample") or "1.06 k, 266 per sample" in lines[-2]


def test_the_example_of_the_documentation_runs() -> None:
    """The Python code of the page prints a table, and its assertions hold."""
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "summary(" in block]
    exec(compile(code, "performance.md", "exec"), {})
