"""A small Llama of transformers under any strategy, and the exports of its checkpoint for ``from_pretrained``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tests.foreign.torchvision_ops  # noqa: F401 -- before transformers, which imports torchvision if it is installed
from stratagem import ModelWithLoss, Runner
from stratagem.checkpoint import CheckpointLoader
from stratagem.cli.main import main
from stratagem.utils.imports import import_module

__all__ = ["TENSOR_PLAN", "require_equal_logits", "trained"]

TENSOR_PLAN = {
    f"network.model.layers.*.{name}": style
    for name, style in {
        "self_attn.q_proj": "colwise",
        "self_attn.k_proj": "colwise",
        "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise",
        "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise",
    }.items()
}
CONFIG = """
from tests.support.exported_llama import network

model = dict(type="ModelWithLoss", network=dict(type=network))
"""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 200,
    "use_cache": False,
}


def network() -> nn.Module:
    """Return the untrained network, with the same weights each time."""
    library = import_module("transformers")
    torch.manual_seed(0)
    model: nn.Module = library.LlamaForCausalLM(library.LlamaConfig(**SIZES))
    return model


def tokens(seed: int, count: int) -> Tensor:
    """Return ``count`` sequences of 12 random tokens."""
    return torch.randint(1, 200, (count, 12), generator=torch.Generator().manual_seed(seed))


def trained(strategy: Mapping[str, Any], folder: str, *, parts: int) -> None:
    """Train for two iterations on each of ``parts`` data-parallel ranks, and save the checkpoint ``epoch_1`` in ``folder``."""
    samples = [{"input_ids": each, "labels": each} for each in tokens(0, 4 * parts)]
    with warnings.catch_warnings():
        # The engines and transformers emit warnings.
        warnings.simplefilter("ignore")
        runner = Runner(
            model=ModelWithLoss(network()),
            work_dir=folder,
            train_dataloader=DataLoader(samples, 2),
            train_cfg=dict(max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2)),
            randomness=dict(seed=0),
            strategy=dict(strategy),
            log_level="ERROR",
            report=False,
        )
        try:
            runner.train()
        finally:
            runner.close()


def require_equal_logits(folder: Path) -> None:
    """Export ``epoch_1`` by the command, and require the logits of the saved weights to the bit after ``from_pretrained``."""
    weights = CheckpointLoader.load_checkpoint(folder / "epoch_1")["state_dict"]
    expected, untrained = network().eval(), network().state_dict()
    expected.load_state_dict({name.removeprefix("network."): value for name, value in weights.items()}, strict=True)
    assert not any(torch.equal(value, untrained[name]) for name, value in expected.named_parameters())
    config, out = folder / "exported_llama.py", folder / "exported"
    config.write_text(CONFIG, encoding="utf-8")
    words = ["ckpt", "convert", folder / "epoch_1", out, "--to", "huggingface", "--config", config]
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert not end.value.code
    with torch.no_grad():
        found = type(expected).from_pretrained(out).eval()(input_ids=tokens(1, 3)).logits
        assert torch.equal(found, expected(input_ids=tokens(1, 3)).logits)
