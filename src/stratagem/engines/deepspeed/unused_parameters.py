"""Report the parameters that do not get a gradient in the first update."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stratagem.utils.names import some_names

__all__ = ["UnusedParameters"]

logger = logging.getLogger(__name__)

_MAX_NAMES = 8


@final
class UnusedParameters:
    """Record which parameters get a gradient before the first update, and warn about the others.

    DeepSpeed updates every parameter of its flat buffers, so a parameter without a gradient is updated with a gradient of zero:
    weight decay and momentum still change it. In a single process, an optimizer skips it.

    Args:
        names: the trainable parameters of the optimizer with their names.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._unused = dict(names)
        self._handles: list[RemovableHandle] = [
            parameter.register_hook(partial(self._record, parameter)) for parameter in names
        ]

    def report(self) -> None:
        """Warn about the parameters that got no gradient, on the first call only."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._unused:
            logger.warning(
                "%d parameters got no gradient in the first update: %s. DeepSpeed updates them with a gradient of zero, so "
                "weight decay and momentum change them, unlike in a single process. If they are never used, freeze them with "
                "requires_grad_(False) before prepare(). If they are used in some updates only, put them into a parameter group "
                "without weight decay, or use another strategy for exact results.",
                len(self._unused), some_names(list(self._unused.values()), _MAX_NAMES),
            )  # fmt: skip
        self._unused.clear()

    def _record(self, parameter: nn.Parameter, _: Tensor) -> None:
        self._unused.pop(parameter, None)
