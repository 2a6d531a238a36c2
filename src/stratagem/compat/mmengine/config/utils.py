"""Find the configurations that an installed package contains, and their metadata."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

from stratagem.config.reading.data_languages import language_of
from stratagem.errors import ConfigFileNotFoundError, ConfigParsingError, ConfigValueError

__all__ = ["MODULE2PACKAGE", "ConfigParsingError"]

# Module -> the name of its distribution, for the packages of OpenMMLab.
MODULE2PACKAGE = {
    "mmaction": "mmaction2",
    "mmcls": "mmcls",
    "mmdet": "mmdet",
    "mmdet3d": "mmdet3d",
    "mmedit": "mmedit",
    "mmengine": "mmengine",
    "mmocr": "mmocr",
    "mmpose": "mmpose",
    "mmpretrain": "mmpretrain",
    "mmrazor": "mmrazor",
    "mmrotate": "mmrotate",
    "mmseg": "mmsegmentation",
    "mmselfsup": "mmselfsup",
    "mmtrack": "mmtrack",
    "mmyolo": "mmyolo",
}
_EXTERNAL = re.compile(r"(\w+)::(\w[^:]*/[^:]+)")


def _get_package_and_cfg_path(cfg_path: str) -> tuple[str, str]:
    """Return the distribution and the path in ``"mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"``.

    Raises:
        ConfigValueError: if the text has another form.
        AssertionError: if the package is not one of OpenMMLab's.
    """
    match = _EXTERNAL.fullmatch(cfg_path)
    if match is None:
        raise ConfigValueError(f"Expected package::folder/file, got {cfg_path!r}.")
    if match[1] not in MODULE2PACKAGE:
        raise AssertionError(f"{match[1]!r} is not a package of OpenMMLab. Known: {', '.join(MODULE2PACKAGE)}.")
    return MODULE2PACKAGE[match[1]], match[2]


def _get_cfg_metainfo(package_path: str, cfg_path: str) -> dict[str, Any]:
    """Return the entry of a configuration in the model index of a package.

    Raises:
        ConfigValueError: if the index does not have it.
    """
    entries = _model_index(package_path)
    if cfg_path not in entries:
        raise ConfigValueError(f"The model index of {package_path} has no configuration {cfg_path!r}.")
    return entries[cfg_path]


@functools.lru_cache(maxsize=16)
def _model_index(package_path: str) -> dict[str, dict[str, Any]]:
    folder = Path(package_path) / ".mim"
    entries: dict[str, dict[str, Any]] = {}
    for path in _read_yaml(folder / "model-index.yml")["Import"]:
        for model in _read_yaml(folder / path)["Models"]:
            # A configuration with several weights has several entries, of which the first one counts.
            entries.setdefault(str(model.get("Config", "")).partition("/")[2], model)
    return entries


def _read_yaml(path: Path) -> Any:
    return language_of(".yaml").parse(path.read_text(encoding="utf-8"), str(path))


def _get_external_cfg_path(package_path: str, cfg_file: str) -> str:
    """Return the path of a configuration in the model index of a package.

    Raises:
        ConfigValueError: if the index does not have it.
        ConfigFileNotFoundError: if the file does not exist.
    """
    return _existing(Path(package_path) / _get_cfg_metainfo(package_path, cfg_file)["Config"])


def _get_external_cfg_base_path(package_path: str, cfg_name: str) -> str:
    """Return the path of a configuration in a package.

    Raises:
        ConfigFileNotFoundError: if the file does not exist.
    """
    return _existing(Path(package_path) / ".mim" / "configs" / cfg_name)


def _existing(path: Path) -> str:
    if not path.is_file():
        raise ConfigFileNotFoundError(f"{path} does not exist.")
    return str(path)


def _is_builtin_module(module_name: str) -> bool:
    """Return whether a module belongs to the standard library or to ``mmengine.config``."""
    return module_name.startswith("mmengine.config") or module_name.partition(".")[0] in sys.stdlib_module_names
