"""``stratagem export`` writes programs of ``torch.export`` that have the outputs of the trained module."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import BaseModel, ModelWithLoss, SupervisedModel
from stratagem.checkpoint import save_checkpoint
from stratagem.checkpoint.convert.program import _difference, export_program
from stratagem.checkpoint.convert.program_inputs import ModuleInputs, captured_inputs
from stratagem.errors import CheckpointError, ConfigValueError, MissingDependencyError


class Tokens(nn.Module):
    """A network with named inputs, whose loss is part of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Any]:
        found = self.table(ids).sum(2)
        logits = found if mask is None else found * mask
        return {"logits": logits} if labels is None else {"logits": logits, "loss": (logits - labels).square().mean()}


class NeedsLabels(Tokens):
    """A network that fails without labels."""

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Any]:
        return super().forward(ids, None, labels)


class Signs(nn.Linear):
    """A layer whose code depends on the values of tensors."""

    def forward(self, inputs: Tensor) -> Tensor:
        found = super().forward(inputs)
        return found if found.sum() > 0 else -found


class Pairs(nn.Linear):
    """A layer that has a fixed number of samples."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).reshape(2, -1)


class Noise(nn.Linear):
    """A layer that is random in evaluation mode."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + torch.rand(1)


def linear(cls: type[nn.Linear] = nn.Linear) -> SupervisedModel:
    return SupervisedModel(nn.Sequential(cls(2, 3), nn.Dropout()), nn.MSELoss())


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves the weights of a model as a checkpoint, with averaged weights of ones if requested."""

    def save(model: nn.Module, *, averaged: bool = False) -> Path:
        state = model.state_dict()
        average = {"averages": {name: torch.ones_like(value) for name, value in state.items()}, "updates": 1}
        save_checkpoint({"state_dict": state, **({"average": average} if averaged else {})}, tmp_path / "checkpoint")
        return tmp_path / "checkpoint"

    return save


@pytest.mark.slow
def test_an_exported_module_has_equal_outputs_for_any_number_of_samples(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    """The file runs without the class of the module, in evaluation mode, with the weights of the checkpoint."""
    trained = linear()
    written = export_program(saved(trained), tmp_path / "m.pt2", linear(), batch=(torch.randn(4, 2), torch.randn(4, 3)))
    assert (written.module, written.type, written.averaged) == ("network", "Sequential", False)
    assert (written.inputs, written.sizes, written.difference) == ("float32[batch, 2]", (1, 5), 0.0)
    program = torch.export.load(tmp_path / "m.pt2").module()
    for size in (1, 2, 11):
        inputs = torch.randn(size, 2)
        assert torch.equal(program(inputs), trained.network.eval()(inputs))


@pytest.mark.slow
@pytest.mark.parametrize("raw", [False, True])
def test_averaged_weights_are_exported_unless_raw_is_set(saved: Callable[..., Path], tmp_path: Path, raw: bool) -> None:
    """With averaged weights of ones, the sum of two inputs of 1 and the bias is 3."""
    trained = linear()
    source = saved(trained, averaged=True)
    written = export_program(source, tmp_path / "m.pt2", linear(), torch.ones(1, 2), raw=raw)
    assert written.averaged != raw
    found = torch.export.load(tmp_path / "m.pt2").module()(torch.ones(1, 2))
    assert torch.equal(found, trained.network.eval()(torch.ones(1, 2)) if raw else torch.full((1, 3), 3.0))


@pytest.mark.slow
@pytest.mark.parametrize(("network", "inputs"), [(Tokens, ["ids", "mask"]), (NeedsLabels, ["ids", "labels"])])
def test_labels_are_not_an_input_unless_the_network_requires_them(
    saved: Callable[..., Path], tmp_path: Path, network: type[nn.Module], inputs: list[str]
) -> None:
    """The inputs of a ModelWithLoss are those of the batch without the labels."""
    model = ModelWithLoss(network())
    batch = {"ids": torch.randint(9, (4, 5)), "mask": torch.ones(4, 5), "labels": torch.ones(4, 5)}
    batch = {name: value for name, value in batch.items() if name in (*inputs, "labels")}
    export_program(saved(model), tmp_path / "m.pt2", model, batch=batch)
    program = torch.export.load(tmp_path / "m.pt2")
    assert list(program.call_spec.in_spec.unflatten(program.graph_signature.user_inputs)[1]) == inputs
    arguments = {name: value[:3] for name, value in batch.items() if name in inputs}
    assert torch.equal(program.module()(**arguments)["logits"], model.network(**arguments)["logits"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Signs, r"cannot export Sequential \(network\) at .*test_export_program\.py:\d+ in forward.*torch\.where"),
        (Pairs, r"specialized it to be a constant \(2\).*use x\.shape\[0\]"),
        (Noise, r"Output 0 .* differs from that of Sequential by .*random in evaluation mode"),
    ],
)
def test_a_module_that_cannot_be_exported_is_refused_with_the_reason(
    saved: Callable[..., Path], tmp_path: Path, cls: type[nn.Linear], message: str
) -> None:
    """The error names the line and what to change, and no file is left."""
    model = linear(cls)
    source = saved(model)
    with pytest.raises(CheckpointError, match=rf"(?s){message}"):
        export_program(source, tmp_path / "m.pt2", model, torch.randn(2, 2))
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(to="tensorflow"), "no export format 'tensorflow'"),
        (dict(to="onnx"), r"An export to onnx is a file \.onnx"),
        (dict(inputs=None), "Pass either inputs"),
        (dict(module="networc"), r"no module 'networc'. Did you mean 'network'"),
        (dict(inputs=torch.ones(())), "not a batch: expected a tensor whose first dimension counts the samples"),
        (dict(inputs=None, batch={"points": torch.ones(2, 2)}), "could not predict a batch of the data"),
        (dict(module="loss", inputs=None, batch=(torch.ones(2, 2), None)), "predicts without calling MSELoss"),
        (dict(inputs=torch.ones(2, 5)), r"forward pass of Sequential \(network\) failed with float32\[batch, 5\]"),
    ],
)
def test_wrong_arguments_are_refused(
    saved: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """The error names the argument, and no file is written."""
    model = linear()
    source = saved(model)
    with pytest.raises((ConfigValueError, CheckpointError), match=message):
        export_program(source, tmp_path / "m.pt2", model, **{"inputs": torch.ones(2, 2), **changes})
    assert not (tmp_path / "m.pt2").exists()


def test_an_existing_file_is_not_replaced(saved: Callable[..., Path], tmp_path: Path) -> None:
    """The error names the file."""
    (tmp_path / "m.pt2").write_text("mine")
    model = linear()
    source = saved(model)
    with pytest.raises(CheckpointError, match=r"m\.pt2 already exists"):
        export_program(source, tmp_path / "m.pt2", model, torch.ones(2, 2))
    assert (tmp_path / "m.pt2").read_text() == "mine"


@pytest.mark.slow
def test_a_missing_package_for_onnx_is_named(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without onnx, the error states how to install it."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    model = linear()
    source = saved(model)
    with pytest.raises(MissingDependencyError, match=r"pip install stratagem\[onnx\]"):
        export_program(source, tmp_path / "m.onnx", model, torch.ones(2, 2), to="onnx")


def test_the_inputs_of_an_inner_module_are_those_of_its_first_call() -> None:
    """The preprocessing of the model and the modules before it are applied."""

    class Doubling(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Identity(), nn.Linear(2, 2))

        def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
            return self.layers(2 * inputs)

    model = Doubling().eval()
    found = captured_inputs(model, model.layers[1], [torch.ones(3, 2)])
    assert torch.equal(found.args[0], torch.full((3, 2), 2.0))
    assert captured_inputs(model, model, [torch.ones(3, 2)]).kwargs == {}


def test_inputs_are_resized_by_repeating_samples() -> None:
    """Tensors with one row for each sample have the new number of rows, and other inputs are unchanged."""
    inputs = ModuleInputs.given({"rows": torch.arange(3), "table": torch.ones(2, 2), "factor": 2})
    found = inputs.resized(5)
    assert found.kwargs["rows"].tolist() == [0, 1, 2, 0, 1]
    assert found.kwargs["table"].shape == (2, 2)
    assert found.kwargs["factor"] == 2
    assert inputs.dynamic_shapes("any")[1] == {"rows": {0: "any"}, "table": None, "factor": None}
    assert inputs.describe() == "int64[batch], float32[2, 2]"


@pytest.mark.parametrize(
    ("own", "other", "difference"),
    [
        ([2.0, -8.0], [2.0, -8.0], 0.0),
        ([2.0, -8.0], [3.0, -8.0], 1 / 8),
        ([float("nan"), 4.0], [float("nan"), 5.0], 1 / 4),
        ([1.0, 4.0], [float("nan"), 4.0], float("inf")),
        ([0.0, 0.0], [0.5, 0.0], 0.5),
        ([float("inf"), 4.0], [float("inf"), 4.0], 0.0),
        ([1.0, 2.0], [1.0], float("inf")),
    ],
)
def test_differences_are_relative_to_the_largest_value(own: list[float], other: list[float], difference: float) -> None:
    """The expected values are computed by hand; NaN equals NaN, and a different shape is infinitely different."""
    assert _difference(torch.tensor(own), torch.tensor(other)) == difference
