"""The places a checkpoint can come from: paths, URLs and the names of model collections."""

from __future__ import annotations

import os
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

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
from stratagem.distributed import ALONE, Team
from stratagem.errors import CheckpointError, CheckpointNotFoundError, ConfigValueError
from stratagem.storage import is_remote_scheme
from stratagem.utils import absolute, did_you_mean, is_url, mask_text

__all__ = ["CheckpointLoader", "cache_folder", "read_any"]

Fetcher = Callable[[str], Path]


@final
class CheckpointLoader:
    """Reads checkpoints from wherever their name says.

    A scheme (``https://``, ``torchvision://`` ...) is served by a function that returns the path of a local copy.
    """

    _fetchers: ClassVar[dict[str, Fetcher]] = {}

    @classmethod
    def register_scheme(cls, prefixes: str | Iterable[str], *, force: bool = False) -> Callable[[Fetcher], Fetcher]:
        """Have the decorated function serve the names that begin with one of ``prefixes``.

        Raises:
            ConfigValueError: if a prefix is taken and ``force`` is not set.
        """

        def register(function: Fetcher) -> Fetcher:
            wanted = [prefixes] if isinstance(prefixes, str) else list(prefixes)
            taken = [prefix for prefix in wanted if prefix in cls._fetchers]
            if taken and not force:
                raise ConfigValueError(f"The scheme {taken[0]!r} is registered already; pass force=True to replace it.")
            cls._fetchers.update(dict.fromkeys(wanted, function))
            return function

        return register

    @classmethod
    def only_reads(cls, name: str) -> bool:
        """Tell whether a registered scheme serves the name: such places give checkpoints and take none."""
        return name.startswith(tuple(cls._fetchers))

    @classmethod
    def fetch(cls, filename: str | os.PathLike[str]) -> Path:
        """Return the local path of a checkpoint; what lies elsewhere is copied into the cache first.

        Raises:
            CheckpointNotFoundError: if there is nothing under that name.
            CheckpointError: if its scheme is not known.
        """
        if not is_url(filename):
            path = absolute(filename)
            if not path.exists():
                raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.{_similar_names(path)}")
            return path
        name = os.fspath(filename)
        for prefix in sorted(cls._fetchers, key=len, reverse=True):
            if name.startswith(prefix):
                return cls._fetchers[prefix](name)
        scheme = name.partition("://")[0] + "://"
        if is_remote_scheme(scheme.removesuffix("://")):
            return fetch_remote(name, cache_folder() / "checkpoints")
        raise CheckpointError(
            f"{mask_text(name)}: no way to read {scheme} is known. {did_you_mean(scheme, cls._fetchers)}"
        )

    @classmethod
    def load_checkpoint(
        cls, filename: str | os.PathLike[str], map_location: torch.device | str = "cpu", *, team: Team = ALONE
    ) -> StateTree:
        """Read a checkpoint from a path, a URL or a named collection; never runs code from it.

        Collective over ``team``.
        """
        return read_any(team.own(lambda: cls.fetch(filename)), map_location, team=team)


def read_any(
    path: Path,
    map_location: torch.device | str = "cpu",
    *,
    parts: Collection[str] | None = None,
    team: Team = ALONE,
) -> StateTree:
    """Read a local checkpoint in whatever form it is: one of ours, or of another program; never runs code from it.

    Collective over ``team``.

    Raises:
        CheckpointError: in one of its kinds, if it cannot be read.
    """
    is_ours = (path / MANIFEST).is_file()
    if is_dcp_directory(path):
        return team.own(lambda: _read_dcp(path, map_location, parts))
    if not is_ours and is_deepspeed_folder(path):
        return team.own(lambda: _moved(read_deepspeed_folder(path, parts=parts), map_location))
    if not is_ours and HuggingFaceFormat.reads(path):
        return team.own(lambda: HuggingFaceFormat().load(path, map_location=map_location, parts=parts))
    if not ColossalAIFolder.reads(path):
        return format_for(path).load(path, map_location=map_location, parts=parts, team=team)
    own_parts = None if parts is None else {*parts, ENGINE_PART}
    ours = format_for(path).load(path, map_location=map_location, parts=own_parts, team=team) if is_ours else None
    return team.own(lambda: ColossalAIFolder().load(path, map_location=map_location, parts=parts, ours=ours))


def _read_dcp(path: Path, device: torch.device | str, parts: Collection[str] | None) -> StateTree:
    def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    tree = DcpDirectory(path).load(parts=parts, allocate=allocate)
    # What most programs call the model's part.
    if "model" in tree and "state_dict" not in tree:
        tree["state_dict"] = tree.pop("model")
    return tree


def _moved(node: Any, device: torch.device | str) -> Any:
    """Return a tree with its tensors on a device."""
    if isinstance(node, Tensor):
        return node.to(device)
    if isinstance(node, dict):
        return {key: _moved(value, device) for key, value in node.items()}
    return [_moved(value, device) for value in node] if isinstance(node, list) else node


def _similar_names(path: Path) -> str:
    """Name the entries beside a missing path that may have been meant."""
    entries = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return f" {did_you_mean(path.name, entries)}" if entries else f" There is no folder {path.parent} either."


def cache_folder() -> Path:
    """Return where downloads are kept: ``$STRATAGEM_CACHE``, or ``stratagem`` in the user's cache folder."""
    own = os.environ.get("STRATAGEM_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return absolute(own) if own else absolute(shared) / "stratagem"


@CheckpointLoader.register_scheme("file://")
def _fetch_file(url: str) -> Path:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in {"", "localhost"}:
        raise CheckpointError(
            f"{mask_text(url)}: {parts.hostname!r} stands where a host does, and only this one has files. Write "
            "file:///absolute/path, or the path alone."
        )
    return CheckpointLoader.fetch(Path(urllib.request.url2pathname(parts.path)))


def _into_cache(fetch: Callable[[str, Path], Path]) -> Fetcher:
    return lambda url: fetch(url, cache_folder() / "checkpoints")


CheckpointLoader.register_scheme(("http://", "https://"))(_into_cache(fetch_http))
CheckpointLoader.register_scheme("hf://")(_into_cache(fetch_hugging_face))
CheckpointLoader.register_scheme("timm://")(_into_cache(fetch_timm))
CheckpointLoader.register_scheme("torchvision://")(_into_cache(fetch_torchvision))
CheckpointLoader.register_scheme(("open-mmlab://", "openmmlab://"))(_into_cache(fetch_open_mmlab))
