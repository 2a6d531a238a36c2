"""The rules of ``paramwise_cfg``: which parameters learn slower, decay less, or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, final

from torch import nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.utils.names import did_you_mean

__all__ = ["LayerDecay", "ParamwiseRules", "Place", "parse_paramwise", "walk"]

Match = Literal["substring", "component", "regex"]
Options = dict[str, Any]

_NORMS: Final = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_DEFORMABLE: Final = frozenset({"DeformConv2d", "ModulatedDeformConv2d"})


@final
@dataclass(frozen=True, slots=True)
class Place:
    """One parameter where it stands in its model."""

    name: str
    parameter: Parameter
    module: nn.Module
    in_deformable: bool

    @property
    def is_bias(self) -> bool:
        """Whether it is a bias."""
        return self.name.rpartition(".")[2] == "bias"

    @property
    def is_norm(self) -> bool:
        """Whether it belongs to a normalisation."""
        return isinstance(self.module, _NORMS)

    @property
    def is_depth_wise(self) -> bool:
        """Whether it belongs to a convolution of each channel on its own."""
        return isinstance(self.module, nn.Conv2d) and self.module.in_channels == self.module.groups

    @property
    def is_offset(self) -> bool:
        """Whether it belongs to the convolution that computes the offsets of a deformable one."""
        return self.in_deformable and isinstance(self.module, nn.Conv2d) and "conv_offset" in self.name


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDecay:
    r"""Smaller learning rates for the layers nearer to the input (arXiv:1801.06146).

    Attributes:
        rate: the factor from one layer to the one before it.
        layers: a regular expression whose first group is a layer's number, such as ``r"blocks\.(\d+)\."``.
        first: regular expressions of what comes before layer 0, such as ``"patch_embed"``. All else comes after the
            last layer and keeps the whole learning rate.
    """

    rate: float
    layers: str
    first: Sequence[str] = ()

    def multipliers(self, names: Sequence[str]) -> dict[str, float]:
        """Return the factor of the learning rate for each name.

        Raises:
            ConfigValueError: if no name matches ``layers``.
        """
        numbers = {name: int(found[1]) for name in names if (found := re.search(self.layers, name))}
        if not numbers:
            raise ConfigValueError(f"layer_decay: no parameter matches layers={self.layers!r}.")
        depth = max(numbers.values()) + 1
        before = {name for name in names if any(re.search(pattern, name) for pattern in self.first)}
        powers = {name: depth + 1 if name in before else depth - numbers.get(name, depth) for name in names}
        return {name: float(self.rate**power) for name, power in powers.items()}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ParamwiseRules:
    """The rules of ``paramwise_cfg``.

    Attributes:
        custom_keys: options by a part of the parameters' names; ``lr_mult`` and ``decay_mult`` multiply, others are
            set. The longest key that matches decides, and no other rule but ``layer_decay`` applies.
        match: how a key matches: anywhere in the name, as whole components of it, or as a regular expression.
        bias_lr_mult: for biases, except those of normalisations and of the offsets of deformable convolutions.
        bias_decay_mult: for biases, except those of deformable convolutions.
        norm_decay_mult: for weights and biases of normalisations.
        dwconv_decay_mult: for depth-wise convolutions.
        dcn_offset_lr_mult: for ``conv_offset`` of deformable convolutions.
        flat_decay_mult: for all other parameters of one dimension.
        bypass_duplicate: let the first name of a shared parameter decide, where its names have different options.
        layer_decay: learning rates that grow with the depth; multiplies what the other rules say.
        freeze: regular expressions of parameters that are not trained.
    """

    custom_keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    match: Match = "substring"
    bias_lr_mult: float = 1.0
    bias_decay_mult: float | None = None
    norm_decay_mult: float | None = None
    dwconv_decay_mult: float | None = None
    dcn_offset_lr_mult: float = 1.0
    flat_decay_mult: float | None = None
    bypass_duplicate: bool = False
    layer_decay: LayerDecay | None = None
    freeze: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.match not in ("substring", "component", "regex"):
            raise ConfigValueError(f'match={self.match!r} is not known. Use "substring", "component" or "regex".')
        if not isinstance(self.custom_keys, Mapping):
            raise ConfigTypeError(f"custom_keys must map names to options, got {self.custom_keys!r}.")
        for key, options in self.custom_keys.items():
            if not isinstance(options, Mapping):
                raise ConfigTypeError(
                    f"custom_keys[{key!r}] must be a mapping such as dict(lr_mult=0.1), got {options!r}."
                )

    def key_for(self, name: str) -> str | None:
        """Return the custom key that decides about a name: the longest that matches, then the first by name."""
        matching = [key for key in self.custom_keys if _matches(key, name, self.match)]
        return min(matching, key=lambda key: (-len(key), key), default=None)

    def multipliers(self, place: Place) -> Options:
        """Return the ``lr_mult`` and ``decay_mult`` that the rules for kinds of parameters say."""
        options: Options = {}
        if place.is_bias and not (place.is_norm or place.in_deformable):
            options["lr_mult"] = self.bias_lr_mult
        elif place.is_offset:
            options["lr_mult"] = self.dcn_offset_lr_mult
        decay = self._decay(place)
        return options if decay is None else {**options, "decay_mult": decay}

    def _decay(self, place: Place) -> float | None:
        rules = (
            (place.is_norm, self.norm_decay_mult),
            (place.is_bias and not place.in_deformable, self.bias_decay_mult),
            (place.is_depth_wise, self.dwconv_decay_mult),
            (place.parameter.ndim == 1 and not place.in_deformable, self.flat_decay_mult),
        )
        return next((mult for applies, mult in rules if applies and mult is not None), None)


def parse_paramwise(paramwise_cfg: Mapping[str, Any] | None) -> ParamwiseRules:
    """Check what a configuration says about single parameters; the argument stays as it is.

    Raises:
        ConfigTypeError: if it, ``custom_keys`` or an entry of that is no mapping.
        ConfigKeyError: for an unknown rule.
        ConfigValueError: for an unknown ``match``.
    """
    if paramwise_cfg is None:
        return ParamwiseRules()
    if not isinstance(paramwise_cfg, Mapping):
        raise ConfigTypeError(f"paramwise_cfg must be a mapping, got {paramwise_cfg!r}.")
    rules = dict(paramwise_cfg)
    _refuse_unknown("paramwise_cfg", rules, ParamwiseRules)
    if rules.get("layer_decay") is not None:
        _refuse_unknown("paramwise_cfg.layer_decay", rules["layer_decay"], LayerDecay)
        rules["layer_decay"] = LayerDecay(**rules["layer_decay"])
    return ParamwiseRules(**rules)


def walk(model: nn.Module) -> Iterator[Place]:
    """Yield every parameter under each of its names, a module's own before those of its children."""
    yield from _walk(model, "", in_deformable=False)


def _walk(module: nn.Module, prefix: str, *, in_deformable: bool) -> Iterator[Place]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Place(prefix + name, parameter, module, in_deformable)
    deformable = any(base.__name__ in _DEFORMABLE for base in type(module).__mro__)
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.", in_deformable=deformable)


def _matches(key: str, name: str, match: Match) -> bool:
    if match == "substring":
        return key in name
    if match == "component":
        return f".{key}." in f".{name}."
    return re.search(key, name) is not None


def _refuse_unknown(where: str, given: Mapping[str, Any], known: type[Any]) -> None:
    names = [item.name for item in fields(known)]
    for key in given:
        if key not in names:
            raise ConfigKeyError(f"{where}: {key!r} is not known. {did_you_mean(key, names)}")
