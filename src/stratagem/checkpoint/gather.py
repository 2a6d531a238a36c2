"""Put the tensors of a tree together that are spread over ranks."""

from __future__ import annotations

from torch import Tensor

from stratagem.checkpoint.tree import StateTree, join_tree, split_tree
from stratagem.dist import Team
from stratagem.optim.sharded import is_sharded, whole

__all__ = ["gather_tree"]


def gather_tree(tree: StateTree, team: Team) -> StateTree:
    """Return the tree with every tensor whole on the CPU, on the first rank; on the others without content.

    Collective over ``team``: tensors that are spread over ranks are put together one after the other.

    Raises:
        CheckpointError: if a value is of a kind that no checkpoint can hold.
    """
    tensors, skeleton = team.own(lambda: split_tree(tree))
    gathered: StateTree = join_tree(
        {name: _gather(tensor, keep=team.leads) for name, tensor in tensors.items()}, skeleton
    )
    return gathered


def _gather(tensor: Tensor, *, keep: bool) -> Tensor:
    """Return a tensor in one piece on the CPU where it is kept; collective for one that is spread over ranks."""
    gathered = whole(tensor) if is_sharded(tensor) else tensor
    return gathered.to("cpu") if keep else gathered.new_empty(0)
