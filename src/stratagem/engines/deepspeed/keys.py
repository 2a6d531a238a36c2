"""The keys of a DeepSpeed configuration that are passed to DeepSpeed, and the rejected keys with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.utils import refuse_unknown

__all__ = ["check_keys"]

_PRECISION: Final = ("enabled",)
_SECTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "zero_optimization": (
        "stage",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "compute_grad_norm",
        "load_from_fp32_weights",
        "offload_param",
        "offload_optimizer",
        "sub_group_size",
        "prefetch_bucket_size",
        "stage3_prefetch_bucket_size",
        "param_persistence_threshold",
        "stage3_param_persistence_threshold",
        "model_persistence_threshold",
        "stage3_model_persistence_threshold",
        "max_live_parameters",
        "stage3_max_live_parameters",
        "max_reuse_distance",
        "stage3_max_reuse_distance",
        "gather_16bit_weights_on_model_save",
        "stage3_gather_16bit_weights_on_model_save",
        "module_granularity_threshold",
        "stage3_module_granularity_threshold",
        "use_all_reduce_for_fetch_params",
        "stage3_use_all_reduce_for_fetch_params",
        "allgather_sequential",
        "stage3_allgather_sequential",
        "ignore_unused_parameters",
        "round_robin_gradients",
        "parameter_alignment",
        "memory_efficient_linear",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
        "leaf_module",
    ),
    "bf16": (*_PRECISION, "check_grad_overflow"),
    "fp16": (
        *_PRECISION,
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
    ),
    "activation_checkpointing": (
        "partition_activations",
        "cpu_checkpointing",
        "contiguous_memory_optimization",
        "number_checkpoints",
        "synchronize_checkpoint_boundary",
        "profile",
    ),
    "optimizer": ("type", "params"),
}
_NESTED: Final[Mapping[str, tuple[str, ...]]] = {
    "offload_optimizer": ("device", "pin_memory", "ratio", "cpuadam_cores_perc"),
    "offload_param": ("device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"),
}
_PLAIN: Final = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "data_types",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "flops_profiler",
    "comms_logger",
    "disable_python_gc",
)
_PARALLEL: Final = "only data parallelism is supported. Omit it."
_REFUSED: Final[Mapping[str, str]] = {
    "scheduler": "use param_scheduler, which works with every strategy and is saved in checkpoints.",
    "amp": "DeepSpeed no longer supports Apex. Use bf16=dict(enabled=True).",
    "torch_autocast": "use bf16=dict(enabled=True) or fp16=dict(enabled=True), whose master weights are saved in checkpoints.",
    "compile": "set compile=True in the Runner, which compiles the model's forward.",
    "managed_gradient_accumulation": "the optimizer wrapper counts micro-batches. Omit it.",
    "gradient_allreduce_op": "gradients are averaged over ranks, as with every strategy. Omit it.",
    "sparse_gradients": "gradients are reduced as dense tensors. Omit it.",
    "checkpoint": "select the checkpoint format with DeepSpeedStrategy(checkpoint_format=...).",
    "dataloader_drop_last": "set drop_last in train_dataloader.",
    "aio": "it configures offloading to NVMe, whose state cannot be saved in checkpoints. Use device='cpu'.",
    "data_efficiency": "samples are selected by the sampler of train_dataloader. Omit it.",
    "curriculum_learning": "samples are selected by the sampler of train_dataloader. Omit it.",
    "tensorboard": "use the TensorboardHook.",
    "wandb": "use the logging hooks.",
    "csv_monitor": "logged values are in scalars.json in the log folder. Omit it.",
    "comet": "use the logging hooks.",
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "pipeline": _PARALLEL,
    "hybrid_engine": "it is only used for inference between steps. Omit it.",
    "elasticity": "Stratagem's launcher restarts runs, which can resume on any number of ranks. Omit it.",
    "autotuning": "it starts separate runs to tune the configuration. Omit it.",
    "compression_training": "it changes weights outside the optimizer. Omit it.",
    "weight_quantization": "it changes weights outside the optimizer. Omit it.",
    "disable_allgather": "the weights would differ between ranks. Omit it.",
}
_REFUSED_INSIDE: Final[Mapping[str, str]] = {
    "zenflow": "its updates are delayed and differ from the updates of a single process. Omit it.",
    "zero_hpz_partition_size": "secondary partitions are not saved in checkpoints. Omit it.",
    "zero_quantized_weights": "quantized communication changes the results. Omit it.",
    "zero_quantized_nontrainable_weights": "quantized communication changes the results. Omit it.",
    "zero_quantized_gradients": "quantized communication changes the results. Omit it.",
    "elastic_checkpoint": "every checkpoint can be resumed on any number of ranks. Omit it.",
    "legacy_stage1": "DeepSpeed has removed it. Omit it.",
    "cpu_offload": "DeepSpeed has renamed it. Use offload_optimizer=dict(device='cpu').",
    "cpu_offload_params": "DeepSpeed has renamed it. Use offload_param=dict(device='cpu').",
    "nvme_path": "state on NVMe cannot be saved in checkpoints. Use device='cpu'.",
    "super_offload": "its state cannot be saved in checkpoints. Omit it.",
    "auto_cast": "use inputs_to_half.",
    "fp16_master_weights_and_grads": "master weights are kept in float32. Omit it.",
    "bf16_master_weights_and_grads": "master weights are kept in float32. Omit it.",
    "bf16_optimizer_states": "the optimizer state is kept in float32. Omit it.",
    "immediate_grad_update": "it belongs to a DeepSpeed optimizer that is not used here. Omit it.",
    "legacy_fusion": "it belongs to an old version of FusedAdam. Omit it.",
}
# Values that are equivalent to omitting the option.
_OFF: Final[tuple[Any, ...]] = (None, False, {}, {"enabled": False})


def check_keys(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options after removing unsupported options that are disabled.

    Raises:
        ConfigKeyError: if DeepSpeed does not have a key; the message suggests the closest one.
        ConfigValueError: if an option is not supported; the message names an alternative.
        ConfigTypeError: if a section is not a mapping.
    """
    refuse_unknown(config, (*_PLAIN, *_SECTIONS, *_REFUSED), where)
    kept = {}
    for key, value in config.items():
        if key in _REFUSED and value in _OFF:
            continue
        if key in _REFUSED:
            raise ConfigValueError(f"{where}: {key} is not supported: {_REFUSED[key]}")
        kept[key] = _check_section(value, _SECTIONS[key], f"{where}: {key}") if key in _SECTIONS else value
    return kept


def _check_section(section: Any, known: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(section, Mapping):
        raise ConfigTypeError(f"{where} must be a mapping of options, got {section!r}.")
    refuse_unknown(section, (*known, *_REFUSED_INSIDE), where)
    kept = {}
    for key, value in section.items():
        if key in _REFUSED_INSIDE and (value in _OFF or (key == "zero_hpz_partition_size" and value == 1)):
            continue
        if key in _REFUSED_INSIDE:
            raise ConfigValueError(f"{where}: {key} is not supported: {_REFUSED_INSIDE[key]}")
        if key not in known:
            raise ConfigKeyError(f"{where} has no option {key!r}.")
        kept[key] = _check_section(value, _NESTED[key], f"{where}.{key}") if key in _NESTED and value else value
    if section.get("device") == "nvme":
        raise ConfigValueError(f"{where}: device='nvme' is not supported: {_REFUSED_INSIDE['nvme_path']}")
    return kept
