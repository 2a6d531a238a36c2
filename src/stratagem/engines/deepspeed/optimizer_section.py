"""Convert the optimizer, accumulation and clipping options of a DeepSpeed configuration to optimizer wrapper options."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from stratagem.errors import ConfigTypeError, ConfigValueError, PlacementError, StratagemError
from stratagem.optim import BaseOptimWrapper
from stratagem.optim.gradients import parse_clipping

__all__ = ["as_optimizer", "explain_kernel_errors", "with_accumulation", "with_clipping", "with_optimizer"]

# The case-insensitive names of optimizers that DeepSpeed creates.
_NAMES: Final = {
    "lion": "FusedLion",
    "lamb": "FusedLamb",
    "onebitadam": "OnebitAdam",
    "onebitlamb": "OnebitLamb",
    "zerooneadam": "ZeroOneAdam",
    "muon": "Muon",
}

_ONE_OPTIMIZER: Final = frozenset({"type", "constructor", "optimizer"})
# Optimizers whose kernels are compiled when they are first built.
_COMPILED: Final = ("DeepSpeedCPUAdam", "DeepSpeedCPULion", "FusedAdam", "FusedLion", "FusedLamb")


@contextmanager
def explain_kernel_errors(optim_wrapper: Any) -> Iterator[None]:
    """Inside the ``with`` block, convert errors from compiling the configured optimizer's kernels to a helpful error.

    Raises:
        PlacementError: if a kernel of DeepSpeed cannot be compiled.
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
            f"DeepSpeed could not compile the kernel for {name}: {reason}. Compilation requires a C++ compiler and "
            "ninja; fused optimizers also require the accelerator toolkit, such as the CUDA Toolkit. torch's AdamW needs no "
            "compilation and is fused by default."
        ) from error


def with_optimizer(optim_wrapper: Any, section: Mapping[str, Any] | None) -> Any:
    """Return an optimizer wrapper's configuration with the optimizer from the DeepSpeed configuration added.

    Raises:
        ConfigValueError: if both specify an optimizer.
    """
    if section is None:
        return optim_wrapper
    if not isinstance(optim_wrapper, Mapping) or "optimizer" in optim_wrapper:
        raise ConfigValueError(
            f"config specifies an optimizer ({section.get('type')!r}), and so does optim_wrapper. Omit one of them. "
            "With optim_wrapper=dict(accumulative_counts=...), the optimizer in config is used."
        )
    return {**optim_wrapper, "optimizer": as_optimizer(section)}


def with_accumulation(optim_wrapper: Any, steps: int | None) -> Any:
    """Return an optimizer wrapper's configuration with ``gradient_accumulation_steps`` added.

    Raises:
        ConfigValueError: if the configuration specifies a different number.
    """
    if steps is None or isinstance(optim_wrapper, BaseOptimWrapper):
        return optim_wrapper
    return _with(optim_wrapper, "accumulative_counts", steps, "gradient_accumulation_steps", steps)


def with_clipping(optim_wrapper: Any, limit: float | None) -> Any:
    """Return an optimizer wrapper's configuration with ``gradient_clipping`` added.

    Raises:
        ConfigValueError: if the configuration specifies a different norm.
    """
    if limit is None or isinstance(optim_wrapper, BaseOptimWrapper):
        return optim_wrapper
    clipping = parse_clipping(optim_wrapper.get("clip_grad")) if isinstance(optim_wrapper, Mapping) else None
    if clipping is not None and clipping.by_norm and clipping.limit == limit:
        return optim_wrapper
    return _with(optim_wrapper, "clip_grad", {"max_norm": limit}, "gradient_clipping", limit)


def _with(optim_wrapper: Any, key: str, value: Any, option: str, given: object) -> Any:
    section = optim_wrapper if isinstance(optim_wrapper, Mapping) else {"optimizer": optim_wrapper}
    if not _ONE_OPTIMIZER.intersection(section):
        # Several optimizers, which are rejected later.
        return optim_wrapper
    if section.get(key) not in (None, value):
        raise ConfigValueError(
            f"{option}={given!r}, but optim_wrapper has {key}={section[key]!r}. Omit one of them, or make them equal."
        )
    return {**section, key: value}


def as_optimizer(section: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the ``optimizer`` section of a DeepSpeed configuration to an optimizer configuration.

    DeepSpeed's ``Adam`` is AdamW unless ``adam_w_mode`` is False. ``torch_adam=False`` selects its own kernels.

    Raises:
        ConfigTypeError: if the section has no type, or its parameters are not a mapping.
        ConfigValueError: if its parameters contain ``max_grad_norm`` or the value ``"auto"``.
    """
    kind, options = section.get("type"), section.get("params", {})
    if not isinstance(kind, str) or not isinstance(options, Mapping):
        raise ConfigTypeError(
            f"config: optimizer must have the form dict(type='AdamW', params=dict(lr=...)), got {dict(section)!r}."
        )
    unset = sorted(key for key, value in options.items() if isinstance(value, str) and value == "auto")
    if unset:
        names = ", ".join(f"optimizer.params.{key}" for key in unset)
        raise ConfigValueError(
            f"config: {names} is 'auto', which only programs such as the Hugging Face Trainer fill in. Set a value, or remove "
            "the optimizer section and set optim_wrapper=dict(optimizer=dict(type='AdamW', lr=...))."
        )
    if "max_grad_norm" in options:
        raise ConfigValueError("config: optimizer.params has max_grad_norm. Use gradient_clipping instead.")
    rest = dict(options)
    if kind.lower() not in ("adam", "adamw"):
        return {"type": _NAMES.get(kind.lower(), kind), **rest}
    decoupled = bool(rest.pop("adam_w_mode", True)) or kind.lower() == "adamw"
    if not rest.pop("torch_adam", True):
        return {"type": "FusedAdam", "adam_w_mode": decoupled, **rest}
    return {"type": "AdamW" if decoupled else "Adam", **rest}
