"""Tests of buffers of modules whose forward pass is repeated in the backward pass."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stratagem.model import SupervisedModel
from stratagem.model.recomputation import BufferReplay, update_buffers_once
from stratagem.strategies import SingleDeviceStrategy
from stratagem.utils.torch_private import checkpoint_module


class Normalize(nn.Module):
    """A layer whose output depends on a running mean that it updates first, with a replaced and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("replaced", torch.zeros(1), persistent=False)
        self.register_buffer("table", torch.arange(70000.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized features."""
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.25)
            self.calls += 1
            self.replaced = self.replaced + 1
        return torch.sin(x - self.mean) * self.calls + self.table[3]


class Block(nn.Module):
    """A linear layer, BatchNorm, and a layer with custom buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), Normalize())

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        return torch.tanh(self.layers(x))


class Network(nn.Module):
    """Two blocks, each called by a function that may checkpoint it."""

    def __init__(self, call: Any = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 1)
        self.call = call or (lambda block, x: block(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return one value per sample."""
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x)


def trained(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train for three steps by hand; return the parameters and the buffers."""
    optim = torch.optim.SGD(network.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        x = torch.randn(8, 6, generator=generator).requires_grad_()
        nn.functional.mse_loss(network(x), x.detach().sum(1, keepdim=True)).backward()
        optim.step()
        optim.zero_grad()
    return dict(network.named_parameters()), dict(network.named_buffers())


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    """Checkpoint a block with the reentrant implementation."""
    return checkpoint(block, x, use_reentrant=True)


def non_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    """Checkpoint a block with the non-reentrant implementation."""
    return checkpoint(block, x, use_reentrant=False)


class Repeating(torch.autograd.Function):
    """A checkpoint of a library that does not use torch's."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Tensor:
        """Return the output of the block without a graph."""
        ctx.block, ctx.x = block, x.detach().requires_grad_()
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Repeat the forward pass with a graph, and compute the gradients with it."""
        with torch.enable_grad():
            output = ctx.block(ctx.x)
        output.backward(gradients[0])
        return None, ctx.x.grad


def repeat_to_unpack(block: nn.Module, x: Tensor) -> Tensor:
    """Checkpoint a block with hooks that repeat the forward pass for each tensor that the backward pass needs."""
    count = 0

    def pack(_: Tensor) -> int:
        nonlocal count
        count += 1
        return count

    def unpack(number: int) -> Tensor:
        saved: list[Tensor] = []
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda none: none):
            block(x.detach().requires_grad_())
        return saved[number - 1]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return block(x)


@pytest.fixture
def network() -> Network:
    """A network without checkpoints."""
    torch.manual_seed(0)
    return Network()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Return whether named tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointed_modules_train_as_without_checkpoints(network: Network):
    """Parameters and all kinds of buffers are equal, also if the output depends on an updated buffer."""
    checkpointed = copy.deepcopy(network)
    for block in checkpointed.blocks:
        checkpoint_module(block, context_fn=BufferReplay(block).contexts)
    update_buffers_once(checkpointed)
    for result, expected in zip(trained(checkpointed), trained(network), strict=True):
        assert equal(result, expected)


def test_a_model_without_recomputations_has_no_hooks(network: Network):
    """A forward pass of a model costs nothing more until something can repeat it in a backward pass."""
    update_buffers_once(network)
    trained(network)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("call", [reentrant, non_reentrant, Repeating.apply, repeat_to_unpack])
def test_a_checkpoint_after_other_iterations_updates_buffers_once(network: Network, call: Any):
    """A model that calls a checkpoint only in later iterations, from torch or another library, updates each buffer once."""
    update_buffers_once(network)
    trained(network)
    network.call = call
    _, buffers = trained(network)
    assert buffers["blocks.0.layers.1.num_batches_tracked"] == 6
    assert buffers["blocks.1.layers.2.calls"] == 6
    assert buffers["blocks.1.layers.2.replaced"] == 6


@pytest.mark.parametrize("call", [reentrant, non_reentrant])
def test_checkpoints_in_the_model_update_buffers_once(network: Network, call: Any):
    """A model that calls torch's checkpoint updates each buffer once per forward pass."""
    checkpointed = network
    checkpointed.call = call
    update_buffers_once(checkpointed)
    _, buffers = trained(checkpointed)
    assert buffers["blocks.0.layers.1.num_batches_tracked"] == 3
    assert buffers["blocks.1.layers.2.calls"] == 3
    assert buffers["blocks.1.layers.2.replaced"] == 3


@pytest.mark.parametrize("call", [reentrant, non_reentrant])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_batch_norm_in_a_checkpoint_of_the_model(tmp_path: Path, call: Any, accumulation: int):
    """With a strategy, the statistics of BatchNorm and the parameters are those of a model without checkpoints."""
    states = []
    for number, chosen in enumerate([None, call]):
        torch.manual_seed(0)
        network = Network(chosen)
        for block in network.blocks:
            del block.layers[2]
        strategy = SingleDeviceStrategy(work_dir=tmp_path / str(number), log_kwargs={"log_level": "WARNING"})
        try:
            wrapper = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": accumulation}
            model, optim = strategy.prepare(
                SupervisedModel(network, nn.MSELoss()), optim_wrapper=wrapper, dispatch_kwargs={"max_iters": 4}
            )
            generator = torch.Generator().manual_seed(2)
            for _ in range(4):
                x = torch.randn(8, 6, generator=generator).requires_grad_()
                model.train_step((x, x.detach().sum(1, keepdim=True)), optim_wrapper=optim)
            states.append(strategy.model_state_dict())
        finally:
            strategy.close()
    assert equal(*states)
    assert next(value for name, value in states[1].items() if name.endswith("num_batches_tracked")) == 4


def test_error_in_a_recomputation_restores_the_buffers():
    """The buffers of the model are restored if the forward pass that is repeated in the backward pass fails."""

    class Failing(nn.BatchNorm1d):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                raise ValueError("out of luck")
            return super().forward(x)

    layer = Failing(3)
    before = dict(layer.named_buffers())
    update_buffers_once(layer)
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="out of luck"):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert all(buffer is before[name] for name, buffer in layer.named_buffers())


@pytest.mark.slow
def test_compiled_model_has_no_graph_break():
    """The hooks do not prevent torch.compile from capturing the whole model."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for _ in range(2):
        update_buffers_once(model)
        non_reentrant(model, torch.ones(4, 3))
    assert len(model[1]._forward_hooks) == 1
    model[1].reset_running_stats()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(4, 3)).sum().backward()
    assert model[1].num_batches_tracked == 1
