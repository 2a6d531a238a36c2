"""``stratagem export`` takes the model and the inputs from a configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Config
from stratagem.checkpoint import save_checkpoint
from stratagem.strategies.setup.building import build_model


@pytest.fixture
def checkpoint(config: str, tmp_path: Path) -> Path:
    """A checkpoint of the model of the small run."""
    save_checkpoint({"state_dict": build_model(Config.fromfile(config)["model"]).state_dict()}, tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.slow
def test_a_model_is_exported_with_the_inputs_of_its_data(
    stratagem: Callable[..., Any], config: str, checkpoint: Path
) -> None:
    """The command prints the inputs and the difference, and the file runs with torch alone."""
    done = stratagem("export", config, checkpoint, "-o", "m.pt2")
    assert done.status == 0
    assert "Wrote the module 'network' (Sequential) to m.pt2" in done.out
    assert "Inputs: float32[batch, 2]." in done.out
    assert "With 1 and 5 samples, the outputs differ from those of the model by at most 0 of" in done.out
    assert torch.export.load("m.pt2").module()(torch.ones(7, 2)).shape == (7, 4)


@pytest.mark.slow
def test_inputs_can_be_described(stratagem: Callable[..., Any], config: str, checkpoint: Path) -> None:
    """With --input, the data are not read, and --json prints what was written."""
    no_data = [
        f"{name}_dataloader={{'dataset': {{'type': 'CornerSamples', 'length': -1}}}}" for name in ("test", "val")
    ]
    words = [word for each in no_data for word in ("--set", each)]
    done = stratagem(
        "export",
        config,
        checkpoint,
        "-o",
        "m.pt2",
        "--module",
        "network.0",
        "--input",
        "float32[3,2]",
        "--json",
        *words,
    )
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert (found["module"], found["type"], found["inputs"]) == ("network.0", "Linear", "float32[batch, 2]")
    assert found["files"] == ["m.pt2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "m.onnx"), "An export to torch-export is a file .pt2"),
        (("-o", "m.pt2", "--to", "tflite"), "There is no export format 'tflite'"),
        (("-o", "no/m.pt2"), "is not a directory. Create it"),
        (("-o", "m.pt2", "--input", "float32"), "is not a list of tensors such as"),
    ],
)
def test_wrong_options_are_refused(
    stratagem: Callable[..., Any], config: str, checkpoint: Path, words: tuple[str, ...], message: str
) -> None:
    """The error names the option and an alternative."""
    done = stratagem("export", config, checkpoint, *words)
    assert done.status != 0
    assert message in done.err


def test_a_configuration_without_data_requires_a_description(
    stratagem: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    """The error shows how to describe the inputs."""
    (tmp_path / "model.py").write_text("model = dict(type='Linear', in_features=2, out_features=4)")
    done = stratagem("export", "model.py", checkpoint, "-o", "m.pt2")
    assert done.status != 0
    assert "no data from which the inputs of the model are taken" in done.err
    assert "--input 'float32[8,3,32,32]'" in done.err
