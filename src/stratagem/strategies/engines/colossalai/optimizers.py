"""ColossalAI's own optimizers, for ``OPTIMIZERS``: by their names there, or as ``colossalai.<name>``."""

from __future__ import annotations

from typing import Any, Final

import torch

from stratagem.errors import PlacementError
from stratagem.strategies.engines.colossalai.stand_ins import stand_ins

with stand_ins():
    from colossalai.nn import optimizer as library

__all__ = ["CAME", "WHOLE_PARAMETERS", "CPUAdam", "FusedAdam", "FusedLAMB", "FusedSGD", "HybridAdam", "Lamb", "Lars"]

# What looks at more than one element of a parameter at a time, and was not written for ZeRO.
WHOLE_PARAMETERS: Final = frozenset({"Adafactor", "Lars", "LBFGS", "Muon", "SparseAdam"})

if not torch.accelerator.is_available():
    with stand_ins():
        from stratagem.strategies.engines.colossalai.on_cpu import train_on_cpu
    train_on_cpu()

CAME = library.CAME
CPUAdam = library.CPUAdam
HybridAdam = library.HybridAdam
Lamb = library.Lamb
Lars = library.Lars


class _NeedsAccelerator(torch.optim.Optimizer):
    """Stands for an optimizer whose kernels are CUDA's alone, on a machine without: it says so when it is built."""

    def __init__(self, params: Any, **options: Any) -> None:
        raise PlacementError(
            f"ColossalAI's {type(self).__name__} has kernels for CUDA alone, and this run is on the CPU. Use HybridAdam, or "
            "torch's AdamW or SGD, which are fused on the CPU too."
        )


def _for_accelerators(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    return optimizer if torch.accelerator.is_available() else type(optimizer.__name__, (_NeedsAccelerator,), {})


FusedAdam = _for_accelerators(library.FusedAdam)
FusedLAMB = _for_accelerators(library.FusedLAMB)
FusedSGD = _for_accelerators(library.FusedSGD)
