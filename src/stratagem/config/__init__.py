"""Configurations: read, merge, override, check and write them, and find where a value was set."""

from stratagem.config.check import FREE_KEY, JointRule, Problem, Rule, Section, check, require
from stratagem.config.compare import changed_paths, changed_values
from stratagem.config.config import Config
from stratagem.config.explain import explain, show
from stratagem.config.history import Change, ChangeKind
from stratagem.config.node import ConfigDict
from stratagem.config.overrides import parse_overrides
from stratagem.config.reading.lazy import read_base
from stratagem.config.reading.source import Origin

__all__ = [
    "FREE_KEY",
    "Change",
    "Config",
    "ConfigDict",
    "ChangeKind",
    "Origin",
    "Problem",
    "JointRule",
    "Rule",
    "Section",
    "changed_paths",
    "changed_values",
    "check",
    "explain",
    "parse_overrides",
    "read_base",
    "require",
    "show",
]
