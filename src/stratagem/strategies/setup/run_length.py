"""How far a run goes, and in what batches: ``dispatch_kwargs`` parsed once."""

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
    """What building needs to know of the run. Iterations are micro-batches; None is "not known".

    Attributes:
        epoch_length: iterations in an epoch.
        max_epochs: epochs in the run.
        max_iters: iterations in the run.
        train_micro_batch_size_per_gpu: samples that a rank trains on in one iteration.
        init_weights_for_test_or_val: whether the model's ``init_weights`` is called.
        cur_iter: iterations that are done when training begins.
    """

    epoch_length: int | None = None
    max_epochs: int | None = None
    max_iters: int | None = None
    train_micro_batch_size_per_gpu: int | None = None
    init_weights_for_test_or_val: bool = True
    cur_iter: int = 0

    @classmethod
    def parse(cls, dispatch_kwargs: Mapping[str, Any]) -> RunLength:
        """Read ``dispatch_kwargs``.

        Raises:
            ConfigKeyError: if a key is unknown.
            ConfigTypeError: if a number is no whole number.
        """
        refuse_unknown(dispatch_kwargs, (field.name for field in fields(cls)), "dispatch_kwargs")
        for key, value in dispatch_kwargs.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if key != "init_weights_for_test_or_val" and value is not None and not whole:
                raise ConfigTypeError(f"dispatch_kwargs: {key} is {value!r}; a whole number is due.")
        return cls(**dispatch_kwargs)
