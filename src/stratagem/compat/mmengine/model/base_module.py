"""Modules that initialize their weights as their ``init_cfg`` specifies."""

from __future__ import annotations

import copy
import logging
from abc import ABCMeta
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.dist import master_only
from stratagem.compat.mmengine.logging import MMLogger, print_log
from stratagem.compat.mmengine.model.weight_init import PretrainedInit, initialize, mean_of, update_init_info
from stratagem.compat.mmengine.model.wrappers.utils import is_model_wrapper

__all__ = ["BaseModule", "ModuleDict", "ModuleList", "Sequential"]


class BaseModule(nn.Module, metaclass=ABCMeta):
    """A module with a method ``init_weights``, which initializes it and its submodules.

    Args:
        init_cfg: the configuration of an initializer, or a list of them; see ``initialize``.

    Attributes:
        init_cfg: a copy of the argument.
        is_init: whether ``init_weights`` was called.
    """

    def __init__(self, init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self._is_init = False
        self.init_cfg = copy.deepcopy(init_cfg)

    @property
    def is_init(self) -> bool:
        """Whether ``init_weights`` was called."""
        return self._is_init

    @is_init.setter
    def is_init(self, value: bool) -> None:
        self._is_init = value

    def init_weights(self) -> None:
        """Initialize the module with ``init_cfg``, then each child that has ``init_weights``, then load pretrained weights.

        The outermost call logs what has initialized each parameter.
        """
        is_outermost = not hasattr(self, "_params_init_info")
        if is_outermost:
            self._start_recording()
        if self._is_init:
            print_log(
                f"init_weights of {type(self).__name__} was called again and has no effect.",
                logger="current",
                level=logging.WARNING,
            )
        else:
            self._initialize()
        if is_outermost:
            self._dump_init_info()
            for module in self.modules():
                del module._params_init_info

    def _start_recording(self) -> None:
        records: defaultdict[nn.Parameter, dict[str, Any]] = defaultdict(dict)
        unchanged = f"Not changed by init_weights of {type(self).__name__}"
        for parameter in self.parameters():
            records[parameter].update(init_info=unchanged, tmp_mean_value=mean_of(parameter))
        for module in self.modules():
            module._params_init_info = records  # type: ignore[assignment]

    def _initialize(self) -> None:
        configured = [self.init_cfg] if isinstance(self.init_cfg, dict) else list(self.init_cfg or ())
        for cfg in configured:
            require(isinstance(cfg, dict), f"init_cfg of {type(self).__name__} must contain dicts, got {cfg!r}.")
        pretrained = [cfg for cfg in configured if cfg["type"] in ("Pretrained", PretrainedInit)]
        if self.init_cfg:
            print_log(
                f"Initializing {type(self).__name__} with init_cfg={self.init_cfg}",
                logger="current",
                level=logging.DEBUG,
            )
            initialize(self, [cfg for cfg in configured if cfg not in pretrained])
        for child in self.children():
            module: Any = child
            if is_model_wrapper(module) and not hasattr(module, "init_weights"):
                module = module.module
            if hasattr(module, "init_weights") and not getattr(module, "is_init", False):
                module.init_weights()
                update_init_info(module, init_info=f"Initialized by init_weights of {type(module).__name__}")
        if pretrained:
            initialize(self, pretrained)
        self._is_init = True

    @master_only
    def _dump_init_info(self) -> None:
        """Write how each parameter was initialized to the log files, or to the console if there is no log file."""
        logger = MMLogger.get_current_instance()
        records: Any = self._params_init_info
        lines = [
            f"\n{name} - {parameter.shape}: \n{records[parameter]['init_info']} \n"
            for name, parameter in self.named_parameters()
        ]
        if not logger.write_to_files("".join(["Name of parameter - Initialization information\n", *lines])):
            for line in lines:
                logger.info(line)

    def __repr__(self) -> str:
        shown = super().__repr__()
        return f"{shown}\ninit_cfg={self.init_cfg}" if self.init_cfg else shown


class Sequential(BaseModule, nn.Sequential):
    """A ``torch.nn.Sequential`` with ``init_cfg``.

    Args:
        args: the modules.
        init_cfg: see ``BaseModule``.
    """

    def __init__(self, *args: Any, init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.Sequential.__init__(self, *args)


class ModuleList(BaseModule, nn.ModuleList):
    """A ``torch.nn.ModuleList`` with ``init_cfg``.

    Args:
        modules: the modules.
        init_cfg: see ``BaseModule``.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module] | None = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.ModuleList.__init__(self, modules)


class ModuleDict(BaseModule, nn.ModuleDict):
    """A ``torch.nn.ModuleDict`` with ``init_cfg``.

    Args:
        modules: a mapping from names to modules.
        init_cfg: see ``BaseModule``.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module] | None = None,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        BaseModule.__init__(self, init_cfg)
        nn.ModuleDict.__init__(self, modules)
