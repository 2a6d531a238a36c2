"""Read weights in Hugging Face formats: ``.safetensors`` files, shards with an index, and folders of them.

A folder may also be a checkpoint of the Trainer; then ``optimizer.pt`` is the state of a torch optimizer, keyed by index.
The Trainer's position, recorded in optimizer steps and fractions of epochs, is not converted.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stratagem.checkpoint.foreign.torch_file import read_torch_file
from stratagem.checkpoint.restricted_unpickler import UnsupportedObjectError
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError

__all__ = ["HuggingFaceFormat", "SAFETENSORS", "WEIGHT_FILES", "shards_of"]

logger = logging.getLogger(__name__)

SAFETENSORS = ".safetensors"
INDEX = ".index.json"
# The file names, in the order in which the libraries search for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "open_clip_model.safetensors",
)
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(safetensors|bin)")
_OPTIMIZER = "optimizer.pt"


@final
class HuggingFaceFormat:
    """Read weights in Hugging Face formats. Use ``convert_checkpoint`` to write them."""

    @staticmethod
    def can_read(path: Path) -> bool:
        """Return whether ``path`` contains weights in these formats, based on its name or the files in the folder."""
        if path.is_dir():
            return any((path / name).is_file() for name in WEIGHT_FILES)
        return path.name.endswith((SAFETENSORS, INDEX))

    def load(
        self, path: Path, *, map_location: torch.device | str = "cpu", parts: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Read the weights as ``state_dict`` and, if the folder has it, the optimizer state.

        Raises:
            CheckpointNotFoundError: if the file does not exist, or the folder has no weights.
            CheckpointError: if the file has unexpected contents.
            CheckpointDamagedError: if a file cannot be read, or a shard is missing.
        """
        folder = path if path.is_dir() else path.parent
        tree: dict[str, Any] = {}
        if parts is None or "state_dict" in parts:
            tree["state_dict"] = _weights(_weight_file(path), map_location)
        optimizer = folder / _OPTIMIZER
        if path.is_dir() and optimizer.is_file() and (parts is None or "optimizer" in parts):
            try:
                # The file is the optimizer's state dict itself, with "state" and "param_groups".
                tree["optimizer"] = read_torch_file(optimizer, map_location)
            except UnsupportedObjectError as error:
                if parts is not None:
                    raise
                logger.info("Skipped in the checkpoint: 'optimizer'. %s", error)
        return tree


def shards_of(index: Path) -> dict[str, list[str]]:
    """Return the files that an index lists, each with its keys.

    Raises:
        CheckpointDamagedError: if the file is not such an index.
    """
    try:
        content = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointDamagedError(f"{index} cannot be read: {error}") from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointDamagedError(f"{index} is not an index of weights: it has no weight_map.")
    shards: dict[str, list[str]] = {}
    for key, name in names.items():
        # Reject file names that refer to a path outside the folder.
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointDamagedError(f"{index} refers to {name!r}, which is not a valid shard in the same folder.")
        shards.setdefault(name, []).append(key)
    return shards


def _weight_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.")
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise CheckpointNotFoundError(f"{path} does not contain any of the weight files {', '.join(WEIGHT_FILES)}.")


def _weights(file: Path, device: torch.device | str) -> Mapping[str, Tensor]:
    if not file.name.endswith(INDEX):
        return _file_weights(file, device)
    state: dict[str, Tensor] = {}
    for name, keys in shards_of(file).items():
        shard = file.with_name(name)
        if not shard.is_file():
            raise CheckpointDamagedError(f"{shard} is missing, but {file.name} refers to it.")
        weights = _file_weights(shard, device)
        missing = [key for key in keys if key not in weights]
        if missing:
            raise CheckpointDamagedError(f"{shard} does not contain {missing[:5]}, which are listed in {file.name}.")
        state.update((key, weights[key]) for key in keys)
    return state


def _file_weights(file: Path, device: torch.device | str) -> Mapping[str, Tensor]:
    if file.suffix != SAFETENSORS:
        weights = read_torch_file(file, device)
        if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise CheckpointError(f"{file} contains values other than tensors.")
        return weights
    try:
        with safe_open(file, framework="pt") as opened:
            weights = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 -- not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointDamagedError(f"{file} cannot be read: {error}") from error
    # Move the tensors after reading, since safetensors supports only some devices, and an unsupported device must not
    # be reported as damage.
    return {key: tensor.to(device) for key, tensor in weights.items()}
