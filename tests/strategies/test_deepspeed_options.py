"""Options of DeepSpeedStrategy, which are checked before DeepSpeed is imported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stratagem import DeepSpeedStrategy as OfTheTop
from stratagem.engines.deepspeed.elementwise_check import refuse_by_name, require_elementwise
from stratagem.engines.deepspeed.optimizer_section import (
    explain_kernel_errors,
    with_accumulation,
    with_clipping,
    with_optimizer,
)
from stratagem.engines.deepspeed.options import Options
from stratagem.engines.deepspeed.wrapper import require_plain_wrapper
from stratagem.errors import (
    ConfigError,
    ConfigFileError,
    ConfigKeyError,
    ConfigParsingError,
    ConfigTypeError,
    ConfigValueError,
    LaunchError,
    PlacementError,
)
from stratagem.optim import AmpOptimWrapper, MixedOptimizer, OptimWrapper
from stratagem.registry import OPTIM_WRAPPERS, OPTIMIZERS, STRATEGIES
from stratagem.strategies import DeepSpeedStrategy


def parse(config: Any = None, inputs_to_half: Any = None, **named: Any) -> Options:
    """Parse options like the strategy."""
    return Options.parse(config, named, inputs_to_half)


def test_it_is_registered() -> None:
    """The strategy can be imported and configured by name without DeepSpeed installed."""
    assert STRATEGIES.get("DeepSpeedStrategy") is DeepSpeedStrategy is OfTheTop


def test_mmengine_wrapper_is_accepted() -> None:
    """MMEngine's DeepSpeedOptimWrapper is accepted as the wrapper that the strategy replaces."""
    assert OPTIM_WRAPPERS.get("DeepSpeedOptimWrapper") is OptimWrapper


def test_one_process_without_a_launcher_is_rejected(tmp_path: Path) -> None:
    """The error contains the command to start several processes and the strategy for one."""
    with pytest.raises(LaunchError, match=r"--nproc N.*SingleDeviceStrategy"):
        DeepSpeedStrategy(work_dir=tmp_path)


def test_a_json_file_and_a_mapping_are_equivalent(tmp_path: Path) -> None:
    """A DeepSpeed configuration can be a file or a mapping, which is not modified."""
    config = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
    }
    before = copy.deepcopy(config)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    assert parse(config) == parse(file) == parse(str(file))
    assert parse(config).stage == 2
    assert parse(config).dtype == torch.bfloat16
    assert parse(config).clipping == 1.0
    parse(config).for_engine(micro_batch=4, accumulation=1, clipping=1.0, world_size=2)["zero_optimization"].clear()
    assert config == before


def test_auto_counts_as_not_set() -> None:
    """The value "auto", which Transformers fills in, counts as not set."""
    options = parse(
        {
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
            "bf16": {"enabled": "auto"},
        },
        bf16=True,
    )
    assert (options.stage, options.dtype, options.global_batch) == (3, torch.bfloat16, None)
    assert options.config["zero_optimization"] == {"stage": 3}


def test_an_optimizer_whose_learning_rate_is_auto_is_rejected() -> None:
    """``"auto"`` raises an error, because the run would otherwise train with torch's default learning rate."""
    config = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": "auto"}}}
    with pytest.raises(ConfigValueError, match=r"optimizer.params.eps, optimizer.params.lr is 'auto'.*lr=\.\.\."):
        with_optimizer({}, parse(config).optimizer)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"zero_optimisation": {"stage": 1}}, "zero_optimization"),
        ({"zero_optimization": {"stge": 1}}, "stage"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}, "device"),
        ({"fp16": {"enabled": True, "loss_scales": 0}}, "loss_scale"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_closest_name(config: dict[str, Any], expected: str) -> None:
    """An unknown key raises an error with the closest name, although DeepSpeed would ignore it."""
    with pytest.raises(ConfigKeyError, match=expected):
        parse(config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "param_scheduler"),
        ({"amp": {"enabled": True}}, "bf16"),
        ({"aio": {"block_size": 1}}, "NVMe"),
        ({"compile": {"deepcompile": True}}, "compile=True"),
        ({"torch_autocast": {"enabled": True}}, "bf16"),
        ({"gradient_allreduce_op": "sum"}, "averaged"),
        ({"tensor_parallel": {"autotp_size": 2}}, "only data parallelism"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "delayed"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "Omit it"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "changes the results"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "device='cpu'"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "nvme_path": "/x"}}}, "device='cpu'"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "stage=3"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "stage 1, 2 or 3"),
        ({"zero_optimization": {"stage": 4}}, "0, 1, 2 or 3"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "Enable only one"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "float32"),
        ({"train_micro_batch_size_per_gpu": 0}, "must be a positive integer"),
        ({"gradient_clipping": -1}, "maximum norm"),
    ],
)
def test_unsupported_options_are_rejected(config: dict[str, Any], expected: str) -> None:
    """The error for an unsupported option suggests an alternative, and no option is ignored."""
    with pytest.raises(ConfigValueError, match=expected):
        parse(config)


def test_disabled_options_are_accepted() -> None:
    """An unsupported option that is disabled is accepted."""
    config = {
        "amp": {"enabled": False},
        "tensorboard": {"enabled": False},
        "zero_optimization": {"stage": 1, "zero_hpz_partition_size": 1, "zero_quantized_weights": False},
    }
    assert parse(config).config["zero_optimization"] == {"stage": 1}


def test_an_option_given_twice_must_agree() -> None:
    """An option in both places must have the same value; otherwise the error shows both."""
    assert parse({"gradient_clipping": 1.0}, gradient_clipping=1.0).clipping == 1.0
    with pytest.raises(ConfigValueError, match=r"gradient_clipping=2.0, but config has gradient_clipping=1.0"):
        parse({"gradient_clipping": 1.0}, gradient_clipping=2.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, "yields 4 samples per rank"),
        ({"train_batch_size": 64}, r"4 samples x 3 accumulated x 2 ranks"),
    ],
)
def test_batch_sizes_must_match_the_run(given: dict[str, int], expected: str) -> None:
    """A batch size that differs from the run's raises an error."""
    with pytest.raises(ConfigValueError, match=expected):
        parse(given).for_engine(micro_batch=4, accumulation=3, clipping=0.0, world_size=2)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{", ConfigParsingError),
        ('{"bf16": {}, "bf16": {}}', ConfigParsingError),
        ("[1]", ConfigTypeError),
        (None, ConfigFileError),
    ],
)
def test_an_invalid_file_is_rejected(tmp_path: Path, text: str | None, kind: type[ConfigError]) -> None:
    """The error for an invalid file contains its name."""
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(kind, match=r"ds\.json"):
        parse(file)


def test_casting_inputs_requires_a_low_precision() -> None:
    """``inputs_to_half`` without bf16 or fp16 raises an error, because it would have no effect."""
    with pytest.raises(ConfigValueError, match="bf16 or fp16"):
        parse(inputs_to_half=[0])
    assert parse(inputs_to_half=[0, "mask"], bf16=True).half_inputs == (0, "mask")


@pytest.mark.parametrize("name", ["Adafactor", "Adagrad", "SparseAdam", "LBFGS"])
def test_optimizers_that_need_whole_tensors_are_rejected_under_zero(name: str) -> None:
    """Under ZeRO, optimizers that need whole tensors raise an error, because ranks only have parts of them."""
    optimizer = getattr(torch.optim, name)(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(PlacementError, match=f"{name} cannot be used"):
        require_elementwise(optimizer, stage=1, allow_unknown=True)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "NAdam", "RAdam", "Adadelta"])
def test_elementwise_optimizers_are_accepted(name: str) -> None:
    """Under ZeRO, elementwise optimizers are accepted."""
    require_elementwise(getattr(torch.optim, name)(nn.Linear(2, 2).parameters(), lr=0.1), stage=3, allow_unknown=False)


def test_a_custom_optimizer_must_be_allowed() -> None:
    """A custom optimizer requires zero_allow_untested_optimizer, which asserts that it is elementwise."""

    class Mine(torch.optim.SGD):
        """A subclass of SGD."""

    optimizer = Mine(nn.Linear(2, 2).parameters(), lr=0.1)
    require_elementwise(optimizer, stage=0, allow_unknown=False)
    require_elementwise(optimizer, stage=2, allow_unknown=True)
    with pytest.raises(PlacementError, match="zero_allow_untested_optimizer"):
        require_elementwise(optimizer, stage=2, allow_unknown=False)


def test_other_wrappers_are_rejected() -> None:
    """A wrapper for mixed precision raises an error with the DeepSpeed option to use."""
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(PlacementError, match=r"bf16=dict\(enabled=True\)"):
        require_plain_wrapper(AmpOptimWrapper(optimizer, dtype="bfloat16"))
    with pytest.raises(ConfigValueError, match="2-norm"):
        require_plain_wrapper(OptimWrapper(optimizer, clip_grad={"type": "value", "clip_value": 1.0}))


def test_checkpoint_formats_are_checked(tmp_path: Path) -> None:
    """An unknown checkpoint format, and an option of the other format, raise errors."""
    with pytest.raises(ConfigValueError, match="'deepspeed'"):
        DeepSpeedStrategy(work_dir=tmp_path, checkpoint_format="deepsped")  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ConfigValueError, match="checkpoint_format='deepspeed'"):
        DeepSpeedStrategy(work_dir=tmp_path, exclude_frozen_parameters=True)


@pytest.mark.parametrize(
    ("section", "ours"),
    [
        ({"type": "AdamW", "params": {"lr": 0.1}}, {"type": "AdamW", "lr": 0.1}),
        ({"type": "Adam", "params": {"lr": 0.1, "torch_adam": True}}, {"type": "AdamW", "lr": 0.1}),
        ({"type": "Adam", "params": {"adam_w_mode": False}}, {"type": "Adam"}),
        ({"type": "Adam", "params": {"torch_adam": False}}, {"type": "FusedAdam", "adam_w_mode": True}),
        ({"type": "SGD", "params": {"lr": 1, "momentum": 0.9}}, {"type": "SGD", "lr": 1, "momentum": 0.9}),
        ({"type": "OneBitAdam"}, {"type": "OnebitAdam"}),
    ],
)
def test_the_optimizer_section_of_deepspeed_is_used(section: dict[str, Any], ours: dict[str, Any]) -> None:
    """DeepSpeed's optimizer section is used if the run has no optimizer; its Adam decouples weight decay by default."""
    before = copy.deepcopy(section)
    assert with_optimizer({"accumulative_counts": 2}, section) == {"accumulative_counts": 2, "optimizer": ours}
    assert section == before


def test_two_optimizers_are_rejected() -> None:
    """The error for two optimizers states which one to remove."""
    with pytest.raises(ConfigValueError, match="Omit one of them"):
        with_optimizer({"optimizer": {"type": "SGD", "lr": 1}}, {"type": "AdamW"})
    with pytest.raises(ConfigValueError, match="gradient_clipping"):
        with_optimizer({}, {"type": "AdamW", "params": {"max_grad_norm": 1.0}})


def test_accumulation_and_clipping_are_passed_to_the_wrapper() -> None:
    """DeepSpeed's accumulation and clipping are added to the wrapper's options, which are not modified."""
    given = {"optimizer": {"type": "SGD"}}
    assert with_accumulation(given, 4) == {**given, "accumulative_counts": 4}
    assert with_clipping(given, 1.0) == {**given, "clip_grad": {"max_norm": 1.0}}
    assert given == {"optimizer": {"type": "SGD"}}
    alike = {**given, "accumulative_counts": 4, "clip_grad": {"max_norm": 1}}
    assert with_clipping(with_accumulation(alike, 4), 1.0) == alike
    assert with_clipping(with_accumulation(given, None), None) is given


def test_conflicting_accumulation_and_clipping_are_rejected() -> None:
    """The error for conflicting accumulation or clipping contains both values."""
    with pytest.raises(
        ConfigValueError, match=r"gradient_accumulation_steps=4, but optim_wrapper has accumulative_counts=2"
    ):
        with_accumulation({"optimizer": {}, "accumulative_counts": 2}, 4)
    with pytest.raises(ConfigValueError, match=r"gradient_clipping=1.0, but optim_wrapper has clip_grad=.*2.0"):
        with_clipping({"optimizer": {}, "clip_grad": {"max_norm": 2.0}}, 1.0)


def test_a_failed_kernel_compilation_is_explained() -> None:
    """A failed kernel compilation is explained with an alternative; other errors are unchanged."""
    with (
        pytest.raises(PlacementError, match=r"could not compile the kernel for FusedAdam: no ninja. .* torch's AdamW"),
        explain_kernel_errors({"optimizer": {"type": "FusedAdam"}}),
    ):
        raise RuntimeError("no ninja")
    with pytest.raises(RuntimeError, match="mine"), explain_kernel_errors({"optimizer": {"type": "Mine"}}):
        raise RuntimeError("mine")


@pytest.mark.parametrize("name", ["OnebitAdam", "OnebitLamb", "ZeroOneAdam"])
def test_optimizers_that_synchronize_gradients_are_rejected(name: str) -> None:
    """Optimizers that synchronize gradients themselves raise an error with an alternative."""
    assert name in OPTIMIZERS.names()
    with pytest.raises(PlacementError, match=f"{name} cannot be used .* compresses gradients to one bit"):
        refuse_by_name({"optimizer": {"type": name, "lr": 0.1}})


@pytest.mark.parametrize("stage", [0, 2])
def test_several_optimizers_for_different_parameters_are_rejected(stage: int) -> None:
    """A mixed optimizer raises an error that names other strategies, before and after it is built, at every stage."""
    with pytest.raises(PlacementError, match="MixedOptimizer cannot be used .* Use DDPStrategy or FSDPStrategy"):
        refuse_by_name({"optimizer": {"type": "MixedOptimizer"}})
    built = MixedOptimizer({"all": torch.optim.SGD([torch.zeros(1)])})
    with pytest.raises(PlacementError, match="MixedOptimizer cannot be used .* Use DDPStrategy or FSDPStrategy"):
        require_elementwise(built, stage=stage, allow_unknown=True)


def test_a_json_file_cannot_choose_a_module_for_its_optimizer(tmp_path: Path) -> None:
    """A dotted path as optimizer in a JSON file is not imported."""
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": "os.system", "params": {"command": "true"}}}))
    section = parse(str(tmp_path / "ds.json")).optimizer
    optimizer = with_optimizer({"accumulative_counts": 1}, section)["optimizer"]
    with pytest.raises(ConfigValueError, match=r"A data file names 'os\.system'"):
        OPTIMIZERS.build(optimizer)


def test_the_engine_receives_plain_strings(tmp_path: Path) -> None:
    """DeepSpeed receives plain JSON types."""
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "communication_data_type": "fp32"})
    )
    given = parse(str(tmp_path / "ds.json")).for_engine(micro_batch=1, accumulation=1, clipping=0.0, world_size=1)
    assert {type(key) for section in (given, given["zero_optimization"]) for key in section} == {str}
