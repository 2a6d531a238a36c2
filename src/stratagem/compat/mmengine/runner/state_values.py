"""Convert parts of the state of a run to and from values that checkpoints can contain."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from stratagem.compat.mmengine.logging import HistoryBuffer

__all__ = ["history_arguments", "load_scheduler_states", "plain_history", "scheduler_states"]


def plain_history(history: HistoryBuffer) -> dict[str, Any]:
    """Return a history as tensors, which ``torch.load(weights_only=True)`` accepts."""
    values, counts = map(torch.from_numpy, history.data)
    return {"log_history": values, "count_history": counts, "max_length": history.max_length}


def history_arguments(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which a history is built from the result of :func:`plain_history`."""
    values, counts = (plain[name].cpu().numpy() for name in ("log_history", "count_history"))
    return {"log_history": values, "count_history": counts, "max_length": plain["max_length"]}


def scheduler_states(schedulers: Any) -> Any:
    """Return the states of schedulers: a list, or for several optimizers a dict of lists; an empty list without schedulers."""
    if isinstance(schedulers, Mapping):
        return {name: scheduler_states(each) for name, each in schedulers.items()}
    return [each.state_dict() for each in schedulers or ()]


def load_scheduler_states(schedulers: Any, states: Any, logger: logging.Logger) -> None:
    """Restore the states of schedulers; a different number of them is logged."""
    if isinstance(schedulers, Mapping):
        for name, each in schedulers.items():
            load_scheduler_states(each, states[name], logger)
        return
    if len(schedulers) != len(states):
        logger.warning("The checkpoint has %d parameter schedulers, but this run has %d.", len(states), len(schedulers))
    for scheduler, state in zip(schedulers, states, strict=False):
        scheduler.load_state_dict(state)
