"""Run an optimizer on small tensors without changing it, to find out what it does."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stratagem.errors import ConfigValueError
from stratagem.optim.mixed import MixedOptimizer
from stratagem.utils.torch_private import without_global_step_hooks

__all__ = ["probe_copy", "require_step_without_closure", "state_keys_of"]


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
