"""Read the state of a placed model and its optimizers for a checkpoint, and load it from a checkpoint."""

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
    """Reads and writes state under the names of the unwrapped model, so that any strategy can resume from its checkpoints.

    A sharded tensor is represented by a ``DTensor`` or a :class:`~stratagem.checkpoint.ShardedTensorState` with the shard of
    this rank. Reading neither gathers nor copies tensors. The state to load consists of memory-mapped full tensors; each rank
    reads only the parts that it needs.
    """

    @abstractmethod
    def model_state(self, model: nn.Module) -> StateTree:
        """Return a dict of parameters and buffers, with master weights in place of low-precision parameters. Collective."""

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
        """Load the state of a model; see :func:`~stratagem.checkpoint.load_state_dict`. Collective.

        Raises:
            CheckpointMismatchError: as in ``load_state_dict``; the model is not changed.
        """

    @abstractmethod
    def optim_state(self, optim: AnyOptim, model: nn.Module) -> StateTree:
        """Return the optimizer state, keyed by parameter name. Collective."""

    @abstractmethod
    def load_optim_state(
        self, optim: AnyOptim, state: Mapping[str, Any], model: nn.Module, *, allow_missing: Sequence[str]
    ) -> None:
        """Load the optimizer state. Collective.

        Raises:
            CheckpointMismatchError: if the state belongs to different optimizers or parameter groups.
        """

    @abstractmethod
    def weights_are_finite(self, model: nn.Module) -> bool:
        """Return whether all parameter values on this rank are finite."""


@final
class TorchState(StateAccess):
    """Accesses state that is stored directly in torch modules and optimizers."""

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
