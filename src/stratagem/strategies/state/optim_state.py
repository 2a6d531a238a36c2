"""The state of one or several optimizer wrappers, by the names of the bare model's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from stratagem.checkpoint import optimizer_by_index, optimizer_by_name, parameter_names
from stratagem.errors import CheckpointMismatchError
from stratagem.optim import OptimWrapperDict
from stratagem.parallel import AnyOptim
from stratagem.tensors.dtensor import is_sharded, shard_like

__all__ = ["read_optim", "require_one_optimizer", "write_optim"]


def read_optim(optim: AnyOptim, model: nn.Module) -> dict[str, Any]:
    """Return the optimizer's state by parameter name; for several optimizers, name -> state."""
    if isinstance(optim, OptimWrapperDict):
        return {name: read_optim(wrapper, model) for name, wrapper in optim.items()}
    return optimizer_by_name(optim.state_dict(), parameter_names(optim.optimizer, model))


def write_optim(
    optim: AnyOptim, state: Mapping[str, Any], model: nn.Module, *, allow_missing: Sequence[str] = ()
) -> None:
    """Load what :func:`read_optim` gave, or what torch's own optimizer gives, by index.

    Parameters whose names a pattern of ``allow_missing`` matches in whole need not be in it; they begin without state.

    Raises:
        CheckpointMismatchError: if it belongs to other optimizers or other parameter groups.
    """
    if isinstance(optim, OptimWrapperDict):
        names = list(optim.keys())
        if set(state) != set(names):
            raise CheckpointMismatchError(
                f"The checkpoint has optimizers {sorted(state)}, this run has {sorted(names)}. Name them alike, or resume "
                "with resume_optimizer=False."
            )
        for name in names:
            write_optim(optim[name], state[name], model, allow_missing=allow_missing)
        return
    require_one_optimizer(state)
    names_here = parameter_names(optim.optimizer, model)
    by_index = optimizer_by_index(state, names_here, optim.optimizer.param_groups, allow_missing=allow_missing)
    parameters = [parameter for group in optim.optimizer.param_groups for parameter in group["params"]]
    own = {
        index: {key: _own(value, parameters[index]) for key, value in slots.items()}
        for index, slots in by_index["state"].items()
    }
    optim.load_state_dict({**by_index, "state": own})


def require_one_optimizer(state: Mapping[str, Any]) -> None:
    """Refuse the state of several optimizers in a run that has one.

    Raises:
        CheckpointMismatchError: if it is that.
    """
    if "param_groups" not in state:
        raise CheckpointMismatchError(
            f"The checkpoint's optimizer state has {sorted(map(str, state))}, and no parameter groups: it is that of several "
            "optimizers, and this run has one. Resume with resume_optimizer=False."
        )


def _own(value: Any, parameter: Tensor) -> Any:
    """Return a value in memory of its own: the optimizer keeps it, and those of a checkpoint are mapped from its file.

    A moment is spread over ranks as its parameter is; each reads its own part.
    """
    if not isinstance(value, Tensor):
        return value
    if is_sharded(parameter) and value.shape == parameter.shape and not is_sharded(value):
        return shard_like(value, parameter, copy=True)
    return value.clone()
