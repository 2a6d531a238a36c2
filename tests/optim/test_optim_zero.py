"""ZeroRedundancyOptimizer in one process. The tests of the distributed strategies cover several ranks."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from stratagem.errors import ConfigValueError
from stratagem.utils import import_object


def test_a_single_process_is_rejected() -> None:
    """Without a process group, the error suggests the optimizer to use."""
    with warnings.catch_warnings():
        # Importing torch.distributed.optim compiles functions with TorchScript, which causes a warning.
        warnings.simplefilter("ignore", DeprecationWarning)
        zero = import_object("stratagem.optim.zero_redundancy:ZeroRedundancyOptimizer")
    with pytest.raises(ConfigValueError, match="Use AdamW in a single"):
        zero([nn.Parameter(torch.zeros(1))], "AdamW", lr=0.1)
