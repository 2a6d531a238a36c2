"""Parse ``paramwise_cfg``: learning rates, weight decay and freezing per parameter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, final

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.groups.parameter_info import ParameterTraits
from stratagem.utils.names import did_you_mean

__all__ = ["LayerDecay", "ParamwiseRules", "parse_paramwise"]

Match = Literal["substring", "component", "regex"]
Options = dict[str, Any]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDecay:
    r"""Layer-wise learning rate decay: smaller learning rates for layers closer to the input (arXiv:1801.06146).

    Attributes:
        rate: the ratio of a layer's learning rate to that of the next layer.
        layers: a regular expression whose first group is the index of a layer, such as ``r"blocks\.(\d+)\."``.
        first: regular expressions for parameters before layer 0, such as ``"patch_embed"``. All other parameters are treated as
            if they came after the last layer, and keep the full learning rate.
    """

    rate: float
    layers: str
    first: Sequence[str] = ()

    def multipliers(self, names: Sequence[str]) -> dict[str, float]:
        """Return the learning rate multiplier of each name.

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
    """The rules in ``paramwise_cfg``.

    Attributes:
        custom_keys: options for parameters whose names match a key; ``lr_mult`` and ``decay_mult`` are multipliers, all
            other options replace the optimizer's values. The longest matching key is used. For parameters that match a key,
            all other rules except ``layer_decay`` are ignored.
        match: how keys are matched with names: as substrings, as whole components, or as regular expressions.
        bias_lr_mult: the learning rate multiplier for biases, except in normalization layers and deformable convolutions.
        bias_decay_mult: the weight decay multiplier for biases, except in normalization layers with ``norm_decay_mult`` and
            deformable convolutions.
        norm_decay_mult: the weight decay multiplier for weights and biases of normalization layers.
        dwconv_decay_mult: the weight decay multiplier for depthwise convolutions.
        dcn_offset_lr_mult: the learning rate multiplier for ``conv_offset`` of deformable convolutions.
        flat_decay_mult: the weight decay multiplier for all other parameters with one dimension.
        bypass_duplicate: whether a shared parameter whose names have different options uses the options of its first name.
        layer_decay: layer-wise learning rate decay, multiplied with the other rules.
        freeze: regular expressions for the names of parameters to freeze (``requires_grad=False``).
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
            raise ConfigValueError(f'Unknown match={self.match!r}. Use "substring", "component" or "regex".')
        if not isinstance(self.custom_keys, Mapping):
            raise ConfigTypeError(f"custom_keys must map names to options, got {self.custom_keys!r}.")
        for key, options in self.custom_keys.items():
            if not isinstance(options, Mapping):
                raise ConfigTypeError(
                    f"custom_keys[{key!r}] must be a mapping such as dict(lr_mult=0.1), got {options!r}."
                )

    def key_for(self, name: str) -> str | None:
        """Return the longest custom key that matches a name; among keys of the same length, the first in sorted order."""
        matching = [key for key in self.custom_keys if _matches(key, name, self.match)]
        return min(matching, key=lambda key: (-len(key), key), default=None)

    def depth_multipliers(self, names: Sequence[str]) -> Mapping[str, float]:
        """Return the learning rate multiplier of each name according to ``layer_decay``; empty without it."""
        return {} if self.layer_decay is None else self.layer_decay.multipliers(names)

    def multipliers(self, traits: ParameterTraits) -> Options:
        """Return ``lr_mult`` and ``decay_mult`` according to the rules for a parameter's type."""
        options: Options = {}
        if traits.is_bias and not (traits.is_norm or traits.in_deformable):
            options["lr_mult"] = self.bias_lr_mult
        elif traits.is_offset:
            options["lr_mult"] = self.dcn_offset_lr_mult
        decay = self._decay(traits)
        return options if decay is None else {**options, "decay_mult": decay}

    def _decay(self, traits: ParameterTraits) -> float | None:
        rules = (
            (traits.is_norm, self.norm_decay_mult),
            (traits.is_bias and not traits.in_deformable, self.bias_decay_mult),
            (traits.is_depth_wise, self.dwconv_decay_mult),
            (traits.is_flat and not traits.in_deformable, self.flat_decay_mult),
        )
        return next((mult for applies, mult in rules if applies and mult is not None), None)


def parse_paramwise(paramwise_cfg: Mapping[str, Any] | None) -> ParamwiseRules:
    """Validate ``paramwise_cfg`` and return its rules. The argument is not modified.

    Raises:
        ConfigTypeError: if ``paramwise_cfg``, ``custom_keys`` or one of its values is not a mapping.
        ConfigKeyError: if a rule is unknown.
        ConfigValueError: if ``match`` is unknown, or ``layer_decay`` is incomplete.
    """
    if paramwise_cfg is None:
        return ParamwiseRules()
    if not isinstance(paramwise_cfg, Mapping):
        raise ConfigTypeError(f"paramwise_cfg must be a mapping, got {paramwise_cfg!r}.")
    rules = dict(paramwise_cfg)
    _refuse_unknown("paramwise_cfg", rules, ParamwiseRules)
    decay = rules.get("layer_decay")
    if decay is not None:
        _refuse_unknown("paramwise_cfg.layer_decay", decay, LayerDecay)
        missing = [key for key in ("rate", "layers") if key not in decay]
        if missing:
            raise ConfigValueError(f"paramwise_cfg.layer_decay requires {' and '.join(missing)}, got {dict(decay)!r}.")
        rules["layer_decay"] = LayerDecay(**decay)
    return ParamwiseRules(**rules)


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
            raise ConfigKeyError(f"{where}: unknown key {key!r}. {did_you_mean(key, names)}")
