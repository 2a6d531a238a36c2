"""List the parameters of a model with the properties that parameter group rules depend on."""

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
    """The properties of a parameter on which rules depend.

    Attributes:
        is_bias: whether its name is ``bias``.
        is_flat: whether it has one dimension.
        is_norm: whether it belongs to a normalization layer.
        is_depth_wise: whether it belongs to a depthwise convolution.
        in_deformable: whether it belongs to a submodule of a deformable convolution.
        is_offset: whether it belongs to the submodule that computes the offsets of a deformable convolution.
        has_sparse_gradient: whether it belongs to an embedding with sparse gradients.
    """

    is_bias: bool
    is_flat: bool
    is_norm: bool
    is_depth_wise: bool
    in_deformable: bool
    is_offset: bool
    has_sparse_gradient: bool


class ParameterInfo(NamedTuple):
    """A parameter, with one of its names and its traits."""

    name: str
    parameter: Parameter
    traits: ParameterTraits


class _Type(NamedTuple):
    """The properties of a module class that determine parameter traits."""

    is_norm: bool
    is_conv: bool
    is_embedding: bool
    is_deformable: bool


def iter_parameters(model: nn.Module) -> list[ParameterInfo]:
    """Return every parameter under each of its names, with a module's direct parameters before its children's parameters."""
    # Iterate instead of recursing, and cache the properties of each module class, so that a model with thousands of tensors
    # takes only milliseconds.
    infos: list[ParameterInfo] = []
    stack: list[tuple[str, nn.Module, bool]] = [("", model, False)]
    types: dict[type[nn.Module], _Type] = {}
    while stack:
        prefix, module, in_deformable = stack.pop()
        module_type = types.get(type(module)) or types.setdefault(type(module), _type_of(module))
        # named_parameters() and named_children() omit duplicates of shared parameters and modules.
        if module._parameters:
            infos += _direct_parameters(prefix, module, module_type, in_deformable=in_deformable)
        if module._modules:
            children = [(name, child) for name, child in module._modules.items() if child is not None]
            stack += [(f"{prefix}{name}.", child, module_type.is_deformable) for name, child in reversed(children)]
    return infos


def _direct_parameters(
    prefix: str, module: nn.Module, module_type: _Type, *, in_deformable: bool
) -> list[ParameterInfo]:
    is_depth_wise = module_type.is_conv and module.in_channels == module.groups
    is_offset = in_deformable and module_type.is_conv and "conv_offset" in prefix
    is_sparse = module_type.is_embedding and bool(module.sparse)
    infos = []
    for name, parameter in module._parameters.items():
        if parameter is not None:
            traits = ParameterTraits(
                name == "bias",
                parameter.ndim == 1,
                module_type.is_norm,
                is_depth_wise,
                in_deformable,
                is_offset,
                is_sparse,
            )
            infos.append(ParameterInfo(prefix + name, parameter, traits))
    return infos


def _type_of(module: nn.Module) -> _Type:
    return _Type(
        is_norm=isinstance(module, _NORMS),
        is_conv=isinstance(module, nn.Conv2d),
        is_embedding=isinstance(module, nn.Embedding | nn.EmbeddingBag),
        is_deformable=any(base.__name__ in _DEFORMABLE for base in type(module).__mro__),
    )
