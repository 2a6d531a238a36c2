"""``stratagem ckpt convert --to state_dict`` and the options for a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem import SupervisedModel
from stratagem.checkpoint import save_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The checkpoint of a SupervisedModel."""
    save_checkpoint({"state_dict": SupervisedModel(nn.Linear(1, 1), nn.MSELoss()).state_dict()}, tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.slow
def test_a_state_dict_names_the_module_that_it_contains(stratagem: Callable[..., Any], checkpoint: Path) -> None:
    """The command prints the module, and the user's own module loads the file."""
    done = stratagem("ckpt", "convert", checkpoint, "own.pth", "--to", "state_dict")
    assert done.status == 0
    assert "Wrote 2 weights of the module 'network' to own.pth" in done.out
    nn.Linear(1, 1).load_state_dict(torch.load("own.pth", weights_only=True), strict=True)


@pytest.mark.slow
def test_a_folder_without_a_configuration_names_what_is_missing(
    stratagem: Callable[..., Any], checkpoint: Path
) -> None:
    """Without --config, the folder has only weights, and the command prints how to complete it."""
    done = stratagem("ckpt", "convert", checkpoint, "folder", "--to", "huggingface")
    assert "no config.json, which from_pretrained requires. Add --config CONFIG" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokenizer", "x"), "--tokenizer: only --to huggingface with --config CONFIG"),
        (("--to", "huggingface", "--merge-adapters"), "--merge-adapters: only --to huggingface with --config CONFIG"),
        (("--to", "pth", "--module", "network"), "--module network: only --to state_dict"),
    ],
)
def test_options_that_have_no_effect_are_rejected(
    stratagem: Callable[..., Any], checkpoint: Path, words: tuple[str, ...], message: str
) -> None:
    """Options of a complete folder require --to huggingface and --config."""
    done = stratagem("ckpt", "convert", checkpoint, "out.pth", *words)
    assert done.status != 0
    assert message in done.err


@pytest.mark.slow
def test_a_model_without_transformers_is_refused(stratagem: Callable[..., Any], checkpoint: Path, config: str) -> None:
    """The error names the model and suggests other formats."""
    done = stratagem("ckpt", "convert", checkpoint, "folder", "--to", "huggingface", "--config", config)
    assert done.status != 0
    assert "contains no model of transformers or PEFT" in done.err
