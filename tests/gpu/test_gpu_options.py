"""Options for GPUs: CUDA graphs, autocast in evaluations and with offloading, determinism, TensorFloat-32, waits of an update."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import Runner
from stratagem.optim import AmpOptimWrapper
from stratagem.strategies import FSDPStrategy, SingleDeviceStrategy
from stratagem.train import BaseMetric
from tests.gpu.devices import ON_CPU, require_package, require_torch
from tests.gpu.models import SHAPES, Samples, mlp
from tests.gpu.runs import in_new_process, settings
from tests.support.ranks import Ranks

SGD = {"type": "SGD", "lr": 0.05, "momentum": 0.9}


def graphs(device: torch.device) -> dict[str, Any]:
    """Return the option ``compile`` with CUDA graphs; on the CPU, a backend that takes no time."""
    if device.type != "cuda":
        return {"backend": "aot_eager"}
    require_package("triton")
    return {"mode": "reduce-overhead"}


def trained(folder: Path, compiling: Any, **optim: Any) -> tuple[list[float], Tensor]:
    """Train eight iterations; return the losses, which are read at the end, and the weights."""
    torch.manual_seed(0)
    model = mlp()
    strategy = SingleDeviceStrategy(work_dir=folder, log_kwargs={"log_level": "ERROR"})
    wrapper = {"optimizer": SGD, **optim}
    strategy.prepare(model, optim_wrapper=wrapper, compile=compiling, dispatch_kwargs={"max_iters": 8})
    batches = Samples(SHAPES["mlp"]).batches(8)[:8]
    kept = [strategy.model.train_step(batch, strategy.optim_wrapper)["loss"] for batch in batches]
    weights = nn.utils.parameters_to_vector(strategy.unwrap_model().parameters()).detach().cpu()
    strategy.close()
    return [loss.item() for loss in kept], weights


@pytest.mark.parametrize("optim", [{}, {"accumulative_counts": 4}], ids=["each", "accumulation"])
def test_losses_and_gradients_survive_replays_of_graphs(
    optim: dict[str, Any], device: torch.device, tmp_path: Path
) -> None:
    """Losses that are kept until the end, and the sums of gradients of four micro-batches, are those of eager training."""
    losses, weights = trained(tmp_path / "graphs", graphs(device), **optim)
    expected, expected_weights = trained(tmp_path / "eager", False, **optim)
    assert len(set(losses)) == 8
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert torch.allclose(weights, expected_weights, atol=1e-3)


class Predictions(BaseMetric):
    """Keeps the predictions of all batches by reference, on the device; the metric is their sum."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(data_samples["preds"])

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return {"sum": float(sum(each.double().sum() for each in results))}


def validated(folder: Path, **changes: Any) -> tuple[float, nn.Module]:
    """Train, validate, and return the sum of the predictions and the model."""
    data = {"dataset": Samples(SHAPES["mlp"]), "batch_size": 8, "collate_fn": {"type": "default_collate"}}
    validation = {"val_dataloader": data, "val_evaluator": Predictions(), "val_cfg": {}}
    runner = Runner(**settings(folder, iterations=4, **{**validation, **changes}))
    model = runner.train()
    metric = runner.run.metrics["sum"]
    runner.close()
    return metric, model


def sum_by_hand(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> float:
    """Return the sum of the predictions, computed by hand."""
    total = 0.0
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        for inputs, targets in Samples(SHAPES["mlp"]).batches(8):
            total += model.eval()(inputs.to(device), targets.to(device), mode="predict")["preds"].double().sum().item()
    return total


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_validation_uses_autocast_if_training_does(dtype: str, device: torch.device, tmp_path: Path) -> None:
    """The predictions of a validation are those of a hand-written one under autocast, and ``fp16=False`` turns it off."""
    amp = {"type": "AmpOptimWrapper", "dtype": dtype, "optimizer": SGD}
    metric, model = validated(tmp_path / "autocast", optim_wrapper=amp)
    assert metric == pytest.approx(sum_by_hand(model, device, getattr(torch, dtype)), abs=1e-3)
    metric, model = validated(tmp_path / "float32", optim_wrapper=amp, val_cfg={"fp16": False})
    assert metric == pytest.approx(sum_by_hand(model, device, None), abs=1e-3)


def test_predictions_survive_replays_of_graphs(device: torch.device, tmp_path: Path) -> None:
    """Predictions that a metric keeps by reference are those of an eager validation."""
    metric, model = validated(tmp_path, compile=graphs(device))
    eager = mlp().to(device)
    eager.load_state_dict(model.state_dict())
    assert metric == pytest.approx(sum_by_hand(eager, device, None), rel=1e-3, abs=1e-2)


def deterministic_weights(folder: str) -> tuple[str | None, list[float]]:
    """Train with deterministic algorithms; return the setting of cuBLAS during the run, and the weights."""
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.manual_seed(0)  # for the initial weights
    runner = Runner(**settings(Path(folder), "cnn", randomness={"seed": 3, "deterministic": True}))
    during = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    model = runner.train()
    runner.close()
    return during, nn.utils.parameters_to_vector(model.parameters()).detach().cpu().tolist()


@pytest.mark.usefixtures("device")
def test_deterministic_runs_configure_cublas_and_have_the_same_bits(tmp_path: Path) -> None:
    """Without the variable in the environment, two runs neither fail in a matrix multiplication nor differ in any bit."""
    first, second = (in_new_process(deterministic_weights, str(tmp_path / name)) for name in ("one", "two"))
    assert first == second
    assert first[0] == ":4096:8"


def test_float32_matmul_precision_selects_tensor_float_32(cuda: torch.device, tmp_path: Path) -> None:
    """With ``"high"``, products of float32 matrices are rounded more than by default, but not as much as in bfloat16."""
    if torch.cuda.get_device_capability(cuda) < (8, 0):
        pytest.skip(f"requires compute capability 8.0 for TensorFloat-32: {torch.cuda.get_device_name(cuda)} has less")
    torch.manual_seed(0)
    left, right = torch.randn(2, 512, 512, device=cuda)
    exact = left.double() @ right.double()
    errors = []
    for precision in ("highest", "high"):
        strategy = SingleDeviceStrategy(
            work_dir=tmp_path / precision,
            env_kwargs={"float32_matmul_precision": precision},
            log_kwargs={"log_level": "ERROR"},
        )
        errors.append(((left @ right).double() - exact).abs().max().item())
        strategy.close()
    assert errors[0] < 1e-3 < errors[1] < 0.5


def test_an_update_in_float16_waits_once(cuda: torch.device) -> None:
    """With clipping, unscaling, norm, check, clipping and the loss scale together wait for the GPU once."""
    model = mlp().to(cuda)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    wrapper = AmpOptimWrapper(optimizer, dtype="float16", clip_grad={"max_norm": 1.0})
    inputs, targets = (each.to(cuda) for each in Samples(SHAPES["mlp"]).batches(8)[0])
    for measured in (False, False, True):
        with wrapper.optim_context(model):
            loss = model(inputs, targets, mode="loss")["loss"]
        wrapper.backward(wrapper.scale_loss(loss))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn" if measured else "default")
            wrapper.step()
            torch.cuda.set_sync_debug_mode("default")
        wrapper.zero_grad()
    assert len([each for each in seen if "synchroniz" in str(each.message)]) == 1


def offloaded(folder: str, compiling: Any) -> dict[str, Any]:
    """Train under FSDP with parameters in CPU memory; return the dtype of an activation, and the losses."""
    warnings.simplefilter("default")
    torch.manual_seed(0)
    model = mlp()
    strategy = FSDPStrategy(work_dir=folder, cpu_offload=True, log_kwargs={"log_level": "ERROR"}, wrap_policy="Linear")
    amp = {"type": "AmpOptimWrapper", "dtype": "bfloat16", "optimizer": SGD}
    strategy.prepare(model, optim_wrapper=amp, compile=compiling)
    seen: list[torch.dtype] = []
    strategy.unwrap_model().layers[0].register_forward_hook(lambda *args: seen.append(args[-1].dtype))  # type: ignore[union-attr,index]
    batches = Samples(SHAPES["mlp"]).batches(8)[:3]
    losses = [strategy.model.train_step(batch, strategy.optim_wrapper)["loss"].item() for batch in batches]
    devices = {parameter.device.type for parameter in strategy.unwrap_model().parameters()}
    strategy.close()
    return {"dtypes": set(seen), "devices": devices, "losses": losses}


def test_autocast_works_with_parameters_in_cpu_memory(two_gpus: Ranks, tmp_path: Path) -> None:
    """Under FSDP with ``cpu_offload``, activations are bfloat16, also if the wrapped modules are compiled."""
    require_torch(2, 13)
    if not ON_CPU:
        require_package("triton")
    eager = two_gpus.run_within(180, offloaded, str(tmp_path / "eager"), False)
    assert eager[0]["dtypes"] == {torch.bfloat16}
    assert eager[0]["devices"] == {"cpu"}
    compiled = two_gpus.run_within(
        180, offloaded, str(tmp_path / "compiled"), {"backend": "aot_eager"} if ON_CPU else True
    )
    assert compiled[0]["losses"] == pytest.approx(eager[0]["losses"], abs=0.02)
