"""One device."""

from __future__ import annotations

from typing import final

from stratagem.errors import PlacementError
from stratagem.parallel import OnDevice, Placement
from stratagem.strategies.composed import ComposedStrategy

__all__ = ["SingleDeviceStrategy"]


@final
class SingleDeviceStrategy(ComposedStrategy):
    """One process on one device: the CPU or an accelerator. SyncBatchNorm layers become plain BatchNorm.

    Args:
        kwargs: those of :class:`BaseStrategy`.

    Raises:
        PlacementError: if several processes were started: each would train by itself.
    """

    def _make_placement(self) -> Placement:
        if self.world_size > 1:
            raise PlacementError(
                f"SingleDeviceStrategy was started with {self.world_size} processes, and each would train a model of its "
                "own. Use DDPStrategy, or start one process."
            )
        return OnDevice(self.logger)
