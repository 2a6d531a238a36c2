"""Check that an optimizer is elementwise, as ZeRO requires."""

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
    "it compresses gradients to one bit, so its updates differ from the updates of a single process, and it requires "
    "NCCL or MPI. Use AdamW, or FusedAdam on accelerators."
)
_REASONS: Final = {
    "Adagrad": "DeepSpeed rebuilds it without the options of its parameter groups. Use RMSprop or AdamW, or stage=0.",
    "Adafactor": "its updates depend on whole rows and columns. Use AdamW, stage=0, DDPStrategy or FSDPStrategy.",
    "Muon": "its updates depend on whole matrices. Use AdamW, stage=0, DDPStrategy or FSDPStrategy.",
    "LBFGS": "it calls the model several times per update. Use AdamW.",
    "SparseAdam": "it requires sparse gradients, but the gradients of shards are dense. Use AdamW, or stage=0.",
    "FusedLamb": "its updates depend on the norms of whole tensors. Use stage=0.",
    "OnebitAdam": _ONE_BIT,
    "OnebitLamb": _ONE_BIT,
    "ZeroOneAdam": _ONE_BIT,
    "MixedOptimizer": "DeepSpeed supports a single optimizer. Use DDPStrategy or FSDPStrategy, or an optimizer such as AdamW.",
    "ZeroRedundancyOptimizer": "DeepSpeed already shards the optimizer state. Use the wrapped optimizer directly.",
}
# Optimizers that are rejected at every stage.
_NEVER: Final = frozenset(
    {"LBFGS", "MixedOptimizer", "OnebitAdam", "OnebitLamb", "ZeroOneAdam", "ZeroRedundancyOptimizer"}
)


def refuse_by_name(optim_wrapper: Any) -> None:
    """Reject the configuration of an optimizer that no stage supports, before it is built.

    Raises:
        PlacementError: if the optimizer is not supported.
    """
    optimizer = optim_wrapper.get("optimizer") if isinstance(optim_wrapper, Mapping) else None
    name = optimizer.get("type") if isinstance(optimizer, Mapping) else None
    if name in _NEVER:
        raise PlacementError(f"{name} cannot be used with DeepSpeedStrategy: {_REASONS[name]}")


def require_elementwise(optimizer: Optimizer, *, stage: int, allow_unknown: bool) -> None:
    """Require that an optimizer computes the same updates under a ZeRO stage as in a single process.

    From stage 1 on, each rank updates parts of tensors in flat buffers, which is only correct for elementwise
    optimizers.

    Args:
        optimizer: the optimizer.
        stage: the ZeRO stage.
        allow_unknown: whether to accept optimizers that are not known to be elementwise.

    Raises:
        PlacementError: if the optimizer is not supported; the message names an alternative.
    """
    name = type(optimizer).__name__
    if all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
        raise PlacementError(
            f"{name} uses different weights in evaluation and in training, which DeepSpeed does not support. Use AdamW, or "
            "another strategy."
        )
    if name in _NEVER or (stage and name in _REASONS):
        raise PlacementError(f"{name} cannot be used with DeepSpeed's stage {stage}: {_REASONS[name]}")
    if stage and name not in _ELEMENTWISE and not allow_unknown:
        raise PlacementError(
            f"ZeRO requires an elementwise optimizer from stage 1 on, and {name} is not known to be elementwise. If it "
            "is, set config=dict(zero_allow_untested_optimizer=True). Otherwise use stage 0, DDPStrategy or FSDPStrategy."
        )
