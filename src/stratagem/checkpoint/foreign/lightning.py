"""Checkpoints of Lightning: ``state_dict``, ``optimizer_states``, ``loops``, ``lr_schedulers``, ``callbacks`` and more.

Weights, one optimizer's state and the position are taken over. Its schedules are torch's own, whose state holds their
curve and counts otherwise than ours; they are left to the configuration.
"""

from __future__ import annotations

from typing import Any

from stratagem.checkpoint.foreign.normalize import LazyCheckpoint, Parts, under

__all__ = ["lightning_parts", "of_lightning"]

_LEFT = {"optimizer_states", "lr_schedulers", "loops", "callbacks", "state_dict", "epoch", "global_step"}


def of_lightning(contents: LazyCheckpoint) -> bool:
    """Tell whether Lightning wrote the file."""
    return "pytorch-lightning_version" in contents.root and "state_dict" in contents.root


def lightning_parts(contents: LazyCheckpoint) -> Parts:
    """Return the parts that can be taken over, the file's other entries among them."""
    parts = {key: contents.part(key) for key in contents.root if key not in _LEFT}
    parts["state_dict"] = contents.part("state_dict")
    parts["meta"] = lambda: _position(contents)
    states = contents.root.get("optimizer_states")
    if isinstance(states, list) and states:
        parts["optimizer"] = lambda: _optimizers(states, contents)
    return parts


def _optimizers(states: list[Any], contents: LazyCheckpoint) -> Any:
    """Return the state of the only optimizer; of several by their numbers, since Lightning gives them no names."""
    read = [contents.read(state, f"optimizer_states/{number}") for number, state in enumerate(states)]
    return read[0] if len(read) == 1 else {str(number): state for number, state in enumerate(read)}


def _position(contents: LazyCheckpoint) -> dict[str, int]:
    """Return what is done, in our units: whole epochs, iterations, and batches of an epoch under way.

    Lightning's ``epoch`` is the number of the epoch under way and ``global_step`` counts optimizer steps; the loops
    count what was processed.
    """
    loop = under(contents.root, "loops", "fit_loop")
    epochs = under(loop, "epoch_progress", "current")
    batches = under(loop, "epoch_loop.batch_progress")
    done, begun = under(epochs, "processed"), under(epochs, "ready")
    total, inside = under(batches, "total", "processed"), under(batches, "current", "processed")
    if not all(isinstance(count, int) for count in (done, begun, total, inside)):
        return {}
    return {"epoch": done, "iter": total, "batch_in_epoch": inside if begun > done else 0}
