"""The default rule for the weight matrices of hidden layers, checked against lists written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stratagem.optim.groups.hidden_matrices import find_hidden_matrices


def found(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Return the names of the hidden matrices, and the reasons for the others."""
    ids, reasons = find_hidden_matrices(model)
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if id(parameter) in ids], reasons


class Block(nn.Module):
    """A transformer block, whose attention has names such as ``heads``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, 4) for _ in range(2))
        self.fc = nn.Linear(width, width)


class LanguageModel(nn.Module):
    """Embeddings, blocks, and an output layer that may share the weight of the embedding."""

    def __init__(self, *, tied: bool, blocks: int = 2) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.h = nn.ModuleList(Block() for _ in range(blocks))
        self.lm_head = nn.Linear(8, 11, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


IN_BLOCKS = [f"h.{block}.{name}.weight" for block in (0, 1) for name in ("heads.0", "heads.1", "fc")]


def test_the_output_layer_that_shares_the_weight_of_an_embedding_is_not_hidden() -> None:
    """The tied weight is excluded under both names; the layers of the blocks are hidden although they have names of heads."""
    assert found(LanguageModel(tied=True)) == (
        IN_BLOCKS,
        {"wte.weight": "embedding", "wpe.weight": "embedding", "lm_head.weight": "tied to an embedding"},
    )


def test_an_output_layer_with_its_own_weight_is_not_hidden() -> None:
    """``lm_head`` is excluded as the output layer."""
    hidden, reasons = found(LanguageModel(tied=False))
    assert hidden == IN_BLOCKS
    assert reasons["lm_head.weight"] == "output layer"


def test_an_output_layer_that_is_registered_first_is_recognized_by_its_name() -> None:
    """``classifier`` is the output layer although other linear layers follow it."""
    model = nn.ModuleDict({"classifier": nn.Linear(8, 3), "body": nn.ModuleList(Block() for _ in range(2))})
    hidden, reasons = found(model)
    assert "classifier.weight" not in hidden
    assert len(hidden) == 6
    assert reasons == {"classifier.weight": "output layer"}


def test_the_last_layer_of_an_mlp_is_its_output_layer() -> None:
    """Of three linear layers, the last one is excluded without a name."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    assert found(model) == (["0.weight", "2.weight"], {"4.weight": "output layer"})


def test_blocks_without_an_output_layer_are_entirely_hidden() -> None:
    """All projections of ``nn.Transformer`` are hidden, including the last linear layer, which is repeated."""
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    hidden, reasons = found(model)
    per_encoder = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    per_decoder = (
        *per_encoder[:2],
        "multihead_attn.in_proj_weight",
        "multihead_attn.out_proj.weight",
        *per_encoder[2:],
    )
    assert hidden == [
        *(f"encoder.layers.{layer}.{name}" for layer in (0, 1) for name in per_encoder),
        *(f"decoder.layers.{layer}.{name}" for layer in (0, 1) for name in per_decoder),
    ]
    assert reasons == {}


class Vit(nn.Module):
    """A vision transformer: the patch embedding is a convolution, and tokens and positions are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(5, 8))
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.embed_proj = nn.Linear(8, 8)
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)))
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def test_embeddings_and_the_last_layer_of_the_head_of_a_vit_are_not_hidden() -> None:
    """Positions are not the weight of a layer, ``embed_proj`` is an embedding, and only the last layer of the head is output."""
    hidden, reasons = found(Vit())
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert hidden == [*(f"blocks.{block}.{name}" for block in (0, 1) for name in names), "head.0.weight"]
    assert reasons == {
        "pos_embed": "not the weight of a linear layer",
        "embed_proj.weight": "embedding by name",
        "head.2.weight": "output layer",
    }


def test_convolutions_are_not_hidden_matrices() -> None:
    """A convolutional network has one hidden matrix, between its convolutions and its output layer."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 8), nn.Linear(8, 3))
    assert found(model) == (["3.weight"], {"4.weight": "output layer"})


def test_several_heads_are_recognized() -> None:
    """Each head of a dict of heads is an output layer; the hidden layers of a head are hidden."""

    def head(classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))

    model = nn.ModuleDict({"heads": nn.ModuleDict({"a": head(3), "b": head(3)}), "body": nn.Linear(8, 8)})
    hidden, reasons = found(model)
    assert hidden == ["heads.a.0.weight", "heads.b.0.weight"]
    assert reasons == dict.fromkeys(["heads.a.2.weight", "heads.b.2.weight", "body.weight"], "output layer")


def test_a_single_row_or_column_is_not_a_hidden_matrix() -> None:
    """A linear layer with a single input has nothing to orthogonalize."""
    model = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert found(model)[1] == {"0.weight": "a single row or column", "2.weight": "output layer"}


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in transformers, with a transposed weight."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))


def test_linear_layers_of_other_classes_are_recognized_by_the_names_of_the_classes() -> None:
    """``Conv1D`` of transformers is a linear layer, and other modules with a matrix are not."""
    model = nn.ModuleDict(
        {
            "c_fc": Conv1D(16, 8),
            "gates": nn.LSTM(8, 8),
            "bilinear": nn.Bilinear(2, 2, 2),
            "out": nn.Linear(8, 2),
        }
    )
    hidden, reasons = found(model)
    assert hidden == ["c_fc.weight"]
    assert reasons == {
        "gates.weight_ih_l0": "not the weight of a linear layer",
        "gates.weight_hh_l0": "not the weight of a linear layer",
        "out.weight": "output layer",
    }


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda module: torch.compile(module, backend="eager"), lambda module: module])
def test_compiled_submodules_do_not_change_the_rule(wrap: Any) -> None:
    """A compiled block is compared with the other blocks under the name without the wrapper."""
    model = LanguageModel(tied=True)
    model.h[0] = wrap(model.h[0])
    hidden, _ = found(model)
    assert [name.replace("_orig_mod.", "") for name in hidden] == IN_BLOCKS
