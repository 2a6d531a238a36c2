"""A hook for compatibility with MMEngine configurations."""

from __future__ import annotations

from typing import final

from stratagem.train.hook import Hook

__all__ = ["DistSamplerSeedHook"]


@final
class DistSamplerSeedHook(Hook):
    """A hook that does nothing: the loops pass the epoch to the dataloader, which passes it to the sampler.

    The hook exists so that configurations that contain it keep working.
    """
