"""Plans of models of transformers and timm equal real runs; ``make proof-plan`` compares more strategies and numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stratagem
from stratagem import ModelWithLoss, SupervisedModel
from tests.support.plan_proof.jobs import CASES, llama, vit
from tests.support.plan_proof.trial import compare, measured
from tests.support.ranks import Ranks

# A slow machine may need minutes for the first job, which starts the ranks and imports the packages.
pytestmark = [pytest.mark.foreign, pytest.mark.timeout(900)]

ADAMW = {"optimizer": {"type": "AdamW", "lr": 1e-3}}


@pytest.mark.parametrize("model", ["transformers Llama", "timm ViT"])
@pytest.mark.parametrize("name", ["DDP", "FSDP", "TP x2"])
def test_a_plan_equals_a_run_of_two_ranks(ranks: Ranks, tmp_path: Path, model: str, name: str) -> None:
    """Static sizes, collectives and operations are equal, and activations and the peak are within 5 %."""
    case = next(each for each in CASES if each.name == name)
    real = ranks.run_within(300, measured, model, name, str(tmp_path))
    assert compare(model, case, 2, real).different == []


def plan_of(model: nn.Module, batch: Any, strategy: Any) -> Any:
    """Return the plan of a module on four ranks, which needs no configuration."""
    [step] = stratagem.plan(model, optim_wrapper=ADAMW, batch=batch, strategies=[strategy], worlds=[4]).steps
    assert step.refusal is None
    assert step.failure is None
    return step


def test_a_llama_is_planned_without_a_configuration() -> None:
    """A description of the batch is enough, and each of four ranks has a quarter of AdamW's two moments."""
    model = llama()
    assert isinstance(model, ModelWithLoss)
    strategy = {"type": "fsdp", "wrap_policy": "LlamaDecoderLayer"}
    step = plan_of(model, "input_ids=int64[2,32],labels=int64[2,32]", strategy)
    numel = sum(each.numel() for each in model.parameters())
    assert numel <= step.memory.parameters <= 1.01 * numel
    assert step.memory.optimizer_state == 2 * step.memory.parameters + 4 * len(list(model.parameters()))
    assert step.memory.peak > step.memory.static


def test_a_vit_is_planned_with_a_sample_batch() -> None:
    """The batch may be tensors, and the gradients of DDP are as large as the parameters."""
    model = vit()
    assert isinstance(model, SupervisedModel)
    step = plan_of(model, (torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)), "ddp")
    assert step.memory.parameters == sum(each.nbytes for each in model.parameters())
    assert step.memory.activations > 0
