"""The number of examples of the property tests."""

from __future__ import annotations

from hypothesis import settings

__all__ = ["examples"]


def examples(count: int) -> int:
    """Return the number of examples to generate: ``count``, or 5 % of it if only the fast tests run.

    The profile is chosen in ``conftest.py``; its own number of examples is a percentage of ``count``.
    """
    return max(10, count * settings.default.max_examples // 100)
