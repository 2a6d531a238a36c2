"""Options of MMEngine's FSDPStrategy."""

from __future__ import annotations

from typing import Any

import pytest

from stratagem.errors import ConfigError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.parallel.fsdp.options import FSDPOptions, Precision
from stratagem.strategies.fsdp_names import from_model_wrapper, state_of

OWN: dict[str, Any] = {
    "wrap_policy": None,
    "reshard_after_forward": None,
    "mixed_precision": None,
    "cpu_offload": False,
    "ignored": (),
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "MMFullyShardedDataParallel", "use_orig_params": True, "backward_prefetch": "BACKWARD_PRE"}, {}),
        ({"cpu_offload": True}, {"cpu_offload": True}),
        ({"cpu_offload": {"offload_params": True}}, {"cpu_offload": True}),
        ({"sharding_strategy": "SHARD_GRAD_OP"}, {"reshard_after_forward": False}),
        ({"sharding_strategy": "FULL_SHARD"}, {"reshard_after_forward": None}),
        ({"mixed_precision": {"param_dtype": "float16"}}, {"mixed_precision": {"param_dtype": "float16"}}),
        ({"ignored_modules": ["head"]}, {"ignored": ["head"]}),
        (
            {
                "auto_wrap_policy": {
                    "type": "torch.distributed.fsdp.wrap.size_based_auto_wrap_policy",
                    "min_num_params": 7,
                }
            },
            {"wrap_policy": {"min_params": 7}},
        ),
        (
            {"auto_wrap_policy": {"type": "transformer_auto_wrap_policy", "transformer_layer_cls": {"Block"}}},
            {"wrap_policy": {"classes": ["Block"]}},
        ),
    ],
)
def test_options_with_an_equivalent_are_accepted(given: dict[str, Any], expected: dict[str, Any]) -> None:
    """An option of MMEngine has the same effect as the new option."""
    assert from_model_wrapper(given, OWN) == {**OWN, **expected}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"use_orig_params": False}, ConfigKeyError, "FSDPStrategy always uses use_orig_params=True"),
        ({"param_init_fn": "f"}, ConfigKeyError, r"param_init_fn='f' is not supported: .* initial_weights"),
        ({"process_group": "g"}, ConfigKeyError, r"replicate=\.\.\. and tp="),
        ({"sharding_strategy": "HYBRID_SHARD"}, ConfigValueError, r"Use FSDPStrategy\(replicate="),
        ({"sharding_strategy": "NO_SHARD"}, ConfigValueError, "Use DDPStrategy"),
        ({"auto_wrap": 1}, ConfigKeyError, "Did you mean 'auto_wrap_policy'"),
        ({"type": "MMDistributedDataParallel"}, ConfigValueError, "unknown type='MMDistributedDataParallel'"),
        ("whole", ConfigTypeError, "model_wrapper must be a mapping .* got 'whole'"),
    ],
)
def test_options_without_an_equivalent_are_rejected(given: Any, error: type[ConfigError], message: str) -> None:
    """The error for an option without an equivalent names the new option."""
    with pytest.raises(error, match=message):
        from_model_wrapper(given, OWN)


def test_an_option_under_both_names_is_rejected() -> None:
    """An option under both names raises an error."""
    with pytest.raises(ConfigValueError, match="specify the same option"):
        from_model_wrapper({"cpu_offload": False}, {**OWN, "cpu_offload": True})


@pytest.mark.parametrize(
    ("state", "cfg", "form"),
    [
        (None, None, "sharded"), ("full", None, "full"), (None, "local", "sharded"), (None, "full", "full"),
        (None, {"state_dict_type": "FULL_STATE_DICT"}, "full"), (None, {}, "sharded"),
        (None, {"state_dict_type": "StateDictType.SHARDED_STATE_DICT"}, "sharded"),
    ],
)  # fmt: skip
def test_checkpoint_formats_under_both_names(state: str | None, cfg: Any, form: str) -> None:
    """``state_dict_cfg`` is the older name for ``state``."""
    assert state_of(state, cfg) == form


@pytest.mark.parametrize(
    ("state", "cfg", "message"),
    [
        ("full", "full", "Specify only state"), (None, "half", "unknown type 'half'"),
        (None, {"state_dict_config": 1}, "state_dict_config configure torch's older FSDP"), (None, 5, "Use state="),
    ],
)  # fmt: skip
def test_unknown_checkpoint_formats_are_rejected(state: str | None, cfg: Any, message: str) -> None:
    """The error for an unknown format contains the valid ones."""
    with pytest.raises(ConfigError, match=message):
        state_of(state, cfg)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward_prefetch": -1}, "forward_prefetch must be the number of blocks.* got -1"),
        ({"cpu_offload": "yes"}, "cpu_offload must be True or False, got 'yes'"),
        ({"skip_init_weights": 1}, "skip_init_weights must be True or False, got 1"),
        ({"ignored": "head"}, "ignored must be a list of names, got 'head'"),
        ({"initial_weights": "rank_0"}, "Did you mean 'rank0'"),
        ({"tp_plan": {"a": "colwise"}}, "tp=1 disables tensor parallelism"),
        ({"reshard_after_forward": "always"}, "reshard_after_forward must be .* got 'always'"),
        ({"reshard_after_forward": {"a": "b"}}, "reshard_after_forward must be .* got 'b'"),
    ],
)
def test_options_of_the_wrong_type_are_rejected(options: dict[str, Any], message: str) -> None:
    """Options with an invalid type raise errors before anything is built."""
    with pytest.raises(ConfigError, match=message):
        FSDPOptions(**options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("float31", "unknown param_dtype='float31'. Did you mean"),
        ({"param_type": "bf16"}, "'param_type' is not known. Did you mean 'param_dtype'"),
        ({"reduce_dtype": "int8"}, "unknown reduce_dtype='int8'"),
        (16, "mixed_precision must be .* got 16"),
    ],
)
def test_invalid_data_types_are_rejected(given: Any, message: str) -> None:
    """The error for an invalid data type names the option."""
    with pytest.raises(ConfigError, match=message):
        Precision.parse(given)
