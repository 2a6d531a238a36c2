"""Convert parts of the state of a run to and from values that checkpoints can contain, and compare such values."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from stratagem.checkpoint.tree.flatten import flatten_state
from stratagem.compat.mmengine.logging import HistoryBuffer
from stratagem.errors import CheckpointError

__all__ = [
    "by_index",
    "equal_values",
    "history_arguments",
    "load_scheduler_states",
    "plain_history",
    "scheduler_states",
    "storable",
]


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


def equal_values(saved: Any, own: Any) -> bool:
    """Return whether two values are equal; arrays may have become tensors, and tuples lists."""
    if isinstance(own, Mapping):
        return (
            isinstance(saved, Mapping)
            and saved.keys() == own.keys()
            and all(equal_values(saved[key], own[key]) for key in own)
        )
    if isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            return False
        return all(equal_values(*pair) for pair in zip(saved, own, strict=True))
    return bool(np.array_equal(np.asarray(saved), np.asarray(own)))


def by_index(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer state whose keys are the indices of parameters instead of their names, as in torch's state dicts."""
    if "param_groups" not in state:
        return {name: by_index(each) if isinstance(each, Mapping) else each for name, each in state.items()}
    names = [name for group in state["param_groups"] for name in group["params"]]
    index = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in state["param_groups"]]
    slots = {index.get(name, name): value for name, value in state["state"].items()}
    return {**state, "state": slots, "param_groups": groups}


def storable(value: Any, where: str, logger: logging.Logger) -> Any:
    """Return a value without the entries that cannot be read without executing code from the file; log them.

    Args:
        value: a part of a checkpoint.
        where: its name in the checkpoint.
        logger: the logger for warnings.

    Raises:
        CheckpointError: if the value is not a mapping, and cannot be stored.
    """
    try:
        flatten_state(value)
    except CheckpointError as error:
        if not isinstance(value, Mapping):
            raise
        kept: dict[Any, Any] = {}
        for key, entry in value.items():
            try:
                kept[key] = storable(entry, f"{where}.{key}", logger)
            except CheckpointError:
                logger.warning(f"The checkpoint does not contain {where}.{key}, a {type(entry).__name__}: {error}")
        return kept
    return value
