import torch
from torch.utils.data import TensorDataset

from stratagem import DATASETS


@DATASETS.register_module()
class Points(TensorDataset):
    """Random points in a square, and whether each of them is inside a circle."""

    def __init__(self, count: int, seed: int) -> None:
        xy = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        super().__init__(xy, (xy.norm(dim=1) < 0.8).long())
