"""An optimizer whose state is sharded across the ranks of a replicated model (ZeRO stage 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer as TorchZeroRedundancyOptimizer

from stratagem.distributed import broadcast_object, get_rank, is_distributed
from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.optim.implementation import implementation_options
from stratagem.registry import OPTIMIZERS
from stratagem.utils.names import did_you_mean

__all__ = ["ZeroRedundancyOptimizer"]


@final
class ZeroRedundancyOptimizer(TorchZeroRedundancyOptimizer):
    """Torch's ``ZeroRedundancyOptimizer`` (ZeRO stage 1, arXiv:1910.02054) with a state dict on every rank.

    Each rank updates its shard of the parameters with the fastest implementation and broadcasts it to the other ranks.

    Args:
        params: parameters or parameter groups.
        optimizer_type: the registered name of the local optimizer.
        options: the arguments of the local optimizer and of torch's ``ZeroRedundancyOptimizer``.

    Raises:
        ConfigValueError: if the process group is not initialized.
        ConfigKeyError: if the optimizer is unknown.
    """

    def __init__(self, params: Iterable[Any], optimizer_type: str, **options: Any) -> None:
        if not is_distributed():
            raise ConfigValueError(
                "ZeroRedundancyOptimizer shards its state across the ranks of a process group, but no process group "
                f"is initialized. Use {optimizer_type} in a single process, or start several processes with torchrun."
            )
        optimizer_class: Any = OPTIMIZERS.get(optimizer_type)
        if optimizer_class is None:
            raise ConfigKeyError(
                f"Unknown optimizer_type={optimizer_type!r}. {did_you_mean(optimizer_type, OPTIMIZERS.names())}"
            )
        groups = list(params)
        options = {**options, **implementation_options(optimizer_class, options, _tensors(groups))}
        super().__init__(groups, optimizer_class, **options)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parameters, on every rank. Collective."""
        self.consolidate_state_dict(to=0)
        state: dict[str, Any] = super().state_dict() if get_rank() == 0 else {}
        return broadcast_object(state)


def _tensors(groups: Iterable[Any]) -> list[Tensor]:
    return [tensor for group in groups for tensor in (group["params"] if isinstance(group, Mapping) else [group])]
