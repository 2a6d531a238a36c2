"""A policy of ColossalAI from a model's own plan of tensor parallelism."""

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
from stratagem.parallel.fsdp.wrap_policy import matches_name
from stratagem.utils.names import did_you_mean

__all__ = ["PLAN_ATTRIBUTE", "TPPlanPolicy"]

# The same attribute as FSDPStrategy(tp=...) follows.
PLAN_ATTRIBUTE: Final = "tp_plan"
_LAYERS: Final = {"colwise": Linear1D_Col, "rowwise": Linear1D_Row}


@final
class TPPlanPolicy(Policy):
    """Spreads the linear layers that a plan names: pattern of module names -> ``"colwise"`` or ``"rowwise"``.

    Args:
        plan: the plan; the model's own attribute ``tp_plan`` has this form.

    Raises:
        PlacementError: if it has a style that ColossalAI's layers do not have.
    """

    def __init__(self, plan: Mapping[str, Any]) -> None:
        super().__init__()
        for pattern, style in plan.items():
            if style not in _LAYERS:
                raise PlacementError(
                    f"{PLAN_ATTRIBUTE}: {pattern!r} is {style!r}, and ColossalAI's linear layers are cut 'colwise' or "
                    "'rowwise'. Use FSDPStrategy(tp=...), or give a custom_policy."
                )
        self._plan = dict(plan)

    def config_sanity_check(self) -> None:
        """There is nothing to check."""

    def preprocess(self) -> nn.Module:
        """Return the model as it is."""
        model: nn.Module = self.model
        return model

    def module_policy(self) -> dict[Any, Any]:
        """Return which layers are replaced by spread ones, by their full names.

        Raises:
            ConfigValueError: if a pattern of the plan fits no module.
        """
        if not self.shard_config.enable_tensor_parallelism:
            return {}
        named = dict(self.model.named_modules())
        layers = []
        for pattern, style in self._plan.items():
            found = [name for name in named if matches_name(name, pattern)]
            if not found:
                raise ConfigValueError(
                    f"{PLAN_ATTRIBUTE}: no module is called {pattern!r}. {did_you_mean(pattern, named)}"
                )
            layers += [SubModuleReplacementDescription(suffix=name, target_module=_LAYERS[style]) for name in found]
        return {type(self.model): ModulePolicyDescription(sub_module_replacement=layers)}

    def postprocess(self) -> nn.Module:
        """Return the model as it is."""
        model: nn.Module = self.model
        return model
