"""Equal numbers of forward passes on every rank, where a forward pass is collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stratagem.data import EpochLoader
from stratagem.dist import all_reduce
from stratagem.errors import PlacementError
from stratagem.train.run import Run

__all__ = ["keep_pace", "most_batches"]


def most_batches(run: Run, loader: EpochLoader) -> int:
    """Return the most batches that a rank has, if all ranks must make the same number of forward passes; else 0.

    Also 0 if every rank reads all batches, and so sees at the end whether it lacks one. Collective.

    Raises:
        PlacementError: if the data do not say how many they are.
    """
    if not run.strategy.collective_forward or loader.share is not None:
        return 0
    if loader.length is None:
        raise PlacementError(
            f"{type(loader.dataset).__name__} has no length, and under {type(run.strategy).__name__} all ranks must make as "
            "many forward passes. Give the evaluation's dataset a __len__, or evaluate the checkpoint on one device."
        )
    most = torch.tensor(loader.length)
    all_reduce(most, "max")
    return int(most.item())


def keep_pace(step: Callable[[Any], Any], loader: EpochLoader, last: Any, missing: int) -> None:
    """Make the forward passes that other ranks need from this one, which has no data left; their results are discarded.

    Args:
        step: makes a forward pass of a batch.
        loader: where the data come from.
        last: the last batch that this rank had; None if it had none.
        missing: how many are to be made, as far as the length of the data shows.
    """
    if loader.leftover is not None:
        step(loader.leftover)
    if missing <= 0:
        return
    if last is None:
        collate = loader.collate
        last = loader.dataset[0] if collate is None else collate([loader.dataset[0]])
    for _ in range(missing):
        step(last)
