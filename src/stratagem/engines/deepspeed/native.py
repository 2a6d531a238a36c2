"""Save checkpoints in DeepSpeed's own format, for use with other programs."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Final, final

from stratagem.checkpoint import StateTree, gather_tree
from stratagem.checkpoint.foreign import DEEPSPEED_STATE
from stratagem.distributed import RankGroup
from stratagem.engines.deepspeed.wrapper import DeepSpeedEngineOptimWrapper
from stratagem.errors import CheckpointError, ConfigValueError
from stratagem.storage import atomic_directory
from stratagem.utils import absolute

__all__ = ["DeepSpeedFormatWriter"]

_TAG: Final = "state"
# The parts of the state tree that DeepSpeed saves.
_ENGINE_PARTS: Final = frozenset({"state_dict", "optimizer"})


@final
class DeepSpeedFormatWriter:
    """Write checkpoints whose model and optimizer are saved by the engine; other parts are saved as its client state.

    Args:
        optim: the engine's optimizer wrapper.
        exclude_frozen_parameters: whether to exclude frozen parameters.
    """

    def __init__(self, optim: DeepSpeedEngineOptimWrapper, *, exclude_frozen_parameters: bool) -> None:
        self._optim = optim
        self._exclude = exclude_frozen_parameters

    def __call__(self, tree: StateTree, filename: str | os.PathLike[str], rank_group: RankGroup) -> None:
        """Write the checkpoint, and publish it with a single rename after all ranks have written their parts.

        Collective.

        Raises:
            CheckpointError: on every rank, if the checkpoint cannot be written.
            ConfigValueError: if the state tree has no optimizer state.
        """
        path = absolute(filename)
        if path.suffix:
            raise CheckpointError(
                f"{path}: checkpoint_format='deepspeed' writes a folder. Use a name without {path.suffix}, or "
                "checkpoint_format='portable'."
            )
        if "optimizer" not in tree:
            raise ConfigValueError(
                "checkpoint_format='deepspeed' requires the optimizer state. Set save_optimizer=True, or use "
                "checkpoint_format='portable'."
            )
        rest = gather_tree({key: value for key, value in tree.items() if key not in _ENGINE_PARTS}, rank_group)
        rest["optimizer"] = self._describe_optimizer(tree["optimizer"])
        with ExitStack() as stack:
            folder = rank_group.run_on_rank0(lambda: stack.enter_context(atomic_directory(path)))
            stack.enter_context(self._optim.engine_groups())
            rank_group.run_checked(
                lambda: self._optim.engine.save_checkpoint(
                    str(folder),
                    tag=_TAG,
                    client_state={DEEPSPEED_STATE: rest} if rank_group.is_rank0 else {},
                    exclude_frozen_parameters=self._exclude,
                )
            )
            rank_group.run_on_rank0(stack.close)

    def _describe_optimizer(self, state: StateTree) -> StateTree:
        """Return the parameter groups with parameter names, and the names of the trained parameters.

        DeepSpeed saves neither.
        """
        names = [name for group in state["param_groups"] for name in group["params"]]
        parameters = [each for group in self._optim.groups for each in group.parameters]
        trained = [
            name
            for name, each in zip(names, parameters, strict=True)
            if each in self._optim.master_weights.shard_ranges
        ]
        return {**{key: value for key, value in state.items() if key != "state"}, "trained": trained}
