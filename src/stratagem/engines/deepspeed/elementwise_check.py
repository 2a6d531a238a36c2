"""Which optimizers may step parts of tensors: those that compute element by element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch.optim import Optimizer

from stratagem.errors import PlacementError

__all__ = ["refuse_by_name", "require_elementwise"]

_ELEMENTWISE: Final = frozenset(
    {
        "ASGD",
        "Adadelta",
        "Adam",
        "AdamW",
        "Adamax",
        "DeepSpeedCPUAdam",
        "DeepSpeedCPULion",
        "FusedAdam",
        "FusedLion",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    }
)
_ONE_BIT: Final = (
    "it exchanges gradients itself, in one bit and over NCCL or MPI alone, so that its steps are not those of one process. "
    "Use AdamW, or FusedAdam on accelerators."
)
_REASONS: Final = {
    "Adagrad": "DeepSpeed builds it anew without the options of its groups. Use RMSprop or AdamW, or stage=0.",
    "Adafactor": "it looks at the rows and columns of whole tensors. Use AdamW, stage=0, or FSDPStrategy.",
    "Muon": "it looks at whole matrices. Use AdamW, stage=0, or FSDPStrategy.",
    "LBFGS": "it calls the model several times in an update. Use AdamW.",
    "SparseAdam": "it needs sparse gradients, and those of parts are dense. Use AdamW, or stage=0.",
    "FusedLamb": "it looks at the norms of whole tensors. Use stage=0.",
    "OnebitAdam": _ONE_BIT,
    "OnebitLamb": _ONE_BIT,
    "ZeroOneAdam": _ONE_BIT,
    "ZeroRedundancyOptimizer": "DeepSpeed spreads the optimizer's state already. Use the optimizer itself.",
}
# Whatever the stage.
_NEVER: Final = frozenset({"LBFGS", "OnebitAdam", "OnebitLamb", "ZeroOneAdam", "ZeroRedundancyOptimizer"})


def refuse_by_name(optim_wrapper: Any) -> None:
    """Refuse a configuration of an optimizer that no stage can have, before it is built.

    Raises:
        PlacementError: if it is one of these.
    """
    optimizer = optim_wrapper.get("optimizer") if isinstance(optim_wrapper, Mapping) else None
    name = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    if name in _NEVER:
        raise PlacementError(f"{name} cannot be used with DeepSpeedStrategy: {_REASONS[name]}")


def require_elementwise(optimizer: Optimizer, *, stage: int, allow_unknown: bool) -> None:
    """Refuse an optimizer that would compute other numbers under this stage of ZeRO.

    From stage 1 on a rank steps parts of tensors, laid out one after another: only arithmetic that looks at each
    element by itself comes to the same. ``allow_unknown`` lets optimizers pass that are not known here.

    Raises:
        PlacementError: if it is refused; the message says what to use instead.
    """
    name = type(optimizer).__name__
    if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
        raise PlacementError(
            f"{name} keeps other weights for evaluation than it trains with, and DeepSpeed would train with either. Use "
            "AdamW, or another strategy."
        )
    if name in _NEVER or (stage and name in _REASONS):
        raise PlacementError(f"{name} cannot be used with DeepSpeed's stage {stage}: {_REASONS[name]}")
    if stage and name not in _ELEMENTWISE and not allow_unknown:
        raise PlacementError(
            f"{name} is not known here, and from ZeRO stage 1 on it would step parts of tensors. If it computes element by "
            "element, say so with config=dict(zero_allow_untested_optimizer=True); else use stage 0."
        )
