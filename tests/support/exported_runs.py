"""A small run under any strategy: its predictions, its measurements, and what the exports of its checkpoint contain."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stratagem import Runner, SupervisedModel
from stratagem.checkpoint import CheckpointLoader
from stratagem.checkpoint.convert.plain import export_state_dict
from stratagem.checkpoint.convert.program import export_program
from stratagem.train import Hook
from stratagem.train.hooks.flops import FlopsHook
from stratagem.train.hooks.profiler import ProfilerHook

__all__ = ["FLOPS", "TENSOR_PLAN", "network", "require_exports", "require_measurements", "trained"]

# Of one iteration with eight samples on each rank: the layers 4 -> 16 -> 3 have 64 and 48 weights. The forward pass and the
# gradients of the weights use all of them, and the gradient of the inputs of the second layer those of this layer.
FLOPS = 2 * 8 * (2 * (64 + 48) + 48)
TENSOR_PLAN = {"network.0": "colwise", "network.2": "rowwise"}


def network() -> nn.Module:
    """Return the untrained network, with the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def points() -> Tensor:
    """Return the inputs that are predicted."""
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


class CountedFlops(Hook):
    """Keeps the operations of an iteration that FlopsHook counted on this rank."""

    counted: float = 0.0

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        (work,) = run.flops_meter._works.values()
        self.counted = work.model


def trained(
    strategy: Mapping[str, Any] | str, folder: str, *, measured: bool = False, parts: int = 2
) -> dict[str, Any]:
    """Train for one epoch of eight iterations on each of ``parts`` data-parallel ranks; return predictions and measurements."""
    inputs = points()
    targets = (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long()
    repeated = TensorDataset(inputs.repeat(parts, 1), targets.repeat(parts))
    profiler, counted = ProfilerHook(start=1, warmup=1, active=3), CountedFlops()
    with warnings.catch_warnings():
        # The engines and torch's profiler emit warnings.
        warnings.simplefilter("ignore")
        runner = Runner(
            model=SupervisedModel(network(), nn.CrossEntropyLoss()),
            work_dir=folder,
            train_dataloader=DataLoader(repeated, 8),
            train_cfg=dict(max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.02)),
            custom_hooks=[FlopsHook(), counted, profiler] if measured else [],
            default_hooks=dict(logger=dict(interval=2)),
            randomness=dict(seed=0),
            strategy=strategy,
            log_level="ERROR",
            report=False,
        )
        try:
            runner.train()
            predicted = runner.predict(DataLoader(TensorDataset(inputs, targets), 8))
            log_dir = runner.strategy.log_dir
        finally:
            runner.close()
    found: dict[str, Any] = {"log_dir": log_dir, "flops": counted.counted}
    if predicted is not None:
        found["predictions"] = torch.stack([each["preds"] for each in predicted])
    if measured:
        found["profile"] = None if profiler.profile is None else profiler.profile.as_dict()
    return found


def require_measurements(seen: list[dict[str, Any]]) -> None:
    """Require the operations of all ranks, a profile of each with all parts of an iteration, and the goodput."""
    assert [each["flops"] for each in seen] == [FLOPS] * len(seen)
    for each in seen:
        profile = each["profile"]
        assert profile["iterations"] == 3
        assert {"data", "forward", "backward", "optimizer", "hooks"} <= profile["parts"].keys()
        assert min(profile["parts"][name] for name in ("forward", "backward", "optimizer")) > 0
        assert json.loads(Path(profile["trace"]).read_text(encoding="utf-8"))["traceEvents"]
    lines = (Path(seen[0]["log_dir"]) / "vis_data" / "scalars.json").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert all("tflops_per_second" in each for each in records if each["mode"] == "train")
    (goodput,) = (each for each in records if each["mode"] == "goodput")
    assert 0 < goodput["goodput"] < 1
    parts = sum(value for name, value in goodput.items() if name.endswith("_s") and name != "wall_s")
    assert abs(parts - goodput["wall_s"]) < 0.05


def require_exports(seen: list[dict[str, Any]], folder: Path) -> None:
    """Require that the exports of the checkpoint have the logits of the saved weights to the bit, and those of the run."""
    checkpoint = folder / "epoch_1"
    weights = CheckpointLoader.load_checkpoint(checkpoint)["state_dict"]
    expected, plain = network(), network()
    untrained = {name: value.clone() for name, value in plain.state_dict().items()}
    expected.load_state_dict({name.removeprefix("network."): value for name, value in weights.items()}, strict=True)
    assert not any(torch.equal(value, untrained[name]) for name, value in expected.state_dict().items())
    assert export_state_dict(checkpoint, folder / "own.pth").module == "network"
    plain.load_state_dict(torch.load(folder / "own.pth", weights_only=True), strict=True)
    model = SupervisedModel(network(), nn.CrossEntropyLoss())
    assert export_program(checkpoint, folder / "model.pt2", model, points()[:4]).difference == 0
    with torch.no_grad():
        logits = expected(points())
        assert torch.equal(plain(points()), logits)
        assert torch.equal(torch.export.load(folder / "model.pt2").module()(points()), logits)
    torch.testing.assert_close(seen[0]["predictions"], logits, rtol=1e-5, atol=1e-6)
