"""CUDA graphs, captured by the user or by torch.compile, train like eager code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.optim import OptimWrapper
from stratagem.strategies import SingleDeviceStrategy
from tests.gpu.devices import require_package
from tests.gpu.models import SHAPES, Samples, mlp
from tests.gpu.test_gpu_equality import largest_difference, with_strategy

SGD = {"type": "SGD", "lr": 0.05, "momentum": 0.9}


def losses_of(strategy: SingleDeviceStrategy, batches: list[Any]) -> list[float]:
    """Train on all batches, and read the losses only afterwards."""
    kept = [strategy.model.train_step(batch, strategy.optim_wrapper)["loss"].clone() for batch in batches]
    return [loss.item() for loss in kept]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_like_an_eager_one(mode: str, device: torch.device, tmp_path: Path) -> None:
    """The losses and weights of a compiled model, also with CUDA graphs, equal those of the eager model nearly."""
    options: dict[str, Any] = {"backend": "aot_eager"}
    if device.type == "cuda":
        require_package("triton")
        options = {"mode": mode}
    batches = Samples(SHAPES["mlp"]).batches(8)
    model = mlp()
    reference = copy.deepcopy(model)
    strategy = SingleDeviceStrategy(work_dir=tmp_path / "compiled", log_kwargs={"log_level": "ERROR"})
    strategy.prepare(model, optim_wrapper={"optimizer": SGD}, compile=options)
    losses = losses_of(strategy, batches)
    strategy.close()
    assert losses == pytest.approx(with_strategy(reference, SGD, batches, tmp_path / "eager"), rel=1e-3, abs=1e-4)
    assert largest_difference(model, reference) < 1e-3


def test_layers_captured_as_graphs_train_like_eager_ones(cuda: torch.device, tmp_path: Path) -> None:
    """A model whose layers were captured with ``torch.cuda.make_graphed_callables`` trains with the usual step."""
    batches = Samples(SHAPES["mlp"]).batches(8)
    model = mlp().to(cuda)
    reference = copy.deepcopy(model)
    sample = torch.zeros(8, *SHAPES["mlp"], device=cuda)
    model.layers = torch.cuda.make_graphed_callables(model.layers, (sample,))
    losses = with_strategy(model, SGD, batches, tmp_path / "graphed")
    assert losses == pytest.approx(with_strategy(reference, SGD, batches, tmp_path / "eager"), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.5}], ids=["plain", "clipping"])
def test_a_whole_iteration_can_be_captured(clip: dict[str, Any] | None, cuda: torch.device) -> None:
    """Forward, backward, clipping and a fused update in one graph: each replay equals an eager iteration."""
    batches = [(inputs.to(cuda), targets.to(cuda)) for inputs, targets in Samples(SHAPES["mlp"]).batches(8)]
    models = [mlp().to(cuda) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    graphed, eager = (
        OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True), clip_grad=clip)
        for model in models
    )
    inputs, targets = (part.clone() for part in batches[0])

    def iterate(model: Any, optim: OptimWrapper, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = model(*data, mode="loss")["loss"]
        optim.update_params(loss)
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches[:3]:
            iterate(models[0], graphed, batch)
    torch.cuda.current_stream().wait_stream(side)
    for batch in batches[:3]:
        iterate(models[1], eager, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = iterate(models[0], graphed, (inputs, targets))
    for batch in batches[3:]:
        inputs.copy_(batch[0])
        targets.copy_(batch[1])
        graph.replay()
        expected = iterate(models[1], eager, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert largest_difference(*models) < 1e-4
