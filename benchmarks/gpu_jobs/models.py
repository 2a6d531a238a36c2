"""A ResNet-50 and a GPT with 124 million parameters, with random data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stratagem.model import BaseModel

__all__ = ["JOBS", "TINY_JOBS", "Job"]

_VOCABULARY: Final = 50304


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained.

    Attributes:
        model: builds the model.
        dataset: builds the data.
        batch_size: the number of samples per iteration.
        optimizer: the class of the optimizer in ``torch.optim`` (``type``) and its options.
    """

    model: Callable[[], BaseModel]
    dataset: Callable[[], Dataset[tuple[Tensor, Tensor]]]
    batch_size: int
    optimizer: Mapping[str, Any]


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.layers = nn.Sequential(
            *_convolution(width_in, width, 1), nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride), nn.ReLU(inplace=True),
            *_convolution(width, out, 1),
        )  # fmt: skip
        self.shortcut = (
            nn.Sequential(*_convolution(width_in, out, 1, stride)) if stride > 1 or width_in != out else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        return torch.relu(self.layers(x) + self.shortcut(x))


def _convolution(width_in: int, width: int, size: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(width_in, width, size, stride, size // 2, bias=False), nn.BatchNorm2d(width)


class ResNet(BaseModel):
    """A residual network with bottleneck blocks and cross entropy; with the default arguments, a ResNet-50."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        width_in = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                stages.append(Bottleneck(width_in, width << stage, 2 if stage and not index else 1))
                width_in = 4 * (width << stage)
        self.layers = nn.Sequential(
            *_convolution(3, width, 7, 2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width_in, classes),
        )

    def forward(self, images: Tensor, targets: Tensor, mode: str = "tensor") -> Any:  # type: ignore[override]
        """Return the loss or the scores of the classes."""
        scores = self.layers(images)
        return {"loss": nn.functional.cross_entropy(scores, targets)} if mode == "loss" else scores


class Block(nn.Module):
    """Causal attention and two linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape."""
        batch, length, width = x.shape
        parts = self.attention(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm_mlp(x)), approximate="tanh"))
        return hidden


class Gpt(BaseModel):
    """A language model with tied embeddings; with the default arguments, it has the size of GPT-2 (124 million)."""

    def __init__(
        self, layers: int = 12, width: int = 768, heads: int = 12, length: int = 1024, words: int = _VOCABULARY
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        self.head.weight = self.words.weight
        self.register_buffer("order", torch.arange(length), persistent=False)
        self.order: Tensor

    def forward(self, words: Tensor, targets: Tensor, mode: str = "tensor") -> Any:  # type: ignore[override]
        """Return the loss or the scores of the next words."""
        x = self.words(words) + self.places(self.order[: words.shape[1]])
        for block in self.blocks:
            x = block(x)
        scores = self.head(self.norm(x))
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())}
        return scores


@final
class Images(Dataset[tuple[Tensor, Tensor]]):
    """Random images, which are stored as bytes and converted when they are read, as after decoding a file."""

    def __init__(self, size: int = 224, classes: int = 1000, stored: int = 256) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randint(256, (stored, 3, size, size), dtype=torch.uint8, generator=generator)
        self._targets = torch.randint(classes, (stored,), generator=generator)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        place = index % len(self._images)
        return self._images[place].float().div_(255), self._targets[place]


@final
class Texts(Dataset[tuple[Tensor, Tensor]]):
    """Random sequences of words, and the same sequences shifted by one."""

    def __init__(self, length: int = 1024, words: int = _VOCABULARY) -> None:
        self._words = torch.randint(words, (1024 * length + 1,), generator=torch.Generator().manual_seed(0))
        self._length = length

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        begin = index % 1024 * self._length
        part = self._words[begin : begin + self._length + 1]
        return part[:-1], part[1:]


_SGD: Final = {"type": "SGD", "lr": 1e-3, "momentum": 0.9}
_ADAMW: Final = {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.1}
JOBS: Final[Mapping[str, Job]] = {
    "ResNet-50": Job(model=ResNet, dataset=Images, batch_size=64, optimizer=_SGD),
    "GPT-124M": Job(model=Gpt, dataset=Texts, batch_size=8, optimizer=_ADAMW),
}
# The same code with small sizes, for the test of the benchmark.
TINY_JOBS: Final[Mapping[str, Job]] = {
    "ResNet-50": Job(
        model=lambda: ResNet((1, 1), 4, 10), dataset=lambda: Images(32, 10, 8), batch_size=2, optimizer=_SGD
    ),
    "GPT-124M": Job(model=lambda: Gpt(2, 16, 2, 8, 32), dataset=lambda: Texts(8, 32), batch_size=2, optimizer=_ADAMW),
}
