"""Restore the training state after a trial."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stratagem.data import EpochLoader
from stratagem.errors import PlacementError
from stratagem.strategies import BaseStrategy
from stratagem.utils import generator_state, restore_generator_state

__all__ = ["isolate_rng", "preserve_training_state"]


@contextmanager
def isolate_rng() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch on exit."""
    state = generator_state()
    try:
        yield
    finally:
        restore_generator_state(state)


@contextmanager
def preserve_training_state(strategy: BaseStrategy, dataloader: EpochLoader) -> Iterator[None]:
    """Restore parameters, buffers, training modes, optimizer state and random states on exit.

    The copies of the weights are in host memory, so they do not take device memory. Gradients of an incomplete
    accumulation window are discarded. Other state of the model is not restored.

    Raises:
        PlacementError: if the model does not hold the master weights.
    """
    if not strategy.params_accept_writes:
        raise PlacementError(
            f"The weights must be restored after the trial, but {type(strategy).__name__} stores them where this is not "
            "possible. Use another strategy for the search, such as DDPStrategy or FSDPStrategy."
        )
    model, optim = strategy.model, strategy.optim_wrapper
    optim.discard_accumulation()
    tensors = [*model.parameters(), *model.buffers()]
    kept = [tensor.detach().cpu().clone() for tensor in tensors]
    modes = [(module, module.training) for module in model.modules()]
    optim_state = copy.deepcopy(optim.state_dict())
    generator = dataloader.loader.generator
    order = None if generator is None else generator.get_state()
    with isolate_rng():
        try:
            yield
        finally:
            optim.discard_accumulation()
            optim.zero_grad()
            optim.load_state_dict(optim_state)
            _copy(tensors, kept)
            for module, training in modes:
                module.training = training
            if generator is not None and order is not None:
                generator.set_state(order)


def _copy(tensors: list[nn.Parameter | torch.Tensor], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
