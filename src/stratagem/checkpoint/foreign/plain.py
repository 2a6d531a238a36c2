"""Files that a script wrote with ``torch.save``: a bare state dict, or a dict with one under a usual name."""

from __future__ import annotations

from stratagem.checkpoint.foreign.normalize import LazyCheckpoint, Parts, is_optimizer_state, is_state_dict
from stratagem.checkpoint.restricted_unpickler import PickledObject
from stratagem.errors import CheckpointError

__all__ = ["plain_parts"]

_MODEL = ("model_state_dict", "model", "net", "network", "module")
_OPTIMIZER = ("optimizer_state_dict", "optim", "optimizer_state")


def plain_parts(contents: LazyCheckpoint) -> Parts:
    """Return the file's entries, with the weights as ``state_dict`` and the optimizer's state as ``optimizer``.

    Raises:
        CheckpointError: if several entries could be the weights.
    """
    root = contents.root
    renamed: dict[str, str] = {}
    if "state_dict" not in root:
        models = [key for key in _MODEL if is_state_dict(root.get(key))]
        if not models and is_state_dict(contents.whole):
            return {"state_dict": lambda: contents.read(contents.whole, "state_dict")}
        # A whole model in the place of its state: reading it is an error that says so.
        models = models or [key for key in _MODEL if isinstance(root.get(key), PickledObject)]
        if len(models) > 1:
            raise CheckpointError(
                f"it has weights under {' and '.join(map(repr, models))}. Save the one that is meant, as "
                "{'state_dict': ...}, in a file of its own."
            )
        renamed.update(dict.fromkeys(models, "state_dict"))
    if "optimizer" not in root:
        optimizers = [key for key in _OPTIMIZER if is_optimizer_state(root.get(key))]
        renamed.update(dict.fromkeys(optimizers[:1], "optimizer"))
    return {renamed.get(key, key): contents.part(key) for key in root}
