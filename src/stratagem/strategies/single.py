"""The strategy for a single device."""

from __future__ import annotations

from typing import final

from stratagem.errors import PlacementError
from stratagem.parallel import OnDevice, Placement
from stratagem.strategies.composed import ComposedStrategy

__all__ = ["SingleDeviceStrategy"]


@final
class SingleDeviceStrategy(ComposedStrategy):
    """Trains in one process on one device: the CPU or an accelerator. SyncBatchNorm layers are converted to BatchNorm.

    Args:
        kwargs: the arguments of :class:`BaseStrategy`.

    Raises:
        PlacementError: if several processes were started, each of which would train a separate model.
    """

    def _make_placement(self) -> Placement:
        if self.world_size > 1:
            raise PlacementError(
                f"SingleDeviceStrategy was used with {self.world_size} processes, each of which would train a separate "
                "model. Use DDPStrategy, or start a single process."
            )
        return OnDevice(self.logger)
