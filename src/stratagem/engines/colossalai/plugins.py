"""Build ColossalAI plugins, and determine the properties of a built plugin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import colossalai.booster.plugin as library
import torch
from colossalai.booster.plugin import HybridParallelPlugin, LowLevelZeroPlugin, Plugin, TorchDDPPlugin
from colossalai.shardformer.policies.base_policy import Policy
from torch import nn

from stratagem.engines.colossalai.import_stubs import import_stubs
from stratagem.engines.colossalai.options import PluginSpec
from stratagem.engines.colossalai.tp_plan_policy import PLAN_ATTRIBUTE, TPPlanPolicy
from stratagem.errors import ConfigTypeError, ConfigValueError, PlacementError
from stratagem.registry import TASK_UTILS

__all__ = ["PluginTraits", "build_plugin", "plugin_traits"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PluginTraits:
    """The properties of a plugin.

    Attributes:
        tp_size: the tensor-parallel size: the number of ranks that a layer is sharded across.
        zero_stage: the stage of ZeRO; 0 if the optimizer is not sharded.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        clips: whether the plugin clips gradients itself.
        max_norm: the norm that it clips to; 0 for no clipping.
    """

    tp_size: int
    zero_stage: int
    precision: str
    clips: bool
    max_norm: float


def plugin_traits(plugin: Plugin) -> PluginTraits:
    """Return the properties of a built plugin.

    Raises:
        PlacementError: if this strategy does not support the plugin or one of its options.
    """
    if isinstance(plugin, TorchDDPPlugin):
        return PluginTraits(tp_size=1, zero_stage=0, precision="fp32", clips=False, max_norm=0.0)
    if isinstance(plugin, LowLevelZeroPlugin):
        options: Mapping[str, Any] = plugin.zero_optim_kwargs
        _refuse("overlap_allgather", options["overlap_allgather"])
        _refuse("extra_dp_size", "extra_dp_group" in options)
        _refuse("use_fp8", plugin.use_fp8)
        return PluginTraits(
            tp_size=1,
            zero_stage=plugin.stage,
            precision=plugin.precision,
            clips=True,
            max_norm=options["clip_grad_norm"],
        )
    if isinstance(plugin, HybridParallelPlugin):
        _refuse("overlap_allgather", plugin.zero_config["overlap_allgather"])
        _refuse("pp_size", plugin.pp_size > 1)
        _refuse("enable_sequence_parallelism", plugin.enable_sequence_parallelism)
        _refuse("use_fp8", plugin.use_fp8)
        return PluginTraits(
            tp_size=plugin.tp_size,
            zero_stage=plugin.zero_stage,
            precision=plugin.precision,
            clips=True,
            max_norm=plugin.max_norm,
        )
    raise PlacementError(
        f"plugin: {type(plugin).__name__} is not supported. Use a TorchDDPPlugin, a LowLevelZeroPlugin or a "
        "HybridParallelPlugin, or FSDPStrategy for FSDP."
    )


def _refuse(option: str, chosen: bool) -> None:
    if chosen:
        raise PlacementError(
            f"The plugin was built with {option}, which is not supported. Build it without {option}. If you pass a mapping of "
            f"options instead of a built plugin, the error about {option} names an alternative."
        )


def build_plugin(spec: PluginSpec, model: nn.Module, device: torch.device) -> Plugin:
    """Build the plugin on this rank. Collective.

    Raises:
        PlacementError: if the plugin does not support the model or the device.
        ConfigTypeError: if ``custom_policy`` is not a policy.
        ConfigValueError: if ``communication_dtype`` is unknown.
    """
    options = dict(spec.options)
    if device.type == "cpu":
        if options.get("overlap_communication"):
            raise PlacementError(
                "plugin: overlap_communication=True requires an accelerator, and this run is on the CPU. Omit it."
            )
        if spec.kind != "torch-ddp":
            options["overlap_communication"] = False
    if isinstance(options.get("communication_dtype"), str):
        options["communication_dtype"] = _dtype(options["communication_dtype"])
    if spec.kind == "hybrid-parallel":
        options["custom_policy"] = _policy(options.get("custom_policy"), model, options["tp_size"])
    built: Plugin = getattr(library, spec.class_name)(**options)
    return built


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigValueError(
            f"plugin: communication_dtype={name!r} is not the name of a torch dtype, such as 'float16'."
        )
    return found


def _policy(policy: Any, model: nn.Module, tp_size: int) -> Policy | None:
    """Return the given policy, or one built from the model's tensor-parallel plan; None for ColossalAI's built-in policy."""
    if isinstance(policy, Mapping):
        # Importing the policy's module may import ColossalAI's layers for the first time.
        with import_stubs():
            policy = TASK_UTILS.build(policy)
    if isinstance(policy, type):
        policy = policy()
    if isinstance(policy, Policy):
        return policy
    if policy is not None:
        raise ConfigTypeError(
            "plugin: custom_policy must be a colossalai.shardformer Policy, a Policy class, or a mapping with a type, got "
            f"{policy!r}."
        )
    if type(model).__module__.startswith("transformers."):
        return None
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    if tp_size > 1 and not plan:
        raise PlacementError(
            f"plugin: tp_size={tp_size} requires a plan for the layers of {type(model).__name__}: ColossalAI only has plans for "
            f"models from the transformers library. Define the model's attribute {PLAN_ATTRIBUTE!r}, such as "
            "{'blocks.*.up': 'colwise', 'blocks.*.down': 'rowwise'}, or set custom_policy=...; see "
            "docs/strategies/colossalai.md."
        )
    return TPPlanPolicy(plan if tp_size > 1 and plan else {})
