"""Select the fastest implementation of a torch optimizer: fused, foreach or a loop over tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adafactor, Adam, AdamW, Rprop

from stratagem.errors import ConfigValueError
from stratagem.tensors.dtensor import mesh_of

__all__ = ["IMPLEMENTATION_KEYS", "KEPT_KEYS", "Implementation", "check_implementation", "implementation_options"]

Implementation = Literal["auto", "fused", "foreach", "loop"]

# The implementation depends on the machine, so these parameter group options are not saved in checkpoints.
IMPLEMENTATION_KEYS: Final = ("fused", "foreach")
# Loading a state does not change these options of this run's optimizer. The last one distinguishes Adam from AdamW.
KEPT_KEYS: Final = (*IMPLEMENTATION_KEYS, "decoupled_weight_decay")
_CHOICES: Final = ("auto", "fused", "foreach", "loop")
# If the user sets one of these, no implementation is selected.
_DECIDING_KEYS: Final = ("fused", "foreach", "differentiable", "capturable")
_FUSED_DEVICES: Final = frozenset({"cpu", "cuda", "xpu", "mps"})
# The only optimizers with fused kernels for DTensor parameters in torch 2.13.
_FUSED_ON_SHARDS: Final = (Adam, AdamW)
# These update plain tensors even if the parameters are sharded; see stratagem.optim.whole_updates.
_WHOLE_UPDATES: Final = (Adafactor, Rprop)
# Plain SGD performs one addition per tensor. On the CPU, a loop is faster than the fused implementation up to about
# this number of tensors (4 tensors: 51 us fused, 32 us loop; 20 tensors: 70 and 92; torch 2.13).
_MAX_LOOP_TENSORS: Final = 10


def check_implementation(implementation: str) -> None:
    """Check that an implementation is known.

    Raises:
        ConfigValueError: if it is not.
    """
    if implementation not in _CHOICES:
        raise ConfigValueError(f"Unknown implementation={implementation!r}. Use one of {', '.join(_CHOICES)}.")


def implementation_options(
    optimizer_type: Callable[..., Any],
    options: Mapping[str, Any],
    parameters: Sequence[Tensor],
    *,
    implementation: str = "auto",
    sparse_gradients: bool = False,
) -> dict[str, bool]:
    """Return the optimizer arguments that select an implementation; empty for torch's default.

    ``"auto"`` selects fused if the optimizer, devices, dtypes and gradients support it and it is faster; otherwise foreach
    for ``DTensor`` parameters, and torch's default for others (foreach on accelerators, a loop on the CPU). If ``options``
    already selects an implementation, that selection is kept.

    Raises:
        ConfigValueError: if the implementation is unknown, not supported, or in conflict with ``options``.
    """
    check_implementation(implementation)
    offered = inspect.signature(optimizer_type).parameters
    decided = [key for key in _DECIDING_KEYS if options.get(key) is not None and options[key] is not False]
    decided += [key for key in IMPLEMENTATION_KEYS if options.get(key) is False]
    meshes = len({mesh_of(parameter) for parameter in parameters})
    shards = any(mesh_of(parameter) is not None for parameter in parameters)
    skips = _fused_step_skips_values(optimizer_type, parameters)
    if skips and (implementation == "fused" or options.get("fused")):
        raise ConfigValueError(
            "The fused implementation of SGD does not update all values of 16-bit parameters on the CPU (a bug in torch "
            f"{torch.__version__}). Use implementation='auto', or omit fused=True."
        )
    if implementation == "auto":
        if decided or sparse_gradients or meshes > 1:
            return {}
        fused = "fused" in offered and not skips and _can_fuse(parameters)
        fused = fused and not _is_faster_in_a_loop(optimizer_type, options, parameters)
        if fused and (not shards or optimizer_type in _FUSED_ON_SHARDS):
            return {"fused": True}
        # Operations on a DTensor have a large dispatch overhead, and foreach dispatches once for all tensors.
        dispatches = shards and optimizer_type not in _WHOLE_UPDATES
        return {"foreach": True} if dispatches and "foreach" in offered else {}
    if decided:
        raise ConfigValueError(
            f"implementation={implementation!r} conflicts with the optimizer option {', '.join(decided)}. Set only one of them."
        )
    if implementation == "loop":
        return {key: False for key in IMPLEMENTATION_KEYS if key in offered}
    if meshes > 1:
        raise ConfigValueError(
            f"implementation={implementation!r} processes all tensors in one call, but this model's parameters are on {meshes} "
            "different device meshes, as with tensor parallelism. Use implementation='auto'."
        )
    if shards and implementation == "fused" and optimizer_type not in _FUSED_ON_SHARDS:
        raise ConfigValueError(
            "implementation='fused': torch does not support a fused "
            f"{getattr(optimizer_type, '__name__', optimizer_type)} for DTensor parameters. Use implementation='auto'."
        )
    if implementation not in offered:
        name = getattr(optimizer_type, "__name__", repr(optimizer_type))
        raise ConfigValueError(f"{name} has no {implementation} implementation. Use implementation='auto'.")
    return {implementation: True}


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    kinds = {(parameter.device, parameter.dtype, parameter.layout) for parameter in parameters}
    return all(
        device.type in _FUSED_DEVICES and dtype.is_floating_point and layout == torch.strided
        for device, dtype, layout in kinds
    )


def _fused_step_skips_values(optimizer_type: Callable[..., Any], parameters: Sequence[Tensor]) -> bool:
    """Return whether torch's fused kernel leaves values unchanged: SGD on the CPU with 16-bit parameters (torch 2.13)."""
    is_sgd = isinstance(optimizer_type, type) and issubclass(optimizer_type, SGD)
    return is_sgd and any(
        parameter.device.type == "cpu" and parameter.dtype in (torch.float16, torch.bfloat16)
        for parameter in parameters
    )


def _is_faster_in_a_loop(
    optimizer_type: Callable[..., Any], options: Mapping[str, Any], parameters: Sequence[Tensor]
) -> bool:
    return (
        optimizer_type is SGD
        and not options.get("momentum")
        and len(parameters) <= _MAX_LOOP_TENSORS
        and all(parameter.device.type == "cpu" for parameter in parameters)
    )
