"""Put the tensors of a tree together that are spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from stratagem.checkpoint.tree.flatten import StateTree, StoredTensor, flatten_state, unflatten_tree
from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState
from stratagem.distributed import Team
from stratagem.tensors.dtensor import is_sharded, whole

__all__ = ["gather_tensor", "gather_tree"]


def gather_tree(tree: StateTree, team: Team) -> StateTree:
    """Return the tree with every tensor whole on the CPU, on the first rank; on the others nothing is moved or kept for it.

    Collective over ``team``: tensors that are spread over ranks are put together one after the other.

    Raises:
        CheckpointError: if a value is of a kind that no checkpoint can hold.
    """
    tensors, skeleton = team.own(lambda: flatten_state(tree))
    gathered = {name: gather_tensor(tensor, team) for name, tensor in tensors.items()}
    if team.leads:
        gathered = {name: tensor.to("cpu") for name, tensor in gathered.items()}
    whole_tree: StateTree = unflatten_tree(gathered, skeleton)
    return whole_tree


def gather_tensor(tensor: StoredTensor, team: Team) -> Tensor:
    """Return a tensor in one piece; one that is spread over ranks comes to the first rank's CPU, and is empty elsewhere.

    Collective for one that is spread over ranks.
    """
    if isinstance(tensor, ShardedTensorState):
        told = team.gather(tensor.on_cpu().shards)
        return tensor.assemble(told) if team.leads else torch.empty(0, dtype=tensor.dtype)
    if not is_sharded(tensor):
        return tensor
    gathered = whole(tensor)
    return gathered.to("cpu") if team.leads else gathered.new_empty(0)
