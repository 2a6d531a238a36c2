"""Checkpoints in DeepSpeed's own form, for those who go on with other programs."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Final, final

from stratagem.checkpoint import StateTree, gather_tree
from stratagem.checkpoint.foreign import DEEPSPEED_STATE
from stratagem.distributed import RankGroup
from stratagem.engines.deepspeed.wrapper import DeepSpeedOptimWrapper
from stratagem.errors import CheckpointError, ConfigValueError
from stratagem.storage import atomic_directory
from stratagem.utils import absolute

__all__ = ["DeepSpeedFormatWriter"]

_TAG: Final = "state"
# What DeepSpeed saves itself.
_ENGINES: Final = frozenset({"state_dict", "optimizer"})


@final
class DeepSpeedFormatWriter:
    """Writes what :meth:`ComposedStrategy.save_checkpoint` gives: model and optimizer by the engine, all else beside them.

    Args:
        optim: the engine's optimizer wrapper.
        exclude_frozen_parameters: whether parameters that do not learn are left out.
    """

    def __init__(self, optim: DeepSpeedOptimWrapper, *, exclude_frozen_parameters: bool) -> None:
        self._optim = optim
        self._exclude = exclude_frozen_parameters

    def __call__(self, tree: StateTree, filename: str | os.PathLike[str], rank_group: RankGroup) -> None:
        """Publish the folder by one rename, when every rank has written its part. Collective.

        Raises:
            CheckpointError: on every rank, if it cannot be written.
            ConfigValueError: if the optimizer's state shall be left out.
        """
        path = absolute(filename)
        if path.suffix:
            raise CheckpointError(
                f"{path}: checkpoint_format='deepspeed' writes a folder, and the name is that of a file. Leave {path.suffix} "
                "out, or use checkpoint_format='portable'."
            )
        if "optimizer" not in tree:
            raise ConfigValueError(
                "checkpoint_format='deepspeed' always holds the optimizer's state. Set save_optimizer=True, or use "
                "checkpoint_format='portable'."
            )
        rest = gather_tree({key: value for key, value in tree.items() if key not in _ENGINES}, rank_group)
        rest["optimizer"] = self._described(tree["optimizer"])
        with ExitStack() as aside:
            folder = rank_group.run_on_rank0(lambda: aside.enter_context(atomic_directory(path)))
            aside.enter_context(self._optim.engines_groups())
            rank_group.run_checked(
                lambda: self._optim.engine.save_checkpoint(
                    str(folder),
                    tag=_TAG,
                    client_state={DEEPSPEED_STATE: rest} if rank_group.is_rank0 else {},
                    exclude_frozen_parameters=self._exclude,
                )
            )
            rank_group.run_on_rank0(aside.close)

    def _described(self, state: StateTree) -> StateTree:
        """Return what DeepSpeed does not tell of the optimizer's state: which parameters its numbers stand for."""
        names = [name for group in state["param_groups"] for name in group["params"]]
        parameters = [each for group in self._optim.groups for each in group.parameters]
        trained = [
            name
            for name, each in zip(names, parameters, strict=True)
            if each in self._optim.master_weights.shard_ranges
        ]
        return {**{key: value for key, value in state.items() if key != "state"}, "trained": trained}
