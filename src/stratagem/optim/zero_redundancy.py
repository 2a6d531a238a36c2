"""An optimizer whose state is spread over the ranks of a replicated model."""

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
    """torch's ZeRO stage 1 (arXiv:1910.02054), with the optimizer by name and a state that every rank can save.

    Each rank updates its part of the parameters with the fastest implementation there is, and all exchange them.

    Args:
        params: parameters or groups of them.
        optimizer_type: the name of the optimizer whose state is spread.
        options: the arguments of that optimizer, and of torch's ``ZeroRedundancyOptimizer``.

    Raises:
        ConfigValueError: if there is only one process without a process group.
        ConfigKeyError: if there is no optimizer of that name.
    """

    def __init__(self, params: Iterable[Any], optimizer_type: str, **options: Any) -> None:
        if not is_distributed():
            raise ConfigValueError(
                "ZeroRedundancyOptimizer spreads its state over ranks, and there is no process group. "
                f"Use {optimizer_type} itself in one process, or start several with torchrun."
            )
        optimizer_class: Any = OPTIMIZERS.get(optimizer_type)
        if optimizer_class is None:
            raise ConfigKeyError(
                f"optimizer_type={optimizer_type!r} is not known. {did_you_mean(optimizer_type, OPTIMIZERS.names())}"
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
