"""Collections of weights by name: ``torchvision://``, ``timm://``, ``open-mmlab://`` and ``hf://``.

All of them end in downloads over https by :func:`~stratagem.checkpoint.remote.download.fetch_http`, so that one place checks
digests and sizes and keeps the copies. The Hub is asked by its own URLs and not through its library, for that reason.
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
    """Fetch ``hf://organisation/repository[@revision][/file]``; without a file, the folder with the usual weights.

    A revision that is a commit is always the same file; ``main``, the default, is what it was at the first download.
    ``HF_TOKEN`` opens private repositories, ``HF_ENDPOINT`` names a mirror. With a slash in it, a revision is written
    with ``%2F``.

    Raises:
        CheckpointNotFoundError: if there is no such file, or none of the usual ones.
        CheckpointError: if the name is none, or the download fails.
    """
    match = _HUB.fullmatch(url)
    if match is None or ".." in (match["file"] or "").split("/"):
        raise CheckpointError(f"{mask_text(url)}: write hf://<organisation>/<repository>[@<revision>][/<file>].")
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
        f"{mask_text(url)} has none of {', '.join(WEIGHT_FILES)}, or there is no such repository. Name a file: {url}/<file>."
    )


def fetch_timm(url: str, cache: Path) -> Path:
    """Fetch ``timm://resnet18`` or ``timm://resnet18.a1_in1k``: the default or a named set of weights.

    Raises:
        MissingDependencyError: if timm is not installed; it knows where its weights are.
        CheckpointNotFoundError: if it has no such model, or no weights for it.
    """
    name = url.removeprefix("timm://")
    models: Any = import_module("timm.models", extra="timm")
    known = models.list_pretrained()
    if name not in known and name not in {each.partition(".")[0] for each in known}:
        raise CheckpointNotFoundError(f"timm has no weights {name!r}. {did_you_mean(name, known)}")
    described = models.get_pretrained_cfg(name)
    if described.hf_hub_id:
        file = f"/{described.hf_hub_filename}" if described.hf_hub_filename else ""
        return fetch_hugging_face(f"hf://{described.hf_hub_id}{file}", cache)
    return fetch_http(described.url, cache)


def fetch_torchvision(url: str, cache: Path) -> Path:
    """Fetch ``torchvision://resnet18`` or ``torchvision://resnet18.imagenet1k_v1``: the default or named weights.

    Raises:
        MissingDependencyError: if torchvision is not installed.
        CheckpointNotFoundError: if it has no such model or weights.
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
    """Fetch ``open-mmlab://resnet50_v1c``: weights that configurations of that family name.

    Raises:
        CheckpointNotFoundError: if there are no weights of that name.
    """
    name = url.partition("://")[2]
    if name not in OPEN_MMLAB_URLS:
        raise CheckpointNotFoundError(f"open-mmlab has no weights {name!r}. {did_you_mean(name, OPEN_MMLAB_URLS)}")
    return fetch_http(OPEN_MMLAB_URLS[name], cache)


def _fetch_file(root: str, file: str, folder: Path, digest: str) -> Path:
    """Fetch one file of a repository, and with an index the files that it names."""
    address = f"{root}/{urllib.parse.quote(file)}" + (f"#{digest}" if digest else "")
    token = os.environ.get("HF_TOKEN", "")
    path = fetch_http(address, folder / Path(file).parent, name=Path(file).name, token=token)
    if file.endswith(_INDEX):
        for shard in shards_of(path):
            inside = str(Path(file).with_name(shard))
            fetch_http(f"{root}/{urllib.parse.quote(inside)}", path.parent, name=shard, token=token)
    return path
