"""Load checkpoints from paths, URLs and model hubs."""

from __future__ import annotations

import os
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from stratagem.checkpoint.directory.directory import DirectoryFormat
from stratagem.checkpoint.directory.manifest import MANIFEST
from stratagem.checkpoint.foreign import (
    ENGINE_PART,
    ColossalAIFolder,
    HuggingFaceFormat,
    is_deepspeed_folder,
    read_deepspeed_folder,
)
from stratagem.checkpoint.formats.choice import format_for
from stratagem.checkpoint.formats.dcp import DcpDirectory, is_dcp_directory
from stratagem.checkpoint.remote.checkpoint_urls import fetch_remote
from stratagem.checkpoint.remote.download import fetch_http
from stratagem.checkpoint.remote.hubs import fetch_hugging_face, fetch_open_mmlab, fetch_timm, fetch_torchvision
from stratagem.checkpoint.tree.flatten import StateTree
from stratagem.distributed import SINGLE_PROCESS, RankGroup
from stratagem.errors import CheckpointError, CheckpointNotFoundError, ConfigValueError
from stratagem.storage import is_remote_scheme
from stratagem.utils import absolute, did_you_mean, is_url, mask_text

__all__ = ["CheckpointLoader", "cache_folder", "read_any"]

Fetcher = Callable[[str], Path]


@final
class CheckpointLoader:
    """Load checkpoints from a path or URL.

    Each scheme (``https://``, ``torchvision://``, ...) is handled by a function that returns the path of a local copy.
    """

    _fetchers: ClassVar[dict[str, Fetcher]] = {}

    @classmethod
    def register_scheme(cls, prefixes: str | Iterable[str], *, force: bool = False) -> Callable[[Fetcher], Fetcher]:
        """Register the decorated function for names that start with one of ``prefixes``.

        Raises:
            ConfigValueError: if a prefix is already registered and ``force`` is False.
        """

        def register(function: Fetcher) -> Fetcher:
            wanted = [prefixes] if isinstance(prefixes, str) else list(prefixes)
            taken = [prefix for prefix in wanted if prefix in cls._fetchers]
            if taken and not force:
                raise ConfigValueError(f"The scheme {taken[0]!r} is already registered. Pass force=True to replace it.")
            cls._fetchers.update(dict.fromkeys(wanted, function))
            return function

        return register

    @classmethod
    def is_read_only(cls, name: str) -> bool:
        """Return whether the name has a registered scheme, to which checkpoints cannot be saved."""
        return name.startswith(tuple(cls._fetchers))

    @classmethod
    def fetch(cls, filename: str | os.PathLike[str]) -> Path:
        """Return the local path of a checkpoint; download it to the cache if necessary.

        Raises:
            CheckpointNotFoundError: if the checkpoint does not exist.
            CheckpointError: if the scheme is unknown.
        """
        if not is_url(filename):
            path = absolute(filename)
            if not _exists(path):
                raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.{_similar_names(path)}")
            return path
        name = os.fspath(filename)
        for prefix in sorted(cls._fetchers, key=len, reverse=True):
            if name.startswith(prefix):
                return cls._fetchers[prefix](name)
        scheme = name.partition("://")[0] + "://"
        if is_remote_scheme(scheme.removesuffix("://")):
            return fetch_remote(name, cache_folder() / "checkpoints")
        raise CheckpointError(f"{mask_text(name)}: unknown scheme {scheme}. {did_you_mean(scheme, cls._fetchers)}")

    @classmethod
    def load_checkpoint(
        cls,
        filename: str | os.PathLike[str],
        map_location: torch.device | str = "cpu",
        *,
        rank_group: RankGroup = SINGLE_PROCESS,
        in_memory: Collection[str] = (),
    ) -> StateTree:
        """Load a checkpoint from a path or URL, without executing code from it. Collective over ``rank_group``.

        See :func:`read_any` for ``in_memory``.
        """
        path = rank_group.run_checked(lambda: cls.fetch(filename))
        return read_any(path, map_location, rank_group=rank_group, in_memory=in_memory)


def read_any(
    path: Path,
    map_location: torch.device | str = "cpu",
    *,
    parts: Collection[str] | None = None,
    rank_group: RankGroup = SINGLE_PROCESS,
    in_memory: Collection[str] = (),
) -> StateTree:
    """Load a local checkpoint in any supported format, without executing code from it. Collective over ``rank_group``.

    Args:
        path: the checkpoint.
        map_location: the device of the tensors.
        parts: the names of the parts to read; all by default.
        rank_group: the ranks that load the same checkpoint.
        in_memory: the parts of a checkpoint directory that each rank reads to memory instead of mapping them; see
            :meth:`~stratagem.checkpoint.DirectoryFormat.load`. Tensors of other formats are read as usual.

    Raises:
        CheckpointError: (or a subclass) if it cannot be read.
    """
    has_manifest = (path / MANIFEST).is_file()
    if is_dcp_directory(path):
        return rank_group.run_checked(lambda: _read_dcp(path, map_location, parts))
    if not has_manifest and is_deepspeed_folder(path):
        return rank_group.run_checked(lambda: _to_device(read_deepspeed_folder(path, parts=parts), map_location))
    if not has_manifest and HuggingFaceFormat.can_read(path):
        return rank_group.run_checked(lambda: HuggingFaceFormat().load(path, map_location=map_location, parts=parts))
    if not ColossalAIFolder.can_read(path):
        file_format = format_for(path)
        if isinstance(file_format, DirectoryFormat):
            return file_format.load(
                path, map_location=map_location, parts=parts, rank_group=rank_group, in_memory=in_memory
            )
        return file_format.load(path, map_location=map_location, parts=parts, rank_group=rank_group)
    wanted_parts = None if parts is None else {*parts, ENGINE_PART}
    stratagem_parts = (
        format_for(path).load(path, map_location=map_location, parts=wanted_parts, rank_group=rank_group)
        if has_manifest
        else None
    )
    return rank_group.run_checked(
        lambda: ColossalAIFolder().load(path, map_location=map_location, parts=parts, stratagem_parts=stratagem_parts)
    )


def _read_dcp(path: Path, device: torch.device | str, parts: Collection[str] | None) -> StateTree:
    def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    tree = DcpDirectory(path).load(parts=parts, allocate=allocate)
    # Most programs store the model state under "model".
    if "model" in tree and "state_dict" not in tree:
        tree["state_dict"] = tree.pop("model")
    return tree


def _to_device(node: Any, device: torch.device | str) -> Any:
    """Return a tree with its tensors moved to a device."""
    if isinstance(node, Tensor):
        return node.to(device)
    if isinstance(node, dict):
        return {key: _to_device(value, device) for key, value in node.items()}
    return [_to_device(value, device) for value in node] if isinstance(node, list) else node


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # The path is too long or invalid.
        return False


def _similar_names(path: Path) -> str:
    """Return a hint that lists similar names in the folder of a missing path."""
    entries = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return f" {did_you_mean(path.name, entries)}" if entries else f" The folder {path.parent} does not exist either."


def cache_folder() -> Path:
    """Return the folder for downloads: ``$STRATAGEM_CACHE``, or ``stratagem`` in the user's cache folder."""
    own = os.environ.get("STRATAGEM_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return absolute(own) if own else absolute(shared) / "stratagem"


@CheckpointLoader.register_scheme("file://")
def _fetch_file(url: str) -> Path:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in {"", "localhost"}:
        raise CheckpointError(
            f"{mask_text(url)} names the host {parts.hostname!r}, but file:// URLs can only refer to this machine. Write "
            "file:///absolute/path, or just the path."
        )
    return CheckpointLoader.fetch(Path(urllib.request.url2pathname(parts.path)))


def _into_cache(fetch: Callable[[str, Path], Path]) -> Fetcher:
    return lambda url: fetch(url, cache_folder() / "checkpoints")


CheckpointLoader.register_scheme(("http://", "https://"))(_into_cache(fetch_http))
CheckpointLoader.register_scheme("hf://")(_into_cache(fetch_hugging_face))
CheckpointLoader.register_scheme("timm://")(_into_cache(fetch_timm))
CheckpointLoader.register_scheme("torchvision://")(_into_cache(fetch_torchvision))
CheckpointLoader.register_scheme(("open-mmlab://", "openmmlab://"))(_into_cache(fetch_open_mmlab))
