"""Every parameter of a model where it stands, with what rules may ask about it."""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["ParameterInfo", "ParameterTraits", "iter_parameters"]

_NORMS: Final = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_DEFORMABLE: Final = frozenset({"DeformConv2d", "ModulatedDeformConv2d"})


class ParameterTraits(NamedTuple):
    """What a parameter is, the same value for all that are alike.

    Attributes:
        is_bias: it is called ``bias``.
        is_flat: it has one dimension.
        is_norm: it belongs to a normalisation.
        is_depth_wise: it belongs to a convolution of each channel on its own.
        in_deformable: it belongs to a part of a deformable convolution.
        is_offset: it belongs to the part that computes the offsets of one.
        has_sparse_gradient: it belongs to an embedding with sparse gradients.
    """

    is_bias: bool
    is_flat: bool
    is_norm: bool
    is_depth_wise: bool
    in_deformable: bool
    is_offset: bool
    has_sparse_gradient: bool


class ParameterInfo(NamedTuple):
    """One parameter under one of its names."""

    name: str
    parameter: Parameter
    kind: ParameterTraits


class _Type(NamedTuple):
    """What all modules of one type have in common."""

    is_norm: bool
    is_conv: bool
    is_embedding: bool
    is_deformable: bool


def iter_parameters(model: nn.Module) -> list[ParameterInfo]:
    """Return every parameter under each of its names, a module's own before those of its children."""
    # A stack and not a recursion, and types looked at once: models of thousands of tensors take milliseconds.
    infos: list[ParameterInfo] = []
    waiting: list[tuple[str, nn.Module, bool]] = [("", model, False)]
    types: dict[type[nn.Module], _Type] = {}
    while waiting:
        prefix, module, in_deformable = waiting.pop()
        kind = types.get(type(module)) or types.setdefault(type(module), _type_of(module))
        # named_parameters() and named_children() hide what is shared.
        if module._parameters:
            infos += _direct_parameters(prefix, module, kind, in_deformable=in_deformable)
        if module._modules:
            children = [(name, child) for name, child in module._modules.items() if child is not None]
            waiting += [(f"{prefix}{name}.", child, kind.is_deformable) for name, child in reversed(children)]
    return infos


def _direct_parameters(prefix: str, module: nn.Module, kind: _Type, *, in_deformable: bool) -> list[ParameterInfo]:
    is_depth_wise = kind.is_conv and module.in_channels == module.groups
    is_offset = in_deformable and kind.is_conv and "conv_offset" in prefix
    is_sparse = kind.is_embedding and bool(module.sparse)
    infos = []
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found = ParameterTraits(
                name == "bias", parameter.ndim == 1, kind.is_norm, is_depth_wise, in_deformable, is_offset, is_sparse
            )
            infos.append(ParameterInfo(prefix + name, parameter, found))
    return infos


def _type_of(module: nn.Module) -> _Type:
    return _Type(
        is_norm=isinstance(module, _NORMS),
        is_conv=isinstance(module, nn.Conv2d),
        is_embedding=isinstance(module, nn.Embedding | nn.EmbeddingBag),
        is_deformable=any(base.__name__ in _DEFORMABLE for base in type(module).__mro__),
    )
