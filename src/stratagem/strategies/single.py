"""The strategy for a single device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from stratagem.errors import PlacementError
from stratagem.parallel import OnDevice, Placement
from stratagem.parallel.activation_checkpointing import parse_checkpointing
from stratagem.strategies.composed import ComposedStrategy

__all__ = ["SingleDeviceStrategy"]


@final
class SingleDeviceStrategy(ComposedStrategy):
    """Trains in one process on one device: the CPU or an accelerator. SyncBatchNorm layers are converted to BatchNorm.

    Args:
        activation_checkpointing: which modules compute their activations again in the backward pass instead of storing them:
            True for the items of every ``ModuleList``; a class, the name of a class, or a list of them;
            ``dict(classes=...)``, ``dict(modules=["layers.*"])`` or ``dict(min_params=1_000_000)``; a function
            ``(name, module) -> bool``; or a mapping with such a ``policy``, ``save_ops`` and ``preserve_rng_state``. Losses and
            gradients do not change.
        kwargs: the arguments of :class:`BaseStrategy`.

    Raises:
        PlacementError: if several processes were started, each of which would train a separate model.
    """

    def __init__(self, *, activation_checkpointing: Any = None, **kwargs: Any) -> None:
        parse_checkpointing(activation_checkpointing)
        self._activation_checkpointing = activation_checkpointing
        super().__init__(**kwargs)

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        parse_checkpointing(arguments.get("activation_checkpointing"))
        super().check_arguments(arguments)

    def _make_placement(self) -> Placement:
        if self.world_size > 1:
            raise PlacementError(
                f"SingleDeviceStrategy was used with {self.world_size} processes, each of which would train a separate "
                "model. Use DDPStrategy, or start a single process."
            )
        return OnDevice(self.logger, activation_checkpointing=self._activation_checkpointing)
