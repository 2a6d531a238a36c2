"""A replica of the model on every rank, gradients averaged: DistributedDataParallel."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast, final
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stratagem.distributed import World
from stratagem.errors import ConfigKeyError, PlacementError
from stratagem.model import Trainable, convert_sync_batchnorm, is_model_wrapper, unwrap_model
from stratagem.parallel.forward_redirection import calls_go_to
from stratagem.parallel.local_gradients import LocalGradients
from stratagem.parallel.placement import NO_CONTEXT, Placed, Placement, Steps
from stratagem.utils.names import did_you_mean

__all__ = ["DDP_OPTIONS", "Replica", "Replicated"]

# What the placement decides itself.
_OWN_OPTIONS = {"self", "module", "device_ids", "output_device", "process_group", "device_mesh"}
DDP_OPTIONS = tuple(name for name in inspect.signature(DistributedDataParallel).parameters if name not in _OWN_OPTIONS)
# From torch 2.13 on, broadcast_buffers is a deprecated name for it.
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers"

# How DistributedDataParallel counts the parameters that it waited for in vain: by number among those that learn.
_UNUSED = re.compile(r"indices which did not receive grad for rank \d+: ((?:\d+ ?)+)")
_MOST_NAMES = 8
# What the reducer says where a second backward pass begins before it has all gradients of the first.
_TWO_PASSES = ("mark a variable ready only once", "undefined, but still allreduced")


@final
class Replica(DistributedDataParallel):
    """A DistributedDataParallel that trains through its model's own ``train_step``.

    While the step runs, the calls of ``self(...)`` in it go through DistributedDataParallel, so gradients are exchanged.
    In all else ``self`` is the model, and an attribute that the replica does not have is the model's.
    """

    _passed: bool

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
        self._passed = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        except RuntimeError as error:
            numbers = _UNUSED.search(str(error))
            if numbers is None:
                raise
            raise PlacementError(self._tell_unused([int(number) for number in numbers[1].split()])) from None

    def _tell_unused(self, numbers: list[int]) -> str:
        ignored = set(self.parameters_to_ignore)
        learning = [
            name for name, value in self.module.named_parameters() if value.requires_grad and name not in ignored
        ]
        names = [learning[number] for number in numbers]
        listed = ", ".join(names[:_MOST_NAMES]) + (
            f" and {len(names) - _MOST_NAMES} more" if names[_MOST_NAMES:] else ""
        )
        return (
            f"{type(self.module).__name__} did not use all its parameters for the loss of the last iteration, and DDP waits "
            f"for the gradient of each: {listed} ({len(names)} of {len(learning)}). If that is as it should be, give "
            "strategy=dict(type='DDPStrategy', find_unused_parameters=True); else freeze them with requires_grad_(False), or "
            "see that the loss depends on them."
        )

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Learn from one micro-batch; see the model's ``train_step``.

        Raises:
            PlacementError: if the model's step did not call ``self(...)``, which would leave each rank with gradients
                of its own, or if several of its backward passes reach different parameters.
        """
        self._passed = False
        try:
            with calls_go_to(self.module, self):
                outputs: dict[str, Tensor] = cast("Trainable", self.module).train_step(
                    data, optim_wrapper=optim_wrapper
                )
        except RuntimeError as error:
            if not any(text in str(error) for text in _TWO_PASSES):
                raise
            raise PlacementError(
                f"{type(self.module).__name__}.train_step began a backward pass before DDP had the gradients of all parameters "
                "from the one before it. If the step computes several losses of which each reaches only some parameters, add "
                "them and call backward once: optim_wrapper.update_params(loss_1 + loss_2). Other causes, such as reentrant "
                "checkpoints, are in the error above."
            ) from error
        if not self._passed:
            name = type(self.module).__name__
            raise PlacementError(
                f"{name}.train_step reached the model's parameters without calling self(...), so DDP exchanged no "
                "gradients and the ranks would drift apart. Call self(...) for the forward pass, or wrap each "
                "sub-module by itself: DDPStrategy(model_wrapper='separate')."
            )
        return outputs

    def val_step(self, data: Any) -> Any:
        """Return the model's predictions; nothing is exchanged, so ranks may have different numbers of batches."""
        return cast("Trainable", self.module).val_step(data)

    def test_step(self, data: Any) -> Any:
        """Return the model's predictions; nothing is exchanged."""
        return cast("Trainable", self.module).test_step(data)


@final
class Replicated(Placement):
    """A replica on every rank.

    Args:
        logger: says what was converted.
        sync_bn: ``"torch"`` turns BatchNorm layers into SyncBatchNorm; None leaves them.
        separate: whether each child module that learns is wrapped by itself, as a model with several optimizers needs
            whose steps use only some of its parts.
        options: those of ``DistributedDataParallel``.

    Raises:
        ConfigKeyError: if there is no such option.
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
        # Buffers that every rank updates alike, or from its own samples as BatchNorm does, need no broadcast in each
        # forward pass; it costs one more exchange.
        self._options = dict(options)
        if _SYNC_BUFFERS not in options:
            self._options[_SYNC_BUFFERS] = self._options.pop("broadcast_buffers", False)
        self._views: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
        self._replicas: dict[nn.Module, Replica] = {}

    def place(self, model: nn.Module, steps: Steps, world: World) -> Placed:
        if is_model_wrapper(model):
            raise PlacementError(
                f"The model is wrapped already, in a {type(model).__name__}; give the strategy the bare model: it wraps it."
            )
        model = steps.init_and_sync(model)
        if self._sync_bn is not None:
            model = convert_sync_batchnorm(model, self._sync_bn)
            self._logger.info("Converted BatchNorm layers to SyncBatchNorm.")
        if world.device.type == "cpu" and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise PlacementError(
                "torch's SyncBatchNorm works on accelerators alone, and this run is on the CPU. Leave sync_bn out and use "
                "BatchNorm, or a normalisation that does not look at the batch, such as GroupNorm."
            )
        model = steps.compile(model.to(world.device))
        if "train_step" in vars(model):
            raise PlacementError(
                "compile: target='train_step' cannot be used under DDP, whose hooks around forward it would leave out. "
                "Compile target='forward'."
            )
        # On the bare model: its parameters' names are the ones that rules for parameter groups are written for.
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
                f"model_wrapper='separate' wraps each child module, but {type(model).__name__} has learning parameters of "
                f"its own ({', '.join(own[:5])}), whose gradients nobody would exchange. Move them into a child module."
            )
        # A second view of the same model: its children are replicas, and the bare model keeps its own, with its names.
        view = copy.copy(model)
        view.__dict__["_modules"] = {name: self._wrap(child, world) for name, child in model.named_children()}
        self._views[view] = model
        return view

    def unwrap(self, model: nn.Module) -> nn.Module:
        return self._views[model] if model in self._views else unwrap_model(model)

    def gradient_completion(self, model: nn.Module) -> Callable[[], None]:
        return self._complete_gradients

    def note_restored_gradients(self, model: nn.Module) -> None:
        for replica in self._replicas.values():
            replica.local_gradients.missed = True

    def _complete_gradients(self) -> None:
        for replica in self._replicas.values():
            replica.local_gradients.complete()

    def accumulate(self, model: nn.Module, sync: bool) -> AbstractContextManager[object]:
        if sync:
            return NO_CONTEXT
        # A model's own step names the model, not what is around it.
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
