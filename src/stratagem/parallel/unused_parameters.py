"""Explain torch's error about parameters that the last loss did not depend on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch.nn.parallel import DistributedDataParallel

from stratagem.errors import PlacementError
from stratagem.utils.names import some_names

__all__ = ["unused_parameters_error"]

# DistributedDataParallel reports unused parameters by their index among the trainable parameters.
_UNUSED = re.compile(r"indices which did not receive grad for rank \d+: ((?:\d+ ?)+)")
_MAX_NAMES = 8


def unused_parameters_error(
    error: RuntimeError, replica: DistributedDataParallel, names: Sequence[str], option: str
) -> PlacementError | None:
    """Return an error that names the unused parameters, or None if ``error`` has a different cause.

    Args:
        error: the error that ``DistributedDataParallel`` raised in its forward pass.
        replica: the wrapped model.
        names: the names of the trainable parameters, in the order of ``named_parameters()``.
        option: the code that allows unused parameters.
    """
    found = _UNUSED.search(str(error))
    if found is None:
        return None
    unused = [names[int(number)] for number in found[1].split()]
    listed = some_names(unused, _MAX_NAMES)
    return PlacementError(
        f"{type(replica.module).__name__} did not use all its parameters for the loss of the last iteration, but DDP waits for "
        f"the gradients of all parameters. Unused: {listed} ({len(unused)} of {len(names)}). If this is intended, set {option}; "
        "otherwise freeze them with requires_grad_(False), or make the loss depend on them."
    )
