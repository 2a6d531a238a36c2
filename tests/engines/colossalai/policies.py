"""A ColossalAI policy that shards the small language model of ``sharded_runs`` for tensor parallelism."""

from __future__ import annotations

from typing import Any

from colossalai.shardformer.layer import Linear1D_Col, Linear1D_Row
from colossalai.shardformer.policies.base_policy import (
    ModulePolicyDescription,
    Policy,
    SubModuleReplacementDescription,
)

from tests.support.sharded_runs import Block

_CUT = {"query": Linear1D_Col, "key": Linear1D_Col, "value": Linear1D_Col, "out": Linear1D_Row}
_CUT |= {"up": Linear1D_Col, "down": Linear1D_Row}


class GptPolicy(Policy):
    """Shards the layers that produce heads and features by rows, and the layers that combine them by columns."""

    def config_sanity_check(self) -> None:
        """Do nothing, because there is nothing to check."""

    def preprocess(self) -> Any:
        """Return the model unchanged."""
        return self.model

    def module_policy(self) -> dict[Any, Any]:
        """Return the sharded layers that replace the layers of a block."""
        if not self.shard_config.enable_tensor_parallelism:
            return {}
        layers = [SubModuleReplacementDescription(suffix=name, target_module=layer) for name, layer in _CUT.items()]
        return {Block: ModulePolicyDescription(sub_module_replacement=layers)}

    def postprocess(self) -> Any:
        """Return the model unchanged."""
        return self.model
