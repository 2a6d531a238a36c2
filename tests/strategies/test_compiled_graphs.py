"""torch.compile traces models without graph breaks in this package's wrappers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from stratagem.model import BaseModel, ModelWithLoss, SupervisedModel
from stratagem.strategies import BaseStrategy, FSDPStrategy
from tests.support.ranks import Ranks
from tests.support.small_runs import Lines, Mlp, make

pytestmark = pytest.mark.slow

LOGS = {"log_level": "ERROR"}
SGD = {"optimizer": {"type": "SGD", "lr": 0.1}}


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.layer(inputs).tanh()


class Blocks(BaseModel):
    """Three blocks between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.last = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Any:
        outputs = self.first(inputs)
        for block in self.blocks:
            outputs = block(outputs)
        outputs = self.last(outputs)
        return {"loss": nn.functional.cross_entropy(outputs, targets)} if mode == "loss" else outputs


class WithLoss(nn.Module):
    """A network that returns its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layer(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def built(kind: str) -> nn.Module:
    """Return a model."""
    if kind == "supervised":
        return SupervisedModel(nn.Linear(4, 3), nn.CrossEntropyLoss())
    if kind == "with loss":
        return ModelWithLoss(WithLoss())
    return Blocks() if kind == "blocks" else Mlp()


def count(strategy: BaseStrategy, kind: str, compiling: Mapping[str, Any], **optim: Any) -> dict[str, Any]:
    """Train four iterations and predict once; return the losses, the traced frames, and the reasons for graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    # The compiler of torch warns about other parts of torch.
    ignored = warnings.catch_warnings()
    ignored.__enter__()
    warnings.simplefilter("ignore")
    try:
        strategy.prepare(
            built(kind), optim_wrapper={**SGD, **optim}, compile=compiling, dispatch_kwargs={"max_iters": 4}
        )
        inputs, targets = torch.ones(2, 4), torch.tensor([0, 2])
        batch: Any = {"inputs": inputs, "labels": targets} if kind == "with loss" else (inputs, targets)
        losses = [strategy.model.train_step(batch, strategy.optim_wrapper)["loss"].item() for _ in range(4)]
        strategy.model.val_step(batch)
        return {
            "losses": losses,
            "frames": counters["frames"]["ok"],
            "skipped": counters["frames"]["total"] - counters["frames"]["ok"],
            "breaks": dict(counters["graph_break"]),
        }
    finally:
        strategy.close()
        torch._dynamo.reset()
        ignored.__exit__(None, None, None)


def count_on_a_rank(folder: str, placement: str, kind: str, compiling: Any, options: Any, optim: Any) -> dict[str, Any]:
    """Count on ranks; each has the same samples."""
    if placement == "ddp":
        strategy = make("ddp", folder, log_kwargs=LOGS)
    else:
        strategy = FSDPStrategy(work_dir=folder, log_kwargs=LOGS, env_kwargs={"randomness": {"seed": 0}}, **options)
    return count(strategy, kind, compiling, **optim)


EAGER = {"backend": "eager"}
PLAIN = {"disable": True}
OPTIMS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "bfloat16": {"type": "AmpOptimWrapper", "dtype": "bfloat16", "accumulative_counts": 2},
}


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("kind", ["mlp", "supervised", "with loss", "blocks"])
def test_a_model_on_one_device_is_one_graph(tmp_path: Path, kind: str, optim: str) -> None:
    """Training compiles the whole forward pass once and predicting once more, without graph breaks or skipped frames."""
    compiled = count(make("single", tmp_path, log_kwargs=LOGS), kind, EAGER, **OPTIMS[optim])
    plain = count(make("single", tmp_path, log_kwargs=LOGS), kind, PLAIN, **OPTIMS[optim])
    assert compiled == {"losses": plain["losses"], "frames": 2, "skipped": 0, "breaks": {}}


def count_all(folder: str) -> dict[str, Any]:
    """Count every combination on ranks."""
    cases: dict[str, tuple[str, str, Any, Any]] = {
        "ddp mlp": ("ddp", "mlp", EAGER, {}),
        "ddp supervised": ("ddp", "supervised", EAGER, {}),
        "ddp with loss": ("ddp", "with loss", EAGER, {}),
        "ddp blocks": ("ddp", "blocks", EAGER, {}),
        "fsdp mlp": ("fsdp", "mlp", EAGER, {}),
        "fsdp blocks": ("fsdp", "blocks", EAGER, {}),
        "fsdp compile_blocks": ("fsdp", "blocks", PLAIN, {"compile_blocks": EAGER}),
    }
    results: dict[str, Any] = {}
    for name, (placement, kind, compiling, options) in cases.items():
        results[name] = (
            count_on_a_rank(folder, placement, kind, compiling, options, OPTIMS["bfloat16"]),
            count_on_a_rank(folder, placement, kind, PLAIN, {}, OPTIMS["bfloat16"])["losses"],
        )
    return results


def test_models_on_ranks_are_compiled_without_graph_breaks(ranks: Ranks, tmp_path: Path) -> None:
    """Under DDP, the model is one graph; under FSDP, each wrapped module is one; losses equal those without a compiler."""
    for case, (compiled, losses) in ranks.run(count_all, str(tmp_path))[0].items():
        frames = compiled.pop("frames")
        # The model is compiled for training and for predicting, and under FSDP each of the three blocks.
        assert frames == 2 if "blocks" not in case or case.startswith("ddp") else frames >= 3, case
        assert compiled == {"losses": losses, "skipped": 0, "breaks": {}}, case


def lines_of_fsdp(folder: str) -> list[list[str]]:
    """Return the log lines about the compiler with ``compile``, and with ``compile`` and ``compile_blocks``."""
    seen = []
    for options in ({}, {"compile_blocks": {"backend": "eager"}}):
        strategy = FSDPStrategy(work_dir=folder, env_kwargs={"randomness": {"seed": 0}}, **options)
        lines = Lines(strategy)
        strategy.prepare(Blocks(), compile={"backend": "eager"})
        seen.append([line for line in lines.lines if "ompil" in line])
        strategy.close()
    return seen


def test_fsdp_logs_what_is_compiled(ranks: Ranks, tmp_path: Path) -> None:
    """``compile`` compiles the wrapped modules; together with ``compile_blocks``, a warning names that option."""
    (blocks,), (both, *_) = ranks.run(lines_of_fsdp, str(tmp_path))[0]
    assert "Compiling each of the 3 modules" in blocks
    assert "set compile_blocks={'backend': 'eager'} in the strategy, and omit compile." in both
