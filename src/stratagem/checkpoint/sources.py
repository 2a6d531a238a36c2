"""The places a checkpoint can come from: paths, URLs and the names of model collections."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from stratagem.checkpoint.formats import format_for
from stratagem.checkpoint.open_mmlab import OPEN_MMLAB_URLS
from stratagem.checkpoint.tree import StateTree
from stratagem.errors import CheckpointDamagedError, CheckpointError, CheckpointNotFoundError, ConfigValueError
from stratagem.storage import atomic_file
from stratagem.utils import absolute, did_you_mean, import_module, is_url, mask_text

__all__ = ["CheckpointLoader", "cache_folder"]

Fetcher = Callable[[str], Path]

_TIMEOUT_S = 60.0
_CHUNK_BYTES = 1 << 20
# As in resnet18-f37072fd.pth: the first digits of the file's SHA-256.
_DIGEST_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[A-Za-z]+$")


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
            for prefix in [prefixes] if isinstance(prefixes, str) else prefixes:
                if prefix in cls._fetchers and not force:
                    raise ConfigValueError(
                        f"The scheme {prefix!r} is registered already; pass force=True to replace it."
                    )
                cls._fetchers[prefix] = function
            return function

        return register

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
                raise CheckpointNotFoundError(f"{path}: there is no such checkpoint.{_beside(path)}")
            return path
        name = os.fspath(filename)
        for prefix in sorted(cls._fetchers, key=len, reverse=True):
            if name.startswith(prefix):
                return cls._fetchers[prefix](name)
        scheme = name.partition("://")[0] + "://"
        raise CheckpointError(
            f"{mask_text(name)}: no way to read {scheme} is known. {did_you_mean(scheme, cls._fetchers)}"
        )

    @classmethod
    def load_checkpoint(cls, filename: str | os.PathLike[str], map_location: torch.device | str = "cpu") -> StateTree:
        """Read a checkpoint from a path, a URL or a named collection; never runs code from it."""
        path = cls.fetch(filename)
        return format_for(path).load(path, map_location=map_location)


def _beside(path: Path) -> str:
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
    path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    return CheckpointLoader.fetch(path)


@CheckpointLoader.register_scheme(("http://", "https://"))
def _fetch_http(url: str) -> Path:
    """Download once. ``#sha256=<hex>`` at the URL's end, or digits in the file's name, are checked."""
    address, _, fragment = url.partition("#")
    name = Path(urllib.parse.urlsplit(address).path).name
    in_name = _DIGEST_IN_NAME.search(name)
    expected = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else in_name[1] if in_name else ""
    kept = (
        cache_folder()
        / "checkpoints"
        / f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name or 'checkpoint.pth'}"
    )
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        _download(address, kept, expected)
    return kept


def _download(address: str, target: Path, expected: str) -> None:
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer, atomic_file(target) as aside:  # noqa: S310 -- http(s) only
            with aside.open("wb") as file:
                while chunk := answer.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
            if not digest.hexdigest().startswith(expected.lower()):
                raise CheckpointDamagedError(
                    f"{mask_text(address)}: its SHA-256 is {digest.hexdigest()}, but {expected}... is due. "
                    "Nothing was kept; the file was changed or the transfer was cut."
                )
    except urllib.error.HTTPError as error:
        raise CheckpointNotFoundError(
            f"{mask_text(address)}: the server answered {error.code} {error.reason}."
        ) from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise CheckpointError(f"{mask_text(address)}: the download failed: {error}.") from error


@CheckpointLoader.register_scheme("torchvision://")
def _fetch_torchvision(url: str) -> Path:
    """``torchvision://resnet18`` or ``torchvision://resnet18.imagenet1k_v1``: the default or a named set of weights."""
    name, _, weights = url.removeprefix("torchvision://").partition(".")
    models: Any = import_module("torchvision.models")
    if name not in models.list_models():
        raise CheckpointNotFoundError(f"torchvision has no model {name!r}. {did_you_mean(name, models.list_models())}")
    choices = models.get_model_weights(name)
    by_name = {choice.name.casefold(): choice for choice in choices}
    if weights and weights.casefold() not in by_name:
        raise CheckpointNotFoundError(
            f"torchvision's {name} has no weights {weights!r}. {did_you_mean(weights, by_name)}"
        )
    chosen = by_name[weights.casefold()] if weights else choices.DEFAULT
    return _fetch_http(chosen.url)


@CheckpointLoader.register_scheme(("open-mmlab://", "openmmlab://"))
def _fetch_open_mmlab(url: str) -> Path:
    """``open-mmlab://resnet50_v1c``: weights that configurations of that family name."""
    name = url.partition("://")[2]
    if name not in OPEN_MMLAB_URLS:
        raise CheckpointNotFoundError(f"open-mmlab has no weights {name!r}. {did_you_mean(name, OPEN_MMLAB_URLS)}")
    return _fetch_http(OPEN_MMLAB_URLS[name])
