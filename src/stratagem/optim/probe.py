"""Run an optimizer on small tensors without changing it, to find out what it does."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_iter

from stratagem.errors import ConfigValueError
from stratagem.optim.mixed import MixedOptimizer
from stratagem.utils import generator_state, restore_generator_state
from stratagem.utils.torch_private import without_global_step_hooks

__all__ = ["Dependence", "dependence_of", "probe_copy", "require_step_without_closure", "set_lr", "state_keys_of"]


# Optimizers of other packages may change their update after some steps, as Shampoo does.
_STEPS: Final = 2
_STEPS_OF_OTHER_PACKAGES: Final = 12
# Added to single elements of gradients. The large one exceeds the thresholds of optimizers that clip by a norm.
_CHANGES: Final = (0.05, 1e3)


class Dependence(IntEnum):
    """The values that determine the update of an element of a parameter, apart from options."""

    ELEMENT = 0
    """Only on the element and its gradients."""
    TENSOR = 1
    """On other elements of the same parameter."""
    ALL = 2
    """On other parameters."""


@torch.no_grad()
def dependence_of(optimizer: Optimizer, tensors: Sequence[Sequence[Tensor]], *, lr: float) -> Dependence:
    """Return what the updates of an optimizer depend on, by trial updates with gradients that differ in single elements.

    An optimizer whose state contains anything but numbers and tensors with the shape of the parameter depends on other elements
    of the parameter, even if its first updates do not show it.

    Args:
        optimizer: the optimizer whose class, options and implementation are tried.
        tensors: the values of small parameters for each group.
        lr: the learning rate of the trial updates.
    """
    random = generator_state()
    number = _STEPS if type(optimizer).__module__.startswith("torch.optim.") else _STEPS_OF_OTHER_PACKAGES
    base, state = _trial(optimizer, tensors, lr, number, change=0.0)
    found = Dependence.ELEMENT
    if any(not _is_elementwise(each, parameter) for parameter, own in state for each in own.values()):
        found = Dependence.TENSOR
    for change in _CHANGES:
        restore_generator_state(random)
        changed, _ = _trial(optimizer, tensors, lr, number, change=change)
        for (first, copy), (other_first, other_copy) in zip(base, changed, strict=True):
            if not torch.equal(copy, other_copy):
                return Dependence.ALL
            if not torch.equal(first.flatten()[1:], other_first.flatten()[1:]):
                found = Dependence.TENSOR
    return found


def _trial(
    optimizer: Optimizer, tensors: Sequence[Sequence[Tensor]], lr: float, number: int, *, change: float
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Mapping[str, Any]]]]:
    """Update each tensor and a copy of it with other gradients; return their values, and their states.

    Args:
        optimizer: the optimizer to try.
        tensors: the values of small parameters for each group.
        lr: the learning rate.
        number: the number of updates.
        change: is added to the first element of each gradient, but not to the gradients of the copies.
    """
    pairs = [[(nn.Parameter(each.clone()), nn.Parameter(each.flip(0))) for each in some] for some in tensors]
    probe = probe_copy(optimizer, [[each for pair in some for each in pair] for some in pairs])
    set_lr(probe, lr)
    flat = [pair for some in pairs for pair in some]
    for step in range(number):
        for first, copy in flat:
            first.grad, copy.grad = _gradient(first, step), _gradient(copy, step + number)
            first.grad.view(-1)[0] += change
        with without_global_step_hooks(), torch.enable_grad():
            probe.step()
    values = [(first.detach().nan_to_num(), copy.detach().nan_to_num()) for first, copy in flat]
    return values, [(each, probe.state[each]) for pair in flat for each in pair if each in probe.state]


def _gradient(parameter: Tensor, step: int) -> Tensor:
    angles = torch.arange(parameter.numel(), dtype=torch.float32).square().mul(0.3 + step)
    return angles.cos().mul(0.01).view(parameter.shape).to(parameter)


def _is_elementwise(value: Any, parameter: Tensor) -> bool:
    """Return whether an entry of the state may belong to an elementwise optimizer."""
    if isinstance(value, Tensor):
        return value.shape == parameter.shape or value.numel() <= 1
    return (
        value is None
        or isinstance(value, bool | int | float | str)
        or not any(
            isinstance(each, Tensor) or not isinstance(each, bool | int | float | str | None)
            for each in tree_iter(value)
        )
    )


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all groups, in place if it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), Tensor):
            group["lr"].fill_(lr)
        elif "lr" in group:
            group["lr"] = lr


def probe_copy(optimizer: Optimizer, parameters: Sequence[Sequence[Tensor]]) -> Optimizer:
    """Return a copy of an optimizer with other parameters, in groups with the same options, and without state or hooks.

    Groups without parameters are omitted, and so are parts of a ``MixedOptimizer`` without groups. Call the copy within
    :func:`~stratagem.utils.torch_private.without_global_step_hooks`.
    """
    if isinstance(optimizer, MixedOptimizer):
        given = iter(parameters)
        by_part = {name: [next(given) for _ in part.param_groups] for name, part in optimizer.parts.items()}
        return MixedOptimizer(
            {name: probe_copy(optimizer.parts[name], some) for name, some in by_part.items() if any(some)}
        )
    groups = [
        {**{key: _copied(value) for key, value in group.items()}, "params": list(some)}
        for group, some in zip(optimizer.param_groups, parameters, strict=True)
        if some
    ]
    if optimizer.state:
        # The constructor of some optimizers, such as Adagrad, already initializes the state.
        accepted = inspect.signature(type(optimizer)).parameters
        options = {key: value for key, value in optimizer.defaults.items() if key in accepted}
        return type(optimizer)(groups, **options)
    # copy.copy would omit all attributes but the groups and the state, because Optimizer defines __getstate__.
    probe = object.__new__(type(optimizer))
    probe.__dict__.update(vars(optimizer))
    probe.state = defaultdict(dict)
    probe.param_groups = groups
    # A torch scheduler replaces this method of the original optimizer by an attribute.
    probe.__dict__.pop("step", None)
    for name in [name for name in vars(probe) if name.startswith("_optimizer_") and name.endswith("_hooks")]:
        setattr(probe, name, OrderedDict())
    return probe


def require_step_without_closure(optimizer: Optimizer) -> None:
    """Require that an optimizer can update without a function that computes the loss again.

    Raises:
        ConfigValueError: if its ``step`` requires a closure.
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        name = type(optimizer).__name__
        raise ConfigValueError(
            f"{name} calls a closure several times per update, and the default train_step computes the loss once. Use a "
            f"different optimizer such as AdamW, or override train_step of the model and call "
            "optim_wrapper.step(closure=...) there."
        )


def state_keys_of(optimizer: Optimizer) -> set[str] | None:
    """Return the names of the entries that an optimizer stores for a parameter; None if they cannot be determined."""
    groups = optimizer.param_groups
    like = next((each for group in groups for each in group["params"] if each.requires_grad), None)
    if like is None:
        return None
    parameter = nn.Parameter(torch.ones((2,) * like.ndim, dtype=torch.float32, device=like.device))
    parameter.grad = torch.full_like(parameter, 0.1)
    try:
        probe = probe_copy(optimizer, [[parameter], *([] for _ in groups[1:])])
        with without_global_step_hooks():
            probe.step()
    except Exception:  # noqa: BLE001 -- the optimizer may come from any library
        return None
    return {key for key, value in probe.state[parameter].items() if value is not None}


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
