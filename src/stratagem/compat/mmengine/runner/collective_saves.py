"""Decide whether all ranks take part in a save."""

from __future__ import annotations

from itertools import count
from typing import Any, Final

from torch.distributed.distributed_c10d import PrefixStore

from stratagem.compat.mmengine.hooks import CheckpointHook
from stratagem.distributed import get_dist_info
from stratagem.distributed.polling import poll_until
from stratagem.errors import CheckpointError
from stratagem.utils.torch_private import default_store

__all__ = ["is_called_on_all_ranks", "require_all_ranks"]

# The ranks are at the same position of the training, so they do not arrive at a save minutes apart.
_TIMEOUT_S: Final = 120.0
_LONGEST_PAUSE_S: Final = 0.02

# The methods that save are called on all ranks, and so are the methods that they call, unless a subclass overrides one of them.
_STAGES: Final = ("after_train_epoch", "after_train_iter", "after_val_epoch", "after_val")
_STEPS: Final = (
    *_STAGES,
    "_save_checkpoint",
    "_save_checkpoint_with_step",
    "_save_best_checkpoint",
    "_update_best",
    "every_n_epochs",
    "every_n_train_iters",
    "is_last_train_epoch",
    "is_last_train_iter",
)
_numbers = count()


def is_called_on_all_ranks(method: Any) -> bool:
    """Return whether a method of a hook that saves, and is being called, does so on all ranks.

    This is true of :class:`CheckpointHook` and its subclasses that leave its methods unchanged. All other code may save on rank
    0 only, as is usual with MMEngine: with the decorator ``master_only``, or under a condition.

    Args:
        method: the method; None outside of hooks.
    """
    function, hook = getattr(method, "__func__", None), getattr(method, "__self__", None)
    if not isinstance(hook, CheckpointHook) or function not in [getattr(CheckpointHook, name) for name in _STAGES]:
        return False
    return all(getattr(type(hook), name) is getattr(CheckpointHook, name) for name in _STEPS)


def require_all_ranks(path: str) -> None:
    """Wait until all ranks have called this function. Collective.

    Args:
        path: the checkpoint to be saved, for the error message.

    Raises:
        CheckpointError: if a rank does not call it within two minutes.
    """
    rank, size = get_dist_info()
    # A separate connection, because waiting on the group's connection would block other threads.
    store = PrefixStore(f"mmengine_save/{next(_numbers)}", default_store().clone())
    store.set(str(rank), path)
    keys = {each: str(each) for each in range(size)}
    if poll_until(lambda: store.check(list(keys.values())), _TIMEOUT_S, longest_pause_s=_LONGEST_PAUSE_S):
        return
    missing = [each for each, key in keys.items() if not store.check([key])]
    raise CheckpointError(
        f"{path}: rank {rank} saves, but rank {', '.join(map(str, missing))} does not. The model is sharded, so "
        "save_checkpoint must be called on all ranks: do not call it in a function decorated with master_only, or if "
        "is_main_process() is true. Rank 0 writes the file in any case."
    )
