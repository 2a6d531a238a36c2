"""Configurations with the interface of ``mmengine.config``."""

from stratagem.compat.mmengine.config.config import Config, read_base
from stratagem.compat.mmengine.config.config_dict import ConfigDict
from stratagem.compat.mmengine.config.dict_action import DictAction

__all__ = ["Config", "ConfigDict", "DictAction", "read_base"]
