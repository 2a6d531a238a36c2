"""What a DeepSpeed configuration may say: what is handed on, and what is refused, with what to write instead."""

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
_PARALLEL: Final = "only the data is parallel here: each rank has its own samples. Leave it out."
_REFUSED: Final[Mapping[str, str]] = {
    "scheduler": "schedules are param_scheduler's, which every strategy follows and checkpoints keep. Move it there.",
    "amp": "Apex is no longer part of DeepSpeed. Use bf16=dict(enabled=True).",
    "torch_autocast": "use bf16=dict(enabled=True) or fp16=dict(enabled=True), whose masters checkpoints keep.",
    "compile": "use the runner's compile=True, which compiles the model's forward.",
    "managed_gradient_accumulation": "windows are counted by the optimizer wrapper. Leave it out.",
    "gradient_allreduce_op": "gradients are averaged over ranks, as under every strategy. Leave it out.",
    "sparse_gradients": "gradients are exchanged dense. Leave it out.",
    "checkpoint": "use checkpoint_format of DeepSpeedStrategy to choose the form of checkpoints.",
    "dataloader_drop_last": "use drop_last of train_dataloader.",
    "aio": "it configures offload to NVMe, whose state cannot be read piece by piece. Use device='cpu'.",
    "data_efficiency": "samples are chosen by the sampler of train_dataloader.",
    "curriculum_learning": "samples are chosen by the sampler of train_dataloader.",
    "tensorboard": "use the TensorboardHook.",
    "wandb": "what a run logs goes through the hooks.",
    "csv_monitor": "what a run logs is in scalars.json of its log folder.",
    "comet": "what a run logs goes through the hooks.",
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "pipeline": _PARALLEL,
    "hybrid_engine": "it is for inference between steps. Leave it out.",
    "elasticity": "runs are restarted by the launcher, and resume on any number of ranks. Leave it out.",
    "autotuning": "it starts runs of its own. Leave it out.",
    "compression_training": "it changes the weights outside of the optimizer. Leave it out.",
    "weight_quantization": "it changes the weights outside of the optimizer. Leave it out.",
    "disable_allgather": "the weights would differ between ranks. Leave it out.",
}
_REFUSED_INSIDE: Final[Mapping[str, str]] = {
    "zenflow": "its updates are late, so that they are not those of one process. Leave it out.",
    "zero_hpz_partition_size": "secondary partitions are not kept in checkpoints. Leave it out.",
    "zero_quantized_weights": "quantized exchange changes the numbers. Leave it out.",
    "zero_quantized_nontrainable_weights": "quantized exchange changes the numbers. Leave it out.",
    "zero_quantized_gradients": "quantized exchange changes the numbers. Leave it out.",
    "elastic_checkpoint": "checkpoints resume on any number of ranks as they are. Leave it out.",
    "legacy_stage1": "DeepSpeed removed it. Leave it out.",
    "cpu_offload": "DeepSpeed renamed it. Use offload_optimizer=dict(device='cpu').",
    "cpu_offload_params": "DeepSpeed renamed it. Use offload_param=dict(device='cpu').",
    "nvme_path": "state on NVMe cannot be read piece by piece for checkpoints. Use device='cpu'.",
    "super_offload": "its state is elsewhere than checkpoints look for it. Leave it out.",
    "auto_cast": "inputs are cast by inputs_to_half.",
    "fp16_master_weights_and_grads": "masters are kept in float32. Leave it out.",
    "bf16_master_weights_and_grads": "masters are kept in float32. Leave it out.",
    "bf16_optimizer_states": "the optimizer's state is kept in float32. Leave it out.",
    "immediate_grad_update": "it belongs to an optimizer of DeepSpeed's that is not used here. Leave it out.",
    "legacy_fusion": "it belongs to an old form of FusedAdam. Leave it out.",
}
# Values that stand for the option not being given.
_OFF: Final[tuple[Any, ...]] = (None, False, {}, {"enabled": False})


def check_keys(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the options without refused ones that are switched off.

    Raises:
        ConfigKeyError: for a key that DeepSpeed does not have, with the nearest that it has.
        ConfigValueError: for an option that is refused; the message says what to write instead.
        ConfigTypeError: if a section is no mapping.
    """
    refuse_unknown(config, (*_PLAIN, *_SECTIONS, *_REFUSED), where)
    kept = {}
    for key, value in config.items():
        if key in _REFUSED and value in _OFF:
            continue
        if key in _REFUSED:
            raise ConfigValueError(f"{where}: {key} is not for this strategy: {_REFUSED[key]}")
        kept[key] = _check_section(value, _SECTIONS[key], f"{where}: {key}") if key in _SECTIONS else value
    return kept


def _check_section(section: Any, known: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(section, Mapping):
        raise ConfigTypeError(f"{where} is {section!r}; a mapping of its options is due.")
    refuse_unknown(section, (*known, *_REFUSED_INSIDE), where)
    kept = {}
    for key, value in section.items():
        if key in _REFUSED_INSIDE and (value in _OFF or (key == "zero_hpz_partition_size" and value == 1)):
            continue
        if key in _REFUSED_INSIDE:
            raise ConfigValueError(f"{where}: {key} is not for this strategy: {_REFUSED_INSIDE[key]}")
        if key not in known:
            raise ConfigKeyError(f"{where} has no option {key!r}.")
        kept[key] = _check_section(value, _NESTED[key], f"{where}.{key}") if key in _NESTED and value else value
    if section.get("device") == "nvme":
        raise ConfigValueError(f"{where}: device='nvme' is not for this strategy: {_REFUSED_INSIDE['nvme_path']}")
    return kept
