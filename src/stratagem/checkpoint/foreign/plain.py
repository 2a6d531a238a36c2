"""Read files that a script wrote with ``torch.save``: a state dict, or a dict that contains one under a common name."""

from __future__ import annotations

from stratagem.checkpoint.foreign.normalize import LazyCheckpoint, Parts, is_optimizer_state, is_state_dict
from stratagem.checkpoint.restricted_unpickler import PickledObject
from stratagem.errors import CheckpointError

__all__ = ["plain_parts"]

_MODEL = ("model_state_dict", "model", "net", "network", "module")
_OPTIMIZER = ("optimizer_state_dict", "optim", "optimizer_state")


def plain_parts(checkpoint: LazyCheckpoint) -> Parts:
    """Return the entries of a file, with the weights as ``state_dict`` and the optimizer state as ``optimizer``.

    Raises:
        CheckpointError: if more than one entry could be the weights.
    """
    root = checkpoint.entries
    renamed: dict[str, str] = {}
    if "state_dict" not in root:
        models = [key for key in _MODEL if is_state_dict(root.get(key))]
        if not models and is_state_dict(checkpoint.root):
            return {"state_dict": lambda: checkpoint.read(checkpoint.root, "state_dict")}
        # The entry may be a pickled module instead of a state dict; reading it raises an error with this explanation.
        models = models or [key for key in _MODEL if isinstance(root.get(key), PickledObject)]
        if len(models) > 1:
            raise CheckpointError(
                f"it contains weights under {' and '.join(map(repr, models))}. Save only one of them, as {{'state_dict': ...}}, "
                "to a separate file."
            )
        renamed.update(dict.fromkeys(models, "state_dict"))
    if "optimizer" not in root:
        optimizers = [key for key in _OPTIMIZER if is_optimizer_state(root.get(key))]
        renamed.update(dict.fromkeys(optimizers[:1], "optimizer"))
    return {renamed.get(key, key): checkpoint.reader(key) for key in root}
