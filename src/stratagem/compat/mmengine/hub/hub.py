"""Load configurations and models of installed packages by names such as ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.config.utils import (
    _get_cfg_metainfo,
    _get_external_cfg_base_path,
    _get_package_and_cfg_path,
)
from stratagem.compat.mmengine.registry import MODELS, DefaultScope
from stratagem.compat.mmengine.runner import load_checkpoint
from stratagem.compat.mmengine.utils import get_installed_path, install_package
from stratagem.errors import ConfigKeyError, ConfigValueError

__all__ = ["get_config", "get_model"]


def get_config(cfg_path: str, pretrained: bool = False) -> Config:
    """Load a configuration of an installed package.

    Args:
        cfg_path: ``"package::folder/file.py"``.
        pretrained: whether to set ``model_path`` to the URL of the trained weights in the model index of the package.

    Raises:
        ConfigValueError: if ``cfg_path`` has another form.
        ConfigFileError: if the package does not have the file.
        ConfigKeyError: if ``pretrained`` is set and the model index has no weights for the configuration.
    """
    package, path = _get_package_and_cfg_path(cfg_path)
    install_package(package)
    folder = get_installed_path(package)
    try:
        entry = _get_cfg_metainfo(folder, path)
    except ConfigValueError:
        # Files that other configurations are based on are not in the index.
        return Config.fromfile(_get_external_cfg_base_path(folder, path))
    cfg = Config.fromfile(Path(folder) / ".mim" / entry["Config"])
    if pretrained:
        if "Weights" not in entry:
            raise ConfigKeyError(f"The model index of {folder} has no weights for {path}. Load the model without them.")
        cfg.model_path = entry["Weights"]
    return cfg


def get_model(cfg_path: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build the model of a configuration of an installed package.

    Args:
        cfg_path: ``"package::folder/file.py"``.
        pretrained: whether to load the trained weights in the model index of the package.
        **kwargs: default arguments of the model.

    Raises:
        ConfigError: as in :func:`get_config`.
    """
    scope = cfg_path.partition("::")[0]
    with DefaultScope.overwrite_default_scope(scope):
        cfg = get_config(cfg_path, pretrained)
        if "data_preprocessor" in cfg:
            cfg.model.data_preprocessor = cfg.data_preprocessor
        importlib.import_module(f"{scope}.utils").register_all_modules()
        model: nn.Module = MODELS.build(cfg.model, default_args=kwargs)
        if pretrained:
            load_checkpoint(model, cfg.model_path)
            vars(model)["_is_init"] = True  # The Runner does not initialize the weights again.
    return model
