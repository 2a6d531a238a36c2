"""Build a plugin of ColossalAI from what a configuration says of it, and tell what a built one does."""

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

__all__ = ["PluginTraits", "build_plugin", "traits_of"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PluginTraits:
    """What has to be known of a plugin.

    Attributes:
        tp_size: over how many ranks a layer's arithmetic is spread; they see the same samples.
        zero_stage: 0 where every rank has the whole optimizer.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        clips: whether the plugin clips gradients itself.
        max_norm: by which norm it does; 0 for none.
    """

    tp_size: int
    zero_stage: int
    precision: str
    clips: bool
    max_norm: float


def traits_of(plugin: Plugin) -> PluginTraits:
    """Return what has to be known of a built plugin.

    Raises:
        PlacementError: if this strategy cannot train with it.
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
        f"plugin is a {type(plugin).__name__}, with which this strategy cannot train. Give a TorchDDPPlugin, a "
        "LowLevelZeroPlugin or a HybridParallelPlugin; for FSDP use FSDPStrategy."
    )


def _refuse(option: str, chosen: bool) -> None:
    if chosen:
        raise PlacementError(
            f"The plugin was built with {option}, which this strategy cannot train with. Build it without, or give its "
            f"options as a mapping: the error for {option} says what to do instead."
        )


def build_plugin(spec: PluginSpec, model: nn.Module, device: torch.device) -> Plugin:
    """Build the plugin on this rank. Collective.

    Raises:
        PlacementError: if it cannot work with this model or on this device.
        ConfigTypeError: if a policy or a type is none.
    """
    options = dict(spec.options)
    if device.type == "cpu":
        if options.get("overlap_communication"):
            raise PlacementError(
                "plugin: overlap_communication=True needs a device that computes while the host communicates, and this run is "
                "on the CPU. Leave it out."
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
        raise ConfigValueError(f"plugin: communication_dtype={name!r} is no type of torch, such as 'float16'.")
    return found


def _policy(policy: Any, model: nn.Module, tp_size: int) -> Policy | None:
    """Return what says how layers are cut: the policy that is given, or the model's plan; None for ColossalAI's own."""
    if isinstance(policy, Mapping):
        # Its module may be the first to import the library's layers.
        with import_stubs():
            policy = TASK_UTILS.build(policy)
    if isinstance(policy, type):
        policy = policy()
    if isinstance(policy, Policy):
        return policy
    if policy is not None:
        raise ConfigTypeError(
            f"plugin: custom_policy is {policy!r}; a Policy of colossalai.shardformer, its class, or a mapping with its type "
            "is due."
        )
    if type(model).__module__.startswith("transformers."):
        return None
    plan = getattr(model, PLAN_ATTRIBUTE, None)
    if tp_size > 1 and not plan:
        raise PlacementError(
            f"plugin: tp_size={tp_size} needs to know how the layers of {type(model).__name__} are cut, and ColossalAI knows it "
            f"of models of transformers alone. Let the model say it by its attribute {PLAN_ATTRIBUTE!r}, such as "
            "{'blocks.*.up': 'colwise', 'blocks.*.down': 'rowwise'}, or give custom_policy=...; see "
            "docs/strategies/colossalai.md."
        )
    return TPPlanPolicy(plan if tp_size > 1 and plan else {})
