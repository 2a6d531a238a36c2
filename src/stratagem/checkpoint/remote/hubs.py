"""Fetch weights by name: ``torchvision://``, ``timm://``, ``open-mmlab://`` and ``hf://``.

All downloads use :func:`~stratagem.checkpoint.remote.download.fetch_http`, which checks digests and sizes and caches
the copies. Therefore, the Hugging Face Hub is accessed by URL instead of through its library.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.parse
from pathlib import Path
from typing import Any

from stratagem.checkpoint.foreign import WEIGHT_FILES, shards_of
from stratagem.checkpoint.remote.download import fetch_http
from stratagem.checkpoint.remote.open_mmlab import OPEN_MMLAB_URLS
from stratagem.errors import CheckpointError, CheckpointNotFoundError
from stratagem.utils import did_you_mean, import_module, mask_text
from stratagem.utils.imports import without_working_directory

__all__ = ["fetch_hugging_face", "fetch_open_mmlab", "fetch_timm", "fetch_torchvision"]

_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/#]+))?(/(?P<file>[^#]+))?(#(?P<digest>.*))?")
_INDEX = ".index.json"


def fetch_hugging_face(url: str, cache: Path) -> Path:
    """Fetch ``hf://organization/repository[@revision][/file]``; without a file, a folder with the weights.

    If the revision is a commit, the file never changes; for ``main``, the default, the first download is reused.
    ``HF_TOKEN`` gives access to private repositories, and ``HF_ENDPOINT`` selects a mirror. Write a slash in a revision as
    ``%2F``.

    Raises:
        CheckpointNotFoundError: if the file does not exist, or the repository has none of the usual weight files.
        CheckpointError: if the URL is malformed, or the download fails.
    """
    match = _HUB.fullmatch(url)
    if match is None or ".." in (match["file"] or "").split("/"):
        raise CheckpointError(f"{mask_text(url)}: expected hf://<organization>/<repository>[@<revision>][/<file>].")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    revision = urllib.parse.quote(urllib.parse.unquote(match["revision"] or "main"), safe="")
    root = f"{endpoint}/{match['repo']}/resolve/{revision}"
    label = match["repo"].replace("/", "--")
    folder = cache / f"{hashlib.sha256(root.encode()).hexdigest()[:12]}-{label}"
    if match["file"]:
        return _fetch_file(root, match["file"], folder, match["digest"] or "")
    for name in WEIGHT_FILES:
        try:
            _fetch_file(root, name, folder, "")
        except CheckpointNotFoundError:
            continue
        return folder
    raise CheckpointNotFoundError(
        f"{mask_text(url)} does not exist or does not contain any of {', '.join(WEIGHT_FILES)}. Specify a file: "
        f"{url}/<file>."
    )


def fetch_timm(url: str, cache: Path) -> Path:
    """Fetch ``timm://resnet18`` or ``timm://resnet18.a1_in1k``: the default or a named set of weights.

    Raises:
        MissingDependencyError: if timm, which contains the URLs, is not installed.
        CheckpointNotFoundError: if timm does not have the model or weights for it.
    """
    name = url.removeprefix("timm://")
    models: Any = import_module("timm.models", extra="timm")
    known = models.list_pretrained()
    if name not in known and name not in {each.partition(".")[0] for each in known}:
        raise CheckpointNotFoundError(f"timm has no weights {name!r}. {did_you_mean(name, known)}")
    pretrained = models.get_pretrained_cfg(name)
    if pretrained.hf_hub_id:
        file = f"/{pretrained.hf_hub_filename}" if pretrained.hf_hub_filename else ""
        return fetch_hugging_face(f"hf://{pretrained.hf_hub_id}{file}", cache)
    return fetch_http(pretrained.url, cache)


def fetch_torchvision(url: str, cache: Path) -> Path:
    """Fetch ``torchvision://resnet18`` or ``torchvision://resnet18.imagenet1k_v1``: the default or named weights.

    Raises:
        MissingDependencyError: if torchvision is not installed.
        CheckpointNotFoundError: if torchvision does not have the model or the weights.
    """
    name, _, weights = url.removeprefix("torchvision://").partition(".")
    with without_working_directory():
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
    return fetch_http(str(chosen.url), cache)


def fetch_open_mmlab(url: str, cache: Path) -> Path:
    """Fetch ``open-mmlab://resnet50_v1c``: weights that OpenMMLab configurations refer to by name.

    Raises:
        CheckpointNotFoundError: if no weights with this name exist.
    """
    name = url.partition("://")[2]
    if name not in OPEN_MMLAB_URLS:
        raise CheckpointNotFoundError(f"open-mmlab has no weights {name!r}. {did_you_mean(name, OPEN_MMLAB_URLS)}")
    return fetch_http(OPEN_MMLAB_URLS[name], cache)


def _fetch_file(root: str, file: str, folder: Path, digest: str) -> Path:
    """Fetch a file from a repository; if it is an index, also fetch the files listed in it."""
    address = f"{root}/{urllib.parse.quote(file)}" + (f"#{digest}" if digest else "")
    token = os.environ.get("HF_TOKEN", "")
    path = fetch_http(address, folder / Path(file).parent, name=Path(file).name, token=token)
    if file.endswith(_INDEX):
        for shard in shards_of(path):
            inside = str(Path(file).with_name(shard))
            fetch_http(f"{root}/{urllib.parse.quote(inside)}", path.parent, name=shard, token=token)
    return path
