"""Small models, data and hand-written loops for the tests on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stratagem.model import BaseModel

CLASSES: Final = 5


class Classifier(BaseModel):
    """A model with cross entropy."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = "tensor") -> Any:
        scores = self.layers(inputs)
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(scores, targets)}
        return {"preds": scores, "target": targets} if mode == "predict" else scores


class Encoder(nn.Module):
    """A transformer encoder with two layers, without dropout, over sequences of 16 vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(inputs).mean(1))
        return scores


def mlp() -> Classifier:
    """Three linear layers for 32 features."""
    return Classifier(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, CLASSES)))


def cnn() -> Classifier:
    """Two convolutions with BatchNorm for images of 3 x 16 x 16."""
    return Classifier(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        )
    )


def transformer() -> Classifier:
    """The encoder for sequences of 16 x 32."""
    return Classifier(Encoder())


SHAPES: Final[Mapping[str, tuple[int, ...]]] = {"mlp": (32,), "cnn": (3, 16, 16), "transformer": (16, 32)}
MODELS: Final[Mapping[str, Callable[[], Classifier]]] = {"mlp": mlp, "cnn": cnn, "transformer": transformer}


class Samples(Dataset[tuple[Tensor, int]]):
    """Random samples of a shape, whose class depends on their mean."""

    def __init__(self, shape: tuple[int, ...], length: int = 96) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(length, *shape, generator=generator)
        self.targets = torch.randint(CLASSES, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.targets[index])

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Return all samples in their order, in batches."""
        return list(zip(self.inputs.split(size), self.targets.split(size), strict=True))
