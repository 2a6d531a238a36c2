"""Detecting and removing model wrappers."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stratagem.model import is_model_wrapper, unwrap_model
from tests.support.ranks import Ranks


class Holder(nn.Module):
    """A model with a submodule named ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(1, 1)
        self.head = nn.Linear(1, 1)


def test_a_model_with_a_submodule_named_module_is_not_a_wrapper() -> None:
    """A model with a submodule named ``module`` is not a wrapper and is returned unchanged."""
    model = Holder()
    assert not is_model_wrapper(model)
    assert unwrap_model(model) is model


def test_data_parallel_is_a_wrapper() -> None:
    """Nested DataParallel wrappers are removed, but not the model's own submodule."""
    model = Holder()
    wrapped = nn.DataParallel(nn.DataParallel(model))
    assert is_model_wrapper(wrapped)
    assert unwrap_model(wrapped) is model


def of_distributed() -> tuple[bool, bool]:
    """Wrap a model in DistributedDataParallel and unwrap it."""
    model = Holder()
    wrapped = DistributedDataParallel(model)
    return is_model_wrapper(wrapped), unwrap_model(wrapped) is model


def test_distributed_data_parallel_is_a_wrapper(ranks: Ranks) -> None:
    """The model inside DistributedDataParallel is returned."""
    assert ranks.run(of_distributed) == [(True, True)] * 2
