"""Save checkpoints that contain weights and optimizer state in ColossalAI's own format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from colossalai.zero import LowLevelZeroOptimizer
from torch import Tensor

from stratagem.checkpoint import DirectoryFormat, StateTree, write_to
from stratagem.checkpoint.foreign import ENGINE_ORDER, ENGINE_PART, TIED
from stratagem.distributed import RankGroup
from stratagem.engines.colossalai.import_stubs import import_stubs
from stratagem.engines.colossalai.placement import ColossalAIPlacement
from stratagem.errors import CheckpointError

__all__ = ["ColossalAIFormatWriter"]


@final
class ColossalAIFormatWriter:
    """Write checkpoints whose folders ``model`` and ``optimizer`` can be loaded with ColossalAI's Booster.

    Args:
        placement: the placement whose booster wrapped the model.
    """

    def __init__(self, placement: ColossalAIPlacement) -> None:
        self._placement = placement

    def __call__(self, checkpoint: StateTree, filename: str | os.PathLike[str], rank_group: RankGroup) -> None:
        """Write and publish a checkpoint; see :func:`~stratagem.checkpoint.save_checkpoint`. Collective.

        Raises:
            CheckpointError: if ``filename`` is the name of a single file, or the checkpoint cannot be written.
        """
        if Path(filename).suffix:
            raise CheckpointError(
                f"{os.fspath(filename)}: checkpoint_format='colossalai' writes a folder. Use a name without a suffix, or "
                "checkpoint_format='portable'."
            )
        # The booster writes the model's parameters. Save the state tree as well if they are not the master weights, or
        # if a hook has put the training weights into the tree because the model temporarily holds averaged weights.
        excluded = (
            () if self._placement.has_master_weights or self._is_changed(checkpoint["state_dict"]) else ("state_dict",)
        )
        tree = {key: value for key, value in checkpoint.items() if key not in excluded}
        with_optimizer = "optimizer" in tree
        if with_optimizer:
            tree["optimizer"] = {**tree["optimizer"], "state": {}}
        tree[ENGINE_PART] = {ENGINE_ORDER: self._parameter_order(), TIED: self._tied_names()}

        def write_extra_files(folder: Path) -> None:
            boosted = self._placement.boosted
            # ColossalAI imports transformers when it saves a checkpoint.
            with import_stubs():
                boosted.booster.save_model(boosted.engine, str(folder / "model"), shard=True)
                if with_optimizer:
                    boosted.booster.save_optimizer(boosted.optimizer, str(folder / "optimizer"), shard=True)

        write_to(
            filename,
            lambda path: DirectoryFormat().save(tree, path, rank_group, write_extra_files=write_extra_files),
            rank_group,
        )

    def _is_changed(self, state: Mapping[str, Any]) -> bool:
        """Return whether a callback has replaced parameters in the state tree, for example with averaged weights."""
        return any(isinstance(state.get(shard.name), Tensor) for shard in self._placement.param_shards.values())

    def _parameter_order(self) -> list[str]:
        """Return the parameter names in the order in which ColossalAI numbers them."""
        names = [name for group in self._placement.group_names for name in group]
        optimizer = self._placement.boosted.optimizer
        if type(optimizer) is not LowLevelZeroOptimizer:
            return names
        # This optimizer removed the frozen parameters.
        trainable = {shard.name for shard in self._placement.param_shards.values() if shard.working.requires_grad}
        return [name for name in names if name in trainable]

    def _tied_names(self) -> dict[str, str]:
        """Return the additional names of tied parameters, which the booster may write under only one name."""
        names = self._placement.boosted.model.named_parameters(remove_duplicate=False)
        param_shards = self._placement.param_shards
        return {name: param_shards[parameter].name for name, parameter in names if param_shards[parameter].name != name}
