"""Parse and validate the options of ColossalAIStrategy, without importing ColossalAI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, final

import torch
from torch.optim import Optimizer

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, PlacementError
from stratagem.optim import MixedOptimizer, OptimWrapper
from stratagem.optim.base import is_schedule_free
from stratagem.optim.gradients import Clipping
from stratagem.optim.probe import Dependence, dependence_of
from stratagem.utils import did_you_mean, generator_state, restore_generator_state

__all__ = [
    "CHECKPOINT_FORMATS",
    "PluginSpec",
    "check_plugin_wrapper",
    "max_norm_of",
    "parse_plugin",
    "refuse_other_wrappers",
    "refuse_whole_parameters",
    "require_plain_wrapper",
]

CHECKPOINT_FORMATS: Final = ("portable", "colossalai")

_CLASSES: Final = {
    "torch-ddp": "TorchDDPPlugin",
    "lowlevel-zero": "LowLevelZeroPlugin",
    "hybrid-parallel": "HybridParallelPlugin",
}
_NO_FSDP: Final = (
    "It wraps torch's older FSDP, whose state cannot be saved on the CPU. Use FSDPStrategy, which does the same with "
    "fully_shard."
)
_NO_GEMINI: Final = (
    "Gemini moves chunks of parameters between a CUDA device and the host, and is not tested with this strategy. Use "
    "plugin='lowlevel-zero', or FSDPStrategy(cpu_offload=True)."
)
# ColossalAI plugins that this strategy does not support.
_UNSUPPORTED: Final = {
    **dict.fromkeys(("torch-fsdp", "TorchFSDPPlugin"), _NO_FSDP),
    **dict.fromkeys(("gemini", "GeminiPlugin"), _NO_GEMINI),
}
_KIND_OF: Final = {**{kind: kind for kind in _CLASSES}, **{name: kind for kind, name in _CLASSES.items()}}

_SCALER: Final = (
    "initial_scale", "min_scale", "growth_factor", "backoff_factor", "growth_interval", "hysteresis", "max_scale",
)  # fmt: skip
# A mapping from names of loss-scale options in torch.amp.GradScaler to their names in ColossalAI.
_SCALER_ALIASES: Final = {"init_scale": "initial_scale"}
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
    "With pipeline parallelism the booster runs the whole step (execute_pipeline) instead of the model's train_step. Omit "
    "it, or use tensor parallelism: tp_size=..."
)
_SEQUENCE: Final = (
    "Sequence parallelism works only in ColossalAI's own models, where ranks process parts of one sample. Omit it."
)
_FP8: Final = "It requires 8-bit kernels, which are only available for CUDA devices. Omit it."
# Plugin options that this strategy does not support, with the reasons. Values in _HARMLESS are ignored.
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
    "overlap_allgather": "Hooks and checkpoints would read incomplete weights between steps. Omit it.",
    "extra_dp_size": "To replicate a sharded model, use FSDPStrategy(replicate=...).",
}  # fmt: skip
_HARMLESS: Final = {"pp_size": 1, "sp_size": 1, "pp_style": "1f1b", "num_model_chunks": 1, "extra_dp_size": 1}
_PRECISIONS: Final = ("fp32", "bf16", "fp16")
# Optimizers that do not update each element of a parameter independently. Others are found by trial updates.
_WHOLE_PARAMETERS: Final = frozenset({"Adafactor", "CAME", "Lars", "LBFGS", "Muon", "SparseAdam"})
# ColossalAI replaces this optimizer with a distributed version, which uses the norms of whole parameters.
_DISTRIBUTED: Final = frozenset({"Lamb"})
_MOST_NDIM: Final = 5
_TRIAL_LR: Final = 0.01
_WRAPPER: Final = "CollosalAIModelWrapper"  # MMEngine's spelling


@final
@dataclass(frozen=True, slots=True)
class PluginSpec:
    """The kind and the options of a plugin that has not been built yet."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def class_name(self) -> str:
        """The name of the plugin class in ColossalAI."""
        return _CLASSES[self.kind]

    @property
    def clips(self) -> bool:
        """Whether the plugin clips gradients itself."""
        return self.kind != "torch-ddp"

    @property
    def tp_size(self) -> int:
        """The tensor-parallel size: the number of ranks that a layer is sharded across."""
        return int(self.options.get("tp_size", 1))

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage; 0 if the optimizer is not sharded."""
        return {"torch-ddp": 0, "lowlevel-zero": int(self.options.get("stage", 1))}.get(
            self.kind, int(self.options.get("zero_stage", 0))
        )

    def with_options(self, **options: Any) -> PluginSpec:
        """Return a copy with additional options."""
        return PluginSpec(self.kind, {**self.options, **options})


def parse_plugin(plugin: Any, mixed_precision: Any) -> Any:
    """Return the plugin specification with its precision; a plugin that is already built is returned unchanged.

    Raises:
        ConfigTypeError: if ``plugin`` or ``mixed_precision`` has a wrong type.
        ConfigValueError: if the plugin is unknown, or its precision and ``mixed_precision`` differ.
        ConfigKeyError: if the plugin does not have a given option.
        PlacementError: if a plugin or an option is not supported; the message names an alternative.
    """
    if not isinstance(plugin, str | Mapping):
        if mixed_precision is not None:
            raise ConfigValueError(
                f"mixed_precision={mixed_precision!r} has no effect, because this plugin is already built: {plugin!r}. "
                "Build the plugin with precision=... instead."
            )
        return plugin
    if isinstance(plugin, Mapping):
        options = dict(plugin)
        name = options.pop("type", None)
        if name is None:
            raise ConfigValueError(f"plugin={dict(plugin)!r} has no type. Set it to one of {', '.join(_CLASSES)}.")
    else:
        name, options = plugin, {}
    kind = _kind(name)
    _check_options(kind, options)
    if kind == "hybrid-parallel":
        options = {"tp_size": 1, "pp_size": 1, **options}
    return _with_precision(PluginSpec(kind, options), mixed_precision)


def _kind(name: Any) -> str:
    if not isinstance(name, str):
        raise ConfigTypeError(f"plugin must be a name, a mapping with a type, or a ColossalAI plugin, got {name!r}.")
    if name in _UNSUPPORTED:
        raise PlacementError(f"plugin={name!r} is not supported. {_UNSUPPORTED[name]}")
    if name not in _KIND_OF:
        raise ConfigValueError(f"Unknown plugin={name!r}. {did_you_mean(name, _KIND_OF)}")
    return _KIND_OF[name]


def _check_options(kind: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _KNOWN[kind]:
            continue
        if name not in _REFUSED:
            raise ConfigKeyError(f"plugin: {_CLASSES[kind]} has no {name!r}. {did_you_mean(name, _KNOWN[kind])}")
        if value not in (None, False, _HARMLESS.get(name)):
            raise PlacementError(f"plugin: {name}={value!r} is not supported. {_REFUSED[name]}")
    for name, stages in (("stage", (1, 2)), ("zero_stage", (0, 1, 2))):
        if name in options and options[name] not in stages:
            raise ConfigValueError(
                f"plugin: {name} must be one of {', '.join(map(str, stages))}, got {options[name]!r}."
            )
    if options.get("norm_type", 2.0) != 2.0:
        raise PlacementError(
            f"plugin: norm_type={options['norm_type']!r} is not supported, because ColossalAI only clips by the "
            "2-norm. Omit it."
        )


def _with_precision(spec: PluginSpec, mixed_precision: Any) -> PluginSpec:
    """Return the plugin specification with its precision, by default float32.

    Raises:
        ConfigTypeError: if ``mixed_precision`` is neither a name nor a mapping.
        ConfigValueError: if the precision is unknown, or conflicts between the plugin and ``mixed_precision``.
        PlacementError: if the plugin does not support the precision.
    """
    name, scaler = _parse_precision(mixed_precision)
    if spec.kind == "torch-ddp":
        if name not in (None, "fp32"):
            raise PlacementError(
                f"mixed_precision={name!r} is not supported with plugin='torch-ddp', for which ColossalAI 0.5.0 has only "
                "float16 on CUDA. Use plugin='lowlevel-zero' with mixed_precision='bf16' or 'fp16'."
            )
        return spec
    in_plugin = spec.options.get("precision")
    if None not in (name, in_plugin) and name != in_plugin:
        raise ConfigValueError(
            f"mixed_precision={name!r} and the plugin's precision={in_plugin!r} differ. Specify only one of them."
        )
    precision = in_plugin or name or "fp32"
    if precision not in _PRECISIONS:
        raise ConfigValueError(f"plugin: unknown precision={precision!r}. {did_you_mean(str(precision), _PRECISIONS)}")
    if scaler and precision != "fp16":
        raise ConfigValueError(f"mixed_precision: {', '.join(scaler)} require fp16, but the precision is {precision}.")
    zero_stage = spec.options.get("zero_stage", 0)
    if spec.kind == "hybrid-parallel" and zero_stage and precision == "fp32":
        raise PlacementError(
            f"plugin: HybridParallelPlugin supports zero_stage={zero_stage} only with 'bf16' or 'fp16'. Use "
            "mixed_precision='bf16', zero_stage=0, or plugin='lowlevel-zero'."
        )
    return spec.with_options(precision=precision, **scaler)


def _parse_precision(mixed_precision: Any) -> tuple[str | None, dict[str, Any]]:
    """Return the name of the precision and the options of the loss scale."""
    if mixed_precision is None:
        return None, {}
    options = dict(mixed_precision) if isinstance(mixed_precision, Mapping) else {}
    name = options.pop("type", None) if isinstance(mixed_precision, Mapping) else mixed_precision
    if not isinstance(name, str):
        raise ConfigTypeError(f"mixed_precision must be a name or a mapping with a type, got {mixed_precision!r}.")
    if name in ("fp8", "fp16_apex", "fp16_naive"):
        raise PlacementError(f"mixed_precision={name!r} is not implemented in ColossalAI 0.5.0. Use 'bf16' or 'fp16'.")
    if name not in _PRECISIONS:
        raise ConfigValueError(f"Unknown mixed_precision={name!r}. {did_you_mean(name, _PRECISIONS)}")
    scaler = {_SCALER_ALIASES.get(key, key): value for key, value in options.items()}
    for key in scaler:
        if key not in _SCALER:
            raise ConfigKeyError(f"mixed_precision: unknown option {key!r}. {did_you_mean(key, _SCALER)}")
    return name, scaler


def refuse_other_wrappers(config: Any, model_wrapper: Any) -> None:
    """Reject values for MMEngine's arguments ``config`` and ``model_wrapper`` that would have no effect.

    Raises:
        PlacementError: if ``config`` is not empty, or ``model_wrapper`` is not MMEngine's default.
    """
    if config:
        raise PlacementError(
            f"config={config!r} has no effect: ColossalAI has had no global configuration since version 0.4. Set options of the "
            "plugin instead: plugin=dict(type='lowlevel-zero', stage=2)."
        )
    name = model_wrapper.get("type") if isinstance(model_wrapper, Mapping) else model_wrapper
    rest = set(model_wrapper) - {"type"} if isinstance(model_wrapper, Mapping) else set()
    if name not in (None, _WRAPPER) or rest:
        raise PlacementError(f"model_wrapper={model_wrapper!r} is not supported: the booster wraps the model. Omit it.")


def max_norm_of(clipping: Clipping | None, plugin_max_norm: float) -> float:
    """Return the maximum gradient norm from the options of the optimizer wrapper and the plugin; 0 for no clipping.

    Raises:
        PlacementError: if plugins do not support the optimizer wrapper's type of clipping.
        ConfigValueError: if the two options differ.
    """
    if clipping is None:
        return plugin_max_norm
    if not clipping.by_norm or clipping.norm_type != 2.0:
        kind = f"norm_type={clipping.norm_type:g}" if clipping.by_norm else "type='value'"
        raise PlacementError(
            f"clip_grad: {kind} is not supported by ColossalAI's plugins, which clip by the 2-norm. Use "
            "clip_grad=dict(max_norm=...), or plugin='torch-ddp', which supports every type of clipping."
        )
    if plugin_max_norm and plugin_max_norm != clipping.limit:
        raise ConfigValueError(
            f"clip_grad=dict(max_norm={clipping.limit:g}) of the optimizer wrapper and max_norm={plugin_max_norm:g} of the "
            "plugin differ. Specify only one of them."
        )
    return clipping.limit


def require_plain_wrapper(built: object) -> OptimWrapper:
    """Return the configured optimizer wrapper, whose settings ColossalAI's wrapper uses.

    Raises:
        PlacementError: if it is not an ``OptimWrapper``, or its optimizer is a ``MixedOptimizer``.
    """
    if isinstance(built, OptimWrapper) and isinstance(built.optimizer, MixedOptimizer):
        raise PlacementError(
            "ColossalAIStrategy cannot train with a MixedOptimizer, because ColossalAI supports a single optimizer. Use "
            "DDPStrategy or FSDPStrategy, or an optimizer such as AdamW."
        )
    if isinstance(built, OptimWrapper):
        return built
    instead = {
        "AmpOptimWrapper": "The plugin sets the precision: use OptimWrapper and ColossalAIStrategy(mixed_precision='bf16')",
        "OptimWrapperDict": "ColossalAI supports a single optimizer. Use DDPStrategy for a model with several",
    }.get(type(built).__name__, "Use OptimWrapper, which the strategy replaces with a wrapper for ColossalAI")
    raise PlacementError(f"ColossalAIStrategy cannot train with a {type(built).__name__}. {instead}.")


def refuse_whole_parameters(optimizer: Optimizer, *, zero: bool, tensor_parallel: bool) -> None:
    """Reject an optimizer that cannot update parts of parameters, if the ranks have parts.

    Args:
        optimizer: the optimizer, before ColossalAI replaces or wraps it.
        zero: whether ZeRO divides the parameters.
        tensor_parallel: whether tensor parallelism divides them.

    Raises:
        PlacementError: if the update of an element depends on other elements, or the optimizer is schedule-free under ZeRO.
    """
    name = type(optimizer).__name__
    if zero and is_schedule_free(optimizer):
        raise PlacementError(
            f"{name} has different weights for training and evaluation, but under ZeRO the model's parameters are copies of "
            "those that the optimizer updates. Use DDPStrategy or FSDPStrategy, or an optimizer such as AdamW."
        )
    if not (zero or tensor_parallel) or (name in _DISTRIBUTED and type(optimizer).__module__.startswith("colossalai.")):
        return
    if name in _WHOLE_PARAMETERS or _reads_other_elements(optimizer):
        part = "under ZeRO each rank only updates a range of each parameter"
        if not zero:
            part = "under tensor parallelism each rank only updates its part of a parameter"
        raise PlacementError(
            f"{name} requires whole parameters, but {part}. Use plugin='torch-ddp', DDPStrategy or FSDPStrategy, or an "
            "elementwise optimizer such as AdamW."
        )


def _reads_other_elements(optimizer: Optimizer) -> bool:
    """Return whether trial updates show that the update of an element depends on other elements; False if they fail."""
    shapes = [{each.ndim for each in group["params"] if each.is_floating_point()} for group in optimizer.param_groups]
    small = [
        [torch.linspace(-0.1, 0.1, 4**ndim).view((4,) * ndim) for ndim in sorted(ndims)[:_MOST_NDIM] if ndim]
        for ndims in shapes
    ]
    if not any(small):
        return False
    random = generator_state()
    try:
        return dependence_of(optimizer, small, lr=_TRIAL_LR) is not Dependence.ELEMENT
    except Exception:  # noqa: BLE001 -- the optimizer cannot be tried, for example because it only has CUDA kernels
        return False
    finally:
        restore_generator_state(random)


def check_plugin_wrapper(plugin: Any, optim: object) -> None:
    """Check an optimizer wrapper, which may be built for a stand-in model, with a plugin that is not built yet.

    Raises:
        PlacementError: if the wrapper or the plugin does not support the other.
        ConfigValueError: if both specify a different maximum norm.
    """
    settings = require_plain_wrapper(optim)
    if not isinstance(plugin, PluginSpec):
        return
    if plugin.clips:
        max_norm_of(settings.clipping, plugin.options.get("max_norm", 0.0))
    refuse_whole_parameters(settings.optimizer, zero=bool(plugin.zero_stage), tensor_parallel=plugin.tp_size > 1)
