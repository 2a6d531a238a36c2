"""The ``optimizer`` section of a DeepSpeed configuration, in the form of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from stratagem.errors import ConfigTypeError, ConfigValueError

__all__ = ["as_optimizer", "with_optimizer"]

# DeepSpeed's names, which it reads in any case, for what it makes itself.
_NAMES: Final = {
    "lion": "FusedLion",
    "lamb": "FusedLamb",
    "onebitadam": "OnebitAdam",
    "onebitlamb": "OnebitLamb",
    "zerooneadam": "ZeroOneAdam",
    "muon": "Muon",
}


def with_optimizer(optim_wrapper: Any, section: Mapping[str, Any] | None) -> Any:
    """Return an optimizer wrapper's configuration with the optimizer of DeepSpeed's, where it has none.

    Raises:
        ConfigValueError: if both say it.
    """
    if section is None:
        return optim_wrapper
    if not isinstance(optim_wrapper, Mapping) or "optimizer" in optim_wrapper:
        raise ConfigValueError(
            f"config has an optimizer ({section.get('type')!r}), and optim_wrapper has one too. Leave one of them out: "
            "optim_wrapper=dict(accumulative_counts=...) takes DeepSpeed's."
        )
    return {**optim_wrapper, "optimizer": as_optimizer(section)}


def as_optimizer(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section as a configuration of an optimizer.

    DeepSpeed's ``Adam`` is AdamW unless ``adam_w_mode`` says otherwise, and its kernels are chosen by ``torch_adam=False``.

    Raises:
        ConfigTypeError: if the section has no type, or its parameters are no mapping.
        ConfigValueError: if they say what belongs elsewhere.
    """
    kind, options = section.get("type"), section.get("params", {})
    if not isinstance(kind, str) or not isinstance(options, Mapping):
        raise ConfigTypeError(
            f"config: optimizer is {dict(section)!r}; dict(type='AdamW', params=dict(lr=...)) is due."
        )
    if "max_grad_norm" in options:
        raise ConfigValueError("config: optimizer.params has max_grad_norm. Use gradient_clipping in its place.")
    rest = dict(options)
    if kind.lower() not in ("adam", "adamw"):
        return {"type": _NAMES.get(kind.lower(), kind), **rest}
    decoupled = bool(rest.pop("adam_w_mode", True)) or kind.lower() == "adamw"
    if not rest.pop("torch_adam", True):
        return {"type": "FusedAdam", "adam_w_mode": decoupled, **rest}
    return {"type": "AdamW" if decoupled else "Adam", **rest}
