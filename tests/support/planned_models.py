"""Models, batches and an independent measurement of a training step, to compare with plans."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stratagem import BaseModel, SupervisedModel
from stratagem.planning.result import StepPlan
from stratagem.planning.trace import CollectiveCall, StepTrace
from stratagem.strategies.choice import choose_strategy

TOKENS, LENGTH, WIDTH, BATCH = 50, 16, 32, 4
OPTIMIZER = {"optimizer": {"type": "AdamW", "lr": 1e-3}, "clip_grad": {"max_norm": 1.0}}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Language(BaseModel):
    """A small language model with tied weights and a plan for tensor parallelism."""

    tp_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}  # noqa: RUF012

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, mode: str = "tensor") -> Any:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if mode != "loss":
            return logits
        return {"loss": nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:])}


def language_batch() -> dict[str, Tensor]:
    return {"tokens": torch.zeros(BATCH, LENGTH, dtype=torch.int64)}


def image_model() -> SupervisedModel:
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 49, 10),
    )
    return SupervisedModel(network, nn.CrossEntropyLoss())


def image_batch() -> tuple[Tensor, Tensor]:
    return torch.zeros(BATCH, 1, 14, 14), torch.zeros(BATCH, dtype=torch.int64)


class Pair(nn.Module):
    """A module with two inputs and two outputs, and a layer that another module has as well."""

    def __init__(self, shared: nn.Linear) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(WIDTH, 8))
        self.shared = shared

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(x) + y @ self.scale @ self.scale.t(), self.shared(self.key(x) * self.value(y))


class Irregular(BaseModel):
    """A model that calls a block twice, shares a layer between modules, does not call one, and has frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(LENGTH, WIDTH)
        self.block = Block()
        self.unused = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        shared = nn.Linear(WIDTH, WIDTH)
        self.pairs = nn.ModuleList(Pair(shared) for _ in range(2))
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor, mode: str = "tensor") -> Any:
        x = y = self.block(self.block(self.first(x)))
        for pair in self.pairs:
            x, y = pair(x, y)
        out = self.head(self.frozen(x) + y)
        return {"loss": out.square().mean()} if mode == "loss" else out


def irregular_batch() -> dict[str, Tensor]:
    return {"x": torch.zeros(BATCH, LENGTH)}


MODELS = {
    "language": (Language, language_batch),
    "images": (image_model, image_batch),
    "irregular": (Irregular, irregular_batch),
}


class Allocations(TorchDispatchMode):
    """Adds up the storages that operations create while they exist; an implementation that shares nothing with plans."""

    def __init__(self, existing: int) -> None:
        super().__init__()
        self.now = self.peak = existing
        self._seen: set[int] = set()

    def _change(self, nbytes: int) -> None:
        self.now += nbytes
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        before = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if not isinstance(each, Tensor):
                continue
            storage = each.untyped_storage()
            if storage._cdata in before or storage._cdata in self._seen:
                continue
            self._seen.add(storage._cdata)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.now -= nbytes


def bytes_of(tensors: Any) -> int:
    """Return the bytes of the storages of this rank's parts of tensors, each storage once."""
    local = [each._local_tensor if isinstance(each, DTensor) else each for each in tensors]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in local}.values())


def measured(kind: str, strategy: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Train some real steps on this rank; return the sizes, the collectives and, without FSDP, the peak of the last one."""
    make_model, make_batch = MODELS[kind]
    torch.manual_seed(0)
    distributed = strategy["type"] != "SingleDeviceStrategy"
    built = choose_strategy(
        strategy, launcher="pytorch" if distributed else "none", work_dir=folder, experiment_name=None, env_cfg=None,
        randomness=None, auto_scale_lr=None, log_level="ERROR",
    )  # fmt: skip
    try:
        built.prepare(make_model(), optim_wrapper=OPTIMIZER, dispatch_kwargs={"max_iters": 100})
        return _measure(built, make_batch())
    finally:
        built.close()


def _measure(built: Any, batch: Any) -> dict[str, Any]:
    wrapper, model = built.optim_wrapper, built.unwrap_model()
    for _ in range(3):
        built.model.train_step(batch, optim_wrapper=wrapper)
    seen: list[Tensor] = []
    original = wrapper.step

    def step(**kwargs: Any) -> None:
        seen.extend(each.grad for each in model.parameters() if each.grad is not None)
        original(**kwargs)

    wrapper.step = step
    trace = StepTrace({})
    with trace:
        built.model.train_step(batch, optim_wrapper=wrapper)
    gradients = bytes_of(seen)
    seen.clear()
    state = [each for each in tree_leaves(dict(wrapper.optimizer.state)) if isinstance(each, Tensor)]
    state = [each for each in state if not isinstance(each, nn.Parameter)]
    static = {
        "parameters": bytes_of(model.parameters()),
        "gradients": gradients,
        "optimizer_state": bytes_of(state),
        "buffers": bytes_of(model.buffers()),
    }
    existing = static["parameters"] + static["optimizer_state"] + static["buffers"]
    existing += bytes_of(each for each in tree_leaves(batch) if isinstance(each, Tensor))
    wrapper.step = original
    with Allocations(existing) as allocations:
        built.model.train_step(batch, optim_wrapper=wrapper)
    return {**static, "collectives": summed(trace.calls), "flops": trace.flops, "peak": allocations.peak}


def summed(calls: list[CollectiveCall]) -> dict[tuple[str, int, str], tuple[int, int]]:
    """Return the number and bytes of collectives by kind, group size and phase."""
    found: dict[tuple[str, int, str], tuple[int, int]] = {}
    for call in calls:
        key = (call.kind, len(call.ranks), call.phase)
        count, nbytes = found.get(key, (0, 0))
        found[key] = (count + 1, nbytes + call.nbytes)
    return found


def counted(calls: list[CollectiveCall]) -> dict[tuple[str, int], tuple[int, int]]:
    """Return the number and bytes of collectives by kind and group size; engines run them outside of the backward pass."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for call in calls:
        count, nbytes = found.get((call.kind, len(call.ranks)), (0, 0))
        found[call.kind, len(call.ranks)] = (count + 1, nbytes + call.nbytes)
    return found


def planned_collectives(step: StepPlan) -> dict[tuple[str, int], tuple[int, int]]:
    """Return the same for a plan."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for each in step.collectives:
        count, nbytes = found.get((each.kind, each.group_size), (0, 0))
        found[each.kind, each.group_size] = (count + each.count, nbytes + each.bytes)
    return found
