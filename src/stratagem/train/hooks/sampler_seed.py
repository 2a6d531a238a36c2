"""For configurations that name it."""

from __future__ import annotations

from typing import final

from stratagem.train.hook import Hook

__all__ = ["DistSamplerSeedHook"]


@final
class DistSamplerSeedHook(Hook):
    """Nothing is left to do for it: the loops tell the loader each epoch, and the loader its sampler.

    It exists so that configurations that name it go on working.
    """
