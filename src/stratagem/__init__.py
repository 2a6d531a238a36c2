"""Stratagem: a PyTorch training engine in which the strategy is all that changes with the machine."""

from stratagem._version import __version__

__all__ = ["__version__"]
