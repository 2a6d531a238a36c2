"""Configurations: read, merge, override, write, and know where each value comes from."""

from stratagem.config.config import Config
from stratagem.config.history import Change
from stratagem.config.node import ConfigDict
from stratagem.config.overrides import parse_overrides
from stratagem.config.read_base import read_base
from stratagem.config.source import Origin

__all__ = ["Change", "Config", "ConfigDict", "Origin", "parse_overrides", "read_base"]
