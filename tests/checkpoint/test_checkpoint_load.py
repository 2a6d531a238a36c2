"""A saved state goes into a model, and what does not fit is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem.checkpoint import DEFAULT_REVISE_KEYS, LoadReport, load_state_dict, weights_to_cpu
from stratagem.errors import CheckpointMismatchError


def net() -> nn.Sequential:
    """Return a model with four keys."""
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def ones(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return a state for the module in which every number is one."""
    return {prefix + key: torch.ones_like(value) for key, value in module.state_dict().items()}


def copied(module: nn.Module) -> dict[str, list[Any]]:
    """Return the numbers of a model as they are now."""
    return {key: value.tolist() for key, value in module.state_dict().items()}


def all_ones(module: nn.Module) -> bool:
    """Tell whether every number of a model is one."""
    return all(bool((value == 1).all()) for value in module.state_dict().values())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_wrapped_states_fit_the_bare_model(prefix: str) -> None:
    """A state saved from inside DDP or torch.compile is loaded whole, without any option."""
    model = net()
    report = load_state_dict(model, ones(model, prefix), strict=True)
    assert report == LoadReport(matched=4, total=4)
    assert report.exact
    assert all_ones(model)


class OwnModule(nn.Module):
    """A model with a part that is called as DDP calls its own."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(1, 1)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_part_called_module_is_no_wrapper(prefix: str) -> None:
    """A model whose own part is called ``module`` loads its state, wrapped or not."""
    model = OwnModule()
    assert load_state_dict(model, ones(model, prefix), strict=True).exact
    assert all_ones(model)


def test_names_that_only_begin_alike_are_kept() -> None:
    """The default pattern takes ``module.`` away, not the beginning of ``modules_list``."""
    model = nn.ModuleDict({"modules_list": nn.Linear(1, 1)})
    assert load_state_dict(model, ones(model), strict=True, revise_keys=DEFAULT_REVISE_KEYS).exact


def test_keys_are_rewritten_in_turn() -> None:
    """Patterns are applied one after the other, with groups in the replacement."""
    model = nn.ModuleDict({"body_0": nn.Linear(1, 1)})
    state = {"net.backbone.0.weight": torch.ones(1, 1), "net.backbone.0.bias": torch.ones(1)}
    revise = [(r"^net\.", ""), (r"^backbone\.(\d)", r"body_\1")]
    assert load_state_dict(model, state, strict=True, revise_keys=revise).exact
    assert all_ones(model)


def test_a_key_can_be_rewritten_away() -> None:
    """A name that the user rewrote to something unknown is not loaded under its old name."""
    model = net()
    report = load_state_dict(model, ones(model), revise_keys=[(r"^1\.", "unused.")])
    assert report.missing == ("1.weight", "1.bias")
    assert report.unexpected == ("unused.weight", "unused.bias")


def test_two_keys_for_one_name_are_refused() -> None:
    """Where a wrapped and a bare key stand for the same, neither is chosen silently."""
    model = net()
    before = copied(model)
    with pytest.raises(CheckpointMismatchError, match=r"'0.weight' and 'module.0.weight' both map to '0.weight'"):
        load_state_dict(model, {**ones(model), "module.0.weight": torch.zeros(3, 2)})
    assert copied(model) == before


def test_differences_are_reported_and_the_rest_is_loaded() -> None:
    """Without strict, what fits is loaded; missing, unexpected and shape_mismatches keys are told apart."""
    model = net()
    bias = model[1].bias.tolist()
    state = {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3), "1.bias": torch.ones(7), "head": torch.ones(1)}
    report = load_state_dict(model, state)
    assert report == LoadReport(
        matched=2, total=4, missing=("1.weight",), unexpected=("head",), shape_mismatches=(("1.bias", (7,), (1,)),)
    )
    assert report.describe().splitlines() == [
        "The model and loaded state dict do not match exactly:",
        "  2 of the model's 4 keys were found.",
        "  1 missing in the checkpoint: 1.weight",
        "  1 unexpected in the checkpoint: head",
        "  1 with a different shape: 1.bias (saved [7], model [1])",
    ]
    assert all_ones(model[0])
    assert model[1].bias.tolist() == bias


def test_the_first_differing_keys_and_their_number_are_shown() -> None:
    """Of many keys ten are named, and how many more there are."""
    report = LoadReport(matched=1, total=26, missing=tuple(f"layer.{index}" for index in range(25)))
    text = report.describe()
    assert "25 missing in the checkpoint: layer.0, layer.1," in text
    assert "layer.9, ... (15 more)" in text
    assert "layer.10" not in text
    assert not report.exact


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("1.bias"),
        lambda state: state.update(other=torch.ones(1)),
        lambda state: state.update({"1.bias": torch.ones(5)}),
    ],
    ids=["missing", "unexpected", "shape_mismatches"],
)
def test_a_strict_load_that_differs_changes_nothing(change: Any) -> None:
    """With strict, any difference is an error with the report's text, and the model is as before."""
    model = net()
    before, state = copied(model), ones(model)
    change(state)
    with pytest.raises(CheckpointMismatchError, match="do not match exactly"):
        load_state_dict(model, state, strict=True)
    assert copied(model) == before


def test_nothing_in_common_is_an_error_without_strict_too() -> None:
    """A checkpoint of another model never counts as loaded; the error shows keys of both and what may help."""
    model = net()
    before = copied(model)
    with pytest.raises(CheckpointMismatchError, match=r"(?s)No key .* 0\.weight.* encoder\.a.*revise_keys"):
        load_state_dict(model, {"encoder.a": torch.ones(1)})
    with pytest.raises(CheckpointMismatchError, match="No key"):
        load_state_dict(model, {})
    with pytest.raises(CheckpointMismatchError, match="No key"):
        load_state_dict(model, {key: torch.ones(9) for key in model.state_dict()})
    assert copied(model) == before


def test_a_model_without_state_loads_an_empty_state() -> None:
    """Where there is nothing to load, an empty state fits exactly."""
    assert load_state_dict(nn.ReLU(), {}, strict=True) == LoadReport(matched=0, total=0)


def test_something_else_than_a_tensor_changes_nothing() -> None:
    """A number where the model has a tensor is an error before anything is loaded."""
    model = net()
    before = copied(model)
    with pytest.raises(CheckpointMismatchError, match=r"'1.bias' is a float, but the model has a tensor"):
        load_state_dict(model, {**ones(model), "1.bias": 0.5})
    assert copied(model) == before


def test_batch_norms_counter_may_be_missing() -> None:
    """Checkpoints older than ``num_batches_tracked`` load strictly; the counter stays."""
    model = nn.BatchNorm1d(2)
    state = {key: value for key, value in ones(model).items() if key != "num_batches_tracked"}
    assert load_state_dict(model, state, strict=True).exact
    assert model.weight.tolist() == [1, 1]
    assert model.num_batches_tracked == 0


def test_the_state_given_is_not_changed() -> None:
    """Loading leaves the caller's dict as it is."""
    model = net()
    state = ones(model, "module.")
    keys = list(state)
    load_state_dict(model, state)
    assert list(state) == keys


class Renaming(nn.Module):
    """Loads states from when its parameter was called ``old``."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Parameter(torch.zeros(2))
        self.plain = nn.Parameter(torch.zeros(1))
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        if prefix + "old" in state:
            state[prefix + "new"] = state.pop(prefix + "old")


@pytest.mark.parametrize("strict", [True, False])
def test_hooks_that_rename_are_believed(strict: bool) -> None:
    """What a module's own hook renames counts as found, also where no key fits before."""
    model = Renaming()
    report = load_state_dict(model, {"old": torch.ones(2), "plain": torch.ones(1)}, strict=strict)
    assert report == LoadReport(matched=2, total=2)
    assert all_ones(model)
    only_old = load_state_dict(Renaming(), {"old": torch.ones(2)})
    assert (only_old.matched, only_old.missing) == (1, ("plain",))


@pytest.mark.parametrize(
    ("state", "strict", "text"),
    [
        ({"old": torch.ones(2)}, True, "1 missing in the checkpoint: plain"),
        ({"other": torch.ones(2)}, False, "No key"),
        ({"old": torch.ones(7), "plain": torch.ones(1)}, False, "size mismatch"),
        ({"plain": torch.ones(3), "old": torch.ones(2)}, True, r"plain \(saved \[3\], model \[1\]\)"),
    ],
)
def test_a_model_with_hooks_is_unchanged_too(state: dict[str, Tensor], strict: bool, text: str) -> None:
    """A refused load of a model that renames keys leaves its numbers as they were."""
    model = Renaming()
    with pytest.raises(CheckpointMismatchError, match=text):
        load_state_dict(model, state, strict=strict)
    assert copied(model) == {"new": [0, 0], "plain": [0]}


def test_lazy_modules_take_their_shape_from_the_checkpoint() -> None:
    """A module that does not know its input yet is loaded."""
    model = nn.LazyLinear(2)
    assert load_state_dict(model, {"weight": torch.ones(2, 5), "bias": torch.ones(2)}, strict=True).exact
    assert model.weight.shape == (2, 5)


class Versioned(nn.Module):
    """Since version 2 its weight is twice what it was."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = 2 * state[prefix + "weight"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("wrapper", [nn.Identity, nn.DataParallel])
def test_versions_of_modules_survive(wrapper: type[nn.Module]) -> None:
    """A module that converts states of older versions does not convert one of its own, wrapped or not."""
    inner = nn.Sequential(Versioned())
    source = wrapper(inner) if wrapper is nn.DataParallel else inner
    target = nn.Sequential(Versioned())
    load_state_dict(target, weights_to_cpu(source.state_dict()), strict=True)
    assert target[0].weight.tolist() == [1]
    load_state_dict(target, {"0.weight": torch.ones(1)}, strict=True)
    assert target[0].weight.tolist() == [2]


def test_weights_go_to_the_cpu_without_a_copy() -> None:
    """Tensors that are on the CPU share memory with the model and need no gradient; the rest is passed on."""
    weight = nn.Parameter(torch.ones(2))
    state = weights_to_cpu({"weight": weight, "extra": {"steps": 3}})
    assert state["weight"].data_ptr() == weight.data_ptr()
    assert not state["weight"].requires_grad
    assert state["extra"] == {"steps": 3}
