"""Where a model's parameters live."""

from stratagem.parallel.on_device import OnDevice
from stratagem.parallel.placement import AnyOptim, Placed, Placement, Steps
from stratagem.parallel.replicated import DDP_OPTIONS, Replica, Replicated

__all__ = ["DDP_OPTIONS", "AnyOptim", "OnDevice", "Placed", "Placement", "Replica", "Replicated", "Steps"]
