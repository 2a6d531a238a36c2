"""A replica of the model on each rank, with averaged gradients: ``DistributedDataParallel``."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from operator import attrgetter
from typing import Any, cast, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stratagem.distributed import World
from stratagem.errors import ConfigKeyError, PlacementError
from stratagem.model import Trainable, convert_sync_batchnorm, is_model_wrapper, predict_step_of, unwrap_model
from stratagem.optim.gradient_policy import NO_CONTEXT, GradientPolicy
from stratagem.parallel.activation_checkpointing import checkpoint_activations, log_checkpointed, refuse_compiled
from stratagem.parallel.forward_redirection import redirect_forward
from stratagem.parallel.local_gradients import LocalGradients, average_gradients
from stratagem.parallel.placement import Placed, Placement, Steps
from stratagem.parallel.trainable import TrainableChange
from stratagem.parallel.unused_parameters import unused_parameters_error
from stratagem.utils.names import did_you_mean
from stratagem.utils.torch_private import rebuild_ddp_reducer

__all__ = ["DDP_OPTIONS", "Replica", "Replicated"]

# Arguments of DistributedDataParallel that the placement sets.
_OWN_OPTIONS = {"self", "module", "device_ids", "output_device", "process_group", "device_mesh"}
DDP_OPTIONS = tuple(name for name in inspect.signature(DistributedDataParallel).parameters if name not in _OWN_OPTIONS)
# Since torch 2.13, broadcast_buffers is its deprecated name.
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers"

_requires_grad = attrgetter("requires_grad")
# Errors that the reducer raises if a second backward pass starts before all gradients of the first have arrived.
_TWO_PASSES = ("mark a variable ready only once", "undefined, but still allreduced")


@final
class Replica(DistributedDataParallel):
    """A ``DistributedDataParallel`` that trains with the ``train_step`` of its model.

    In ``train_step``, calls to ``self(...)`` go through ``DistributedDataParallel``, so that gradients are synchronized.
    Outside ``train_step``, ``self(...)`` calls the model directly. Attributes that this wrapper lacks are looked up on the model.

    Args:
        module: the model.
        before_train_step: runs at the start of each training step.
        options: arguments of ``DistributedDataParallel``.
    """

    def __init__(self, module: nn.Module, *, before_train_step: Callable[[], None], **options: Any) -> None:
        super().__init__(module, **options)
        self.local_gradients = LocalGradients(self)
        self._before_train_step = before_train_step
        # Not as an attribute of the module, which would register the parameters twice.
        self.__dict__["_own_parameters"] = [
            each for name, each in module.named_parameters() if name not in self.parameters_to_ignore
        ]
        # Whether each parameter is part of the reducer, which fixes them when it is built.
        self._reduced = self._trainable()

    def __getattr__(self, name: str) -> Any:
        if name == "module" and "_modules" in self.__dict__ and "module" in self._modules:
            return self._modules["module"]  # DistributedDataParallel reads it several times in each forward pass.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def _trainable(self) -> list[bool]:
        return list(map(_requires_grad, self.__dict__["_own_parameters"]))

    def follow_trainable_change(self) -> None:
        """Build the reducer again if the parameters that it waits for are no longer those that are trainable. Collective.

        Raises:
            PlacementError: if DDP was configured such that it fixes the parameters.
        """
        now = self._trainable()
        # Gradients of an incomplete accumulation window may belong to parameters that the next pass does not average.
        self.local_gradients.missed = self.local_gradients.missed or self.local_gradients.held
        if not any(now) or self._reducer_serves(now):
            return
        self._require_changeable()
        rebuild_ddp_reducer(self)
        self._reduced = now

    def _require_changeable(self) -> None:
        if self.static_graph or self.mixed_precision is not None or self._delay_all_reduce_params:
            raise PlacementError(
                "The parameters that are trainable have changed, but the options static_graph, mixed_precision and "
                "delay_all_reduce_named_params of DistributedDataParallel fix them. Omit these options (for mixed precision, use "
                "AmpOptimWrapper), or do not change requires_grad during the run."
            )

    def _reducer_serves(self, trainable: list[bool]) -> bool:
        """Return whether the reducer averages the gradients of exactly these parameters."""
        if trainable == self._reduced:
            return True
        # The reducer then detects in each forward pass which of its parameters are unused.
        finds_unused = self.find_unused_parameters and not self.static_graph
        return finds_unused and all(reduced or not now for reduced, now in zip(self._reduced, trainable, strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        trainable = self._trainable()
        if trainable != self._reduced and not (any(trainable) and self._reducer_serves(trainable)):
            # requires_grad has changed within a training step, as in the step of a GAN.
            output = self._forward_without_reducer(*args, **kwargs)
        else:
            output = self._forward(*args, **kwargs)
        # Not in a forward hook, because modules with hooks take longer to call.
        self.local_gradients.follow(output, averaged=self.require_backward_grad_sync)
        return output

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        except RuntimeError as error:
            option = "strategy=dict(type='DDPStrategy', find_unused_parameters=True)"
            explained = unused_parameters_error(error, self, self._reduced_names(), option)
            if explained is None:
                raise
            raise explained from None

    def _forward_without_reducer(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass such that its gradients stay local; they are averaged before the update."""
        self._require_changeable()
        self.local_gradients.missed = self.local_gradients.missed or any(self._trainable())
        with self.no_sync():
            return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _reduced_names(self) -> list[str]:
        """Return the names of the parameters whose gradients are averaged, in torch's order."""
        own = [name for name, _ in self.module.named_parameters() if name not in self.parameters_to_ignore]
        return [name for name, reduced in zip(own, self._reduced, strict=True) if reduced]

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on one micro-batch; see the model's ``train_step``.

        Raises:
            PlacementError: if the model's step did not call ``self(...)``, so that gradients would differ between
                ranks, or if several of its backward passes reach different parameters.
        """
        self._before_train_step()
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

    def predict_step(self, data: Any) -> Any:
        """Return the results of a batch. Not collective."""
        return predict_step_of(self.module)(data)


def require_ddp_options(options: Iterable[str]) -> None:
    """Check the names of options of ``DistributedDataParallel``.

    Raises:
        ConfigKeyError: if an option is unknown.
    """
    for name in options:
        if name not in DDP_OPTIONS:
            raise ConfigKeyError(f"DistributedDataParallel has no option {name!r}. {did_you_mean(name, DDP_OPTIONS)}")


@final
class Replicated(Placement):
    """Places a replica of the model on each rank.

    Args:
        logger: the logger that reports converted layers.
        sync_bn: ``"torch"`` converts BatchNorm layers to SyncBatchNorm; None leaves them unchanged.
        separate: whether each trainable child module is wrapped separately. A model with several optimizers needs this if
            a step uses only some of its parts.
        options: arguments of ``DistributedDataParallel``.
        activation_checkpointing: see :func:`~stratagem.parallel.activation_checkpointing.checkpoint_activations`.

    Raises:
        ConfigKeyError: if an option is unknown.
    """

    def __init__(
        self,
        logger: logging.Logger,
        *,
        sync_bn: str | None,
        separate: bool,
        options: Mapping[str, Any],
        activation_checkpointing: Any = None,
    ) -> None:
        require_ddp_options(options)
        self._logger = logger
        self._activation_checkpointing = activation_checkpointing
        self._sync_bn = sync_bn
        self._separate = separate
        # Do not broadcast buffers in each forward pass, which would add a collective. Either all ranks update them equally, or
        # each rank updates them from its own samples, as in BatchNorm.
        self._options = dict(options)
        if _SYNC_BUFFERS not in options:
            self._options[_SYNC_BUFFERS] = self._options.pop("broadcast_buffers", False)
        # Child modules without trainable parameters, which are not wrapped.
        self._unwrapped: list[nn.Module] = []
        self._views: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._replicas: dict[nn.Module, Replica] = {}

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        if is_model_wrapper(model):
            raise PlacementError(
                f"The model is already wrapped, in a {type(model).__name__}. Pass the model itself: the strategy wraps it."
            )
        refuse_compiled(self._activation_checkpointing, steps.compile_options)
        model = steps.init_and_sync(model)
        if self._sync_bn is not None:
            model = convert_sync_batchnorm(model, self._sync_bn)
            self._logger.info("Converted BatchNorm layers to SyncBatchNorm.")
        if world.device.type == "cpu" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise PlacementError(
                "torch's SyncBatchNorm requires an accelerator, and this run is on the CPU. Omit sync_bn and use BatchNorm, or "
                "a normalization that does not depend on the batch, such as GroupNorm."
            )
        model = model.to(world.device)
        log_checkpointed(self._logger, checkpoint_activations(model, self._activation_checkpointing))
        model = steps.compile(model)
        if "train_step" in vars(model):
            raise PlacementError(
                "compile: target='train_step' cannot be used under DDP, because it bypasses DDP's forward hooks. Use "
                "target='forward'."
            )
        # Build the optimizer on the unwrapped model, because the rules for parameter groups refer to its parameter
        # names.
        optim = steps.make_optim(model) if steps.make_optim else None
        if self._separate:
            return Placed(model=self._wrap_children(model, world), optim=optim)
        if any(parameter.requires_grad for parameter in model.parameters()):
            return Placed(model=self._wrap(model, world), optim=optim)
        return Placed(model=model if optim is None else self._wrap_frozen(model, world), optim=optim)

    def _wrap(self, module: nn.Module, world: World) -> Replica:
        device_ids = None if world.device.type == "cpu" else [world.device]
        replica = self._replicas[module] = Replica(
            module, before_train_step=self.check_trainable, device_ids=device_ids, **self._options
        )
        return replica

    def _wrap_frozen(self, module: nn.Module, world: World) -> nn.Module:
        """Wrap a model that is frozen now but may be trained later; DDP requires at least one trainable parameter."""
        first = next((each for each in module.parameters() if each.is_floating_point()), None)
        if first is None:
            return module
        first.requires_grad_(True)
        try:
            return self._wrap(module, world)
        finally:
            first.requires_grad_(False)

    def _wrap_children(self, model: nn.Module, world: World) -> nn.Module:
        own = [name for name, parameter in model.named_parameters(recurse=False) if parameter.requires_grad]
        _refuse_outside_children(type(model).__name__, own)
        # A shallow copy of the model has the replicas as children. The original model keeps its children and parameter
        # names.
        view = copy.copy(model)
        view.__dict__["_modules"] = {
            name: self._wrap(child, world) if any(map(_requires_grad, child.parameters())) else child
            for name, child in model.named_children()
        }
        self._unwrapped = [child for child in model.children() if child not in self._replicas]
        self._views[view] = model
        train_step = getattr(view, "train_step", None)
        if callable(train_step):

            @functools.wraps(train_step)
            def checked(*args: Any, **kwargs: Any) -> Any:
                self.before_train_step()
                return train_step(*args, **kwargs)

            view.__dict__["train_step"] = checked
        return view

    def apply_trainable_change(self, model: nn.Module, change: TrainableChange) -> None:
        if self._separate:
            own = dict(self.unwrap(model).named_parameters(recurse=False))
            _refuse_outside_children(
                type(self.unwrap(model)).__name__, [name for name in change.unfrozen if name in own]
            )
        for replica in self._replicas.values():
            replica.follow_trainable_change()

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
        for module in self._unwrapped:
            # If it has become trainable, it has no reducer that averages its gradients.
            average_gradients([each for each in module.parameters() if each.requires_grad], None)

    def _sync_context(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        # no_sync changes the graph, which static_graph forbids. Averaging in each micro-batch yields the same sum.
        if sync or self._options.get("static_graph"):
            return NO_CONTEXT
        # The train_step of a model passes the model itself, so look up the replica that wraps it.
        wrapped = self._replicas.get(model, model)
        if isinstance(wrapped, DistributedDataParallel):
            return cast("AbstractContextManager[object]", wrapped.no_sync())
        return _no_sync_of_children(wrapped)


def _refuse_outside_children(model: str, names: list[str]) -> None:
    if names:
        raise PlacementError(
            f"model_wrapper='separate' wraps each child module, but {model} has trainable parameters "
            f"outside of them ({', '.join(names[:5])}). Move them into a child module, or their gradients are not synchronized."
        )


@contextmanager
def _no_sync_of_children(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for child in model.children():
            if isinstance(child, DistributedDataParallel):
                stack.enter_context(child.no_sync())
        yield
