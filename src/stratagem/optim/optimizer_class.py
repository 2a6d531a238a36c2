"""Check whether this run's optimizer can continue from a saved optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch.optim import Optimizer

from stratagem.optim.mixed import PART, MixedOptimizer
from stratagem.optim.probe import state_keys_of

__all__ = ["continues_equally", "describe_difference", "optimizer_class"]

# The classes that implement Adam; with weight decay that is decoupled from the gradient, they implement AdamW.
_ADAM: Final = frozenset({"Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam", "CPUAdam", "HybridAdam"})
_SAME: Final = {"FusedLion": "Lion", "DeepSpeedCPULion": "Lion", "FusedSGD": "SGD", "DeepSpeedCPUAdagrad": "Adagrad"}
_DECOUPLED: Final = "decoupled_weight_decay"
# Options that only some of torch's optimizers have.
_DISTINCTIVE: Final = frozenset(
    {
        "alpha", "amsgrad", "beta2_decay", "betas", "centered", "dampening", "etas", "initial_accumulator_value", "lambd",
        "lr_decay", "momentum_decay", "nesterov", "ns_steps", "rho", "step_sizes", "t0",
    }
)  # fmt: skip
# State entries that exist only with certain options; a resumed run takes these options from the checkpoint.
_OPTIONAL_STATE: Final = frozenset({"momentum_buffer", "max_exp_avg_sq", "grad_avg", "training_weight"})


def optimizer_class(optimizer: Optimizer) -> str:
    """Return the name of an optimizer's algorithm: its class name, or a common name for all implementations of one algorithm."""
    inner = getattr(optimizer, "optim", None)
    if isinstance(inner, Optimizer):  # ZeroRedundancyOptimizer
        return optimizer_class(inner)
    name = type(optimizer).__name__
    if isinstance(optimizer, MixedOptimizer):
        parts = ", ".join(f"{part}={optimizer_class(own)}" for part, own in optimizer.parts.items())
        return f"{name}({parts})"
    if name not in _ADAM:
        return _SAME.get(name, name)
    decoupled = any(group.get(_DECOUPLED) for group in optimizer.param_groups)
    # DeepSpeed and ColossalAI use different names for this attribute.
    modes = (getattr(optimizer, mode, False) for mode in ("adam_w_mode", "adamw_mode"))
    return "AdamW" if name == "AdamW" or decoupled or any(bool(mode) for mode in modes) else "Adam"


def continues_equally(optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
    """Return whether the optimizer can continue the state of a different class: without weight decay, Adam equals AdamW."""
    classes = {optimizer_class(optimizer), saved_class(state)}
    groups = [*optimizer.param_groups, *state["param_groups"]]
    return classes == {"Adam", "AdamW"} and not any(group.get("weight_decay") for group in groups)


def saved_class(state: Mapping[str, Any]) -> str | None:
    """Return the class of a saved optimizer state; None if it is unknown, as for states of earlier versions or other programs."""
    if "class" in state:
        return str(state["class"])
    flags = {group.get(_DECOUPLED) for group in state["param_groups"] if "amsgrad" in group}
    return None if len(flags) != 1 or flags == {None} else "AdamW" if flags == {True} else "Adam"


def _describe_parts(optimizer: Optimizer, state: Mapping[str, Any]) -> str | None:
    saved, own = ([group.get(PART) for group in groups] for groups in (state["param_groups"], optimizer.param_groups))
    return None if saved == own else f"its parameter groups belong to the parts {saved} instead of {own}"


def describe_difference(optimizer: Optimizer, state: Mapping[str, Any]) -> str | None:
    """Return the reason why a saved state does not belong to this optimizer; None if it fits.

    If the state does not contain its class, its options and the entries that it stores for each parameter are compared with
    those of the optimizer.
    """
    is_mixed = isinstance(optimizer, MixedOptimizer) or any(PART in group for group in state["param_groups"])
    if is_mixed and "class" not in state:
        return _describe_parts(optimizer, state)
    own, saved = optimizer_class(optimizer), saved_class(state)
    if saved is not None and own != saved:
        return f"it belongs to {saved}"
    if "class" in state:
        return None
    here = set(optimizer.param_groups[0])
    for group in state["param_groups"]:
        differing = set(group) - here
        if "maximize" in group:
            # Other programs do not save all options.
            differing |= here - set(group)
        if differing & _DISTINCTIVE:
            return f"it has other options ({', '.join(sorted(differing & _DISTINCTIVE))})"
    expected = state_keys_of(optimizer)
    for slots in state["state"].values() if expected is not None else ():
        found = {key for key in slots if slots[key] is not None}
        differing = (found ^ (expected or set())) - _OPTIONAL_STATE
        if found and differing:
            return f"it has {', '.join(sorted(found))} for each parameter instead of {', '.join(sorted(expected or ['nothing']))}"
    return None
