"""Choose how a torch optimizer computes its updates: the fastest way that the device and the parameters allow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.optim import SGD

from stratagem.errors import ConfigValueError
from stratagem.optim.sharded import mesh_of

__all__ = ["Implementation", "implementation_options"]

Implementation = Literal["auto", "fused", "foreach", "loop"]

_CHOICES: Final = ("auto", "fused", "foreach", "loop")
# Where the user says one of these, the choice is made.
_DECIDING_KEYS: Final = ("fused", "foreach", "differentiable", "capturable")
_FUSED_DEVICES: Final = frozenset({"cpu", "cuda", "xpu", "mps"})
# Plain SGD is one addition a tensor: on the CPU a fused call costs more than the loop up to about this many tensors
# (4 tensors: 51 us fused, 32 us loop; 20 tensors: 70 and 92; torch 2.13).
_FEW_TENSORS: Final = 10


def implementation_options(
    optimizer_type: Callable[..., Any],
    options: Mapping[str, Any],
    parameters: Sequence[Tensor],
    *,
    implementation: str = "auto",
    sparse_gradients: bool = False,
) -> dict[str, bool]:
    """Return the arguments that make an optimizer of this type compute in the wanted way; empty for its own default.

    ``"auto"`` is fused wherever optimizer, devices, dtypes and gradients allow it and it pays, else torch's default
    (foreach on accelerators, a loop on the CPU). What ``options`` already decide is left to them.

    Raises:
        ConfigValueError: for another choice, or one that the optimizer does not have or that ``options`` contradict.
    """
    if implementation not in _CHOICES:
        raise ConfigValueError(f"implementation={implementation!r} is not known. Use one of {', '.join(_CHOICES)}.")
    offered = inspect.signature(optimizer_type).parameters
    decided = [key for key in _DECIDING_KEYS if options.get(key) is not None and options[key] is not False]
    decided += [key for key in ("fused", "foreach") if options.get(key) is False]
    if implementation == "auto":
        fused = "fused" in offered and not decided and not sparse_gradients
        fused = fused and _can_fuse(parameters) and not _is_faster_in_a_loop(optimizer_type, options, parameters)
        return {"fused": True} if fused else {}
    if decided:
        raise ConfigValueError(
            f"implementation={implementation!r} and the optimizer's {', '.join(decided)} both say how updates are "
            "computed. Give one of them."
        )
    if implementation == "loop":
        return {key: False for key in ("fused", "foreach") if key in offered}
    meshes = len(_meshes(parameters))
    if meshes > 1:
        raise ConfigValueError(
            f"implementation={implementation!r} takes all tensors in one call, and this model's lie on {meshes} meshes of "
            "ranks, as under tensor parallel. Use implementation='auto'."
        )
    if implementation not in offered:
        name = getattr(optimizer_type, "__name__", repr(optimizer_type))
        raise ConfigValueError(f"{name} has no {implementation} implementation. Use implementation='auto'.")
    return {implementation: True}


def _meshes(parameters: Sequence[Tensor]) -> set[object]:
    return {mesh_of(parameter) for parameter in parameters}


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    if len(_meshes(parameters)) > 1:
        return False
    kinds = {(parameter.device, parameter.dtype, parameter.layout) for parameter in parameters}
    return all(
        device.type in _FUSED_DEVICES and dtype.is_floating_point and layout == torch.strided
        for device, dtype, layout in kinds
    )


def _is_faster_in_a_loop(
    optimizer_type: Callable[..., Any], options: Mapping[str, Any], parameters: Sequence[Tensor]
) -> bool:
    return (
        optimizer_type is SGD
        and not options.get("momentum")
        and len(parameters) <= _FEW_TENSORS
        and all(parameter.device.type == "cpu" for parameter in parameters)
    )
