"""What a DeepSpeed configuration says of the optimizer, accumulation and clipping, in the form of ours."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from stratagem.errors import ConfigTypeError, ConfigValueError, PlacementError, StratagemError
from stratagem.optim import BaseOptimWrapper
from stratagem.optim.gradients import parse_clipping

__all__ = ["as_optimizer", "kernels_explained", "with_accumulation", "with_clipping", "with_optimizer"]

# DeepSpeed's names, which it reads in any case, for what it makes itself.
_NAMES: Final = {
    "lion": "FusedLion",
    "lamb": "FusedLamb",
    "onebitadam": "OnebitAdam",
    "onebitlamb": "OnebitLamb",
    "zerooneadam": "ZeroOneAdam",
    "muon": "Muon",
}

_ONE_OPTIMIZER: Final = frozenset({"type", "constructor", "optimizer"})
# Their kernels are compiled when they are first built.
_COMPILED: Final = ("DeepSpeedCPUAdam", "DeepSpeedCPULion", "FusedAdam", "FusedLion", "FusedLamb")


@contextmanager
def kernels_explained(optim_wrapper: Any) -> Iterator[None]:
    """Say what to do where a kernel of DeepSpeed's cannot be compiled for the optimizer that is named.

    Raises:
        PlacementError: then.
    """
    optimizer = optim_wrapper.get("optimizer") if isinstance(optim_wrapper, Mapping) else None
    name = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    try:
        yield
    except (AttributeError, ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        if name not in _COMPILED or isinstance(error, StratagemError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlacementError(
            f"{name} has a kernel that DeepSpeed compiles when it is first used, and that failed: {reason}. It needs a C++ "
            "compiler and ninja, and for the fused ones the toolkit of an accelerator. torch's AdamW needs none of them, and "
            "is fused by itself."
        ) from error


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


def with_accumulation(optim_wrapper: Any, steps: int | None) -> Any:
    """Return an optimizer wrapper's configuration with ``gradient_accumulation_steps``, where it does not say them.

    Raises:
        ConfigValueError: if both say another number.
    """
    if steps is None or isinstance(optim_wrapper, BaseOptimWrapper):
        return optim_wrapper
    return _with(optim_wrapper, "accumulative_counts", steps, "gradient_accumulation_steps", steps)


def with_clipping(optim_wrapper: Any, limit: float | None) -> Any:
    """Return an optimizer wrapper's configuration with ``gradient_clipping``, where it does not say it.

    Raises:
        ConfigValueError: if both say another norm.
    """
    if limit is None or isinstance(optim_wrapper, BaseOptimWrapper):
        return optim_wrapper
    clipping = parse_clipping(optim_wrapper.get("clip_grad")) if isinstance(optim_wrapper, Mapping) else None
    if clipping is not None and clipping.by_norm and clipping.limit == limit:
        return optim_wrapper
    return _with(optim_wrapper, "clip_grad", {"max_norm": limit}, "gradient_clipping", limit)


def _with(optim_wrapper: Any, key: str, value: Any, option: str, said: object) -> Any:
    section = optim_wrapper if isinstance(optim_wrapper, Mapping) else {"optimizer": optim_wrapper}
    if not _ONE_OPTIMIZER.intersection(section):
        # Several by name, which are refused elsewhere.
        return optim_wrapper
    if section.get(key) not in (None, value):
        raise ConfigValueError(
            f"{option}={said!r}, but optim_wrapper has {key}={section[key]!r}. Leave one of them out, or make them equal."
        )
    return {**section, key: value}


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
