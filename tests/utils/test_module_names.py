"""Parameter names do not contain the wrappers that torch inserts into a model."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from stratagem.utils import canonical_names, named_parameters, with_canonical_keys


class Holder(nn.Module):
    """A module with an attribute that has the same name as the attribute of a compiled module."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = nn.Linear(1, 1)


def compiled(module: nn.Module) -> nn.Module:
    """Return a module wrapped by ``torch.compile``; nothing is compiled before its first call."""
    wrapper: nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    return wrapper


def test_wrappers_inside_the_model_are_removed_from_names() -> None:
    """Parameters of compiled and activation-checkpointed parts, nested and in lists, have the names of the plain model."""
    inner = nn.Sequential(compiled(nn.Linear(2, 2)), nn.BatchNorm1d(2))
    model = nn.ModuleDict({"a": compiled(inner), "b": nn.ModuleList([checkpoint_wrapper(compiled(nn.Linear(1, 1)))])})
    plain = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "b": nn.ModuleList([nn.Linear(1, 1)])}
    )
    assert list(named_parameters(model)) == [name for name, _ in plain.named_parameters()]
    state = with_canonical_keys(model.state_dict(), model)
    assert list(state) == list(plain.state_dict())
    # BatchNorm's second version, not the version of its wrapper
    assert state._metadata["a.1"] == {"version": 2}  # type: ignore[attr-defined]


def test_an_attribute_called_orig_mod_keeps_its_name() -> None:
    """Only the attribute of a real wrapper is removed, also if the wrapped module has an attribute of the same name."""
    model = nn.ModuleDict({"plain": Holder(), "compiled": compiled(Holder())})
    assert [name for name in named_parameters(model) if name.endswith("bias")] == [
        "plain._orig_mod.bias",
        "compiled._orig_mod.bias",
    ]


def test_a_compiled_model_has_the_names_of_the_model() -> None:
    """The prefix is also removed if the whole model is wrapped."""
    assert list(named_parameters(compiled(nn.Linear(1, 1)))) == ["weight", "bias"]
    assert canonical_names(nn.Linear(1, 1))("_orig_mod.weight") == "_orig_mod.weight"
