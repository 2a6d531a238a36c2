"""Data loading whose order and random numbers are independent of ranks, workers and restarts."""

from stratagem.data.batches import ConsumedSamples, PositionedBatches
from stratagem.data.building import build_dataloader, check_dataloader, in_dataset_order
from stratagem.data.collate import pseudo_collate
from stratagem.data.copy_ahead import AcceleratorCopyStream, CopyStream, copy_ahead, supports_pinned_memory
from stratagem.data.grouped import GroupedBatchSampler
from stratagem.data.limits import BatchLimit, BatchLimits
from stratagem.data.loader import EpochLoader
from stratagem.data.samplers import DefaultSampler, InfiniteSampler, PositionedSampler, epoch_order
from stratagem.data.streams import BatchRequest, stream_seed
from stratagem.data.weighted import WeightedSampler
from stratagem.data.workers import report_dead_workers

__all__ = [
    "BatchLimit",
    "BatchLimits",
    "AcceleratorCopyStream",
    "CopyStream",
    "DefaultSampler",
    "BatchRequest",
    "EpochLoader",
    "GroupedBatchSampler",
    "InfiniteSampler",
    "PositionedBatches",
    "PositionedSampler",
    "ConsumedSamples",
    "WeightedSampler",
    "build_dataloader",
    "check_dataloader",
    "copy_ahead",
    "epoch_order",
    "in_dataset_order",
    "report_dead_workers",
    "pseudo_collate",
    "stream_seed",
    "supports_pinned_memory",
]
