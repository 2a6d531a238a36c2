"""The default rule for hidden matrices on models of transformers and timm, checked against the names of their layers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import tests.foreign.torchvision_ops  # noqa: F401 -- transformers and timm import torchvision
from stratagem.optim.groups.hidden_matrices import find_hidden_matrices

pytestmark = pytest.mark.foreign


def hidden(model: nn.Module) -> set[str]:
    """Return the names of the hidden matrices."""
    ids, _ = find_hidden_matrices(model)
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in ids}


def matching(model: nn.Module, pattern: str) -> set[str]:
    """Return the names of the parameters that match a pattern entirely."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if re.fullmatch(pattern, name)}


SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(("kind", "head"), [("LMHeadModel", "lm_head"), ("ForSequenceClassification", "score")])
def test_gpt2(kind: str, head: str) -> None:
    """The four ``Conv1D`` of each block are hidden; the output layer, tied or not, is not."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"GPT2{kind}")(transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2))
    assert matching(model, rf"{head}\.weight")
    layers = r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)"
    expected = matching(model, rf"transformer\.h\.\d\.{layers}\.weight")
    assert len(expected) == 8
    assert hidden(model) == expected


@pytest.mark.parametrize(
    ("kind", "others"),
    [("ForMaskedLM", r"cls\.predictions\.transform\.dense"), ("ForSequenceClassification", r"bert\.pooler\.dense")],
)
def test_bert(kind: str, others: str) -> None:
    """The linear layers of the encoder and the one before the output layer are hidden."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**SMALL))
    layers = r"(attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|output\.dense)"
    expected = matching(model, rf"(bert\.encoder\.layer\.\d\.{layers}|{others})\.weight")
    assert len(expected) == 13
    assert hidden(model) == expected


def test_vit_and_resnet() -> None:
    """The linear layers of the blocks of a vision transformer are hidden; a residual network has no hidden matrix."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        vit, resnet = timm.create_model("vit_tiny_patch16_224"), timm.create_model("resnet18")
    expected = matching(vit, r"blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.weight")
    assert len(expected) == 48
    assert hidden(vit) == expected
    assert hidden(resnet) == set()
