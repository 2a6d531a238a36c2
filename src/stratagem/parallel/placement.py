"""How a model is put on its device or devices: the one axis on which strategies differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn

from stratagem.dist import World
from stratagem.optim import BaseOptimWrapper, OptimWrapperDict

__all__ = ["AnyOptim", "Placed", "Placement", "Steps"]

AnyOptim = BaseOptimWrapper | OptimWrapperDict

# One object serves all uses: nothing is stored in it.
NO_CONTEXT = nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What a placement calls when it needs it, each once: back ends differ in the order."""

    init: Callable[[nn.Module], nn.Module]
    compile: Callable[[nn.Module], nn.Module]
    make_optim: Callable[[nn.Module], AnyOptim] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A model where it trains, and its optimizers where they were asked for."""

    model: nn.Module
    optim: AnyOptim | None = None


class Placement(ABC):
    """One way to place a model."""

    def construction(self, world: World) -> AbstractContextManager[object]:
        """Return the context in which a model is built from its configuration, such as another device."""
        return NO_CONTEXT

    @abstractmethod
    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        """Initialise, move, wrap and compile ``model`` and make its optimizers, in the order that this back end needs.

        Collective.
        """

    @abstractmethod
    def bare(self, model: nn.Module) -> nn.Module:
        """Return the model without what :meth:`place` put around it."""

    @abstractmethod
    def accumulate(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        """Return the context of one micro-batch: with ``sync=False`` its gradients stay on this rank."""
