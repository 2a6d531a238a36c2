"""A small language model and its training loop, the same under every strategy, for tests that compare strategies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.model import BaseModel, ExponentialMovingAverage
from stratagem.strategies import BaseStrategy, DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from tests.support.training_loop import iterations

WORDS, WIDTH, LENGTH, HEADS = 24, 16, 6, 2
SAMPLES = 96
# The number of samples in an iteration over all ranks.
GLOBAL_BATCH = 8
EPOCH = SAMPLES // GLOBAL_BATCH

TP_PLAN = {
    "blocks.*.query": "colwise",
    "blocks.*.key": "colwise",
    "blocks.*.value": "colwise",
    "blocks.*.out": "rowwise",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
}
# The placements of the matrix by name: the strategy, its options, and the number of processes.
PLACEMENTS: Mapping[str, tuple[type[BaseStrategy], Mapping[str, Any], int]] = {
    "single": (SingleDeviceStrategy, {}, 1),
    "DDP x2": (DDPStrategy, {"find_unused_parameters": False}, 2),
    "FSDP x2": (FSDPStrategy, {}, 2),
    "TP x2": (FSDPStrategy, {"tp": 2, "tp_plan": TP_PLAN}, 2),
    "FSDP x4": (FSDPStrategy, {}, 4),
    "HSDP 2x2": (FSDPStrategy, {"replicate": 2}, 4),
    "FSDP x TP 2x2": (FSDPStrategy, {"tp": 2, "tp_plan": TP_PLAN}, 4),
}


class Sentences(torch.utils.data.Dataset[Any]):
    """96 sequences of 7 words, each with its index."""

    def __init__(self) -> None:
        self.words = torch.randint(WORDS, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.words[index], index


class Block(nn.Module):
    """Attention and two linear layers; with tensor parallelism, a rank only has some of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        # A bias of the keys has no effect. Its gradient is rounding noise, which AdamW would amplify.
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        heads = [
            layer(self.norm(x)).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(x)))


class Gpt(BaseModel):
    """A language model with tied embeddings, frozen position embeddings and a scalar temperature parameter."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.drop = nn.Dropout(drop)
        # 3 rows, so that ranks have shards of different sizes.
        self.shift = nn.Parameter(torch.randn(3, WIDTH) * 0.1)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("order", torch.arange(LENGTH), persistent=False)

    def init_weights(self) -> None:
        """Reinitialize the linear layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.1)

    def forward(self, words: Tensor, numbers: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return the loss, or the logits of the next words."""
        x = self.words(words[:, :LENGTH]) + self.places(self.order) + self.shift.sum(0)
        for block in self.blocks:
            x = block(x)
        scores = self.head(self.norm(self.drop(x))) * self.temperature
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), words[:, 1:].flatten())}
        return {"scores": scores, "numbers": numbers} if mode == "predict" else scores


OPTIM: Mapping[str, Any] = {
    "optimizer": {"type": "AdamW", "lr": 0.01, "weight_decay": 0.1},
    "accumulative_counts": 2,
    "clip_grad": {"max_norm": 0.3},
    "paramwise_cfg": {"norm_decay_mult": 0.0},
}
SCHEDULE = [
    {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 4},
    {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 4},
]


def prepared(placement: str, folder: str, **options: Any) -> BaseStrategy:
    """Return a prepared strategy; ``options`` are passed to it, except ``optim``, ``model`` and ``compile``."""
    kind, known, _ = PLACEMENTS[placement]
    optim, model = options.pop("optim", OPTIM), options.pop("model", {"type": Gpt})
    compiling = options.pop("compile", False)
    strategy = kind(
        work_dir=folder,
        env_kwargs={"randomness": {"seed": 0}},
        log_kwargs={"log_level": "ERROR"},
        **{**known, **options},
    )
    strategy.prepare(
        model,
        optim_wrapper=optim,
        param_scheduler=SCHEDULE,
        compile=compiling,
        dispatch_kwargs={"epoch_length": EPOCH, "max_iters": EPOCH},
    )
    return strategy


def full(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, gathered from all ranks if it is sharded."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def trained(placement: str, folder: str, stop: int = EPOCH, **options: Any) -> dict[str, Any]:
    """Train from the beginning; return all results that strategies must agree on, unsharded on every rank."""
    strategy = prepared(placement, folder, **options)
    try:
        return train(strategy, 0, stop)
    finally:
        strategy.close()


def train(strategy: BaseStrategy, start: int, stop: int) -> dict[str, Any]:
    """Train iterations ``start`` to ``stop``; return all results that strategies must agree on."""
    model, optim = strategy.unwrap_model(), strategy.optim_wrapper
    first = {name: full(parameter) for name, parameter in model.named_parameters()}
    average = ExponentialMovingAverage(model, momentum=0.1)
    seen: dict[str, list[Any]] = {"ids": [], "losses": [], "rates": [], "norms": []}
    for step in iterations(strategy, Sentences(), start, stop, global_batch=GLOBAL_BATCH):
        seen["ids"].append(step.batch[1].tolist())
        seen["losses"].append(step.outputs["loss"].item())
        seen["rates"].append(step.rates)
        if step.updated:
            seen["norms"].append(step.grad_norm)
            average.update()
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        **seen,
        "first": first,
        "last": {name: full(parameter) for name, parameter in model.named_parameters()},
        "average": {name: full(value) for name, value in average.averages.items()},
        "moments": {
            f"{names[parameter]}/{slot}": full(value)
            for parameter, slots in optim.optimizer.state.items()
            for slot, value in slots.items()
        },
        "state": sorted(model.state_dict()),
        "tied": model.head.weight is model.words.weight,
    }


def stopped(placement: str, folder: str, checkpoint: str, at: int, **options: Any) -> dict[str, Any]:
    """Train until iteration ``at`` and save a checkpoint."""
    strategy = prepared(placement, folder, **options)
    try:
        seen = train(strategy, 0, at)
        strategy.save_checkpoint(checkpoint, extra_ckpt={"meta": {"iter": at}})
        return seen
    finally:
        strategy.close()


def resumed(placement: str, folder: str, checkpoint: str, at: int, **options: Any) -> dict[str, Any]:
    """Resume from a checkpoint saved at iteration ``at`` and train to the end; also return the restored state."""
    strategy = prepared(placement, folder, **options)
    try:
        strategy.resume(checkpoint)
        found = train(strategy, at, at)
        return {**train(strategy, at, EPOCH), "found": found}
    finally:
        strategy.close()
