"""Gather the sharded tensors of a state tree on the first rank."""

from __future__ import annotations

import torch
from torch import Tensor

from stratagem.checkpoint.tree.flatten import StateTree, StoredTensor, flatten_state, unflatten_tree
from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState
from stratagem.distributed import Team
from stratagem.tensors.dtensor import is_sharded, whole

__all__ = ["gather_tensor", "gather_tree"]


def gather_tree(tree: StateTree, team: Team) -> StateTree:
    """Return the tree with unsharded CPU tensors on the first rank; other ranks get empty tensors for sharded ones.

    Collective over ``team``: sharded tensors are gathered one at a time.

    Raises:
        CheckpointError: if a value has a type that checkpoints do not support.
    """
    tensors, skeleton = team.own(lambda: flatten_state(tree))
    gathered = {name: gather_tensor(tensor, team) for name, tensor in tensors.items()}
    if team.leads:
        gathered = {name: tensor.to("cpu") for name, tensor in gathered.items()}
    gathered_tree: StateTree = unflatten_tree(gathered, skeleton)
    return gathered_tree


def gather_tensor(tensor: StoredTensor, team: Team) -> Tensor:
    """Return an unsharded tensor; a sharded one is gathered to the CPU of the first rank and is empty on other ranks.

    Collective for sharded tensors.
    """
    if isinstance(tensor, ShardedTensorState):
        shards_of_ranks = team.gather(tensor.to_cpu().shards)
        return tensor.assemble(shards_of_ranks) if team.leads else torch.empty(0, dtype=tensor.dtype)
    if not is_sharded(tensor):
        return tensor
    gathered = whole(tensor)
    return gathered.to("cpu") if team.leads else gathered.new_empty(0)
