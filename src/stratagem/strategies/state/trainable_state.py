"""Save and restore which parameters of a model are trainable."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import nn

from stratagem.checkpoint import unwrapped_name
from stratagem.parallel.trainable import TrainableChange

__all__ = ["apply_trainable", "find_trainable_difference", "read_trainable"]


def read_trainable(model: nn.Module) -> dict[str, Any]:
    """Return the number of trainable parameters and the names of the frozen ones."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # The count also distinguishes a model without frozen parameters from a checkpoint that does not contain this entry.
    return {"count": sum(flags.values()), "frozen": [name for name, trainable in flags.items() if not trainable]}


def find_trainable_difference(
    saved: Mapping[str, Any] | None, model: nn.Module, *, new: Container[str] = ()
) -> TrainableChange:
    """Return the change that makes the parameters trainable or frozen as they were when the checkpoint was saved.

    Args:
        saved: the value that :func:`read_trainable` returned; None if an older version saved the checkpoint.
        model: the unwrapped model.
        new: the parameters that the checkpoint does not contain; they are not changed.
    """
    if saved is None:
        return TrainableChange((), ())
    frozen = {unwrapped_name(name) for name in saved.get("frozen", ())}
    found = {
        name: unwrapped_name(name) in frozen
        for name, parameter in model.named_parameters()
        if name not in new and parameter.requires_grad == (unwrapped_name(name) in frozen)
    }
    return TrainableChange(
        tuple(name for name, freeze in found.items() if not freeze),
        tuple(name for name, freeze in found.items() if freeze),
    )


def apply_trainable(change: TrainableChange, model: nn.Module) -> None:
    """Set ``requires_grad`` of the parameters that a change names."""
    parameters = dict(model.named_parameters())
    for names, trainable in ((change.unfrozen, True), (change.frozen, False)):
        for name in names:
            parameters[name].requires_grad_(trainable)
