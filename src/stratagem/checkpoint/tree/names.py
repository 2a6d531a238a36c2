"""Key checkpoints by name: parameters by their names in the unwrapped model, optimizer state by parameter name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from stratagem.errors import CheckpointMismatchError
from stratagem.optim.implementation import IMPLEMENTATION_KEYS, KEPT_KEYS
from stratagem.utils import named_parameters

__all__ = [
    "AVERAGE_PART",
    "unwrapped_name",
    "matches_any",
    "optimizer_by_index",
    "optimizer_by_name",
    "parameter_names",
    "revise_names",
    "possible_names",
    "with_known_names",
]

# The part of a checkpoint that holds the averaged weights.
AVERAGE_PART: Final = "average"

_WRAPPING_PARTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped_name(name: str) -> str:
    """Return a parameter's name without the prefixes of wrappers, such as ``module.`` or ``_orig_mod.``."""
    return list(possible_names(name))[-1]


def possible_names(name: str) -> Iterator[str]:
    """Yield the name without components that only wrappers add, and then without each leading ``module.`` in turn.

    The last one is the unwrapped name, unless the model itself has a submodule named ``module``.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPING_PARTS]
    yield ".".join(parts)
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
        yield ".".join(parts)


def with_known_names(state: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return ``state`` with each unknown key replaced by its name without wrapper prefixes, if that name is known.

    Earlier versions kept ``_orig_mod`` in the names of compiled submodules.
    """
    return {_known_name(key, known): value for key, value in state.items()}


def _known_name(name: Any, known: Collection[str]) -> Any:
    if not isinstance(name, str) or name in known:
        return name
    return next((each for each in possible_names(name) if each in known), name)


def revise_names(names: Iterable[str], revise_keys: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return each name with every (pattern, replacement) applied in turn."""
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in revise_keys]
    revised = {}
    for name in names:
        new = name
        for pattern, replacement in patterns:
            new = pattern.sub(replacement, new)
        revised[name] = new
    return revised


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Return whether one of the regular expressions matches the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def parameter_names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the optimizer's parameters, one list per group.

    Parameters that do not belong to the model are named by index: ``unnamed.<group index>.<parameter index>``.
    """
    known = {id(parameter): name for name, parameter in named_parameters(model).items()}
    return [
        [known.get(id(p), f"unnamed.{index}.{position}") for position, p in enumerate(group["params"])]
        for index, group in enumerate(optimizer.param_groups)
    ]


def optimizer_by_name(state: Mapping[str, Any], names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return an optimizer's state dict keyed by parameter name instead of torch's indices."""
    flat = [name for group in names for name in group]
    groups = [
        {key: value for key, value in group.items() if key not in {"params", "param_names", *IMPLEMENTATION_KEYS}}
        | {"params": list(group_names)}
        for group, group_names in zip(state["param_groups"], names, strict=True)
    ]
    return {**state, "state": {flat[index]: slots for index, slots in state["state"].items()}, "param_groups": groups}


def optimizer_by_index(
    state: Mapping[str, Any],
    names: Sequence[Sequence[str]],
    current: Sequence[Mapping[str, Any]],
    *,
    allow_missing: Sequence[str] = (),
) -> dict[str, Any]:
    """Convert an optimizer state dict keyed by parameter name to one that torch's optimizers can load.

    Args:
        state: the result of :func:`optimizer_by_name`, or a state dict saved by a torch optimizer, whose indices are
            kept.
        names: the parameter names of the optimizer to load into, one list for each group.
        current: the parameter groups of the optimizer to load into.
        allow_missing: patterns of parameter names that may be missing from ``state``. These parameters start without
            state, and groups that contain only such parameters keep their current options.

    Raises:
        CheckpointMismatchError: if the groups differ in number or in their parameters.
    """
    saved_groups = list(state["param_groups"])
    kept = [{key: now[key] for key in KEPT_KEYS if key in now} for now in current]
    by_name = _is_by_name(state)
    if by_name:
        own_names = {name for group in names for name in group}
        saved_groups = [{**g, "params": [_known_name(name, own_names) for name in g["params"]]} for g in saved_groups]
        state = {**state, "state": with_known_names(state["state"], own_names)}
    known = {name for group in saved_groups for name in group["params"]} if by_name else set()
    new = {
        name for group in names for name in group if by_name and name not in known and matches_any(name, allow_missing)
    }
    for number, group in enumerate(names):
        if group and new.issuperset(group):
            options = {key: value for key, value in current[number].items() if key != "params"}
            saved_groups.insert(number, {**options, "params": list(group)})
    if len(saved_groups) != len(names):
        raise CheckpointMismatchError(
            f"The checkpoint's optimizer has {len(saved_groups)} parameter groups, but this run's has {len(names)}. "
            "Build the same groups, or resume with resume_optimizer=False."
        )
    if not by_name:
        _check_sizes(saved_groups, names)
        return {**state, "param_groups": [{**saved, **own} for saved, own in zip(saved_groups, kept, strict=True)]}
    index_of = {name: index for index, name in enumerate(name for group in names for name in group)}
    groups = []
    for number, (saved, own, flags) in enumerate(zip(saved_groups, names, kept, strict=True)):
        if set(saved["params"]) - new != set(own) - new:
            only_saved, only_own = (
                sorted(set(saved["params"]) - set(own)),
                sorted(set(own) - set(saved["params"]) - new),
            )
            raise CheckpointMismatchError(
                f"Parameter group {number} of the optimizer differs: only in the checkpoint {only_saved[:5]}, only in this "
                f"run {only_own[:5]}. Build the same groups, or resume with resume_optimizer=False."
            )
        groups.append({**saved, **flags, "params": [index_of[name] for name in own]})
    return {
        **state,
        "state": {index_of[name]: slots for name, slots in state["state"].items() if name in index_of},
        "param_groups": groups,
    }


def _is_by_name(state: Mapping[str, Any]) -> bool:
    return any(isinstance(key, str) for group in state["param_groups"] for key in group["params"])


def _check_sizes(saved_groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> None:
    for number, (saved, own) in enumerate(zip(saved_groups, names, strict=True)):
        if len(saved["params"]) != len(own):
            raise CheckpointMismatchError(
                f"Parameter group {number} of the checkpoint's optimizer has {len(saved['params'])} parameters, but this "
                f"run's has {len(own)}. Build the same groups, or resume with resume_optimizer=False."
            )
