"""The floating-point operations of training against counts by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stratagem import Runner
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.model import BaseModel, SupervisedModel
from stratagem.tensors.flops import FlopCounter, FlopKind
from stratagem.train.hooks.flops import FlopsHook
from stratagem.train.run.step_flops import peak_of_device
from tests.support.ranks import Ranks
from tests.train.toys import QUIET_HOOKS, Samples, Toy, loader, settings

MakeRunner = Callable[..., Runner]


class Block(nn.Module):
    """Causal attention with ``heads`` heads and an MLP with four times the width, without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).transpose(1, 3).unbind(2)
        attended = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(x)))


class Gpt(nn.Module):
    """A small GPT; ``recompute`` checkpoints each block."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.blocks = nn.ModuleList(Block(8, 2) for _ in range(2))
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def mlp(batch: int = 4) -> tuple[nn.Module, Tensor, int]:
    """Two layers, 5 -> 7 -> 3. Forward 2 n (5 7 + 7 3); gradients of both weights as much; of one input 2 n 7 3."""
    forward = 2 * batch * (5 * 7 + 7 * 3)
    return (
        nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)),
        torch.rand(batch, 5),
        2 * forward + 2 * batch * 21,
    )


def cnn(batch: int = 2) -> tuple[nn.Module, Tensor, int]:
    """Two 3 x 3 convolutions on 8 x 8, 3 -> 4 -> 6 channels with stride 2 in the second, and a linear layer 6 -> 3.

    A convolution has 2 n (positions of the output) (channels in) (channels out) 9 operations.
    """
    first, second = 2 * batch * 64 * 3 * 4 * 9, 2 * batch * 16 * 4 * 6 * 9
    linear = 2 * batch * 6 * 3
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    # Forward, gradients of weights, and gradients of inputs except those of the images.
    return network, torch.rand(batch, 3, 8, 8), 2 * first + 3 * second + 3 * linear


def gpt(batch: int = 2, length: int = 6, *, recompute: bool = False) -> tuple[nn.Module, Tensor, int]:
    """Per token and block, 12 width^2 weights; attention has two products of length x length x width, and five in backward."""
    weights = 2 * 12 * 8 * 8 + 8 * 11
    attention = 2 * batch * length * length * 8 * 2  # one product of both blocks
    total = 3 * 2 * batch * length * weights + 7 * attention
    return Gpt(recompute=recompute), torch.zeros(batch, length, dtype=torch.int64), total


@pytest.mark.parametrize("build", [mlp, cnn, gpt])
def test_the_operations_of_a_step_are_those_counted_by_hand(build: Callable[[], tuple[nn.Module, Tensor, int]]) -> None:
    """The forward and backward pass of an MLP, a CNN and a GPT have exactly the operations of their formulas."""
    network, inputs, expected = build()
    with FlopCounter() as counter:
        network(inputs).sum().backward()
    assert counter.model == expected
    assert (counter.recomputation, counter.update) == (0, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_repeated_forward_passes_are_no_operations_of_the_model(reentrant: bool) -> None:
    """Activation checkpointing repeats the forward pass of the blocks: a third of their operations, counted separately."""
    network, inputs, expected = gpt()
    embedded = network.embedding(inputs)
    with FlopCounter() as counter:
        for block in network.blocks:
            embedded = checkpoint(block, embedded, use_reentrant=reentrant)
        network.head(embedded).sum().backward()
    attention = 2 * 2 * 6 * 6 * 8 * 2
    # Torch stops a repeated forward pass as soon as it has the tensors that it needs, here before the last product.
    last = 0 if reentrant else 2 * 2 * 2 * 6 * 4 * 8 * 8
    assert counter.model == expected
    assert counter.recomputation == 2 * 2 * 6 * 2 * 12 * 8 * 8 + 2 * attention - last


def test_gradient_penalties_are_operations_of_the_model() -> None:
    """A backward pass that creates a graph is no repeated forward pass.

    The layers 5 -> 7 -> 3 have 35 and 21 weights. The forward pass and the gradient of the inputs use all of them. The penalty
    is differentiated by both factors of the last product and by the weights of the other one, and through the activation by the
    first weights and the inputs.
    """
    network, inputs, _ = mlp()
    inputs.requires_grad_()
    with FlopCounter() as counter:
        (gradient,) = torch.autograd.grad(network(inputs).sum(), inputs, create_graph=True)
        gradient.square().sum().backward()
    assert counter.model == 2 * 4 * ((35 + 21) + (35 + 21) + (35 + 35 + 21) + (35 + 35))
    assert counter.recomputation == 0


def test_operations_of_the_optimizer_are_counted_apart() -> None:
    """Products of matrices inside ``updating`` belong to the optimizer: 2 x 3 x 4 x 5 of a single one."""
    with FlopCounter() as counter, counter.updating():
        torch.rand(3, 4) @ torch.rand(4, 5)
    assert (counter.model, counter.update) == (0, 120)


def test_the_dtype_of_autocast_is_counted() -> None:
    """Under autocast, products have bfloat16 operands although the weights are float32."""
    network, inputs, expected = mlp()
    with FlopCounter() as counter, torch.autocast("cpu", torch.bfloat16):
        network(inputs)
    assert {kind.dtype for kind in counter.flops} == {"bfloat16"}
    assert counter.model < expected


def records(runner: Runner) -> list[dict[str, Any]]:
    """Train; return the records."""
    runner.train()
    lines = (Path(runner.strategy.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["mode"] == "train"]


def counted(found: list[dict[str, Any]]) -> list[float]:
    """Return the operations of each line, from its rate and its duration."""
    before, flops = 0, []
    for record in found:
        seconds, before = record["time"] * (record["iter"] - before), record["iter"]
        flops.append(record["tflops_per_second"] * 1e12 * seconds)
    return flops


def hooks(interval: int) -> dict[str, Any]:
    """Return the default hooks with a logger."""
    return {**QUIET_HOOKS, "logger": {"interval": interval}}


# A toy with 4 -> 8 -> 3 features: per sample, forward 2 (4 8 + 8 3), twice that with gradients of weights, 2 8 3 of one input.
PER_SAMPLE = 2 * 2 * (4 * 8 + 8 * 3) + 2 * 8 * 3


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_line_has_the_operations_of_its_iterations(make_runner: MakeRunner, accumulation: int) -> None:
    """Both epochs of 13 samples have the operations of 13 samples, with a smaller last batch and under accumulation."""
    optim = {"optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": accumulation}
    runner = make_runner(
        default_hooks=hooks(7), custom_hooks=[FlopsHook()], optim_wrapper=optim, train_cfg={"max_epochs": 2}
    )
    found = records(runner)
    assert counted(found) == [pytest.approx(13 * PER_SAMPLE)] * 2
    assert "mfu" not in found[0]
    assert "train_step" not in vars(runner.strategy.model)


def test_mfu_is_the_rate_relative_to_the_given_peak(make_runner: MakeRunner) -> None:
    """With a peak of 1 GFLOP/s, the utilization is the rate in GFLOP/s; ``hfu`` is absent because it would be equal."""
    runner = make_runner(default_hooks=hooks(7), custom_hooks=[{"type": "FlopsHook", "peak_flops": 1e9}])
    for record in records(runner):
        assert record["mfu"] == pytest.approx(record["tflops_per_second"] * 1e3)
        assert "hfu" not in record


def train(make_runner: MakeRunner, *extra: Any, **changes: Any) -> dict[str, Tensor]:
    """Train a network with dropout and batch normalization; return its state."""
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    runner = make_runner(
        model=SupervisedModel(network, nn.CrossEntropyLoss()),
        train_dataloader=loader(dataset=[sample[:2] for sample in map(Samples().__getitem__, range(12))]),
        train_cfg={"max_epochs": 1},
        custom_hooks=list(extra),
        **changes,
    )
    runner.train()
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.slow
def test_counting_does_not_change_the_training(make_runner: MakeRunner, tmp_path: Path) -> None:
    """Weights and statistics of batch normalization have the same bits with and without the hook."""
    torch.manual_seed(0)
    without = train(make_runner, work_dir=tmp_path / "without")
    torch.manual_seed(0)
    counting = train(make_runner, FlopsHook(), work_dir=tmp_path / "counting")
    assert all(torch.equal(counting[name], value) for name, value in without.items())


class Recomputed(BaseModel):
    """A GPT whose blocks are checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Gpt(recompute=True)

    def forward(self, tokens: Tensor, mode: str = "tensor") -> Any:
        return {"loss": self.network(tokens).mean()}


@pytest.mark.slow
def test_hfu_contains_repeated_forward_passes(make_runner: MakeRunner) -> None:
    """``hfu`` relates to ``mfu`` as the executed operations to those of the model."""
    _, tokens, expected = gpt()
    runner = make_runner(
        model=Recomputed(),
        train_dataloader=loader(dataset=list(tokens)),
        default_hooks=hooks(3),
        custom_hooks=[FlopsHook(peak_flops=1e12)],
        train_cfg={"max_iters": 3},
    )
    (record,) = records(runner)
    repeated = 2 * 2 * 6 * 2 * 8 * 8 * 8 + 2 * 2 * 2 * 6 * 6 * 8 * 2
    assert counted([record]) == [pytest.approx(3 * expected)]
    assert record["hfu"] / record["mfu"] == pytest.approx(1 + repeated / expected)


@pytest.mark.slow
def test_a_compiled_model_is_not_counted(make_runner: MakeRunner) -> None:
    """Counting would run it without the compiler; a log line explains that the operations are unknown."""
    runner = make_runner(
        default_hooks=hooks(7), custom_hooks=[FlopsHook()], compile={"backend": "eager"}, train_cfg={"max_iters": 7},
        log_level="INFO",
    )  # fmt: skip
    assert "tflops_per_second" not in records(runner)[0]
    assert "because the model is compiled" in next(Path(runner.strategy.log_dir).glob("*.log")).read_text()


def test_a_peak_that_is_not_a_positive_number_is_refused() -> None:
    """The message contains the value."""
    with pytest.raises(ConfigTypeError, match="expected peak_flops to be a number, got 'A100'"):
        FlopsHook(peak_flops="A100")  # type: ignore[arg-type]
    with pytest.raises(ConfigValueError, match="positive, got 0"):
        FlopsHook(peak_flops=0)


def flops_on_rank(folder: str, strategy: Any) -> list[float]:
    """Train on this rank; return the operations that rank 0 logged."""
    changes = {"default_hooks": hooks(4), "train_cfg": {"max_epochs": 1}, "custom_hooks": [FlopsHook()]}
    runner = Runner(**settings(work_dir=folder, strategy=strategy, model=Toy(), **changes))
    try:
        if runner.strategy.rank:
            runner.train()
            return []
        return counted(records(runner))
    finally:
        runner.close()


def flops_of_strategies(folder: str) -> dict[str, list[float]]:
    """Train with several strategies in one call, because starting a run on ranks takes seconds."""
    tp = {"type": "FSDPStrategy", "tp": 2, "tp_plan": {"layers.0": "colwise", "layers.3": "rowwise"}}
    strategies = {"ddp": "DDPStrategy", "fsdp": {"type": "FSDPStrategy", "wrap_policy": ["Linear"]}, "tp": tp}
    return {name: flops_on_rank(f"{folder}/{name}", strategy) for name, strategy in strategies.items()}


def test_strategies_have_the_operations_of_a_single_process(tmp_path: Path, ranks: Ranks) -> None:
    """DDP and FSDP process 14 samples on two ranks; with tensor parallelism, the sum of both ranks is that of the model."""
    found = ranks.run(flops_of_strategies, str(tmp_path))[0]
    assert found["ddp"] == [pytest.approx(14 * PER_SAMPLE)]
    assert found["fsdp"] == [pytest.approx(14 * PER_SAMPLE)]
    # With 7 batches of at most 2 samples, the line after 4 iterations has 8 samples.
    assert found["tp"] == [pytest.approx(8 * PER_SAMPLE)]


@pytest.mark.parametrize(
    ("name", "kind", "tf32", "tflops"),
    [
        ("NVIDIA H200", FlopKind("model", "bfloat16", "matmul"), False, 989.4),
        ("NVIDIA H200", FlopKind("model", "float32", "matmul"), False, 66.9),
        ("NVIDIA H200", FlopKind("model", "float32", "matmul"), True, 494.7),
        ("NVIDIA A100-SXM4-80GB", FlopKind("model", "float32", "convolution"), True, 156),
        ("NVIDIA H200", FlopKind("model", "float64", "matmul"), False, None),
        ("NVIDIA GeForce GTX 1080", FlopKind("model", "bfloat16", "matmul"), False, None),
    ],
)
def test_the_peak_is_that_of_the_data_sheet_for_the_operation(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: FlopKind, tf32: bool, tflops: float | None
) -> None:
    """Operations on float32 have the rate of TF32 if torch uses it for them; unknown devices and dtypes have none."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    setting = SimpleNamespace(fp32_precision="tf32" if tf32 else "ieee")
    monkeypatch.setattr(torch.backends.cuda, "matmul", setting)
    monkeypatch.setattr(torch.backends.cudnn, "conv", setting)
    found = peak_of_device(torch.device("cuda", 0))(kind)
    assert math.isnan(found) if tflops is None else found == pytest.approx(tflops * 1e12)
    assert math.isnan(peak_of_device(torch.device("cpu"))(kind))
