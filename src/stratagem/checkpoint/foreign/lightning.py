"""Read Lightning checkpoints (``state_dict``, ``optimizer_states``, ``loops``, ``lr_schedulers``, ``callbacks``, ...).

Weights, optimizer state and training progress are converted. Scheduler states are not, because the state of a torch
scheduler includes the parameters of its schedule, which Stratagem reads from the configuration.
"""

from __future__ import annotations

from typing import Any

from stratagem.checkpoint.foreign.normalize import LazyCheckpoint, Parts, get_nested

__all__ = ["lightning_parts", "is_lightning"]

_CONVERTED = {"optimizer_states", "lr_schedulers", "loops", "callbacks", "state_dict", "epoch", "global_step"}


def is_lightning(checkpoint: LazyCheckpoint) -> bool:
    """Return whether Lightning wrote the file."""
    return "pytorch-lightning_version" in checkpoint.entries and "state_dict" in checkpoint.entries


def lightning_parts(checkpoint: LazyCheckpoint) -> Parts:
    """Return the parts that can be used, including the file's other entries."""
    parts = {key: checkpoint.reader(key) for key in checkpoint.entries if key not in _CONVERTED}
    parts["state_dict"] = checkpoint.reader("state_dict")
    parts["meta"] = lambda: _position(checkpoint)
    states = checkpoint.entries.get("optimizer_states")
    if isinstance(states, list) and states:
        parts["optimizer"] = lambda: _optimizers(states, checkpoint)
    return parts


def _optimizers(states: list[Any], checkpoint: LazyCheckpoint) -> Any:
    """Return the optimizer state; for several optimizers, a dict keyed by index, since Lightning does not name them."""
    read = [checkpoint.read(state, f"optimizer_states/{number}") for number, state in enumerate(states)]
    return read[0] if len(read) == 1 else {str(number): state for number, state in enumerate(read)}


def _position(checkpoint: LazyCheckpoint) -> dict[str, int]:
    """Return the training progress: finished epochs, iterations, and finished batches of the current epoch.

    It is read from the loops, because Lightning's ``epoch`` is the current epoch and ``global_step`` counts optimizer steps.
    """
    loop = get_nested(checkpoint.entries, "loops", "fit_loop")
    epochs = get_nested(loop, "epoch_progress", "current")
    batches = get_nested(loop, "epoch_loop.batch_progress")
    done, begun = get_nested(epochs, "processed"), get_nested(epochs, "ready")
    total, inside = get_nested(batches, "total", "processed"), get_nested(batches, "current", "processed")
    if not all(isinstance(count, int) for count in (done, begun, total, inside)):
        return {}
    return {"epoch": done, "iter": total, "batch_in_epoch": inside if begun > done else 0}
