"""Gather the sharded tensors of a state tree on the first rank."""

from __future__ import annotations

import torch
from torch import Tensor

from stratagem.checkpoint.tree.flatten import StateTree, StoredTensor, flatten_state, unflatten_tree
from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState
from stratagem.distributed import RankGroup
from stratagem.tensors.dtensor import full_tensor, is_sharded

__all__ = ["gather_tensor", "gather_tree"]


def gather_tree(tree: StateTree, rank_group: RankGroup) -> StateTree:
    """Return the tree on the first rank with all tensors unsharded and on the CPU.

    Collective over ``rank_group``: sharded tensors are gathered one at a time. On other ranks they are empty in the result.

    Raises:
        CheckpointError: if a value has a type that checkpoints do not support.
    """
    tensors, skeleton = rank_group.run_checked(lambda: flatten_state(tree))
    gathered = {name: gather_tensor(tensor, rank_group) for name, tensor in tensors.items()}
    if rank_group.is_rank0:
        gathered = {name: tensor.to("cpu") for name, tensor in gathered.items()}
    gathered_tree: StateTree = unflatten_tree(gathered, skeleton)
    return gathered_tree


def gather_tensor(tensor: StoredTensor, rank_group: RankGroup) -> Tensor:
    """Return an unsharded tensor; a sharded one is gathered to the CPU of the first rank and is empty on other ranks.

    Collective for sharded tensors.
    """
    if isinstance(tensor, ShardedTensorState):
        shards_of_ranks = rank_group.gather(tensor.to_cpu().shards)
        return tensor.assemble(shards_of_ranks) if rank_group.is_rank0 else torch.empty(0, dtype=tensor.dtype)
    if not is_sharded(tensor):
        return tensor
    gathered = full_tensor(tensor)
    return gathered.to("cpu") if rank_group.is_rank0 else gathered.new_empty(0)
