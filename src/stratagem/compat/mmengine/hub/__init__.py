"""Configurations and models of installed packages, with the interface of ``mmengine.hub``."""

from stratagem.compat.mmengine.hub.hub import get_config, get_model

__all__ = ["get_config", "get_model"]
