"""Data in an order that does not depend on ranks, workers or restarts."""

from stratagem.data.collate import pseudo_collate
from stratagem.data.loader import EpochLoader, build_dataloader
from stratagem.data.samplers import DefaultSampler, InfiniteSampler, PositionedSampler, epoch_order, stream_seed

__all__ = [
    "DefaultSampler",
    "EpochLoader",
    "InfiniteSampler",
    "PositionedSampler",
    "build_dataloader",
    "epoch_order",
    "pseudo_collate",
    "stream_seed",
]
