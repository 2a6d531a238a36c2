"""The configurations that OpenMMLab's packages contain, and their values on MMEngine.

Run as a program, it loads the files named on its standard input with MMEngine and prints their digests::

    python tests/openmmlab/config_corpus.py < PATHS > DIGESTS.json
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType
from typing import Any

INSTALLED = {"mmpretrain": "mmpretrain", "mmdet": "mmdetection", "mmseg": "mmsegmentation"}
# The maintained forks have the same modules as the installed packages, so their source distributions are only unpacked.
FORKS = ("onedl-mmpretrain==1.3.6", "onedl-mmdetection==3.5.1", "onedl-mmsegmentation==1.4.2")

Digests = Mapping[str, Mapping[str, str] | str]
"""By file: the digest of each top-level value, or the error."""


def installed_files() -> dict[str, list[Path]]:
    """Return the configurations of the installed packages, by package."""
    folders = {name: importlib.util.find_spec(module) for module, name in INSTALLED.items()}
    return {
        name: _files(Path(spec.submodule_search_locations[0]))
        for name, spec in folders.items()
        if spec is not None and spec.submodule_search_locations
    }


def fork_files(folder: Path) -> dict[str, list[Path]]:
    """Return the configurations of the forks, by package, after downloading them into ``folder`` if it does not exist."""
    if not folder.exists():
        source = folder.with_suffix(".download")
        options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(source)]
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", *options, *FORKS], check=True)
        for archive in source.glob("*.tar.gz"):
            with tarfile.open(archive) as tar:
                tar.extractall(source / "unpacked", filter="data")
        (source / "unpacked").rename(folder)
    return {path.name.rpartition("-")[0]: _files(*path.glob("mm*")) for path in sorted(folder.iterdir())}


def _files(package: Path) -> list[Path]:
    return sorted((package / ".mim" / "configs").rglob("*.py"))


def digests(paths: Sequence[Path], load: Callable[[Path], Mapping[str, Any]]) -> Digests:
    """Load each file and return the digests of its values."""
    found: dict[str, Mapping[str, str] | str] = {}
    for path in paths:
        try:
            found[str(path)] = {key: digest(value) for key, value in load(path).items()}
        except Exception as error:  # noqa: BLE001 -- the comparison reports it
            found[str(path)] = f"{type(error).__name__}: {error}"
    return found


def digests_on_mmengine(paths: Sequence[Path]) -> Digests:
    """Load the files with MMEngine, in as many processes as there are cores, and return the digests."""
    count = min(os.cpu_count() or 1, 4, len(paths))
    with ThreadPoolExecutor(count) as pool:
        parts = pool.map(_digests_on_mmengine, (paths[index::count] for index in range(count)))
        return {path: digest for part in parts for path, digest in part.items()}


def _digests_on_mmengine(paths: Sequence[Path]) -> Digests:
    text = "\n".join(map(str, paths))
    done = subprocess.run([sys.executable, __file__], input=text, stdout=subprocess.PIPE, text=True, check=True)
    found: Digests = json.loads(done.stdout)
    return found


def digest(value: Any) -> str:
    """Return a digest of a value and of the types in it."""
    return hashlib.sha256(_text(value).encode()).hexdigest()[:16]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{_text(key)}:{_text(item)}" for key, item in value.items())) + "}"
    if type(value) in (list, tuple):
        return f"{type(value).__name__}({','.join(map(_text, value))})"
    if isinstance(value, FunctionType | type):
        return f"<{value.__qualname__}>"
    return str.__repr__(value) if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    Config = importlib.import_module("mmengine.config").Config
    files = [Path(line) for line in sys.stdin.read().splitlines()]
    json.dump(digests(files, lambda path: Config.fromfile(path, import_custom_modules=False).to_dict()), sys.stdout)
