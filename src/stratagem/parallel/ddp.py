"""A replica of the model on each rank, with averaged gradients: ``DistributedDataParallel``."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast, final
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stratagem.distributed import World
from stratagem.errors import ConfigKeyError, PlacementError
from stratagem.model import Trainable, convert_sync_batchnorm, is_model_wrapper, unwrap_model
from stratagem.optim.gradient_policy import NO_CONTEXT, GradientPolicy
from stratagem.parallel.forward_redirection import redirect_forward
from stratagem.parallel.local_gradients import LocalGradients
from stratagem.parallel.placement import Placed, Placement, Steps
from stratagem.parallel.unused_parameters import unused_parameters_error
from stratagem.utils.names import did_you_mean

__all__ = ["DDP_OPTIONS", "Replica", "Replicated"]

# Arguments of DistributedDataParallel that the placement sets.
_OWN_OPTIONS = {"self", "module", "device_ids", "output_device", "process_group", "device_mesh"}
DDP_OPTIONS = tuple(name for name in inspect.signature(DistributedDataParallel).parameters if name not in _OWN_OPTIONS)
# Since torch 2.13, broadcast_buffers is its deprecated name.
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers"

# Errors that the reducer raises if a second backward pass starts before all gradients of the first have arrived.
_TWO_PASSES = ("mark a variable ready only once", "undefined, but still allreduced")


@final
class Replica(DistributedDataParallel):
    """A ``DistributedDataParallel`` that trains with the ``train_step`` of its model.

    In ``train_step``, calls to ``self(...)`` go through ``DistributedDataParallel``, so that gradients are synchronized.
    Outside ``train_step``, ``self(...)`` calls the model directly. Attributes that this wrapper lacks are looked up on the model.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        self.local_gradients = LocalGradients.of(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        except RuntimeError as error:
            option = "strategy=dict(type='DDPStrategy', find_unused_parameters=True)"
            explained = unused_parameters_error(error, self, self._reduced_names(), option)
            if explained is None:
                raise
            raise explained from None

    def _reduced_names(self) -> list[str]:
        """Return the names of the parameters whose gradients are averaged, in torch's order."""
        ignored = set(self.parameters_to_ignore)
        return [name for name, value in self.module.named_parameters() if value.requires_grad and name not in ignored]

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on one micro-batch; see the model's ``train_step``.

        Raises:
            PlacementError: if the model's step did not call ``self(...)``, so that gradients would differ between
                ranks, or if several of its backward passes reach different parameters.
        """
        try:
            with redirect_forward(self.module, self) as redirection:
                outputs: dict[str, Tensor] = cast("Trainable", self.module).train_step(
                    data, optim_wrapper=optim_wrapper
                )
        except RuntimeError as error:
            if not any(text in str(error) for text in _TWO_PASSES):
                raise
            raise PlacementError(
                f"{type(self.module).__name__}.train_step started a backward pass before DDP received the gradients of "
                "all parameters from the previous backward pass. If the step computes several losses and each reaches "
                "only some parameters, add them and call backward once: optim_wrapper.update_params(loss_1 + loss_2). "
                "The error above lists other causes, such as reentrant checkpoints."
            ) from error
        if not redirection.called:
            name = type(self.module).__name__
            raise PlacementError(
                f"{name}.train_step used the model's parameters without calling self(...), so DDP did not synchronize "
                "gradients and the ranks would diverge. Call self(...) for the forward pass, or wrap each submodule "
                "separately: DDPStrategy(model_wrapper='separate')."
            )
        return outputs

    def val_step(self, data: Any) -> Any:
        """Return the model's predictions. Not collective, so ranks may have different numbers of batches."""
        return cast("Trainable", self.module).val_step(data)

    def test_step(self, data: Any) -> Any:
        """Return the model's predictions. Not collective."""
        return cast("Trainable", self.module).test_step(data)


@final
class Replicated(Placement):
    """Places a replica of the model on each rank.

    Args:
        logger: the logger that reports converted layers.
        sync_bn: ``"torch"`` converts BatchNorm layers to SyncBatchNorm; None leaves them unchanged.
        separate: whether each trainable child module is wrapped separately. A model with several optimizers needs this if
            a step uses only some of its parts.
        options: arguments of ``DistributedDataParallel``.

    Raises:
        ConfigKeyError: if an option is unknown.
    """

    def __init__(
        self, logger: logging.Logger, *, sync_bn: str | None, separate: bool, options: Mapping[str, Any]
    ) -> None:
        for name in options:
            if name not in DDP_OPTIONS:
                raise ConfigKeyError(
                    f"DistributedDataParallel has no option {name!r}. {did_you_mean(name, DDP_OPTIONS)}"
                )
        self._logger = logger
        self._sync_bn = sync_bn
        self._separate = separate
        # Do not broadcast buffers in each forward pass, which would add a collective. Either all ranks update them equally, or
        # each rank updates them from its own samples, as in BatchNorm.
        self._options = dict(options)
        if _SYNC_BUFFERS not in options:
            self._options[_SYNC_BUFFERS] = self._options.pop("broadcast_buffers", False)
        self._views: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._replicas: dict[nn.Module, Replica] = {}

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        if is_model_wrapper(model):
            raise PlacementError(
                f"The model is already wrapped, in a {type(model).__name__}. Pass the model itself: the strategy wraps it."
            )
        model = steps.init_and_sync(model)
        if self._sync_bn is not None:
            model = convert_sync_batchnorm(model, self._sync_bn)
            self._logger.info("Converted BatchNorm layers to SyncBatchNorm.")
        if world.device.type == "cpu" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise PlacementError(
                "torch's SyncBatchNorm requires an accelerator, and this run is on the CPU. Omit sync_bn and use BatchNorm, or "
                "a normalization that does not depend on the batch, such as GroupNorm."
            )
        model = steps.compile(model.to(world.device))
        if "train_step" in vars(model):
            raise PlacementError(
                "compile: target='train_step' cannot be used under DDP, because it bypasses DDP's forward hooks. Use "
                "target='forward'."
            )
        # Build the optimizer on the unwrapped model, because the rules for parameter groups refer to its parameter
        # names.
        optim = steps.make_optim(model) if steps.make_optim else None
        return Placed(
            model=self._wrap_children(model, world) if self._separate else self._wrap(model, world), optim=optim
        )

    def _wrap(self, module: nn.Module, world: World) -> nn.Module:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        device_ids = None if world.device.type == "cpu" else [world.device]
        replica = self._replicas[module] = Replica(module, device_ids=device_ids, **self._options)
        return replica

    def _wrap_children(self, model: nn.Module, world: World) -> nn.Module:
        own = [name for name, parameter in model.named_parameters(recurse=False) if parameter.requires_grad]
        if own:
            raise PlacementError(
                f"model_wrapper='separate' wraps each child module, but {type(model).__name__} has trainable parameters "
                f"outside of them ({', '.join(own[:5])}). Their gradients would not be synchronized. Move them into a child "
                "module."
            )
        # A shallow copy of the model has the replicas as children. The original model keeps its children and parameter
        # names.
        view = copy.copy(model)
        view.__dict__["_modules"] = {name: self._wrap(child, world) for name, child in model.named_children()}
        self._views[view] = model
        return view

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self._views[model] if model in self._views else unwrap_model(model)

    def gradient_policy(self, model: nn.Module, *, accumulates: bool) -> GradientPolicy:
        if accumulates and self._options.get("static_graph"):
            self._logger.info("static_graph=True: gradients are averaged over ranks in every micro-batch of a window.")
        return GradientPolicy(
            sync_context=self._sync_context, always_set_grad_sync=accumulates, complete=self._complete_gradients
        )

    def note_restored_gradients(self, model: nn.Module) -> None:
        for replica in self._replicas.values():
            replica.local_gradients.missed = True

    def _complete_gradients(self) -> None:
        for replica in self._replicas.values():
            replica.local_gradients.complete()

    def _sync_context(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        # no_sync changes the graph, which static_graph forbids. Averaging in each micro-batch yields the same sum.
        if sync or self._options.get("static_graph"):
            return NO_CONTEXT
        # The train_step of a model passes the model itself, so look up the replica that wraps it.
        wrapped = self._replicas.get(model, model)
        if isinstance(wrapped, DistributedDataParallel):
            return cast("AbstractContextManager[object]", wrapped.no_sync())
        return _no_sync_of_children(wrapped)


@contextmanager
def _no_sync_of_children(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for child in model.children():
            if isinstance(child, DistributedDataParallel):
                stack.enter_context(child.no_sync())
        yield
