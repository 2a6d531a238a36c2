"""Convert a checkpoint to another format, one tensor at a time."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, final, get_args

import torch
from torch import Tensor

from stratagem.checkpoint.api import get_model_state, save_checkpoint
from stratagem.checkpoint.directory.box_io import create_file, write_boxes
from stratagem.checkpoint.directory.tensor_layout import DTYPES, FileLayout, TensorSpec
from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.formats.choice import SINGLE_FILES
from stratagem.checkpoint.formats.dcp import DcpDirectory, is_dcp_directory, save_dcp
from stratagem.checkpoint.remote.sources import CheckpointLoader
from stratagem.checkpoint.tree.boxes import TensorBox
from stratagem.checkpoint.tree.evaluated import evaluated_weights
from stratagem.checkpoint.tree.flatten import StateTree, flatten_tree
from stratagem.errors import CheckpointError
from stratagem.storage import atomic_directory, atomic_file, write_bytes
from stratagem.utils import absolute, did_you_mean, mask_text

__all__ = [
    "TARGETS",
    "Target",
    "convert_checkpoint",
    "default_format",
    "open_checkpoint",
    "weights_of",
    "write_weights",
]

Target = Literal["stratagem", "pth", "safetensors", "huggingface", "dcp"]
TARGETS: tuple[Target, ...] = get_args(Target)
_WEIGHTS_ONLY: Final = ("safetensors", "huggingface")
# The keys of a checkpoint's meta that may hold the text of a configuration.
_CONFIGURATIONS = ("cfg", "config")
# The maximum size of a weights file in the Hugging Face layout.
_HF_FILE_BYTES = 5_000_000_000


def default_format(path: Path) -> Target:
    """Return the format that a target's file extension selects; without an extension, the directory format."""
    if path.suffix == ".safetensors":
        return "safetensors"
    return "pth" if path.suffix in SINGLE_FILES else "stratagem"


def convert_checkpoint(
    source: str | Path, target: Path, target_format: str | None = None, *, raw: bool = False
) -> list[str]:
    """Convert ``source``, a checkpoint in any supported format, to ``target``; return the names of the omitted parts.

    Only one tensor is in memory at a time.

    Args:
        source: the checkpoint to read, a path or a URL.
        target: the path to write; it must not exist.
        target_format: one of :data:`TARGETS`; by default selected by the name of ``target``. ``"safetensors"`` and
            ``"huggingface"`` contain only the weights.
        raw: whether to write the trained weights to a format that contains only weights, even if the run averaged its
            weights. By default, the averaged weights are written, which the run used for evaluation. The other formats
            always contain both.

    Raises:
        CheckpointError: if ``target`` exists, the format is unknown, or it does not support a value.
    """
    chosen = target_format or default_format(target)
    if chosen not in TARGETS:
        raise CheckpointError(f"Unknown checkpoint format {chosen!r}. {did_you_mean(chosen, TARGETS)}")
    path = absolute(target)
    if path.exists():
        raise CheckpointError(f"{path} already exists. Choose a different target, or remove it first.")
    if raw and chosen not in _WEIGHTS_ONLY:
        raise CheckpointError(
            f"--raw applies to {' and '.join(_WEIGHTS_ONLY)}, which contain only the weights. The format {chosen!r} contains the "
            "trained weights (state_dict) and the averaged weights (average). Omit --raw."
        )
    with open_checkpoint(source) as tree:
        if chosen in _WEIGHTS_ONLY:
            weights = weights_of(tree, source)
            write_weights(weights if raw else evaluated_weights(tree, weights), path, folder=chosen == "huggingface")
            return [part for part in tree if part != "state_dict"]
        kept = _without_secrets(tree)
        if chosen == "dcp":
            save_dcp(kept, path)
        else:
            save_checkpoint(kept, path)
        return []


def weights_of(tree: StateTree, source: str | Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by name, for a safetensors file.

    Raises:
        CheckpointError: if safetensors cannot store one of them.
    """
    state = get_model_state(tree, source)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype not in DTYPES:
            raise CheckpointError(
                f"state_dict/{name} has dtype {value.dtype}, which safetensors cannot store. Use --to stratagem, pth or dcp."
            )
    weights, _ = flatten_tree(state, where="state_dict")
    return weights


def _without_secrets(tree: StateTree) -> StateTree:
    """Mask secrets in the stored configuration, since older versions and other tools do not mask them."""
    meta = tree.get("meta")
    if not isinstance(meta, Mapping):
        return tree
    texts = {key: mask_text(meta[key]) for key in _CONFIGURATIONS if isinstance(meta.get(key), str)}
    return {**tree, "meta": {**meta, **texts}} if texts else tree


@contextmanager
def open_checkpoint(source: str | Path) -> Iterator[StateTree]:
    """Yield the state tree of a checkpoint in any format, with file-backed tensors if the format supports it."""
    if isinstance(source, Path) and is_dcp_directory(source):
        with tempfile.TemporaryDirectory(prefix="stratagem-") as folder:
            yield DcpDirectory(source).load(allocate=_FileAllocator(Path(folder)))
    else:
        yield CheckpointLoader.load_checkpoint(source)


@final
class _FileAllocator:
    """Allocate tensors backed by files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        numel = math.prod(shape)
        if numel == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        self._count += 1
        file = self._folder / str(self._count)
        return torch.from_file(str(file), shared=True, size=numel, dtype=dtype).reshape(tuple(shape))


def write_weights(weights: Mapping[str, Tensor], path: Path, *, folder: bool) -> None:
    """Write only weights: one safetensors file, or a folder in Hugging Face layout.

    Raises:
        CheckpointError: if the file system reports an error.
    """
    try:
        if not folder:
            with atomic_file(path) as temporary:
                _write_file(temporary, weights)
            return
        with atomic_directory(path) as temporary:
            files = _file_names(_divide_into_files(weights))
            for name, tensors in files.items():
                _write_file(temporary / name, tensors)
            if len(files) > 1:
                total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in weights.values())
                index = {
                    "metadata": {"total_size": total},
                    "weight_map": {key: name for name, tensors in files.items() for key in tensors},
                }
                write_bytes(temporary / "model.safetensors.index.json", json.dumps(index, indent=1).encode())
    except (OSError, ValueError) as error:
        raise save_error(path, error) from error


def _write_file(file: Path, tensors: Mapping[str, Tensor]) -> None:
    layout = FileLayout.plan({key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()})
    create_file(file, layout)
    write_boxes(file, layout, ((key, TensorBox.whole(tensor.shape), tensor) for key, tensor in tensors.items()))


def _divide_into_files(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split the weights, in order, into files that do not exceed the size limit."""
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in weights.items():
        nbytes = tensor.numel() * tensor.dtype.itemsize
        if files[-1] and size + nbytes > _HF_FILE_BYTES:
            files.append({})
            size = 0
        files[-1][key] = tensor
        size += nbytes
    return files


def _file_names(files: Sequence[dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": part for number, part in enumerate(files, 1)}
