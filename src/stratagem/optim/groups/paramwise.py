"""The rules of ``paramwise_cfg``: which parameters learn slower, decay less, or not at all."""

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

    def multipliers(self, kind: ParameterTraits) -> Options:
        """Return the ``lr_mult`` and ``decay_mult`` that the rules for kinds of parameters say."""
        options: Options = {}
        if kind.is_bias and not (kind.is_norm or kind.in_deformable):
            options["lr_mult"] = self.bias_lr_mult
        elif kind.is_offset:
            options["lr_mult"] = self.dcn_offset_lr_mult
        decay = self._decay(kind)
        return options if decay is None else {**options, "decay_mult": decay}

    def _decay(self, kind: ParameterTraits) -> float | None:
        rules = (
            (kind.is_norm, self.norm_decay_mult),
            (kind.is_bias and not kind.in_deformable, self.bias_decay_mult),
            (kind.is_depth_wise, self.dwconv_decay_mult),
            (kind.is_flat and not kind.in_deformable, self.flat_decay_mult),
        )
        return next((mult for applies, mult in rules if applies and mult is not None), None)


def parse_paramwise(paramwise_cfg: Mapping[str, Any] | None) -> ParamwiseRules:
    """Check what a configuration says about single parameters; the argument stays as it is.

    Raises:
        ConfigTypeError: if it, ``custom_keys`` or an entry of that is no mapping.
        ConfigKeyError: for an unknown rule.
        ConfigValueError: for an unknown ``match``, or a ``layer_decay`` that lacks something.
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
            raise ConfigValueError(f"paramwise_cfg.layer_decay needs {' and '.join(missing)}, got {dict(decay)!r}.")
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
            raise ConfigKeyError(f"{where}: {key!r} is not known. {did_you_mean(key, names)}")
