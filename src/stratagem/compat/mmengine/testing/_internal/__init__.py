"""Tests with several processes."""

from stratagem.compat.mmengine.testing._internal.distributed import MultiProcessTestCase

__all__ = ["MultiProcessTestCase"]
