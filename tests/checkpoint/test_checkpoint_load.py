"""Loading a state dict into a model, and reporting what does not match."""

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
    """Return a state dict for the module in which all values are one."""
    return {prefix + key: torch.ones_like(value) for key, value in module.state_dict().items()}


def copied(module: nn.Module) -> dict[str, list[Any]]:
    """Return a copy of the values of a model."""
    return {key: value.tolist() for key, value in module.state_dict().items()}


def all_ones(module: nn.Module) -> bool:
    """Return whether all values of a model are one."""
    return all(bool((value == 1).all()) for value in module.state_dict().values())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_a_wrapped_state_dict_fits_the_unwrapped_model(prefix: str) -> None:
    """A state dict saved inside DDP or torch.compile is loaded completely without any option."""
    model = net()
    report = load_state_dict(model, ones(model, prefix), strict=True)
    assert report == LoadReport(matched=4, total=4)
    assert report.exact
    assert all_ones(model)


class OwnModule(nn.Module):
    """A model with a submodule that has the same name as DDP's wrapped module."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(1, 1)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_submodule_called_module_is_not_a_wrapper(prefix: str) -> None:
    """A model with its own submodule ``module`` loads its state dict, wrapped or not."""
    model = OwnModule()
    assert load_state_dict(model, ones(model, prefix), strict=True).exact
    assert all_ones(model)


def test_similar_prefixes_are_kept() -> None:
    """The default pattern removes ``module.``, but not the beginning of ``modules_list``."""
    model = nn.ModuleDict({"modules_list": nn.Linear(1, 1)})
    assert load_state_dict(model, ones(model), strict=True, revise_keys=DEFAULT_REVISE_KEYS).exact


def test_keys_are_rewritten_in_turn() -> None:
    """Patterns are applied one after the other, and replacements may use groups."""
    model = nn.ModuleDict({"body_0": nn.Linear(1, 1)})
    state = {"net.backbone.0.weight": torch.ones(1, 1), "net.backbone.0.bias": torch.ones(1)}
    revise = [(r"^net\.", ""), (r"^backbone\.(\d)", r"body_\1")]
    assert load_state_dict(model, state, strict=True, revise_keys=revise).exact
    assert all_ones(model)


def test_a_key_can_be_rewritten_away() -> None:
    """A key that the user renamed to an unknown name is not loaded under its old name."""
    model = net()
    report = load_state_dict(model, ones(model), revise_keys=[(r"^1\.", "unused.")])
    assert report.missing == ("1.weight", "1.bias")
    assert report.unexpected == ("unused.weight", "unused.bias")


def test_two_keys_for_one_name_are_rejected() -> None:
    """A wrapped and an unwrapped key for the same name raise an error, and neither is silently chosen."""
    model = net()
    before = copied(model)
    with pytest.raises(CheckpointMismatchError, match=r"'0.weight' and 'module.0.weight' both map to '0.weight'"):
        load_state_dict(model, {**ones(model), "module.0.weight": torch.zeros(3, 2)})
    assert copied(model) == before


def test_differences_are_reported_and_the_rest_is_loaded() -> None:
    """Without strict, matching keys are loaded, and missing, unexpected and differently shaped ones are reported."""
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
        "  1 missing from the checkpoint: 1.weight",
        "  1 unexpected in the checkpoint: head",
        "  1 with a different shape: 1.bias (saved [7], model [1])",
    ]
    assert all_ones(model[0])
    assert model[1].bias.tolist() == bias


def test_the_first_differing_keys_and_their_number_are_shown() -> None:
    """Only the first ten keys are listed, followed by the number of remaining keys."""
    report = LoadReport(matched=1, total=26, missing=tuple(f"layer.{index}" for index in range(25)))
    text = report.describe()
    assert "25 missing from the checkpoint: layer.0, layer.1," in text
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
    """With strict, any difference raises an error with the report, and the model is unchanged."""
    model = net()
    before, state = copied(model), ones(model)
    change(state)
    with pytest.raises(CheckpointMismatchError, match="do not match exactly"):
        load_state_dict(model, state, strict=True)
    assert copied(model) == before


def test_no_matching_key_is_an_error_even_without_strict() -> None:
    """A checkpoint of a different model raises an error that lists keys of both and suggests what to do."""
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
    """An empty state dict matches a model without state exactly."""
    assert load_state_dict(nn.ReLU(), {}, strict=True) == LoadReport(matched=0, total=0)


def test_a_value_other_than_a_tensor_is_rejected() -> None:
    """A number where the model has a tensor raises an error before anything is loaded."""
    model = net()
    before = copied(model)
    with pytest.raises(CheckpointMismatchError, match=r"'1.bias' is a float, but the model has a tensor"):
        load_state_dict(model, {**ones(model), "1.bias": 0.5})
    assert copied(model) == before


def test_the_batch_norm_counter_may_be_missing() -> None:
    """Checkpoints older than ``num_batches_tracked`` can be loaded strictly; the counter is unchanged."""
    model = nn.BatchNorm1d(2)
    state = {key: value for key, value in ones(model).items() if key != "num_batches_tracked"}
    assert load_state_dict(model, state, strict=True).exact
    assert model.weight.tolist() == [1, 1]
    assert model.num_batches_tracked == 0


def test_the_given_state_dict_is_not_changed() -> None:
    """Loading does not change the caller's dict."""
    model = net()
    state = ones(model, "module.")
    keys = list(state)
    load_state_dict(model, state)
    assert list(state) == keys


class Renaming(nn.Module):
    """A module that also loads state dicts in which its parameter is called ``old``."""

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
def test_keys_renamed_by_hooks_match(strict: bool) -> None:
    """A key that a module's hook renames counts as matched, even if no key matched before."""
    model = Renaming()
    report = load_state_dict(model, {"old": torch.ones(2), "plain": torch.ones(1)}, strict=strict)
    assert report == LoadReport(matched=2, total=2)
    assert all_ones(model)
    only_old = load_state_dict(Renaming(), {"old": torch.ones(2)})
    assert (only_old.matched, only_old.missing) == (1, ("plain",))


@pytest.mark.parametrize(
    ("state", "strict", "text"),
    [
        ({"old": torch.ones(2)}, True, "1 missing from the checkpoint: plain"),
        ({"other": torch.ones(2)}, False, "No key"),
        ({"old": torch.ones(7), "plain": torch.ones(1)}, False, "size mismatch"),
        ({"plain": torch.ones(3), "old": torch.ones(2)}, True, r"plain \(saved \[3\], model \[1\]\)"),
    ],
)
def test_a_rejected_load_keeps_a_model_with_hooks_unchanged(state: dict[str, Tensor], strict: bool, text: str) -> None:
    """A rejected load leaves a model with renaming hooks unchanged."""
    model = Renaming()
    with pytest.raises(CheckpointMismatchError, match=text):
        load_state_dict(model, state, strict=strict)
    assert copied(model) == {"new": [0, 0], "plain": [0]}


def test_lazy_modules_take_their_shape_from_the_checkpoint() -> None:
    """A lazy module that is not yet initialized can be loaded."""
    model = nn.LazyLinear(2)
    assert load_state_dict(model, {"weight": torch.ones(2, 5), "bias": torch.ones(2)}, strict=True).exact
    assert model.weight.shape == (2, 5)


class Versioned(nn.Module):
    """A module whose weight is twice as large since version 2."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = 2 * state[prefix + "weight"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("wrapper", [nn.Identity, nn.DataParallel])
def test_module_versions_are_restored(wrapper: type[nn.Module]) -> None:
    """A module does not convert state of its current version, wrapped or not."""
    inner = nn.Sequential(Versioned())
    source = wrapper(inner) if wrapper is nn.DataParallel else inner
    target = nn.Sequential(Versioned())
    load_state_dict(target, weights_to_cpu(source.state_dict()), strict=True)
    assert target[0].weight.tolist() == [1]
    load_state_dict(target, {"0.weight": torch.ones(1)}, strict=True)
    assert target[0].weight.tolist() == [2]


def test_weights_go_to_the_cpu_without_a_copy() -> None:
    """CPU tensors are not copied and do not require gradients; other values are passed through."""
    weight = nn.Parameter(torch.ones(2))
    state = weights_to_cpu({"weight": weight, "extra": {"steps": 3}})
    assert state["weight"].data_ptr() == weight.data_ptr()
    assert not state["weight"].requires_grad
    assert state["extra"] == {"steps": 3}


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.embedding.weight


def test_two_different_values_for_one_tied_weight_are_refused() -> None:
    """The error names both keys, the model is unchanged, and ``revise_keys`` can leave one out."""
    model = Tied()
    before = model.head.weight.detach().clone()
    state = {"embedding.weight": torch.ones(3, 2), "head.weight": torch.zeros(3, 2)}
    with pytest.raises(CheckpointMismatchError, match="'embedding.weight' and 'head.weight' share one parameter"):
        load_state_dict(model, state)
    assert torch.equal(model.head.weight, before)
    load_state_dict(model, state, revise_keys=[(r"^head\.weight$", "ignored.head.weight")])
    assert torch.equal(model.head.weight, torch.ones(3, 2))


def test_equal_values_for_a_tied_weight_are_loaded() -> None:
    """Equal values load, also if they are NaN or only one of the names is in the checkpoint."""
    model, values = Tied(), torch.tensor([[1.0, torch.nan]] * 3)
    load_state_dict(model, {"embedding.weight": values, "head.weight": values.clone()}, strict=True)
    torch.testing.assert_close(model.head.weight.detach(), values, equal_nan=True)
    load_state_dict(model, {"head.weight": torch.zeros(3, 2)})
    assert not model.embedding.weight.any()
