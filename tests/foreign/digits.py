"""The 1,797 digits from scikit-learn and a small network, for the jobs that differ only in their optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from stratagem import Runner, SupervisedModel
from tests.foreign.job import ByHand, Job

BATCH, EPOCHS = 64, 3


def data():
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    return TensorDataset(images[:1280], labels[:1280]), TensorDataset(images[1280:], labels[1280:])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 10))


def train(optim_of: Callable[[nn.Module], Any], batch_size: int, **options: Any):
    """Train with an optimizer object, a wrapper or a configuration."""
    training, validation = data()
    model = network()
    runner = Runner(
        model=SupervisedModel(model, nn.CrossEntropyLoss()),
        train_dataloader=DataLoader(training, batch_size, shuffle=True, generator=torch.Generator().manual_seed(1)),
        optim_wrapper=optim_of(model),
        train_cfg=dict(max_epochs=EPOCHS, val_interval=EPOCHS),
        val_dataloader=DataLoader(validation, 100),
        val_cfg=dict(),
        val_evaluator=MulticlassAccuracy(10),
        **options,
    )
    runner.train()
    optim = runner.run.optim_wrapper.optimizer
    if hasattr(optim, "eval"):
        optim.eval()
    return runner, model


def by_hand(optim_of: Callable[[nn.Module], torch.optim.Optimizer], record: ByHand, ranks: int = 1):
    """Run the same training in a plain loop, with the mean of the gradients of ``ranks`` parts of each batch."""
    training, validation = data()
    model = network()
    optim = optim_of(model)
    loader = DataLoader(training, BATCH, shuffle=True, generator=torch.Generator().manual_seed(1))
    switch = hasattr(optim, "eval")  # schedule-free optimizers have different weights for evaluation
    if switch:
        optim.train()
    for _ in range(EPOCHS):
        for images, labels in loader:
            record.samples((images, labels))
            for rank in range(ranks):
                loss = nn.functional.cross_entropy(model(images[rank::ranks]), labels[rank::ranks])
                (loss / ranks).backward()
            optim.step()
            optim.zero_grad()
    if switch:
        optim.eval()
    accuracy = MulticlassAccuracy(10)
    with torch.no_grad():
        for images, labels in DataLoader(validation, 100):
            accuracy.update(model(images), labels)
    record.metrics(multiclassaccuracy=accuracy.compute())
    return model


def optimizer_job(
    package: str,
    summary: str,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    configured: Callable[[nn.Module], Any] | None = None,
    **options: Any,
) -> Job:
    """Return the job for an optimizer; ``configured`` is what Stratagem gets, by default the optimizer itself."""
    return Job(
        packages=(package, "scikit-learn"),
        summary=summary,
        train=functools.partial(train, configured or optimizer),
        by_hand=functools.partial(by_hand, optimizer),
        batch=BATCH,
        **options,
    )
