"""Options that ColossalAIStrategy rejects when it is built or prepared, and state that it must not change."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines.colossalai import boosted_cases, boosted_runs
from tests.support import parameter_hooks, special_layers
from tests.support.changing_models import Freezing, Unfreezing, Unfrozen, change_in_a_manual_loop
from tests.support.ranks import RankError, Ranks, scripts_environment
from tests.support.sharded_runs import OPTIM

pytestmark = [pytest.mark.colossalai, pytest.mark.slow]

ZERO: dict[str, Any] = {"plugin": "lowlevel-zero"}
_RATES = {"lr": 0.1, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plugin": {"type": "lowlevel-zero", "overlap_communication": True}}, "this run is on the CPU. Omit it"),
        ({"plugin": {"type": "lowlevel-zero", "communication_dtype": "float17"}}, "is not the name of a torch dtype"),
        ({"plugin": {"type": "hybrid-parallel", "tp_size": 3}}, "tp_size=3 must divide the number of processes"),
        ({"plugin": {"type": "hybrid-parallel", "tp_size": 2}}, "or set custom_policy=...; see docs"),
        ({"plugin": {"type": "hybrid-parallel", "custom_policy": 3}}, "custom_policy must be a .*, got 3"),
        ({"plugin": 3}, "plugin: int is not supported"),
        (
            {**ZERO, "optim": {**OPTIM, "type": "AmpOptimWrapper"}},
            "The plugin sets the precision: use OptimWrapper and",
        ),
        ({**ZERO, "optim": {**OPTIM, "optimizer": {**_RATES, "type": "Lars"}}}, "Lars requires whole parameters"),
        (
            {**ZERO, "optim": {**OPTIM, "optimizer": {**_RATES, "type": "colossalai.FusedAdam"}}},
            "requires CUDA",
        ),
        (
            {"plugin": {"type": "lowlevel-zero", "max_norm": 1.0}},
            r"clip_grad=dict\(max_norm=0.3\) of the optimizer wrapper and max_norm=1",
        ),
        (
            {**ZERO, "mixed_precision": "fp16", "optim": {**OPTIM, "nonfinite": "error"}},
            "would stop at the first overflow",
        ),
        (
            {"plugin": "torch-ddp", "model": {"type": boosted_cases.WithBatchNorm}},
            "converts BatchNorm to SyncBatchNorm",
        ),
        ({**ZERO, "model": {"type": boosted_cases.OfTwoTypes}}, "requires all parameters to have the same dtype"),
        ({**ZERO, "compile": {"target": "train_step"}}, "Use target='forward'"),
        ({**ZERO, "auto_scale_lr": {"enable": True}}, "base_batch_size must be .* got None"),
    ],
)
def test_unsupported_options_are_rejected_before_training(
    two: Ranks, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Unsupported options raise an error with an alternative on every rank before training."""
    for error_message in two.run(boosted_cases.error_message, boosted_cases.only_prepared, str(tmp_path), **options):
        assert re.search(message, error_message), error_message


def test_layers_that_would_lose_their_hooks_are_rejected(two: Ranks, tmp_path: Path) -> None:
    """Tensor parallelism replaces layers, so a layer with hooks or a computed weight is rejected with its name."""
    lost = {
        "forward hook": "'up' (hooks)",
        "forward pre-hook": "'down' (hooks)",
        "backward hook": "'down' (hooks)",
        "weight norm": "'up' (_WeightNorm)",
        "old weight norm": "'up' (WeightNorm)",
    }
    strategy = {"type": "ColossalAIStrategy", "plugin": {"type": "hybrid-parallel", "tp_size": 2}}
    for found in two.run(special_layers.all_losses, strategy, str(tmp_path), [*lost, "plain"]):
        assert all("replaced layers of Special, and the new layers lack" in found[kind] for kind in lost)
        assert all(words in found[kind] for kind, words in lost.items())
        assert len(found["plain"]) == 3


def test_special_layers_train_as_in_one_process(two: Ranks, tmp_path: Path) -> None:
    """Layers with hooks and parametrizations train as in one process; ZeRO rejects an empty parameter with its name."""
    kinds = [kind for kind in special_layers.KINDS if kind != "empty"]
    expected = special_layers.all_losses({"type": "SingleDeviceStrategy"}, str(tmp_path), kinds)
    for plugin in ("torch-ddp", "lowlevel-zero"):
        strategy = {"type": "ColossalAIStrategy", "plugin": plugin}
        for found in two.run(special_layers.all_losses, strategy, str(tmp_path), [*kinds, "empty"]):
            assert all(found[kind] == pytest.approx(expected[kind], rel=1e-5) for kind in kinds)
            assert plugin == "torch-ddp" or "does not support parameters without elements: empty." in found["empty"]


@pytest.mark.parametrize("name", ["torch-ddp", "zero 1", "zero 2", "hybrid"])
def test_hooks_on_gradients_are_called_as_in_one_process(two: Ranks, tmp_path: Path, name: str) -> None:
    """Hooks of both kinds, registered before or after prepare, mask the gradients as in plain torch."""
    strategy = {"type": "ColossalAIStrategy", **boosted_runs.PLUGINS[name]}
    kinds = ["register_hook", "post up"]
    for late in (False, True):
        for found in two.run(parameter_hooks.all_trained, strategy, str(tmp_path), kinds, late=late):
            parameter_hooks.require_equal(found)


@pytest.mark.parametrize("late", [False, True])
def test_hooks_on_gradients_of_sharded_parameters_are_refused_by_name(two: Ranks, tmp_path: Path, late: bool) -> None:
    """With tensor parallelism, a hook would get the gradient of a shard; hooks on whole parameters work."""
    strategy = {"type": "ColossalAIStrategy", "plugin": {"type": "hybrid-parallel", "tp_size": 2}}
    kinds = ["register_hook", "post", "register_hook up", "post up"]
    for found in two.run(parameter_hooks.all_trained, strategy, str(tmp_path), kinds, late=late):
        refused = {"register_hook up": "register_hook", "post up": "register_post_accumulate_grad_hook"}
        for kind, method in refused.items():
            assert found.pop(kind).startswith(f"{method} was called on up.weight. ColossalAI's tensor parallelism")
        parameter_hooks.require_equal(found)


def test_unused_parameters_are_named_under_ddp(two: Ranks, tmp_path: Path) -> None:
    """The error names the unused parameters and the option that allows them."""
    for plugin in ("torch-ddp", "hybrid-parallel"):
        strategy = {"type": "ColossalAIStrategy", "plugin": plugin}
        for found in two.run(special_layers.all_losses, strategy, str(tmp_path), ["unused"]):
            assert "Unused: other.weight, other.bias (2 of 6)" in found["unused"]
            assert "find_unused_parameters=True" in found["unused"]


def test_a_model_prepared_without_an_optimizer_cannot_be_trained(two: Ranks, tmp_path: Path) -> None:
    """The Booster needs the model and the optimizer in one call, and the error suggests passing both to the first call."""
    for error_message in two.run(boosted_cases.error_message, boosted_cases.prepared_twice, str(tmp_path)):
        assert "Pass optim_wrapper to the first call of prepare()" in error_message


@pytest.mark.parametrize("name", ["torch-ddp", "zero 1", "zero 2", "hybrid"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unfreezing, r"1 parameter became trainable: places\.weight, but ColossalAI determines"),
        (Freezing, r"2 parameters became frozen: norm\.weight, norm\.bias, but ColossalAI determines"),
    ],
)
def test_a_change_of_the_trainable_parameters_is_an_error_at_the_next_step(
    two: Ranks, tmp_path: Path, name: str, model: type, message: str
) -> None:
    """ColossalAI would not train or synchronize the unfrozen parameter, and could change frozen ones; the error names them."""
    with pytest.raises(RankError, match=message):
        two.run(boosted_runs.trained, name, str(tmp_path), 3, model={"type": model})


@pytest.mark.parametrize("name", ["torch-ddp", "zero 1", "zero 2", "hybrid"])
def test_a_change_in_a_manual_loop_is_an_error_at_the_next_forward_pass(two: Ranks, tmp_path: Path, name: str) -> None:
    """A loop that calls the model and update_params, but not train_step, gets the same error."""
    strategy = {"type": "ColossalAIStrategy", **boosted_runs.PLUGINS[name]}
    for unfreeze, verb in ((True, "became trainable"), (False, "became frozen")):
        for error in two.run(change_in_a_manual_loop, strategy, str(tmp_path), unfreeze=unfreeze):
            assert error.startswith(f"2 parameters {verb}: a.weight, a.bias, but ColossalAI determines")


@pytest.mark.parametrize("name", ["torch-ddp", "zero 1", "zero 2", "hybrid", "hybrid tp 2"])
def test_a_checkpoint_with_other_trainable_parameters_is_refused(two: Ranks, tmp_path: Path, name: str) -> None:
    """A run whose layer was frozen cannot resume a run that trained it, and a model that trains it can."""
    model, checkpoint = {"type": Unfrozen}, str(tmp_path / "at")
    saved = two.run(boosted_runs.stopped, name, str(tmp_path), checkpoint, 6, model=model)[0]
    message = r"1 parameter became trainable: places\.weight\. ColossalAIStrategy determines"
    with pytest.raises(RankError, match=message):
        two.run(boosted_runs.resumed, name, str(tmp_path), checkpoint, 6)
    found = two.run(boosted_runs.resumed, name, str(tmp_path), checkpoint, 6, model=model)[0]
    assert found["after"]["losses"] == saved["after"]["losses"]


def test_a_built_plugin_is_used(two: Ranks, tmp_path: Path) -> None:
    """A built plugin clips by its own ``max_norm``; a different ``clip_grad`` raises an error that says how to build it."""
    assert all(two.run(boosted_cases.with_built_plugin, str(tmp_path), clip_grad=None))
    assert all(two.run(boosted_cases.with_built_plugin, str(tmp_path), clip_grad={"max_norm": 0.3}))
    other = {"max_norm": 1.0}
    for error_message in two.run(
        boosted_cases.error_message, boosted_cases.with_built_plugin, str(tmp_path), clip_grad=other
    ):
        assert (
            "clip_grad=dict(max_norm=1) of the optimizer wrapper and max_norm=0.3 of the plugin differ" in error_message
        )


def test_import_stubs_are_invisible_to_other_code(tmp_path: Path) -> None:
    """After ColossalAI is imported, packages that are not installed still cannot be imported by other code."""
    script = tmp_path / "look.py"
    script.write_text(_LOOK)
    done = subprocess.run(
        [sys.executable, str(script)],
        env=scripts_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["nobody", "[]", "no spec", "not there", "its own"]


_LOOK = """
import importlib.util, sys

from stratagem.engines.colossalai.import_stubs import import_stubs

PACKAGES = ("peft", "bitsandbytes", "galore_torch", "transformers")
with import_stubs():
    # Code outside the library does not see the stubs within the context either.
    print("nobody" if not any(importlib.util.find_spec(name) for name in PACKAGES) else "somebody")
    from colossalai.booster import Booster
print([name for name in sys.modules if name.partition(".")[0] in PACKAGES])
print("no spec" if not any(importlib.util.find_spec(name) for name in PACKAGES) else "a spec")
try:
    import bitsandbytes
except ModuleNotFoundError:
    print("not there")
from colossalai.booster.plugin import torch_ddp_plugin
print("its own" if torch_ddp_plugin.PeftModel.__name__ == "PeftModel" else "another")
"""
