"""Small models and data for the seeded bugs: images for a CNN, texts for a GRU, and tokens for the GPT example."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from stratagem.model import BaseModel

__all__ = ["GruClassifier", "Images", "SmallCnn", "Texts", "Tokens"]


@final
class Images(Dataset[tuple[Tensor, int]]):
    """Noise images of 8 x 8 pixels with a brighter quadrant, and its number."""

    def __init__(self, length: int = 32) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index))
        row, column = divmod(index % 4, 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
        return image, index % 4


@final
class Texts(Dataset[tuple[Tensor, int]]):
    """Sequences of 10 tokens, and whether their sum is odd."""

    def __init__(self, length: int = 32) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        tokens = torch.randint(0, 20, (10,), generator=torch.Generator().manual_seed(index))
        return tokens, int(tokens.sum()) % 2


@final
class Tokens(Dataset[Tensor]):
    """Sequences of 5 to 13 tokens."""

    def __init__(self, length: int = 32) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(0, 16, (5 + index % 9,), generator=torch.Generator().manual_seed(index))


class SmallCnn(BaseModel):
    """Two convolutions and a linear layer.

    Args:
        batch_norm: whether to normalize over the batch instead of groups of channels.
    """

    def __init__(self, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(64, 4)

    def forward(self, images: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return the loss or the logits."""
        hidden = functional.relu(self.second(functional.relu(self.norm(self.first(images)))))
        logits = self.head(hidden.flatten(1))
        return {"loss": functional.cross_entropy(logits, labels)} if mode == "loss" else logits


class GruClassifier(BaseModel):
    """An embedding, a GRU and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.gru = nn.GRU(12, 16, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, mode: str = "tensor") -> Any:
        """Return the loss or the logits."""
        outputs, _ = self.gru(self.embedding(tokens))
        logits = self.head(outputs[:, -1])
        return {"loss": functional.cross_entropy(logits, labels)} if mode == "loss" else logits
