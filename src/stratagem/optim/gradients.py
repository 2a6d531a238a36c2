"""Clip gradients and check their norm, over all parameters of an optimizer and under any sharding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, final

import torch
from torch import Tensor, nn

from stratagem.distributed import all_reduce
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, TrainingError
from stratagem.tensors.dtensor import full_tensor, is_sharded, mesh_of, to_local
from stratagem.utils.names import did_you_mean
from stratagem.utils.torch_private import group_by_device_and_dtype, mark_nonfinite

__all__ = [
    "Clipping",
    "NonFinite",
    "check_norm",
    "exact_scalar",
    "global_norm",
    "parse_clipping",
    "parse_nonfinite",
    "scale",
]

NonFinite = Literal["error", "skip"]

_KNOWN_KEYS: Final = {
    "norm": ("type", "max_norm", "norm_type", "error_if_nonfinite"),
    "value": ("type", "clip_value"),
}
# Avoids a division by zero; torch.nn.utils.clip_grad_norm_ adds the same value.
_EPSILON: Final = 1e-6
# The mean number of elements below which a kernel without vectorization is faster than a call of an operator for each tensor.
_SMALL_NUMEL: Final = 2048
_PLAIN: Final = frozenset((Tensor, nn.Parameter))
_LIMIT_KEY: Final = {"norm": "max_norm", "value": "clip_value"}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Clipping:
    """A limit on the norm of all gradients, or on each gradient value."""

    by_norm: bool
    limit: float
    norm_type: float = 2.0
    error_if_nonfinite: bool = False

    def apply(self, gradients: Sequence[Tensor], norm: Tensor | None, factor: Tensor | None = None) -> None:
        """Multiply gradients in place by ``factor``, by default 1, and clip the products.

        ``norm`` is the norm of all products, which clipping by norm requires; the gradients are then multiplied once.
        """
        if self.by_norm and norm is not None:
            coefficient = torch.clamp(self.limit / (norm + _EPSILON), max=1.0)
            scale(gradients, coefficient if factor is None else coefficient * factor.to(coefficient.device))
        elif gradients:
            if factor is not None:
                scale(gradients, factor)
            parts = [to_local(gradient) for gradient in gradients]
            torch._foreach_clamp_min_(parts, -self.limit)
            torch._foreach_clamp_max_(parts, self.limit)


def parse_clipping(clip_grad: Mapping[str, Any] | None) -> Clipping | None:
    """Validate ``clip_grad`` of a configuration without changing it.

    Raises:
        ConfigTypeError: if ``clip_grad`` is not a mapping, or a limit is not a number.
        ConfigValueError: if the ``type`` is unknown, or there is no positive limit.
        ConfigKeyError: for a key that does not apply to this ``type``.
    """
    if clip_grad is None:
        return None
    if not isinstance(clip_grad, Mapping):
        raise ConfigTypeError(f"clip_grad must be a mapping such as dict(max_norm=1.0), got {clip_grad!r}.")
    kind = clip_grad.get("type", "norm")
    if kind not in _KNOWN_KEYS:
        raise ConfigValueError(f'clip_grad: type={kind!r} is unknown. Use "norm" or "value".')
    for key in clip_grad:
        if key not in _KNOWN_KEYS[kind]:
            raise ConfigKeyError(
                f"clip_grad: {key!r} is not an option of type={kind!r}. {did_you_mean(key, _KNOWN_KEYS[kind])}"
            )
    limit = clip_grad.get(_LIMIT_KEY[kind])
    if limit is None:
        raise ConfigValueError(f"clip_grad={dict(clip_grad)!r} has no limit. Add {_LIMIT_KEY[kind]}=...")
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise ConfigTypeError(f"clip_grad: {_LIMIT_KEY[kind]} must be a number, got {limit!r}.")
    if not limit > 0:
        raise ConfigValueError(f"clip_grad: {_LIMIT_KEY[kind]} must be positive, got {limit!r}.")
    return Clipping(
        by_norm=kind == "norm",
        limit=float(limit),
        norm_type=float(clip_grad.get("norm_type", 2.0)),
        error_if_nonfinite=bool(clip_grad.get("error_if_nonfinite", False)),
    )


def parse_nonfinite(policy: str | None, clipping: Clipping | None) -> NonFinite | None:
    """Return the policy for gradients that are NaN or Inf; ``error_if_nonfinite`` of ``clip_grad`` implies ``"error"``.

    Raises:
        ConfigValueError: for an unknown policy.
    """
    if policy is None:
        return "error" if clipping is not None and clipping.error_if_nonfinite else None
    if policy not in ("error", "skip"):
        raise ConfigValueError(f'nonfinite={policy!r} is unknown. Use "error", "skip", or None to disable the check.')
    return cast("NonFinite", policy)


def global_norm(gradients: list[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm of the vector of all gradients as a scalar on their device, without synchronizing with the device.

    For gradients that are sharded across ranks, the norm includes all shards, and the call is collective.
    """
    if _are_plain(gradients):
        return _norm_of_norms(torch._foreach_norm(gradients, norm_type), norm_type) if gradients else torch.zeros(())
    # Reduce shards with the same mesh and mesh axes together, with one all-reduce per axis.
    alike: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    for gradient in gradients:
        cut = _cut_axes(gradient)
        part = full_tensor(gradient) if cut is None else to_local(gradient)
        alike.setdefault((mesh_of(gradient) if cut else None, cut or ()), []).append(part)
    return _norm_of_norms([_norm_over(parts, norm_type, *where) for where, parts in alike.items()], norm_type)


def _cut_axes(gradient: Tensor) -> tuple[int, ...] | None:
    """Return the mesh axes along which a tensor is sharded; None if it has partial placements."""
    if not is_sharded(gradient):
        return ()
    placements = cast("Any", gradient).placements
    if any(placement.is_partial() for placement in placements):
        return None
    return tuple(axis for axis, placement in enumerate(placements) if not placement.is_replicate())


def _norm_over(parts: list[Tensor], norm_type: float, mesh: Any, axes: tuple[int, ...]) -> Tensor:
    # A rank's shard of a small tensor may be empty, and an empty tensor has no maximum.
    filled = [part for part in parts if part.numel()]
    norm = (
        _norm_of_norms(torch._foreach_norm(filled, norm_type), norm_type)
        if filled
        else torch.zeros((), device=parts[0].device)
    )
    norm = norm.to(torch.float32) if norm.dtype in (torch.float16, torch.bfloat16) else norm
    if not axes:
        return norm
    norm = norm if math.isinf(norm_type) else norm**norm_type
    for axis in axes:
        all_reduce(norm, "max" if math.isinf(norm_type) else "sum", mesh.get_group(axis))
    return norm if math.isinf(norm_type) else norm ** (1 / norm_type)


def _norm_of_norms(norms: Sequence[Tensor], norm_type: float) -> Tensor:
    try:
        stacked = torch.stack(norms)  # type: ignore[arg-type]  # torch accepts tuples and lists
    except RuntimeError:
        # Gradients are rarely on different devices, so the devices are not compared in each update.
        first = norms[0].device
        stacked = torch.stack([each.to(first) for each in norms])
    norm: Tensor = torch.linalg.vector_norm(stacked, norm_type)
    return norm


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether no tensor is of a subclass, such as ``DTensor``, with a single call for any number of tensors."""
    return _PLAIN.issuperset(map(type, tensors))


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place by a scalar tensor, without synchronizing with its device."""
    if not gradients:
        return
    local = gradients if _are_plain(gradients) else [to_local(gradient) for gradient in gradients]
    for (device, dtype), ([parts], _) in group_by_device_and_dtype([local], False).items():
        # Use at least float32, because a bfloat16 factor would be rounded, but not float64 for other gradients, for which
        # it is slow.
        precision = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        converted = factor.to(device, precision)
        if _are_small(parts, device, dtype):
            mark_nonfinite(parts, torch.zeros((), device=device), converted)
        else:
            torch._foreach_mul_(parts, converted)


def _are_small(tensors: list[Tensor], device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernel that also looks for NaN and Inf multiplies these tensors faster than ``_foreach_mul_``.

    On the CPU, ``_foreach_mul_`` calls an operator for each tensor, which takes longer than the multiplication of a small
    tensor. The results are the same.
    """
    if device.type != "cpu" or dtype is not torch.float32:
        return False
    sample = tensors[::8]  # Looking at every tensor would take a quarter of the time that this saves.
    return sum(map(Tensor.numel, sample)) <= _SMALL_NUMEL * len(sample)


def exact_scalar(value: float | Tensor) -> Any:
    """Return a number, or a detached tensor in float64, in which counts are exact; in float32 on devices without float64."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)


def check_norm(norm: Tensor, policy: NonFinite | None) -> bool:
    """Return whether gradients with this norm may update the parameters; synchronizes with the device if there is a policy.

    Raises:
        TrainingError: if the norm is NaN or Inf and the policy is ``"error"``.
    """
    if policy is None or bool(torch.isfinite(norm)):
        return True
    if policy == "error":
        raise TrainingError(
            f"The norm of the gradients is {norm.item()}. Lower the learning rate, look for a division by zero or a "
            'logarithm in the loss, or set nonfinite="skip" in the optimizer wrapper.'
        )
    return False
