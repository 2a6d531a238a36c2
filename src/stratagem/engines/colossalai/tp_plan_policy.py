"""A ColossalAI policy that follows the tensor-parallel plan of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

from colossalai.shardformer.layer import Linear1D_Col, Linear1D_Row
from colossalai.shardformer.policies.base_policy import (
    ModulePolicyDescription,
    Policy,
    SubModuleReplacementDescription,
)
from torch import nn

from stratagem.errors import ConfigValueError, PlacementError
from stratagem.parallel.wrap_policy import matches_name
from stratagem.utils.names import did_you_mean

__all__ = ["PLAN_ATTRIBUTE", "TPPlanPolicy"]

# FSDPStrategy(tp=...) uses the same attribute.
PLAN_ATTRIBUTE: Final = "tp_plan"
_LAYERS: Final = {"colwise": Linear1D_Col, "rowwise": Linear1D_Row}


@final
class TPPlanPolicy(Policy):
    """Shard the linear layers that are listed in a tensor-parallel plan.

    Args:
        plan: maps patterns of module names to ``"colwise"`` or ``"rowwise"``, like the attribute ``tp_plan`` of a model.

    Raises:
        PlacementError: if ColossalAI does not support a style of the plan.
    """

    def __init__(self, plan: Mapping[str, Any]) -> None:
        super().__init__()
        for pattern, style in plan.items():
            if style not in _LAYERS:
                raise PlacementError(
                    f"{PLAN_ATTRIBUTE}: {pattern!r} has style {style!r}, but ColossalAI's linear layers only support 'colwise' "
                    "and 'rowwise'. Use FSDPStrategy(tp=...), or set custom_policy."
                )
        self._plan = dict(plan)

    def config_sanity_check(self) -> None:
        """Do nothing, since there is no configuration to check."""

    def preprocess(self) -> nn.Module:
        """Return the model unchanged."""
        model: nn.Module = self.model
        return model

    def module_policy(self) -> dict[Any, Any]:
        """Return the sharded replacement for each layer, keyed by the layer's full name.

        Raises:
            ConfigValueError: if a pattern of the plan matches no module.
        """
        if not self.shard_config.enable_tensor_parallelism:
            return {}
        named = dict(self.model.named_modules())
        layers = []
        for pattern, style in self._plan.items():
            found = [name for name in named if matches_name(name, pattern)]
            if not found:
                raise ConfigValueError(
                    f"{PLAN_ATTRIBUTE}: no module matches {pattern!r}. {did_you_mean(pattern, named)}"
                )
            layers += [SubModuleReplacementDescription(suffix=name, target_module=_LAYERS[style]) for name in found]
        return {type(self.model): ModulePolicyDescription(sub_module_replacement=layers)}

    def postprocess(self) -> nn.Module:
        """Return the model unchanged."""
        model: nn.Module = self.model
        return model
