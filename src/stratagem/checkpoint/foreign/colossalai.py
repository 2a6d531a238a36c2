"""Checkpoints as ColossalAI's Booster writes them: a folder ``model`` and a folder ``optimizer``, each with an index.

``ColossalAIStrategy(checkpoint_format="colossalai")`` writes them with a checkpoint of ours around them, which holds all
the rest: the parameters' names, and float32 weights where the model computes in another type. Without it, as MMEngine's
strategy or a script of the user's saved them, the optimizer's state is by index, and ``meta.pth`` and ``scheduler`` say
where the run stood, as far as they are there.

ColossalAI itself is not needed to read them, and nothing in them is executed.
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

# The part of ours that tells what ColossalAI's files leave out: the parameters' names in the order by which it numbers
# them, and names that stand for the same parameter as another.
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
    """Read such a folder."""

    @staticmethod
    def reads(path: Path) -> bool:
        """Tell whether ``path`` is in this form, by what is in the folder."""
        model = path / _MODEL
        return model.is_dir() and HuggingFaceFormat.reads(model)

    def load(
        self,
        path: Path,
        *,
        map_location: torch.device | str = "cpu",
        parts: Collection[str] | None = None,
        ours: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Read the tree, or only some of its parts.

        Args:
            path: the folder.
            map_location: the device of the tensors.
            parts: names of the parts; all by default.
            ours: what the checkpoint of ours around it holds, where there is one.

        Raises:
            CheckpointError: if it holds something else.
            CheckpointDamagedError: if it cannot be read, or a file is missing.
        """
        tree = dict(ours) if ours is not None else _rest(path, map_location)
        told = tree.pop(ENGINE_PART, {})
        if "state_dict" not in tree and (parts is None or "state_dict" in parts):
            weights = HuggingFaceFormat().load(path / _MODEL, map_location=map_location)["state_dict"]
            tied = {name: weights[other] for name, other in told.get(TIED, {}).items() if other in weights}
            tree["state_dict"] = {**weights, **tied}
        index = path / _OPTIMIZER / _INDEX
        if index.is_file() and (parts is None or "optimizer" in parts):
            tree["optimizer"] = _optimizer(index, map_location, tree.get("optimizer"), told.get(ENGINE_ORDER))
        return tree if parts is None else {name: tree[name] for name in parts if name in tree}


def _optimizer(
    index: Path, device: torch.device | str, ours: Mapping[str, Any] | None, names: Sequence[str] | None
) -> dict[str, Any]:
    """Return the optimizer's state: by name where ours tells the names, else by index, as torch's own is."""
    state: dict[int, Any] = {}
    for name in shards_of(index):
        state.update(read_torch_file(index.parent / name, device))
    if ours is None or names is None:
        return {"state": state, "param_groups": _read(index.parent / _group_file(index), device)}
    return {**ours, "state": {names[number]: slots for number, slots in state.items()}}


def _group_file(index: Path) -> str:
    name = json.loads(index.read_bytes()).get("metadata", {}).get("param_groups")
    # A name from outside must not lead out of the folder.
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointDamagedError(
            f"{index} does not say which file has the parameter groups, or names another folder's."
        )
    return name


def _read(file: Path, device: torch.device | str) -> Any:
    """Return what a file holds at its top, which need not be a mapping."""
    if not file.is_file():
        raise CheckpointDamagedError(f"{file} is missing; the checkpoint is not complete.")
    with TorchArchive(file) as archive:
        return ValueBuilder(archive, device).of(archive.root(), file.name)


def _rest(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Return what MMEngine's strategy keeps beside: the position of the run and of its schedules."""
    tree: dict[str, Any] = {}
    if (path / _META).is_file():
        with open_torch_file(path / _META, device) as contents:
            if "meta" in contents.root:
                tree["meta"] = mmengine_parts(contents)["meta"]()
    files = sorted((path / _SCHEDULERS).glob("scheduler_*.pth"), key=lambda file: int(file.stem.rpartition("_")[2]))
    if files:
        tree["param_schedulers"] = [_position(file, device) for file in files]
    return tree


def _position(file: Path, device: torch.device | str) -> dict[str, Any]:
    with open_torch_file(file, device) as contents:
        return {
            key: contents.read(contents.root[key], key) for key in ("_global_step", "last_step") if key in contents.root
        }
