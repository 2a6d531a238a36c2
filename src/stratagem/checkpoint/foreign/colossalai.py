"""Read checkpoints written by ColossalAI's Booster: a folder ``model`` and a folder ``optimizer``, each with an index.

``ColossalAIStrategy(checkpoint_format="colossalai")`` adds these folders to a Stratagem checkpoint, which holds
everything else: the parameter names, and float32 weights if the model computes in another dtype. Checkpoints written by
MMEngine's strategy or by a script contain only the Booster's folders. Their optimizer state is keyed by index, and the
training progress is read from ``meta.pth`` and ``scheduler`` if they exist.

ColossalAI is not needed to read these checkpoints, and no code from them is executed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch

from stratagem.checkpoint.foreign.hugging_face import HuggingFaceFormat, shards_of
from stratagem.checkpoint.foreign.mmengine import mmengine_parts
from stratagem.checkpoint.foreign.torch_file import open_torch_file, read_torch_file
from stratagem.checkpoint.restricted_unpickler import TorchArchive, ValueBuilder
from stratagem.errors import CheckpointDamagedError

__all__ = ["ENGINE_ORDER", "ENGINE_PART", "TIED", "ColossalAIFolder"]

# The part of the Stratagem checkpoint that holds information missing from ColossalAI's files: the parameter names in
# ColossalAI's order, and the names of tied parameters.
ENGINE_PART: Final = "colossalai"
ENGINE_ORDER: Final = "order"
TIED: Final = "tied"
_MODEL: Final = "model"
_OPTIMIZER: Final = "optimizer"
_INDEX: Final = "pytorch_optim.bin.index.json"
_META: Final = "meta.pth"
_SCHEDULERS: Final = "scheduler"


@final
class ColossalAIFolder:
    """Read checkpoint folders written by ColossalAI's Booster."""

    @staticmethod
    def can_read(path: Path) -> bool:
        """Return whether ``path`` contains a folder ``model`` with weights."""
        model = path / _MODEL
        return model.is_dir() and HuggingFaceFormat.can_read(model)

    def load(
        self,
        path: Path,
        *,
        map_location: torch.device | str = "cpu",
        parts: Collection[str] | None = None,
        stratagem_parts: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Read the state tree, or only some of its parts.

        Args:
            path: the folder.
            map_location: the device of the tensors.
            parts: the names of the parts to read; all by default.
            stratagem_parts: the parts of the Stratagem checkpoint in the same folder, if there is one.

        Raises:
            CheckpointError: if the folder has unexpected contents.
            CheckpointDamagedError: if a file is missing or cannot be read.
        """
        tree = dict(stratagem_parts) if stratagem_parts is not None else _read_position(path, map_location)
        engine_part = tree.pop(ENGINE_PART, {})
        if "state_dict" not in tree and (parts is None or "state_dict" in parts):
            weights = HuggingFaceFormat().load(path / _MODEL, map_location=map_location)["state_dict"]
            tied = {name: weights[other] for name, other in engine_part.get(TIED, {}).items() if other in weights}
            tree["state_dict"] = {**weights, **tied}
        index = path / _OPTIMIZER / _INDEX
        if index.is_file() and (parts is None or "optimizer" in parts):
            tree["optimizer"] = _optimizer(index, map_location, tree.get("optimizer"), engine_part.get(ENGINE_ORDER))
        return tree if parts is None else {name: tree[name] for name in parts if name in tree}


def _optimizer(
    index: Path, device: torch.device | str, named_state: Mapping[str, Any] | None, names: Sequence[str] | None
) -> dict[str, Any]:
    """Return the optimizer state, keyed by name if ``names`` are known, otherwise by index as in torch."""
    state: dict[int, Any] = {}
    for name in shards_of(index):
        state.update(read_torch_file(index.parent / name, device))
    if named_state is None or names is None:
        return {"state": state, "param_groups": _read(index.parent / _group_file(index), device)}
    return {**named_state, "state": {names[number]: slots for number, slots in state.items()}}


def _group_file(index: Path) -> str:
    name = json.loads(index.read_bytes()).get("metadata", {}).get("param_groups")
    # Reject file names that refer to a path outside the folder.
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointDamagedError(f"{index} does not refer to a file with parameter groups in the same folder.")
    return name


def _read(file: Path, device: torch.device | str) -> Any:
    """Return the contents of a file, which may be of any type."""
    if not file.is_file():
        raise CheckpointDamagedError(f"{file} is missing; the checkpoint is incomplete.")
    with TorchArchive(file) as archive:
        return ValueBuilder(archive, device).build(archive.root(), file.name)


def _read_position(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Read the parts that MMEngine's strategy adds: the progress of the run and its schedulers."""
    tree: dict[str, Any] = {}
    if (path / _META).is_file():
        with open_torch_file(path / _META, device) as checkpoint:
            if "meta" in checkpoint.entries:
                tree["meta"] = mmengine_parts(checkpoint)["meta"]()
    files = sorted((path / _SCHEDULERS).glob("scheduler_*.pth"), key=lambda file: int(file.stem.rpartition("_")[2]))
    if files:
        tree["param_schedulers"] = [_scheduler_position(file, device) for file in files]
    return tree


def _scheduler_position(file: Path, device: torch.device | str) -> dict[str, Any]:
    with open_torch_file(file, device) as checkpoint:
        return {
            key: checkpoint.read(checkpoint.entries[key], key)
            for key in ("_global_step", "last_step")
            if key in checkpoint.entries
        }
