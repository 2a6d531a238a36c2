"""Load and save weights and checkpoints.

Files are read without executing code from them: parts that consist of tensors and plain values are read, and other parts are
skipped and logged.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from stratagem.checkpoint import CheckpointLoader as EngineLoader
from stratagem.checkpoint import find_latest_checkpoint as find_complete_checkpoint
from stratagem.checkpoint.foreign import open_torch_file
from stratagem.checkpoint.remote.download import fetch_http
from stratagem.checkpoint.remote.open_mmlab import OPEN_MMLAB_URLS
from stratagem.checkpoint.remote.sources import cache_folder
from stratagem.checkpoint.restricted_unpickler import UnsupportedObjectError
from stratagem.compat.mmengine.dist import barrier, get_dist_info
from stratagem.compat.mmengine.fileio import FileClient, get_file_backend
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.runner.model_zoo import DEPRECATED_NAMES, MMCLS_URLS
from stratagem.compat.mmengine.runner.state_dict import get_state_dict, load_state_dict, weights_to_cpu
from stratagem.errors import CheckpointError, CheckpointNotFoundError
from stratagem.storage import atomic_file
from stratagem.utils import absolute

__all__ = [
    "CheckpointLoader",
    "find_latest_checkpoint",
    "get_deprecated_model_names",
    "get_external_models",
    "get_mmcls_models",
    "get_state_dict",
    "get_torchvision_models",
    "load_checkpoint",
    "load_state_dict",
    "save_checkpoint",
    "weights_to_cpu",
]

Loader = Callable[..., Any]
AnyLoader = TypeVar("AnyLoader", bound=Loader)
_REVISE_KEYS = ((r"^module\.", ""),)


def get_torchvision_models() -> dict[str, str]:
    """Return the URLs of torchvision's weights, by the names of models and of models with weights (``resnet50.imagenet1k_v1``).

    Raises:
        ImportError: if torchvision is not installed.
    """
    models = import_module("torchvision.models")
    urls: dict[str, str] = {}
    for name in models.list_models(module=models):
        choices = list(models.get_model_weights(name))
        if choices:
            urls[name] = choices[0].url
            urls[f"{name}.default"] = models.get_model_weights(name).DEFAULT.url
        urls.update({f"{name}.{choice.name.lower()}": choice.url for choice in choices})
    return urls


def get_external_models() -> dict[str, str]:
    """Return the URLs of the weights that ``open-mmlab://`` refers to."""
    return dict(OPEN_MMLAB_URLS)


def get_mmcls_models() -> dict[str, str]:
    """Return the URLs of the weights that ``mmcls://`` refers to."""
    return dict(MMCLS_URLS)


def get_deprecated_model_names() -> dict[str, str]:
    """Return the old names of weights of ``open-mmlab://``, and the names that replace them."""
    return dict(DEPRECATED_NAMES)


class CheckpointLoader:
    """Loads a checkpoint with the function that is registered for the beginning of its name."""

    _schemes: ClassVar[dict[str, Loader]] = {}

    @classmethod
    def register_scheme(
        cls, prefixes: str | Sequence[str], loader: Loader | None = None, force: bool = False
    ) -> Callable[[AnyLoader], AnyLoader]:
        """Register a function for names that begin with a prefix; as a method, or as a decorator without ``loader``.

        Args:
            prefixes: regular expressions for the beginning of names; longer ones have precedence.
            loader: a function ``(filename, map_location) -> checkpoint``.
            force: whether to replace a registered function.

        Raises:
            KeyError: if a prefix is already registered.
        """

        def register(function: AnyLoader) -> AnyLoader:
            for prefix in [prefixes] if isinstance(prefixes, str) else prefixes:
                if prefix in cls._schemes and not force:
                    raise KeyError(f"A loader for {prefix!r} is already registered. Pass force=True to replace it.")
                cls._schemes[prefix] = function
            cls._schemes = dict(sorted(cls._schemes.items(), reverse=True))
            return function

        if loader is not None:
            register(loader)
        return register

    @classmethod
    def _get_checkpoint_loader(cls, path: str) -> Loader:
        """Return the function for a name; :func:`load_from_local` is registered for all names."""
        return next(loader for prefix, loader in cls._schemes.items() if re.match(prefix, path))

    @classmethod
    def load_checkpoint(
        cls, filename: str | os.PathLike[str], map_location: Any = None, logger: Any = "current"
    ) -> Any:
        """Load a checkpoint.

        Args:
            filename: the path or the name with a scheme.
            map_location: the device of the tensors; by default the CPU.
            logger: the logger, its name, or None to print.
        """
        name = os.fspath(filename)
        loader = cls._get_checkpoint_loader(name)
        print_log(f"Loads checkpoint by {loader.__name__.removeprefix('load_from_')} backend from path: {name}", logger)
        return loader(name, map_location)


def _device(map_location: Any) -> torch.device | str:
    return map_location if isinstance(map_location, str | torch.device) else "cpu"


def _read(path: Path, map_location: Any) -> Any:
    """Return the contents of a file without entries that contain objects.

    Raises:
        CheckpointError: if the weights contain objects.
    """
    checkpoint: dict[Any, Any] = {}
    with open_torch_file(path, _device(map_location)) as opened:
        holds_weights = "state_dict" in opened.entries
        for key, node in opened.entries.items():
            try:
                checkpoint[key] = opened.read(node, str(key))
            except UnsupportedObjectError as error:
                if key == "state_dict" or not holds_weights:
                    raise CheckpointError(
                        f"{path}: {error} No code from the file was executed. If you trust the file, save its weights again in "
                        "an environment where these classes are installed."
                    ) from error
                print_log(f"Skipped in {path}: {key!r}. {error}", logger="current", level=logging.INFO)
        return checkpoint if holds_weights else OrderedDict(checkpoint)


def _safe_torch_load(file: str | os.PathLike[str], map_location: Any = None) -> Any:
    """Return the contents of a file without executing code from it; the maintained fork of MMEngine has this function, too."""
    return _read(absolute(file), map_location)


@CheckpointLoader.register_scheme(prefixes="")
def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Load a file, or a checkpoint folder of Stratagem.

    Raises:
        FileNotFoundError: if it does not exist.
    """
    path = absolute(os.path.expanduser(filename))  # noqa: PTH111 -- absolute() accepts strings
    if path.is_dir():
        return EngineLoader.load_checkpoint(path, _device(map_location))
    if not path.is_file():
        raise CheckpointNotFoundError(f"{filename} does not exist.")
    return _read(path, map_location)


@CheckpointLoader.register_scheme(prefixes=("http://", "https://"))
def load_from_http(
    filename: str, map_location: Any = None, model_dir: str | None = None, progress: bool = False
) -> Any:
    """Download a file, unless it was downloaded before, and load it. Collective: rank 0 of each run downloads first.

    Args:
        filename: the URL.
        map_location: the device of the tensors; by default the CPU.
        model_dir: the folder for downloads; by default ``$STRATAGEM_CACHE`` or a folder in the user's cache.
        progress: whether to log the download.
    """
    folder = Path(model_dir) if model_dir else cache_folder() / "checkpoints"
    rank, size = get_dist_info()
    if progress and rank == 0:
        print_log(f"Downloading {filename} to {folder}", logger="current")
    if rank == 0:
        path = fetch_http(filename, folder)
    if size > 1:
        barrier()
        if rank > 0:
            path = fetch_http(filename, folder)
    return _read(path, map_location)


@CheckpointLoader.register_scheme(prefixes="pavi://")
def load_from_pavi(filename: str, map_location: Any = None) -> Any:
    """Refuse: the model cloud Pavi is not supported.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(f"{filename}: pavi:// is not supported. Download the file and use its path.")


@CheckpointLoader.register_scheme(prefixes=(r"(\S+\:)?s3://", r"(\S+\:)?petrel://"))
def load_from_ceph(filename: str, map_location: Any = None, backend: str = "petrel") -> Any:
    """Load a file from an object store.

    Args:
        filename: the URL.
        map_location: the device of the tensors; by default the CPU.
        backend: the name of the file backend, if it is not that of the URL.
    """
    if filename.startswith("s3://"):
        return EngineLoader.load_checkpoint(filename, _device(map_location))
    content = get_file_backend(filename, backend_args={"backend": backend}).get(filename)
    return torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)


@CheckpointLoader.register_scheme(prefixes=("modelzoo://", "torchvision://"))
def load_from_torchvision(filename: str, map_location: Any = None) -> Any:
    """Load weights of torchvision by the name of the model.

    Raises:
        CheckpointNotFoundError: if torchvision does not have the model.
    """
    name = filename.partition("://")[2]
    urls = get_torchvision_models()
    if name not in urls and name.lower() not in urls:
        raise CheckpointNotFoundError(f"torchvision has no weights {name!r}.")
    return load_from_http(urls.get(name) or urls[name.lower()], map_location=map_location)


@CheckpointLoader.register_scheme(prefixes=("open-mmlab://", "openmmlab://"))
def load_from_openmmlab(filename: str, map_location: Any = None) -> Any:
    """Load weights that OpenMMLab has published.

    Raises:
        CheckpointNotFoundError: if there are none with this name.
    """
    scheme, _, name = filename.partition("://")
    deprecated = get_deprecated_model_names()
    if name in deprecated:
        print_log(
            f"{scheme}://{name} is deprecated. Use {scheme}://{deprecated[name]}.",
            logger="current",
            level=logging.WARNING,
        )
        name = deprecated[name]
    urls = get_external_models()
    if name not in urls:
        raise CheckpointNotFoundError(f"{scheme}:// has no weights {name!r}.")
    return load_from_http(urls[name], map_location=map_location)


@CheckpointLoader.register_scheme(prefixes="mmcls://")
def load_from_mmcls(filename: str, map_location: Any = None) -> Any:
    """Load the backbone of a classifier that OpenMMLab has published.

    Raises:
        CheckpointNotFoundError: if there is none with this name.
    """
    name = filename.removeprefix("mmcls://")
    urls = get_mmcls_models()
    if name not in urls:
        raise CheckpointNotFoundError(f"mmcls:// has no weights {name!r}.")
    return _process_mmcls_checkpoint(load_from_http(urls[name], map_location=map_location))


def _process_mmcls_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    weights = checkpoint.get("state_dict", checkpoint)
    prefix = "backbone."
    kept = OrderedDict((key.removeprefix(prefix), value) for key, value in weights.items() if key.startswith(prefix))
    return {"state_dict": kept}


def _load_checkpoint(filename: str | os.PathLike[str], map_location: Any = None, logger: Any = None) -> Any:
    """Load a checkpoint; see :meth:`CheckpointLoader.load_checkpoint`."""
    return CheckpointLoader.load_checkpoint(filename, map_location, logger)


def _load_checkpoint_with_prefix(prefix: str, filename: str, map_location: Any = None) -> dict[str, Any]:
    """Return the weights of a submodule, without its prefix.

    Raises:
        AssertionError: if no weight has the prefix.
    """
    checkpoint = _load_checkpoint(filename, map_location=map_location)
    weights = checkpoint.get("state_dict", checkpoint)
    below = prefix if prefix.endswith(".") else f"{prefix}."
    found = {key.removeprefix(below): value for key, value in weights.items() if key.startswith(below)}
    if not found:
        raise AssertionError(f"{below} is not in the pretrained model {filename}.")
    return found


def _load_checkpoint_to_model(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    strict: bool = False,
    logger: Any = None,
    revise_keys: Sequence[tuple[str, str]] = _REVISE_KEYS,
) -> Any:
    """Load the weights of a checkpoint into a model, and return the checkpoint."""
    weights = checkpoint.get("state_dict", checkpoint)
    versions = getattr(weights, "_metadata", OrderedDict())
    revised: Any = OrderedDict(weights)
    for pattern, replacement in revise_keys:
        revised = OrderedDict((re.sub(pattern, replacement, key), value) for key, value in revised.items())
    revised._metadata = versions
    load_state_dict(model, revised, strict, logger)
    return checkpoint


def load_checkpoint(
    model: nn.Module,
    filename: str | os.PathLike[str],
    map_location: Any = None,
    strict: bool = False,
    logger: Any = None,
    revise_keys: Sequence[tuple[str, str]] = _REVISE_KEYS,
) -> Any:
    """Load the weights of a checkpoint into a model, and return the checkpoint.

    Args:
        model: the model.
        filename: the path, or the name with a scheme.
        map_location: the device of the tensors; by default the CPU.
        strict: whether a difference between the keys is an error.
        logger: the logger for differences, its name, or None to print.
        revise_keys: pairs (regular expression, replacement) that are applied to the names in the checkpoint.

    Raises:
        RuntimeError: if the file contains no weights, or, with ``strict``, if they do not match.
    """
    checkpoint = _load_checkpoint(filename, map_location, logger)
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{os.fspath(filename)} contains no weights.")
    return _load_checkpoint_to_model(model, checkpoint, strict, logger, revise_keys)


def save_checkpoint(
    checkpoint: Mapping[str, Any],
    filename: str,
    file_client_args: Mapping[str, Any] | None = None,
    backend_args: Mapping[str, Any] | None = None,
) -> None:
    """Save a dict with ``torch.save``. A local file is replaced atomically.

    Args:
        checkpoint: the dict.
        filename: the path or URL.
        file_client_args: deprecated: the arguments of a ``FileClient``.
        backend_args: the arguments of the file backend.

    Raises:
        ValueError: if both kinds of arguments are given.
        NotImplementedError: if the name begins with ``pavi://``.
    """
    if file_client_args is not None:
        print_log("file_client_args is deprecated. Use backend_args.", logger="current", level=logging.WARNING)
        if backend_args is not None:
            raise ValueError("file_client_args and backend_args cannot both be set.")
    if filename.startswith("pavi://"):
        raise NotImplementedError(f"{filename}: pavi:// is not supported. Save to a path.")
    if file_client_args is None and backend_args is None and "://" not in filename:
        path = absolute(filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            torch.save(checkpoint, temporary)
        return
    backend = (
        get_file_backend(filename, backend_args=backend_args)
        if file_client_args is None
        else FileClient.infer_client(file_client_args, filename)
    )
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    backend.put(buffer.getvalue(), filename)


def find_latest_checkpoint(path: str) -> str | None:
    """Return the newest complete checkpoint in a folder, or else the contents of ``last_checkpoint``; None without both."""
    found = find_complete_checkpoint(path)
    if found is not None:
        return os.fspath(found)
    pointer = Path(path) / "last_checkpoint"
    if not pointer.is_file():
        print_log("Did not find last_checkpoint to be resumed.")
        return None
    return pointer.read_text(encoding="utf-8").strip()
