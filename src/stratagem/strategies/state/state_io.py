"""How the state of a placed model and its optimizers is read for a checkpoint, and written from one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import nn

from stratagem.checkpoint import LoadReport, StateTree, load_state_dict
from stratagem.optim import all_finite
from stratagem.parallel import AnyOptim
from stratagem.strategies.state.optim_state import read_optim, write_optim

__all__ = ["StateAccess", "TorchState"]


class StateAccess(ABC):
    """Reads and writes state under the bare model's names, which is what lets any strategy resume what another saved.

    Tensors that are spread over ranks are leaves of which each rank gives what it has: a ``DTensor``, or
    :class:`~stratagem.checkpoint.ShardedTensorState`. Nothing is gathered or copied to be read. What is written comes in whole
    tensors, mapped from a file: each rank reads what it needs of them.
    """

    @abstractmethod
    def model_state(self, model: nn.Module) -> StateTree:
        """Return parameters and buffers by name; of parameters that train in low precision their masters. Collective."""

    @abstractmethod
    def load_model_state(
        self,
        model: nn.Module,
        state: Mapping[str, Any],
        *,
        strict: bool,
        revise_keys: Sequence[tuple[str, str]],
        allow_missing: Sequence[str],
    ) -> LoadReport:
        """Put a model's state into place; see :func:`~stratagem.checkpoint.load_state_dict`. Collective.

        Raises:
            CheckpointMismatchError: as there; nothing is changed then.
        """

    @abstractmethod
    def optim_state(self, optim: AnyOptim, model: nn.Module) -> StateTree:
        """Return the optimizers' state by the names of the parameters. Collective."""

    @abstractmethod
    def load_optim_state(
        self, optim: AnyOptim, state: Mapping[str, Any], model: nn.Module, *, allow_missing: Sequence[str]
    ) -> None:
        """Put the optimizers' state into place. Collective.

        Raises:
            CheckpointMismatchError: if it belongs to other optimizers or other parameter groups.
        """

    @abstractmethod
    def weights_are_finite(self, model: nn.Module) -> bool:
        """Tell it of every value of the parameters that this rank has."""


@final
class TorchState(StateAccess):
    """State that lies in the modules and the optimizers themselves, as torch keeps it."""

    def model_state(self, model: nn.Module) -> StateTree:
        return model.state_dict()

    def load_model_state(
        self,
        model: nn.Module,
        state: Mapping[str, Any],
        *,
        strict: bool,
        revise_keys: Sequence[tuple[str, str]],
        allow_missing: Sequence[str],
    ) -> LoadReport:
        return load_state_dict(model, state, strict=strict, revise_keys=revise_keys, allow_missing=allow_missing)

    def optim_state(self, optim: AnyOptim, model: nn.Module) -> StateTree:
        return read_optim(optim, model)

    def load_optim_state(
        self, optim: AnyOptim, state: Mapping[str, Any], model: nn.Module, *, allow_missing: Sequence[str]
    ) -> None:
        write_optim(optim, state, model, allow_missing=allow_missing)

    def weights_are_finite(self, model: nn.Module) -> bool:
        return all_finite(model.parameters())
