"""ColossalAI's optimizers, which are registered in ``OPTIMIZERS`` under their names and as ``colossalai.<name>``."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from stratagem.engines.colossalai.import_stubs import import_stubs
from stratagem.errors import PlacementError

with import_stubs():
    from colossalai.nn import optimizer as library

__all__ = ["CAME", "CPUAdam", "FusedAdam", "FusedLAMB", "FusedSGD", "HybridAdam", "Lamb", "Lars"]

if not torch.accelerator.is_available():
    with import_stubs():
        from stratagem.engines.colossalai.cpu_backend import train_on_cpu
    train_on_cpu()

CAME = library.CAME
CPUAdam = library.CPUAdam
HybridAdam = library.HybridAdam
Lamb = library.Lamb
Lars = library.Lars


def _for_accelerators(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return the optimizer class, or without an accelerator a subclass that raises an error when it is instantiated."""
    if torch.accelerator.is_available():
        return optimizer

    # wraps() keeps the optimizer's signature, which configurations are checked against.
    @wraps(optimizer.__init__)
    def refuse(*_: Any, **__: Any) -> None:
        raise PlacementError(
            f"ColossalAI's {optimizer.__name__} requires CUDA, and this run is on the CPU. Use HybridAdam, or torch's AdamW or "
            "SGD, which have fused implementations for the CPU."
        )

    return type(optimizer.__name__, (torch.optim.Optimizer,), {"__init__": refuse})


FusedAdam = _for_accelerators(library.FusedAdam)
FusedLAMB = _for_accelerators(library.FusedLAMB)
FusedSGD = _for_accelerators(library.FusedSGD)
