"""Copies of models for plans."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stratagem.planning.model_copies import ModelCopies


def made(*, hook: bool) -> tuple[list[nn.Module], ModelCopies]:
    """Return the models that were built, and what copies them."""
    built: list[nn.Module] = []

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 3, device="meta"), nn.Linear(3, 2, device="meta"))
        if hook:
            model[1].register_forward_pre_hook(lambda _, args: model[0].bias + args[0])
        built.append(model)
        return model

    return built, ModelCopies(build)


def test_a_model_is_built_once() -> None:
    """Each call returns a new model with its own parameters, on the meta device."""
    built, copies = made(hook=False)
    first, second = copies(), copies()
    assert len(built) == 1
    assert len({id(each.weight) for model in (*built, first, second) for each in model}) == 6  # type: ignore[operator]
    assert all(each.is_meta for each in second.parameters())


def test_a_model_with_a_hook_that_refers_to_it_is_built_in_each_call() -> None:
    """A copy would have the hook of the original, which reads the parameters of the original."""
    built, copies = made(hook=True)
    assert [copies(), copies()] == built


def test_a_model_that_cannot_be_copied_is_built_in_each_call() -> None:
    """An attribute that rejects copies, such as an open file, does not prevent planning."""
    built: list[nn.Module] = []

    class Uncopied:
        def __deepcopy__(self, _: Any) -> Any:
            raise TypeError("cannot be copied")

    def build() -> nn.Module:
        model = nn.Linear(2, 2, device="meta", dtype=torch.float32)
        model.source = Uncopied()  # type: ignore[assignment]
        built.append(model)
        return model

    copies = ModelCopies(build)
    models = [copies(), copies()]
    assert built[1:] == models
