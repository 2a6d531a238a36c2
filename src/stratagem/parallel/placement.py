"""How a model is placed on one or more devices: the only axis on which strategies differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.distributed import ProcessGroup

from stratagem.distributed import World
from stratagem.optim import BaseOptimWrapper, OptimWrapperDict
from stratagem.optim.gradient_policy import NO_CONTEXT, GradientPolicy

__all__ = ["AnyOptim", "Placed", "Placement", "Steps"]

AnyOptim = BaseOptimWrapper | OptimWrapperDict


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What a placement calls when it needs it, each once: back ends differ in the order.

    Attributes:
        init_and_sync: initializes the weights and broadcasts those of rank 0. Collective.
        init_local: initializes the weights on this rank only.
        compile: compiles what was asked for.
        make_optim: makes the optimizers of the model; None where there are none.
    """

    init_and_sync: Callable[[nn.Module], nn.Module]
    init_local: Callable[[nn.Module], nn.Module]
    compile: Callable[[nn.Module], nn.Module]
    make_optim: Callable[[nn.Module], AnyOptim] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A model where it trains, and its optimizers where they were asked for."""

    model: nn.Module
    optim: AnyOptim | None = None


class Placement(ABC):
    """One way to place a model.

    Attributes:
        sharded: whether ranks hold parts of the model: the forward pass is collective, so that all ranks must make as
            many, and state is read slice by slice.
        full_state: whether what ranks have in parts is put together on rank 0 for a checkpoint, which else every rank
            writes its own parts of.
        has_gradients: whether gradients that wait for their update lie in the parameters' ``grad``.
        params_are_master_weights: whether the model's parameters hold the full-precision weights between steps.
        params_accept_writes: whether training continues from values that are written into the parameters.
    """

    sharded: ClassVar[bool] = False
    has_gradients: bool = True
    full_state: bool = False
    params_are_master_weights: bool = True
    params_accept_writes: bool = True

    def construction(self, world: World) -> AbstractContextManager[object]:
        """Return the context in which a model is built from its configuration, such as another device."""
        return NO_CONTEXT

    @abstractmethod
    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        """Initialise, move, wrap and compile ``model`` and make its optimizers, in the order that this back end needs.

        Collective.
        """

    def dp_rank(self, world: World) -> int:
        """Return the data-parallel rank: the index of the part of the data that this rank processes."""
        return world.rank

    def dp_size(self, world: World) -> int:
        """Return the data-parallel size: the number of parts of the data."""
        return world.size

    @property
    def dp_group(self) -> ProcessGroup | None:
        """The data-parallel group of this rank: ranks that together process all data; None for all ranks."""
        return None

    def bind(  # noqa: B027 -- nothing to do is the usual case
        self, optim: AnyOptim, model: nn.Module
    ) -> None:
        """Let optimizers that were built before the model was placed step the placed parameters, or refuse them.

        Raises:
            PlacementError: if they cannot.
        """

    def gradient_policy(self, model: nn.Module, *, accumulates: bool) -> GradientPolicy:
        """Return how the gradients of the placed model are synchronized; the same for each of its optimizers.

        Args:
            model: the placed model.
            accumulates: whether one of its optimizers accumulates gradients over several micro-batches.
        """
        return GradientPolicy(always_set_grad_sync=accumulates)

    def note_restored_gradients(  # noqa: B027 -- nothing to do is the usual case
        self, model: nn.Module
    ) -> None:
        """Note that a checkpoint restored this rank's gradients of an accumulation window."""

    def global_numel(self, parameter: nn.Parameter) -> int:
        """Return the number of elements of a parameter of the placed model, over all ranks that share it."""
        return parameter.numel()

    @abstractmethod
    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the model without what :meth:`place` put around it."""
