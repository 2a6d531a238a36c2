"""The length and batch size of a run: ``dispatch_kwargs``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, final

from stratagem.errors import ConfigTypeError
from stratagem.utils import refuse_unknown

__all__ = ["RunLength"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunLength:
    """The length and batch size of a run. An iteration processes one micro-batch; None means unknown.

    Attributes:
        epoch_length: the number of iterations in an epoch.
        max_epochs: the number of epochs in the run.
        max_iters: the number of iterations in the run.
        train_micro_batch_size_per_gpu: the number of samples that a rank trains on in one iteration.
        init_weights_for_test_or_val: whether the model's ``init_weights()`` is called.
        cur_iter: the number of completed iterations when training begins.
    """

    epoch_length: int | None = None
    max_epochs: int | None = None
    max_iters: int | None = None
    train_micro_batch_size_per_gpu: int | None = None
    init_weights_for_test_or_val: bool = True
    cur_iter: int = 0

    @classmethod
    def parse(cls, dispatch_kwargs: Mapping[str, Any]) -> RunLength:
        """Parse ``dispatch_kwargs``.

        Raises:
            ConfigKeyError: if a key is unknown.
            ConfigTypeError: if a number is not an integer.
        """
        refuse_unknown(dispatch_kwargs, (field.name for field in fields(cls)), "dispatch_kwargs")
        for key, value in dispatch_kwargs.items():
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if key != "init_weights_for_test_or_val" and value is not None and not is_integer:
                raise ConfigTypeError(f"dispatch_kwargs: {key} must be an integer, got {value!r}.")
        return cls(**dispatch_kwargs)
