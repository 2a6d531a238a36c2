"""Several optimizers, each of which updates a part of the parameters, as one optimizer."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NoReturn, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.utils.names import did_you_mean

__all__ = ["PART", "MixedOptimizer", "parts_of"]

# The key of a parameter group that contains the name of its part.
PART: Final = "part"


@final
class MixedOptimizer(Optimizer):
    """Updates the parameters with several optimizers, each of which updates a part of them.

    All parameters are updated in one ``step``. The parameter groups are those of the parts, in order, each with the name of
    its part under ``part``, and ``state`` contains the state of all parameters, so the gradients of all parts are clipped
    together and saved together. In a configuration, ``hidden_matrices``, ``others`` and ``rules`` determine the part of each
    parameter; see :class:`~stratagem.optim.groups.parts.PartRules`.

    Args:
        parts: a mapping from names to optimizers, which have no parameters in common.

    Attributes:
        parts: the optimizers by name; read-only.

    Raises:
        ConfigTypeError: if ``parts`` is not a mapping from names to optimizers.
        ConfigValueError: if two parts have a parameter in common, or an optimizer cannot be a part.
    """

    def __init__(self, parts: Mapping[str, Optimizer]) -> None:
        _check_parts(parts)
        parts_by_name: dict[str, Optimizer] = {}
        self.parts = MappingProxyType(parts_by_name)
        self._state: defaultdict[Tensor, Any] = defaultdict(dict)
        super().__init__([{"params": []}], {})
        parts_by_name.update(parts)
        for name, part in self.parts.items():
            for group in part.param_groups:
                group[PART] = name

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all parts (not copies)."""
        return [group for part in self.parts.values() for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        """Ignore the list that the constructor of ``Optimizer`` sets, since the parts have the groups."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The state of all parameters, in one mapping that the parts share."""
        shared = self._state
        for part in self.parts.values():
            if part.state is not shared:  # a new part, or its state was loaded
                shared.update(part.state)
                part.state = shared
        return shared

    @state.setter
    def state(self, value: Any) -> None:
        """Ignore the empty mapping that the constructor of ``Optimizer`` sets."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters of all parts.

        Args:
            closure: computes the loss and the gradients; called once, before the updates.

        Returns:
            The result of ``closure``; None without it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts.values():
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the part whose name it contains under ``part``.

        Raises:
            ConfigKeyError: if no part has this name.
            ConfigValueError: if another part already has one of the parameters.
        """
        if not self.parts:  # called by the constructor of Optimizer, which requires a group
            return
        name = str(param_group.get(PART, ""))
        if name not in self.parts:
            raise ConfigKeyError(
                f"The parameter group belongs to the part {name!r}, which {type(self).__name__} does not have. Set part in the "
                f"group. {did_you_mean(name, self.parts)}"
            )
        params = param_group["params"]
        given = {id(each) for each in ([params] if isinstance(params, Tensor) else list(params))}
        for other, part in self.parts.items():
            if other != name and given & {id(each) for group in part.param_groups for each in group["params"]}:
                raise ConfigValueError(f"A parameter of the group already belongs to the part {other!r}.")
        self.parts[name].add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the same parts.

        Raises:
            ValueError: if the state has other groups or parts.
        """
        saved, own = list(state_dict["param_groups"]), self.param_groups
        if [group.get(PART) for group in saved] != [group[PART] for group in own]:
            raise ValueError(
                f"the saved parameter groups belong to the parts {[group.get(PART) for group in saved]}, and those of this "
                f"optimizer to {[group[PART] for group in own]}"
            )
        for name, part in self.parts.items():
            groups = [group for group in saved if group[PART] == name]
            indices = {index for group in groups for index in group["params"]}
            slots = {index: each for index, each in state_dict["state"].items() if index in indices}
            part.load_state_dict({"state": slots, "param_groups": groups})

    def register_load_state_dict_pre_hook(self, *_: Any, **__: Any) -> NoReturn:
        """Raise an error, since each part loads its state."""
        raise ConfigValueError(
            "Register the hook for a part, such as optimizer.parts[name], which loads its own state."
        )

    register_load_state_dict_post_hook = register_load_state_dict_pre_hook

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedOptimizer, (dict(self.parts),)


def parts_of(optimizer: Optimizer) -> Mapping[str, Optimizer]:
    """Return the parts of a :class:`MixedOptimizer` by name; for any other optimizer, ``{"": optimizer}``."""
    return optimizer.parts if isinstance(optimizer, MixedOptimizer) else {"": optimizer}


def _check_parts(parts: Any) -> None:
    if not isinstance(parts, Mapping) or not parts:
        raise ConfigTypeError(f"MixedOptimizer: parts must be a mapping from names to optimizers, got {parts!r}.")
    owners: dict[int, str] = {}
    for name, part in parts.items():
        if not isinstance(name, str) or not name or "." in name:
            raise ConfigTypeError(f"MixedOptimizer: the name of a part must be a string without dots, got {name!r}.")
        if not isinstance(part, Optimizer):
            raise ConfigTypeError(
                f"MixedOptimizer: the part {name!r} must be an optimizer, got {type(part).__name__}: {part!r}."
            )
        _require_supported(name, part)
        for parameter in (each for group in part.param_groups for each in group["params"]):
            if id(parameter) in owners:
                raise ConfigValueError(
                    f"MixedOptimizer: a parameter with the shape {list(parameter.shape)} belongs to both "
                    f"{owners[id(parameter)]!r} and {name!r}. Each parameter must belong to one part."
                )
            owners[id(parameter)] = name


def _require_supported(name: str, part: Optimizer) -> None:
    kind = type(part).__name__
    closure = inspect.signature(type(part).step).parameters.get("closure")
    if isinstance(part, MixedOptimizer):
        reason = "Pass its parts instead."
    elif closure is not None and closure.default is inspect.Parameter.empty:
        reason = "It calls a closure several times per update. Use AdamW."
    elif type(part).state_dict is not Optimizer.state_dict:
        reason = "It stores its state in its own way (it overrides state_dict). Use the optimizer that it wraps."
    else:
        return
    raise ConfigValueError(f"MixedOptimizer: {kind} cannot be the part {name!r}. {reason}")
