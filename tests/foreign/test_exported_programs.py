"""Transformers models, a network of timm and recurrent layers as programs of ``torch.export`` and as ONNX files."""

from __future__ import annotations

import tests.foreign.torchvision_ops  # noqa: F401 -- before timm and transformers, which import torchvision

# isort: split

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from stratagem import ModelWithLoss, SupervisedModel
from stratagem.checkpoint import save_checkpoint
from stratagem.checkpoint.convert.program import PROGRAM_FORMATS, export_program
from stratagem.errors import CheckpointError
from tests.foreign.jobs import transformers_bert, transformers_gpt2

pytestmark = [pytest.mark.foreign, pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore::FutureWarning")]


class Recurrent(nn.Module):
    """A recurrent network that returns the logits of the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.GRU(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layers(inputs)[0][:, -1])


def image_network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=4)


def tokens(count: int) -> Tensor:
    return torch.randint(1, 200, (count, 12), generator=torch.Generator().manual_seed(0))


def text_batch(count: int) -> dict[str, Tensor]:
    """Return tokens, a mask of different lengths, and labels."""
    mask = (torch.arange(12) < torch.arange(5, 5 + count)[:, None]).long()
    return {"input_ids": tokens(count), "attention_mask": mask, "labels": torch.arange(count) % 3}


JOBS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "BERT": (lambda: ModelWithLoss(transformers_bert.network()), text_batch),
    "GPT-2": (
        lambda: ModelWithLoss(transformers_gpt2.network()),
        lambda count: {"input_ids": tokens(count), "labels": tokens(count)},
    ),
    "timm": (
        lambda: SupervisedModel(image_network(), nn.CrossEntropyLoss()),
        lambda count: (torch.rand(count, 3, 32, 32), torch.arange(count) % 4),
    ),
    "GRU": (
        lambda: SupervisedModel(Recurrent(), nn.CrossEntropyLoss()),
        lambda count: (torch.rand(count, 6, 3), torch.arange(count) % 2),
    ),
}


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits"]


@pytest.mark.parametrize("form", PROGRAM_FORMATS)
@pytest.mark.parametrize("job", JOBS)
def test_an_exported_model_has_the_logits_of_the_trained_one(job: str, form: str, tmp_path: Path) -> None:
    """The file is opened by torch or ONNX Runtime alone, with other numbers of samples than the exported batch."""
    make, batch = JOBS[job]
    model = make()
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "checkpoint")
    target = tmp_path / f"model{PROGRAM_FORMATS[form]}"
    written = export_program(tmp_path / "checkpoint", target, model, batch=batch(4), to=form)
    assert written.difference <= (0 if form == "torch-export" else 1e-5)
    for count in (1, 3, 7):
        inputs = batch(count)
        arguments = {key: value for key, value in inputs.items() if key != "labels"} if isinstance(inputs, dict) else {}
        positional = () if arguments else inputs[:1]
        with torch.no_grad():
            expected = logits(model.network(*positional, **arguments))
            if form == "torch-export":
                assert torch.equal(logits(torch.export.load(target).module()(*positional, **arguments)), expected)
                continue
        session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        assert names == list(arguments) if arguments else len(names) == 1
        values = arguments.values() if arguments else positional
        outputs = session.run(None, dict(zip(names, (each.numpy() for each in values), strict=True)))
        found = next(torch.from_numpy(each) for each in outputs if each.shape == tuple(expected.shape))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_onnx_file_with_other_weights_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the exporter changes a weight by 1 %, the comparison finds it."""
    model = SupervisedModel(nn.Linear(2, 3), nn.MSELoss())
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "checkpoint")
    original = torch.onnx.export

    def altered(program: torch.export.ExportedProgram, **options: Any) -> Any:
        weight = program.state_dict["weight"]
        program.state_dict["weight"] = nn.Parameter(weight * 1.01)
        return original(program, **options)

    monkeypatch.setattr(torch.onnx, "export", altered)
    with pytest.raises(CheckpointError, match=r"Output 0 of the exported file \(onnx\) differs from that of Linear by"):
        export_program(tmp_path / "checkpoint", tmp_path / "m.onnx", model, torch.ones(2, 2), to="onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint"]


def test_large_weights_of_onnx_are_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of a protocol buffer, here reduced to 8 bytes, the weights are written to FILE.data."""
    monkeypatch.setattr("stratagem.checkpoint.convert.program._MAX_ONNX_BYTES", 8)
    model = SupervisedModel(nn.Linear(200, 30), nn.MSELoss())
    save_checkpoint({"state_dict": model.state_dict()}, tmp_path / "checkpoint")
    written = export_program(tmp_path / "checkpoint", tmp_path / "m.onnx", model, torch.ones(2, 200), to="onnx")
    assert written.files == ["m.onnx", "m.onnx.data"]
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"input": torch.ones(1, 200).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.network(torch.ones(1, 200)).detach())
