"""Tell variables of configuration files, which other values use, from misspelled keys."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, final

from stratagem.config.mmcv_keys import MMCV_KEYS
from stratagem.config.reading.lines import line_of, line_that_reads
from stratagem.config.reading.source import Origin, Source
from stratagem.utils import did_you_mean, nearest_names
from stratagem.utils.names import is_within_edits

__all__ = ["ORDINARY_NAMES", "Severity", "UnknownName", "examine_name", "is_foreign_scope"]

# Names that differ from a section in so few characters are refused, since the usual typos of a section differ in at most so many.
_MOST_EDITS: Final = 2
_SHOWN_READERS: Final = 3

# Names that are at most two edits away from a section, but are not refused as a typo of it, and why. They are all such names in
# the runnable configurations of mmpretrain, mmdetection and mmsegmentation.
ORDINARY_NAMES: Final[Mapping[str, str]] = {
    "conv_cfg": "the usual variable for the type of convolutions, for example in the gn+ws configurations of mmdetection; it "
    "resembles env_cfg",
    "models": "bisenetv2_fcn_4xb4-ohem-160k_cityscapes-1024x1024.py of mmsegmentation, which runs without the changes in it; "
    "under its scope, it causes a warning",
}


class Severity(Enum):
    """What to do about an unknown name."""

    ERROR = auto()
    WARNING = auto()


@final
@dataclass(frozen=True, slots=True)
class UnknownName:
    """A top-level name that is neither a section nor a variable whose value is used."""

    severity: Severity
    message: str


def is_foreign_scope(scope: str | None) -> bool:
    """Return whether a ``default_scope`` is that of another project, whose code may read further keys."""
    return scope not in (None, "stratagem", "mmengine")


def examine_name(
    name: str,
    layers: Sequence[Source],
    sections: Collection[str],
    *,
    foreign: bool = False,
    set_by_program: bool = False,
    advice: str = "",
) -> UnknownName | None:
    """Return what is wrong with a top-level name that is not a section; None if it is a variable whose value is used.

    A variable is a name that its file reads after assigning it, or that a file based on it reads: by name, as ``_base_.name`` or
    as ``{{ _base_.name }}``. Names that start with an underscore are always variables.

    Args:
        name: the name.
        layers: the files and overrides of the configuration, bases first.
        sections: the names of all sections.
        foreign: whether the configuration belongs to another project, whose code may read the key.
        set_by_program: whether the program may set names after it loaded the files.
        advice: a sentence that an error for a name that nothing reads ends with.
    """
    if name.startswith("_"):
        return None
    near = _sections_near(name, frozenset(sections)) if name not in ORDINARY_NAMES else ()
    setters = [index for index, layer in enumerate(layers) if name in layer.data]
    if not setters and set_by_program and not near:
        return None
    if not setters:
        text = f"unknown key {name!r}. {_suggest(near)}" if near else _unread(name, sections, advice)
        return UnknownName(Severity.ERROR, text)
    last = layers[setters[-1]]
    if any(_reads_value_of(layer, last, name) for layer in layers[setters[-1] :]):
        return UnknownName(Severity.ERROR, _too_near(name, near, layers)) if near else None
    readers = [layer for layer in layers if _reads(layer, name)]
    if near:
        return UnknownName(Severity.ERROR, f"unknown key {name!r}. {_suggest(near)}")
    if not readers:
        if foreign:
            return UnknownName(Severity.WARNING, _unread(name, sections, advice, lists_all=False))
        return UnknownName(Severity.ERROR, _unread(name, sections, advice))
    return UnknownName(Severity.WARNING, _without_effect(name, last, readers))


def _reads(layer: Source, name: str) -> bool:
    uses = layer.uses
    return name in uses.own or name in uses.before or name in uses.inherited


def _reads_value_of(layer: Source, setter: Source, name: str) -> bool:
    """Return whether a layer reads the value that ``setter`` gives to a name."""
    if layer is setter:
        return name in layer.uses.own
    return (setter.name == layer.name or setter.name in layer.based_on) and layer.uses.inherits(name)


def _unread(name: str, sections: Collection[str], advice: str, *, lists_all: bool = True) -> str:
    if name in MMCV_KEYS:
        return f"unknown key {name!r}, which belongs to MMCV 1. Write {MMCV_KEYS[name]}."
    suggestion = did_you_mean(name, sections) if lists_all or nearest_names(name, sections) else ""
    sentences = (f"unknown key {name!r}.", suggestion, "No other value in the files uses it.", advice)
    return " ".join(filter(None, sentences))


def _suggest(near: Sequence[str]) -> str:
    return f"Did you mean {' or '.join(map(repr, near))}?"


def _too_near(name: str, near: Sequence[str], layers: Sequence[Source]) -> str:
    where = _positions([layer for layer in layers if _reads(layer, name)], name) or "another file"
    return (
        f"unknown key {name!r}. {_suggest(near)} If it is a variable, which {where} uses, choose a "
        "name that is not so similar to that of a section."
    )


def _without_effect(name: str, setter: Source, readers: Sequence[Source]) -> str:
    set_at = _origin(setter, name)
    return (
        f"{name!r} is set in {set_at}, but {_positions(readers, name)} uses its value before that, so the new value has no "
        f"effect. Set the values that depend on {name!r} as well, or remove it."
    )


def _origin(layer: Source, name: str) -> Origin:
    return Origin(layer.name, line_of(layer, (name,))) if layer.suffix else Origin(f"{layer.name} {name}")


def _positions(layers: Sequence[Source], name: str) -> str:
    found = dict.fromkeys(str(Origin(layer.name, line_that_reads(layer, name))) for layer in layers)
    return " and ".join(list(found)[:_SHOWN_READERS])


@functools.lru_cache(maxsize=4096)
def _sections_near(name: str, sections: frozenset[str]) -> tuple[str, ...]:
    return tuple(sorted(each for each in sections if is_within_edits(name, each, _MOST_EDITS)))
