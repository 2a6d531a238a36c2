"""How ColossalAI cuts the layers of the small language model of ``sharded_runs`` for tensor parallelism."""

from __future__ import annotations

from typing import Any

from colossalai.shardformer.layer import Linear1D_Col, Linear1D_Row
from colossalai.shardformer.policies.base_policy import (
    ModulePolicyDescription,
    Policy,
    SubModuleReplacementDescription,
)

from sharded_runs import Block

_CUT = {"query": Linear1D_Col, "key": Linear1D_Col, "value": Linear1D_Col, "out": Linear1D_Row}
_CUT |= {"up": Linear1D_Col, "down": Linear1D_Row}


class GptPolicy(Policy):
    """Rows of what makes heads and features, columns of what brings them together."""

    def config_sanity_check(self) -> None:
        """There is nothing to check."""

    def preprocess(self) -> Any:
        """Return the model as it is."""
        return self.model

    def module_policy(self) -> dict[Any, Any]:
        """Return which layers of a block are replaced by spread ones."""
        if not self.shard_config.enable_tensor_parallelism:
            return {}
        layers = [SubModuleReplacementDescription(suffix=name, target_module=layer) for name, layer in _CUT.items()]
        return {Block: ModulePolicyDescription(sub_module_replacement=layers)}

    def postprocess(self) -> Any:
        """Return the model as it is."""
        return self.model
