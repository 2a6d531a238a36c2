"""Placements distribute a model and its gradients across devices and ranks."""

from stratagem.parallel.ddp import DDP_OPTIONS, Replica, Replicated
from stratagem.parallel.placement import AnyOptim, Placed, Placement, Steps
from stratagem.parallel.single_device import OnDevice

__all__ = ["DDP_OPTIONS", "AnyOptim", "OnDevice", "Placed", "Placement", "Replica", "Replicated", "Steps"]
