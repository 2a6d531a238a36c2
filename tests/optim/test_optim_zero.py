"""State spread over ranks; what several processes do is tested with the distributed strategies."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from stratagem.errors import ConfigValueError
from stratagem.utils import import_object


def test_one_process_has_nobody_to_share_with() -> None:
    """Without a process group the error says what to use."""
    with warnings.catch_warnings():
        # torch.distributed.optim scripts functions when it is imported, and torch warns of that.
        warnings.simplefilter("ignore", DeprecationWarning)
        zero = import_object("stratagem.optim.zero_redundancy:ZeroRedundancyOptimizer")
    with pytest.raises(ConfigValueError, match="Use AdamW itself"):
        zero([nn.Parameter(torch.zeros(1))], "AdamW", lr=0.1)
