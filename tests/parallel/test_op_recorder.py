"""Models with deferred initialization get the same values as models that were initialized directly."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from stratagem.parallel.deferred_init.materialize import named_tensors
from stratagem.parallel.deferred_init.recorder import INIT_FUNCTIONS, OpRecorder


def filled(fill: Callable[[Tensor], object], *shape: int) -> Callable[[], nn.Module]:
    """Return a function that builds a module whose weight is filled by ``fill``, between two random layers."""

    def make() -> nn.Module:
        module = nn.Module()
        module.first = nn.Linear(3, 2)
        module.weight = nn.Parameter(torch.empty(*(shape or (6, 4))))
        fill(module.weight)
        module.last = nn.Linear(2, 3)
        return module

    return make


class Everything(nn.Module):
    """A model with constants, computed buffers, tied weights, views, and weights that are initialized twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8, padding_idx=1)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.noise = nn.Parameter(torch.randn(3, 4) * 0.5 + torch.rand(4))
        angles = torch.outer(torch.arange(5).float(), 1.0 / 10000 ** (torch.arange(0, 4, 2) / 4))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("mask", torch.ones(5, 5).tril().bool())
        self.register_buffer("given", torch.tensor([1.0, 2.0]))
        self.register_buffer("array", torch.from_numpy(np.arange(3.0)))
        self.norm = nn.LayerNorm(8)
        with torch.no_grad():
            self.norm.weight.add_(torch.rand(8))
            self.words.weight[3] = 0.5
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        for module in self.inner:
            nn.init.normal_(module.weight, std=0.02)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 3),
    "convolution": lambda: nn.Conv2d(3, 4, 3),
    "embedding": lambda: nn.Embedding(7, 3, padding_idx=2),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "lstm": lambda: nn.LSTM(4, 5),
    "everything": Everything,
    **{
        name: filled(getattr(nn.init, name))
        for name in (
            "uniform_", "normal_", "trunc_normal_", "ones_", "zeros_", "eye_", "orthogonal_", "xavier_uniform_",
            "xavier_normal_", "kaiming_uniform_", "kaiming_normal_",
        )
    },
    "constant_": filled(lambda weight: nn.init.constant_(weight, 0.3)),
    "sparse_": filled(lambda weight: nn.init.sparse_(weight, 0.5)),
    "dirac_": filled(nn.init.dirac_, 6, 4, 3),
    "narrow trunc_normal_": filled(lambda weight: nn.init.trunc_normal_(weight, std=1.0, a=0.1, b=0.4)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_values_and_generators_match_direct_initialization(name: str) -> None:
    """All parameters and buffers have the same bits, and the next random number is the same."""
    torch.manual_seed(3)
    expected = named_tensors(MODELS[name]())
    after = torch.rand(2)
    torch.manual_seed(3)
    recorder = OpRecorder()
    with recorder.recording():
        model = MODELS[name]()
    tensors = {key: tensor for key, tensor in named_tensors(model).items() if tensor.is_meta}
    names = {id(tensor): key for key, tensor in tensors.items()}
    made = {names[id(tensor)]: values.clone() for tensor, values in recorder.materialize(tensors.values())}
    assert made.keys() == expected.keys() - {"array"}
    assert [key for key, values in made.items() if not torch.equal(values, expected[key])] == []
    assert torch.equal(torch.rand(2), after)
    assert list(made) == [names[id(tensor)] for tensor in recorder.materialization_order(tensors.values())]


def test_all_initializations_that_skip_meta_tensors_are_known() -> None:
    """A new function of torch.nn.init that skips meta tensors makes this test fail."""
    functions = [function for _, function in inspect.getmembers(nn.init, inspect.isfunction)]
    skipping = {each.__code__ for each in functions if re.search(r"\.is_meta", inspect.getsource(each))}
    assert skipping == set(INIT_FUNCTIONS)


def test_a_tensor_is_freed_before_the_next_is_materialized() -> None:
    """In a stack of layers that are initialized twice, only one tensor is in memory at a time."""
    recorder = OpRecorder()
    with recorder.recording():
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
        for layer in model:
            nn.init.normal_(layer.weight)
    earlier: list[StorageWeakRef] = []
    for _, values in recorder.materialize(model.parameters()):
        assert all(reference.expired() for reference in earlier)
        earlier.append(StorageWeakRef(values.untyped_storage()))
    assert len(earlier) == 8


def test_an_uninitialized_tensor_is_not_written() -> None:
    """Uninitialized memory is not recorded as written."""
    recorder = OpRecorder()
    with recorder.recording():
        empty, full = torch.empty(3), torch.ones(3)
    assert (recorder.is_written(empty), recorder.is_written(full)) == (False, True)
