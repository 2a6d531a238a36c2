"""What a configuration says of ColossalAI, read without the library: names, options, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, final

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, PlacementError
from stratagem.utils import did_you_mean

__all__ = ["CHECKPOINT_FORMATS", "PluginSpec", "parse_plugin", "refuse_other_wrappers"]

CHECKPOINT_FORMATS: Final = ("portable", "colossalai")

_CLASSES: Final = {
    "torch-ddp": "TorchDDPPlugin",
    "lowlevel-zero": "LowLevelZeroPlugin",
    "hybrid-parallel": "HybridParallelPlugin",
}
_NO_FSDP: Final = (
    "It is torch's older FSDP in ColossalAI's clothes, whose state cannot be saved on the CPU. Use FSDPStrategy, which does the "
    "same with fully_shard."
)
_NO_GEMINI: Final = (
    "Gemini moves chunks of parameters between a CUDA device and the host; it takes 'cpu' to mean 'moved out', so it does not "
    "run without one, and with one neither its training nor its state was tried here. Use plugin='lowlevel-zero', or "
    "FSDPStrategy(cpu_offload=True)."
)
# Plugins that ColossalAI has and this strategy does not take.
_NOT_TAKEN: Final = {
    **dict.fromkeys(("torch-fsdp", "TorchFSDPPlugin"), _NO_FSDP),
    **dict.fromkeys(("gemini", "GeminiPlugin"), _NO_GEMINI),
}
_KIND_OF: Final = {**{kind: kind for kind in _CLASSES}, **{name: kind for kind, name in _CLASSES.items()}}

_SCALER: Final = (
    "initial_scale", "min_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis", "max_scale",
)  # fmt: skip
# torch's own name for it.
_SCALER_SPELLED: Final = {"init_scale": "initial_scale"}
_DDP: Final = (
    "broadcast_buffers", "find_unused_parameters", "check_reduction", "gradient_as_bucket_view", "static_graph",
)  # fmt: skip
_ZERO: Final = ("precision", "max_norm", "cpu_offload", "communication_dtype", "overlap_communication", *_SCALER)
_KNOWN: Final[Mapping[str, tuple[str, ...]]] = {
    "torch-ddp": (*_DDP, "bucket_cap_mb"),
    "lowlevel-zero": (
        *_ZERO, "stage", "norm_type", "reduce_bucket_size_in_m", "master_weights", "verbose", "cast_inputs",
    ),
    "hybrid-parallel": (
        *_ZERO, *_DDP, "tp_size", "zero_stage", "custom_policy", "ddp_bucket_cap_mb", "zero_bucket_size_in_m",
        "enable_all_optimization", "enable_fused_normalization", "enable_flash_attention", "enable_jit_fused",
        "parallel_output", "make_vocab_size_divisible_by", "dp_outside",
    ),
}  # fmt: skip
_PIPELINE: Final = (
    "A pipeline needs the booster to run the whole step (execute_pipeline), in the place of the model's train_step. Leave "
    "it out; tensor parallel is tp_size=..."
)
_SEQUENCE: Final = (
    "Sequence parallelism works only in ColossalAI's own models, where ranks process parts of one sample. Omit it."
)
_FP8: Final = "It needs kernels for eight bits that only CUDA devices have. Leave it out."
# Options that a plugin has and this strategy does not take: why not. A value in _HARMLESS is as good as none.
_REFUSED: Final = {
    **dict.fromkeys(
        (
            "pp_size", "num_microbatches", "microbatch_size", "pp_style", "num_model_chunks", "scheduler_nodes",
            "num_layers_per_stage", "enable_metadata_cache", "overlap_p2p", "gradient_checkpoint_config",
        ),
        _PIPELINE,
    ),
    **dict.fromkeys(
        ("sp_size", "enable_sequence_parallelism", "sequence_parallelism_mode", "inner_ring_size"), _SEQUENCE
    ),
    **dict.fromkeys(("use_fp8", "fp8_communication"), _FP8),
    "overlap_allgather": "Weights would be incomplete between steps, where hooks, averages and checkpoints read them.",
    "extra_dp_size": "For replicas of a sharded model use FSDPStrategy(replicate=...).",
}  # fmt: skip
_HARMLESS: Final = {"pp_size": 1, "sp_size": 1, "pp_style": "1f1b", "num_model_chunks": 1, "extra_dp_size": 1}
_PRECISIONS: Final = ("fp32", "bf16", "fp16")
_WRAPPER: Final = "CollosalAIModelWrapper"  # as MMEngine spells it


@final
@dataclass(frozen=True, slots=True)
class PluginSpec:
    """A plugin that is still to be built: which, and with what options."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def class_name(self) -> str:
        """The name of the plugin's class in ColossalAI."""
        return _CLASSES[self.kind]

    @property
    def clips(self) -> bool:
        """Whether the plugin clips gradients itself."""
        return self.kind != "torch-ddp"

    @property
    def tp_size(self) -> int:
        """Over how many ranks a layer's arithmetic is spread."""
        return int(self.options.get("tp_size", 1))

    def with_options(self, **options: Any) -> PluginSpec:
        """Return the same plugin with further options."""
        return PluginSpec(self.kind, {**self.options, **options})


def parse_plugin(plugin: Any, mixed_precision: Any) -> Any:
    """Return what a configuration says of the plugin and its precision; a plugin that is built as it is.

    Raises:
        ConfigTypeError: if one of them has another type.
        ConfigValueError: if there is no such plugin, or the two say different things.
        ConfigKeyError: if the plugin has no such option.
        PlacementError: for what cannot be honoured; the message says what to do instead.
    """
    if not isinstance(plugin, str | Mapping):
        if mixed_precision is not None:
            raise ConfigValueError(
                f"mixed_precision={mixed_precision!r} is for a plugin that is built here, and this one is built already: "
                f"{plugin!r}. Give precision=... to it."
            )
        return plugin
    if isinstance(plugin, Mapping):
        options = dict(plugin)
        name = options.pop("type", None)
        if name is None:
            raise ConfigValueError(f"plugin={dict(plugin)!r} has no type. Give one of {', '.join(_CLASSES)}.")
    else:
        name, options = plugin, {}
    kind = _kind(name)
    _check_options(kind, options)
    if kind == "hybrid-parallel":
        options = {"tp_size": 1, "pp_size": 1, **options}
    return _take_precision(PluginSpec(kind, options), mixed_precision)


def _kind(name: Any) -> str:
    if not isinstance(name, str):
        raise ConfigTypeError(f"plugin is {name!r}; a name, a mapping with a type, or a plugin of ColossalAI is due.")
    if name in _NOT_TAKEN:
        raise PlacementError(f"plugin={name!r} is not possible here. {_NOT_TAKEN[name]}")
    if name not in _KIND_OF:
        raise ConfigValueError(f"plugin={name!r} is not known. {did_you_mean(name, _KIND_OF)}")
    return _KIND_OF[name]


def _check_options(kind: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _KNOWN[kind]:
            continue
        if name not in _REFUSED:
            raise ConfigKeyError(f"plugin: {_CLASSES[kind]} has no {name!r}. {did_you_mean(name, _KNOWN[kind])}")
        if value not in (None, False, _HARMLESS.get(name)):
            raise PlacementError(f"plugin: {name}={value!r} is not possible here. {_REFUSED[name]}")
    for name, stages in (("stage", (1, 2)), ("zero_stage", (0, 1, 2))):
        if name in options and options[name] not in stages:
            raise ConfigValueError(f"plugin: {name}={options[name]!r} is none of {', '.join(map(str, stages))}.")
    if options.get("norm_type", 2.0) != 2.0:
        raise PlacementError(
            f"plugin: norm_type={options['norm_type']!r}; ColossalAI clips by the norm of order 2 alone."
        )


def _take_precision(spec: PluginSpec, mixed_precision: Any) -> PluginSpec:
    """Return the plugin in the precision that was asked for; float32 where nothing was.

    Raises:
        ConfigTypeError: if it is neither a name nor a mapping.
        ConfigValueError: if it is unknown, or plugin and ``mixed_precision`` differ.
        PlacementError: if the plugin does not have it.
    """
    name, scaler = _parse_precision(mixed_precision)
    if spec.kind == "torch-ddp":
        if name not in (None, "fp32"):
            raise PlacementError(
                f"mixed_precision={name!r} cannot be had with plugin='torch-ddp': ColossalAI 0.5.0 has only float16 for it, "
                "with a loss scale for CUDA alone. Use plugin='lowlevel-zero' with mixed_precision='bf16' or 'fp16'."
            )
        return spec
    said = spec.options.get("precision")
    if None not in (name, said) and name != said:
        raise ConfigValueError(
            f"mixed_precision={name!r} and the plugin's precision={said!r} differ. Give one of them."
        )
    precision = said or name or "fp32"
    if precision not in _PRECISIONS:
        raise ConfigValueError(
            f"plugin: precision={precision!r} is not known. {did_you_mean(str(precision), _PRECISIONS)}"
        )
    if scaler and precision != "fp16":
        raise ConfigValueError(f"mixed_precision: {', '.join(scaler)} are for fp16, and the precision is {precision}.")
    zero_stage = spec.options.get("zero_stage", 0)
    if spec.kind == "hybrid-parallel" and zero_stage and precision == "fp32":
        raise PlacementError(
            f"plugin: HybridParallelPlugin has zero_stage={zero_stage} only in 'bf16' or 'fp16'. Give mixed_precision='bf16', "
            "zero_stage=0, or plugin='lowlevel-zero'."
        )
    return spec.with_options(precision=precision, **scaler)


def _parse_precision(mixed_precision: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the name of the precision, and the options of its loss scale."""
    if mixed_precision is None:
        return None, {}
    options = dict(mixed_precision) if isinstance(mixed_precision, Mapping) else {}
    name = options.pop("type", None) if isinstance(mixed_precision, Mapping) else mixed_precision
    if not isinstance(name, str):
        raise ConfigTypeError(f"mixed_precision is {mixed_precision!r}; a name or a mapping with a type is due.")
    if name in ("fp8", "fp16_apex", "fp16_naive"):
        raise PlacementError(
            f"mixed_precision={name!r} is announced by ColossalAI 0.5.0 and not written: its class is empty. Use 'bf16' or "
            "'fp16'."
        )
    if name not in _PRECISIONS:
        raise ConfigValueError(f"mixed_precision={name!r} is not known. {did_you_mean(name, _PRECISIONS)}")
    scaler = {_SCALER_SPELLED.get(key, key): value for key, value in options.items()}
    for key in scaler:
        if key not in _SCALER:
            raise ConfigKeyError(f"mixed_precision: {key!r} is not known. {did_you_mean(key, _SCALER)}")
    return name, scaler


def refuse_other_wrappers(config: Any, model_wrapper: Any) -> None:
    """Refuse what MMEngine's strategy takes and ColossalAI 0.5.0 has no use for.

    Raises:
        PlacementError: if there is something in ``config``, or ``model_wrapper`` is not the one that there is.
    """
    if config:
        raise PlacementError(
            f"config={config!r}: since version 0.4 ColossalAI has no configuration of its own. Give options to the plugin: "
            "plugin=dict(type='lowlevel-zero', stage=2)."
        )
    name = model_wrapper.get("type") if isinstance(model_wrapper, Mapping) else model_wrapper
    rest = set(model_wrapper) - {"type"} if isinstance(model_wrapper, Mapping) else set()
    if name not in (None, _WRAPPER) or rest:
        raise PlacementError(
            f"model_wrapper={model_wrapper!r}: the booster wraps the model, and there is one way to train what it gives back. "
            "Leave it out."
        )
