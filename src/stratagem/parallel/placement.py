"""Placements of a model on one or more devices; strategies differ only in their placement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.distributed import ProcessGroup

from stratagem.distributed import World
from stratagem.optim import BaseOptimWrapper, OptimWrapperDict
from stratagem.optim.gradient_policy import NO_CONTEXT, GradientPolicy
from stratagem.optim.whole_updates import MatrixUpdates
from stratagem.parallel.trainable import TrainableChange

__all__ = ["AnyOptim", "Placed", "Placement", "Steps"]

AnyOptim = BaseOptimWrapper | OptimWrapperDict


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The steps of preparing a model. A placement calls each step once, in the order that it requires.

    Attributes:
        init_and_sync: initializes the weights, moves the model to the device and broadcasts the weights from rank 0. Collective.
        init_local: initializes the weights on this rank only.
        compile: compiles the model if requested.
        make_optim: builds the optimizers of the model; None if there are none.
        compile_options: ``target`` and the arguments of ``torch.compile`` that ``compile`` uses; None if nothing is compiled. A
            placement that compiles the parts of a model separately uses them instead of calling ``compile``.
    """

    init_and_sync: Callable[[nn.Module], nn.Module]
    init_local: Callable[[nn.Module], nn.Module]
    compile: Callable[[nn.Module], nn.Module]
    make_optim: Callable[[nn.Module], AnyOptim] | None = None
    compile_options: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A placed model, and its optimizers if they were requested."""

    model: nn.Module
    optim: AnyOptim | None = None


def _nothing_to_check() -> None:
    """Do nothing: the model was prepared for evaluation."""


class Placement(ABC):
    """Base class of placements.

    Attributes:
        sharded: whether the model is sharded across ranks: the forward pass is then collective, so all ranks must run the
            same number of forward passes, and state is read shard by shard.
        full_state: whether sharded state is gathered on rank 0 for a checkpoint; otherwise each rank writes its shards.
        has_gradients: whether accumulated gradients are in the parameters' ``grad``.
        params_are_master_weights: whether the model's parameters hold the full-precision weights between steps.
        params_accept_writes: whether training continues from values that are written into the parameters.
        trainable_is_fixed: whether ``place`` determines which parameters are trainable.
        before_train_step: called at the start of each training step of the placed model, before the forward pass; the
            strategy sets it to a function that detects changes of ``requires_grad``.
        reports_gradient_hooks: whether ``place`` logs with which gradients hooks of parameters are called.
        matrix_updates: how Muon distributes its work if its parameters are sharded; see
            :class:`~stratagem.optim.sharded_muon.ShardedMuon`.
        wraps_train_step: whether the placed model calls ``before_train_step``; otherwise it is called before each update.
    """

    sharded: ClassVar[bool] = False
    has_gradients: bool = True
    full_state: bool = False
    params_are_master_weights: bool = True
    params_accept_writes: bool = True
    before_train_step: Callable[[], None] = staticmethod(_nothing_to_check)
    trainable_is_fixed: ClassVar[bool] = False
    reports_gradient_hooks: ClassVar[bool] = False
    wraps_train_step: ClassVar[bool] = True
    matrix_updates: MatrixUpdates = "owned"

    def construction(self, world: World) -> AbstractContextManager[object]:
        """Return the context in which a model is built from its configuration, such as the meta device."""
        return NO_CONTEXT

    @abstractmethod
    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        """Initialize, move, wrap and compile ``model`` and build its optimizers, in the order that this backend requires.

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

    def bind(  # noqa: B027 -- most placements have nothing to do
        self, optim: AnyOptim, model: nn.Module
    ) -> None:
        """Rebind the parameters of optimizers that were built before placement to the placed ones.

        Raises:
            PlacementError: if the optimizers cannot be rebound.
        """

    def gradient_policy(self, model: nn.Module, *, accumulates: bool) -> GradientPolicy:
        """Return the gradient policy of the placed model, which all its optimizers share.

        Args:
            model: the placed model.
            accumulates: whether one of its optimizers accumulates gradients over several micro-batches.
        """
        return GradientPolicy(always_set_grad_sync=accumulates)

    def note_restored_gradients(  # noqa: B027 -- most placements have nothing to do
        self, model: nn.Module
    ) -> None:
        """Record that this rank's gradients of an incomplete accumulation window were restored from a checkpoint."""

    def release_gathered(  # noqa: B027 -- most placements have nothing to do
        self, model: nn.Module
    ) -> None:
        """Free parameters that a forward pass without a backward pass gathered."""

    def check_trainable(self) -> None:
        """Call ``before_train_step``, which the strategy may set after the model has been placed."""
        self.before_train_step()

    def apply_trainable_change(  # noqa: B027 -- most placements have nothing to do
        self, model: nn.Module, change: TrainableChange
    ) -> None:
        """Prepare the placed model for a training step after ``requires_grad`` of some parameters has changed. Collective.

        Raises:
            PlacementError: if the placement does not support the change.
        """

    def global_numel(self, parameter: nn.Parameter) -> int:
        """Return the total number of elements of a parameter of the placed model, including shards on other ranks."""
        return parameter.numel()

    @abstractmethod
    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the model without the wrappers that :meth:`place` added."""
