"""Data in an order that does not depend on ranks, workers or restarts."""

from stratagem.data.batches import PositionedBatches, Taken
from stratagem.data.building import build_dataloader
from stratagem.data.collate import pseudo_collate
from stratagem.data.grouped import GroupedBatchSampler
from stratagem.data.loader import EpochLoader
from stratagem.data.samplers import DefaultSampler, InfiniteSampler, PositionedSampler, epoch_order
from stratagem.data.streams import Draw, stream_seed
from stratagem.data.weighted import WeightedSampler
from stratagem.data.workers import naming_dead_workers

__all__ = [
    "DefaultSampler",
    "Draw",
    "EpochLoader",
    "GroupedBatchSampler",
    "InfiniteSampler",
    "PositionedBatches",
    "PositionedSampler",
    "Taken",
    "WeightedSampler",
    "build_dataloader",
    "epoch_order",
    "naming_dead_workers",
    "pseudo_collate",
    "stream_seed",
]
