"""Save in ColossalAI's own form: its Booster writes weights and optimizer, with a checkpoint of ours around them."""

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
    """Writes checkpoints whose folders ``model`` and ``optimizer`` any program with ColossalAI's Booster can load.

    Args:
        placement: placed the model.
    """

    def __init__(self, placement: ColossalAIPlacement) -> None:
        self._placement = placement

    def __call__(self, checkpoint: StateTree, filename: str | os.PathLike[str], rank_group: RankGroup) -> None:
        """Publish it; see :func:`~stratagem.checkpoint.save_checkpoint`. Collective.

        Raises:
            CheckpointError: if the name asks for a single file, or it cannot be written.
        """
        if Path(filename).suffix:
            raise CheckpointError(
                f"{os.fspath(filename)}: ColossalAI's form is a folder. Choose a name without an ending, or "
                "checkpoint_format='portable'."
            )
        # The booster writes what lies in the model: rounded parameters, from which masters cannot be made again, or an
        # average for the length of an evaluation, in whose place a hook has put the weights into the tree.
        left = () if self._placement.has_masters or self._is_changed(checkpoint["state_dict"]) else ("state_dict",)
        tree = {key: value for key, value in checkpoint.items() if key not in left}
        with_optimizer = "optimizer" in tree
        if with_optimizer:
            tree["optimizer"] = {**tree["optimizer"], "state": {}}
        tree[ENGINE_PART] = {ENGINE_ORDER: self._numbered(), TIED: self._tied()}

        def write_extra_files(folder: Path) -> None:
            boosted = self._placement.boosted
            # Where it saves, the library asks whether the model is one of transformers.
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
        """Tell whether a callback has put parameters of its own into the tree."""
        return any(isinstance(state.get(shard.name), Tensor) for shard in self._placement.param_shards.values())

    def _numbered(self) -> list[str]:
        """Return the names of the parameters in the order by which ColossalAI numbers them."""
        names = [name for group in self._placement.group_names for name in group]
        optimizer = self._placement.boosted.optimizer
        if type(optimizer) is not LowLevelZeroOptimizer:
            return names
        # It has left out those that do not learn.
        learning = {shard.name for shard in self._placement.param_shards.values() if shard.working.requires_grad}
        return [name for name in names if name in learning]

    def _tied(self) -> dict[str, str]:
        """Return the further names of parameters that have several: the booster may write them under one alone."""
        names = self._placement.boosted.model.named_parameters(remove_duplicate=False)
        param_shards = self._placement.param_shards
        return {name: param_shards[parameter].name for name, parameter in names if param_shards[parameter].name != name}
