"""Options of ColossalAIStrategy, without ColossalAI installed."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem.config import Config
from stratagem.engines.colossalai.options import (
    PluginSpec,
    check_plugin_wrapper,
    max_norm_of,
    parse_plugin,
    refuse_other_wrappers,
    refuse_whole_parameters,
)
from stratagem.errors import (
    ConfigKeyError,
    ConfigTypeError,
    ConfigValueError,
    LaunchError,
    MissingDependencyError,
    PlacementError,
)
from stratagem.optim import MixedOptimizer, OptimWrapper
from stratagem.optim.gradients import parse_clipping
from stratagem.registry import OPTIM_WRAPPERS, STRATEGIES
from stratagem.strategies import ColossalAIStrategy

without_colossalai = pytest.mark.skipif(
    importlib.util.find_spec("colossalai") is not None, reason="ColossalAI is installed here"
)


@pytest.mark.parametrize(
    ("plugin", "precision", "expected"),
    [
        ("lowlevel-zero", None, PluginSpec("lowlevel-zero", {"precision": "fp32"})),
        ("LowLevelZeroPlugin", "bf16", PluginSpec("lowlevel-zero", {"precision": "bf16"})),
        ({"type": "lowlevel-zero", "stage": 2}, "bf16", PluginSpec("lowlevel-zero", {"stage": 2, "precision": "bf16"})),
        ({"type": "lowlevel-zero", "precision": "fp16"}, "fp16", PluginSpec("lowlevel-zero", {"precision": "fp16"})),
        (
            "lowlevel-zero",
            {"type": "fp16", "init_scale": 8.0},
            PluginSpec("lowlevel-zero", {"precision": "fp16", "initial_scale": 8.0}),
        ),
        ("torch-ddp", None, PluginSpec("torch-ddp", {})),
        (
            {"type": "hybrid-parallel", "tp_size": 2, "pp_size": 1},
            None,
            PluginSpec("hybrid-parallel", {"tp_size": 2, "pp_size": 1, "precision": "fp32"}),
        ),
    ],
)
def test_a_plugin_is_a_name_or_a_mapping(plugin: Any, precision: Any, expected: PluginSpec) -> None:
    """Plugin and class names are equivalent, precision applies to both, and the default is float32."""
    assert parse_plugin(plugin, precision) == expected


def test_the_given_mappings_are_not_modified() -> None:
    """Parsing does not modify the given mappings."""
    plugin, precision = {"type": "lowlevel-zero", "stage": 2}, {"type": "fp16", "init_scale": 8.0}
    parse_plugin(plugin, precision)
    assert (plugin, precision) == ({"type": "lowlevel-zero", "stage": 2}, {"type": "fp16", "init_scale": 8.0})


@pytest.mark.parametrize(
    ("plugin", "precision", "error", "expected"),
    [
        ("lowlevelzero", None, ConfigValueError, "Did you mean 'lowlevel-zero'"),
        (3, "bf16", ConfigValueError, "Build the plugin with precision=..."),
        ({"stage": 1}, None, ConfigValueError, "has no type. Set it to one of torch-ddp"),
        ({"type": "lowlevel-zero", "stag": 1}, None, ConfigKeyError, "has no 'stag'. Did you mean 'stage'"),
        ({"type": "lowlevel-zero", "stage": 3}, None, ConfigValueError, "stage must be one of 1, 2, got 3"),
        ({"type": "lowlevel-zero", "norm_type": 1}, None, PlacementError, "by the 2-norm"),
        (
            {"type": "lowlevel-zero", "precision": "bf16"},
            "fp16",
            ConfigValueError,
            "'fp16' and the plugin's precision='bf16' differ",
        ),
        ({"type": "lowlevel-zero", "precision": "fp8"}, None, ConfigValueError, "unknown precision='fp8'"),
        (
            {"type": "lowlevel-zero", "use_fp8": True},
            None,
            PlacementError,
            "8-bit kernels, which are only available for CUDA",
        ),
        (
            {"type": "lowlevel-zero", "overlap_allgather": True},
            None,
            PlacementError,
            "incomplete weights between steps",
        ),
        ({"type": "lowlevel-zero", "extra_dp_size": 2}, None, PlacementError, r"FSDPStrategy\(replicate=...\)"),
        (
            {"type": "hybrid-parallel", "pp_size": 2},
            None,
            PlacementError,
            r"pp_size=2 is not supported. With pipeline parallelism",
        ),
        ({"type": "hybrid-parallel", "enable_sequence_parallelism": True}, None, PlacementError, "parts of one sample"),
        ({"type": "hybrid-parallel", "zero_stage": 1}, None, PlacementError, "Use mixed_precision='bf16'"),
        ("gemini", None, PlacementError, r"Use plugin='lowlevel-zero', or FSDPStrategy\(cpu_offload=True\)"),
        ({"type": "TorchFSDPPlugin"}, None, PlacementError, "Use FSDPStrategy"),
        ("torch-ddp", "bf16", PlacementError, "Use plugin='lowlevel-zero' with mixed_precision='bf16'"),
        ("lowlevel-zero", "fp8", PlacementError, "is not implemented in ColossalAI 0.5.0. Use 'bf16' or 'fp16'"),
        ("lowlevel-zero", "fp16_apex", PlacementError, "is not implemented"),
        ("lowlevel-zero", "bf61", ConfigValueError, "Did you mean 'bf16'"),
        ("lowlevel-zero", 16, ConfigTypeError, "must be a name or a mapping with a type"),
        ("lowlevel-zero", {"type": "bf16", "init_scale": 8.0}, ConfigValueError, "initial_scale require fp16"),
        ("lowlevel-zero", {"type": "fp16", "init_scal": 8.0}, ConfigKeyError, "unknown option 'init_scal'"),
    ],
)
def test_unsupported_options_are_rejected(plugin: Any, precision: Any, error: type[Exception], expected: str) -> None:
    """The error for an unsupported option states the problem and an alternative."""
    with pytest.raises(error, match=expected):
        parse_plugin(plugin, precision)


def test_mmengine_options_without_an_equivalent_are_rejected() -> None:
    """Options of MMEngine without an equivalent raise errors; its ColossalAI wrapper is accepted."""
    refuse_other_wrappers(None, {"type": "CollosalAIModelWrapper"})
    with pytest.raises(PlacementError, match=r"Set options of the plugin"):
        refuse_other_wrappers({"clip_grad_norm": 1.0}, None)
    with pytest.raises(PlacementError, match=r"the booster wraps the model"):
        refuse_other_wrappers(None, {"type": "MMDistributedDataParallel"})


def test_clipping_must_be_consistent() -> None:
    """The wrapper's clip_grad is passed to the plugin; conflicting values and other types of clipping raise errors."""
    clipping = parse_clipping({"max_norm": 0.5})
    assert max_norm_of(clipping, 0.0) == max_norm_of(clipping, 0.5) == max_norm_of(None, 0.5) == 0.5
    assert max_norm_of(None, 0.0) == 0.0
    with pytest.raises(ConfigValueError, match=r"max_norm=0.5\) of the optimizer wrapper and max_norm=1 of the plugin"):
        max_norm_of(clipping, 1.0)
    for other in ({"type": "value", "clip_value": 1.0}, {"max_norm": 1.0, "norm_type": 1}):
        with pytest.raises(PlacementError, match=r"plugin='torch-ddp', which supports every type"):
            max_norm_of(parse_clipping(other), 0.0)


def test_several_optimizers_for_different_parameters_are_rejected() -> None:
    """A mixed optimizer raises an error that names other strategies, with every plugin."""
    mixed = MixedOptimizer({"all": torch.optim.SGD([torch.zeros(1)])})
    for plugin in ("torch-ddp", "lowlevel-zero"):
        with pytest.raises(
            PlacementError, match="cannot train with a MixedOptimizer.* Use DDPStrategy or FSDPStrategy"
        ):
            check_plugin_wrapper(parse_plugin(plugin, None), OptimWrapper(mixed))


def test_it_requires_a_launcher(tmp_path: Path) -> None:
    """In a single process, the error contains the command to start several."""
    with pytest.raises(LaunchError, match=r"stratagem train CONFIG --nproc N"):
        ColossalAIStrategy(work_dir=tmp_path, plugin="torch-ddp")


def test_an_unknown_checkpoint_format_is_rejected(tmp_path: Path) -> None:
    """An unknown checkpoint_format raises an error with the closest name."""
    with pytest.raises(ConfigValueError, match=r"Unknown checkpoint_format='colosal'. Did you mean 'colossalai'"):
        ColossalAIStrategy(work_dir=tmp_path, checkpoint_format="colosal")  # type: ignore[arg-type]


def test_it_is_registered() -> None:
    """The strategy and its wrapper are registered under the names of MMEngine."""
    assert STRATEGIES.get("ColossalAIStrategy") is ColossalAIStrategy
    assert OPTIM_WRAPPERS.get("ColossalAIOptimWrapper") is OPTIM_WRAPPERS.get("OptimWrapper")
    assert Config({"strategy": {"type": "ColossalAIStrategy"}}).strategy.type == "ColossalAIStrategy"


@without_colossalai
def test_without_colossalai_the_error_explains_how_to_install_it(tmp_path: Path, ranks: Any) -> None:
    """A missing library is reported when the strategy is built, not earlier."""
    for message in ranks.run(_missing, str(tmp_path)):
        assert "pip install --no-deps colossalai==0.5.0" in message


def _missing(folder: str) -> str:
    try:
        ColossalAIStrategy(work_dir=folder)
    except MissingDependencyError as error:
        return str(error)
    return ""


def test_schedule_free_optimizers_are_rejected_under_zero() -> None:
    """ZeRO updates copies of the model's parameters, so switching these copies would not change the model."""

    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    optimizer = ScheduleFree([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(PlacementError, match="ScheduleFree has different weights for training and evaluation"):
        refuse_whole_parameters(optimizer, zero=True, tensor_parallel=False)
    refuse_whole_parameters(optimizer, zero=False, tensor_parallel=True)


class NormalizedSgd(torch.optim.SGD):
    """An optimizer of another package, which divides each gradient by its norm."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= parameter.grad.norm()
        return super().step(closure)


class Lamb(NormalizedSgd):
    """An optimizer of another package with the name of one that ColossalAI replaces."""


@pytest.mark.parametrize(
    ("zero", "part"),
    [(True, "under ZeRO each rank only updates a range"), (False, "under tensor parallelism each rank")],
)
@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.Muon, NormalizedSgd, Lamb])
def test_optimizers_of_whole_parameters_are_rejected_if_ranks_have_parts(
    optimizer: type[torch.optim.Optimizer], zero: bool, part: str
) -> None:
    """Trial updates find them, so that optimizers that are not known by name are rejected as well."""
    made = optimizer([torch.nn.Parameter(torch.ones(4, 4))], lr=0.1)
    with pytest.raises(PlacementError, match=f"{optimizer.__name__} requires whole parameters, but {part}"):
        refuse_whole_parameters(made, zero=zero, tensor_parallel=not zero)
    refuse_whole_parameters(made, zero=False, tensor_parallel=False)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop, torch.optim.Adagrad])
def test_elementwise_optimizers_are_accepted_if_ranks_have_parts(optimizer: type[torch.optim.Optimizer]) -> None:
    """The trial updates leave the optimizer without state and the generators unchanged."""
    made = optimizer([torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(()))], lr=0.1)
    before, state = torch.get_rng_state(), copy.deepcopy(made.state_dict())
    refuse_whole_parameters(made, zero=True, tensor_parallel=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(made.state_dict()) == str(state)
