"""The state of a run that rank 0 can save without the other ranks."""

from __future__ import annotations

from pathlib import Path

from stratagem.checkpoint import StateTree
from stratagem.errors import CheckpointError
from stratagem.optim import OptimWrapperDict
from stratagem.optim.mixed import parts_of
from stratagem.optim.whole_updates import divides_state
from stratagem.strategies import BaseStrategy
from stratagem.utils import generator_state, with_canonical_keys

__all__ = ["rank0_state"]


def rank0_state(strategy: BaseStrategy, path: str | Path, *, save_optimizer: bool) -> StateTree:
    """Return the weights, the optimizer state, and the random states of rank 0, without communication.

    Gradients of an incomplete accumulation window, which differ between the ranks, are not included.

    Args:
        strategy: the strategy, which must not shard the model.
        path: the checkpoint, for error messages.
        save_optimizer: whether to include the state of the optimizer.

    Raises:
        CheckpointError: if the optimizer divides its state among the ranks.
    """
    model = strategy.unwrap_model()
    state: StateTree = {
        "meta": {"seed": strategy.seed, "world_size": strategy.world_size},
        "state_dict": with_canonical_keys(model.state_dict(), model),
        "generators": {"0": generator_state()},
    }
    optim = strategy.optim_wrapper_or_none
    if optim is None or not save_optimizer:
        return state
    wrappers = tuple(optim.values()) if isinstance(optim, OptimWrapperDict) else (optim,)
    if any(divides_state(part) for wrapper in wrappers for part in parts_of(wrapper.optimizer).values()):
        raise CheckpointError(
            f"{path}: the optimizer divides its state among the ranks, so rank 0 cannot save it alone. Save with "
            "CheckpointHook, or set save_optimizer=False."
        )
    state["optimizer"] = optim.state_dict()
    return state
