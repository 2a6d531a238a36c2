"""Where the visualizer stores images, scalars and configs."""

from __future__ import annotations

import functools
import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from stratagem.compat.mmengine.checks import not_supported, require
from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.fileio import dump
from stratagem.compat.mmengine.hooks.logger_hook import SUFFIX_TYPE
from stratagem.compat.mmengine.registry import VISBACKENDS
from stratagem.compat.mmengine.utils import scandir
from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.utils import import_module

__all__ = [
    "AimVisBackend",
    "BaseVisBackend",
    "ClearMLVisBackend",
    "DVCLiveVisBackend",
    "LocalVisBackend",
    "MLflowVisBackend",
    "NeptuneVisBackend",
    "TensorboardVisBackend",
    "WandbVisBackend",
    "force_init_env",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])
# The limit of MLflow for one request, and for the value of a parameter.
_MOST_PARAMS = 100
_LONGEST_PARAM = 6000


def force_init_env(old_func: _Function) -> _Function:
    """Call ``_init_env`` before the first call of a method, as a decorator.

    Raises:
        AttributeError: if the object has no such method.
    """

    @functools.wraps(old_func)
    def wrapper(obj: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(obj, "_init_env"):
            raise AttributeError(
                f"{type(obj).__name__} has no method _init_env. Define it, or subclass BaseVisBackend."
            )
        if not getattr(obj, "_env_initialized", False):
            obj._init_env()
            obj._env_initialized = True
        return old_func(obj, *args, **kwargs)

    return cast("_Function", wrapper)


class BaseVisBackend(metaclass=ABCMeta):
    """Base class of the stores of a visualizer. Nothing is created before the first value is stored.

    Args:
        save_dir: the folder for files.
    """

    def __init__(self, save_dir: str) -> None:
        self._save_dir = save_dir
        self._env_initialized = False

    @property
    @abstractmethod
    def experiment(self) -> Any:
        """The object of the package that stores the values, for what this interface lacks."""

    @abstractmethod
    def _init_env(self) -> Any:
        """Open the store."""

    def add_config(self, config: Config, **kwargs: Any) -> None:  # noqa: B027 -- optional
        """Store the config."""

    def add_graph(self, model: nn.Module, data_batch: Any, **kwargs: Any) -> None:  # noqa: B027 -- optional
        """Store the structure of the model."""

    def add_image(self, name: str, image: npt.NDArray[Any], step: int = 0, **kwargs: Any) -> None:  # noqa: B027 -- optional
        """Store an RGB image."""

    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:  # noqa: B027 -- optional
        """Store a number."""

    def add_scalars(  # noqa: B027 -- optional
        self, scalar_dict: dict[str, Any], step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        """Store numbers by name; stores that write files also write them to ``file_path``."""

    def close(self) -> None:  # noqa: B027 -- optional
        """Close the store."""


@VISBACKENDS.register_module()
class LocalVisBackend(BaseVisBackend):
    """Store images as PNG files, and scalars as lines of JSON.

    Args:
        save_dir: the folder.
        img_save_dir: the folder in it for images.
        config_save_file: the file in it for the config, with the suffix ``.py``.
        scalar_save_file: the file in it for scalars, with the suffix ``.json``.

    Raises:
        AssertionError: if a suffix is different.
    """

    def __init__(
        self,
        save_dir: str,
        img_save_dir: str = "vis_image",
        config_save_file: str = "config.py",
        scalar_save_file: str = "scalars.json",
    ) -> None:
        require(config_save_file.endswith(".py"), f"config_save_file must end with .py, got {config_save_file!r}.")
        require(scalar_save_file.endswith(".json"), f"scalar_save_file must end with .json, got {scalar_save_file!r}.")
        super().__init__(save_dir)
        self._img_save_dir = img_save_dir
        self._config_save_file = config_save_file
        self._scalar_save_file = scalar_save_file

    def _init_env(self) -> None:
        Path(self._save_dir).mkdir(parents=True, exist_ok=True)
        self._img_save_dir = str(Path(self._save_dir, self._img_save_dir))
        self._config_save_file = str(Path(self._save_dir, self._config_save_file))
        self._scalar_save_file = str(Path(self._save_dir, self._scalar_save_file))

    @property
    @force_init_env
    def experiment(self) -> LocalVisBackend:
        return self

    @force_init_env
    def add_config(self, config: Config, **kwargs: Any) -> None:
        require(isinstance(config, Config), f"config must be a Config, got {type(config).__name__}.")
        config.dump(self._config_save_file)

    @force_init_env
    def add_image(self, name: str, image: npt.NDArray[Any], step: int = 0, **kwargs: Any) -> None:
        require(image.dtype == np.uint8, f"The image must have the type uint8, got {image.dtype}.")
        path = Path(self._img_save_dir, f"{name}_{step}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        import_module("PIL.Image", extra="plot").fromarray(image).save(path)

    @force_init_env
    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        number = value.item() if isinstance(value, torch.Tensor) else value
        self._dump({name: number, "step": step}, self._scalar_save_file, "json")

    @force_init_env
    def add_scalars(
        self, scalar_dict: dict[str, Any], step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        require(isinstance(scalar_dict, dict), f"scalar_dict must be a dict, got {type(scalar_dict).__name__}.")
        record = {**scalar_dict, "step": scalar_dict.get("step", step)}
        if file_path is not None:
            require(file_path.endswith(".json"), f"file_path must end with .json, got {file_path!r}.")
            path = str(Path(self._save_dir, file_path))
            require(
                path != self._scalar_save_file,
                f"{file_path!r} is scalar_save_file, which receives the values already. Use another file.",
            )
            self._dump(record, path, "json")
        self._dump(record, self._scalar_save_file, "json")

    def _dump(self, value_dict: dict[str, Any], file_path: str, file_format: str) -> None:
        with Path(file_path).open("a+", encoding="utf-8") as file:
            dump(value_dict, file, file_format=file_format)
            file.write("\n")


@VISBACKENDS.register_module()
class TensorboardVisBackend(BaseVisBackend):
    """Store values in event files for TensorBoard. Needs ``pip install stratagem[tensorboard]``.

    Args:
        save_dir: the folder.
    """

    def _init_env(self) -> None:
        Path(self._save_dir).mkdir(parents=True, exist_ok=True)
        writer = import_module("torch.utils.tensorboard", extra="tensorboard").SummaryWriter
        self._tensorboard: Any = writer(self._save_dir)

    @property
    @force_init_env
    def experiment(self) -> Any:
        return self._tensorboard

    @force_init_env
    def add_config(self, config: Config, **kwargs: Any) -> None:
        self._tensorboard.add_text("config", config.pretty_text)

    @force_init_env
    def add_image(self, name: str, image: npt.NDArray[Any], step: int = 0, **kwargs: Any) -> None:
        self._tensorboard.add_image(name, image, step, dataformats="HWC")

    @force_init_env
    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        if isinstance(value, int | float | torch.Tensor | np.ndarray | np.number):
            self._tensorboard.add_scalar(name, value, step)
        else:
            warnings.warn(
                f"TensorBoard stores numbers, arrays and tensors, but {name!r} is of type {type(value).__name__}. Skip it.",
                stacklevel=2,
            )

    @force_init_env
    def add_scalars(
        self, scalar_dict: dict[str, Any], step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        _check_scalars(scalar_dict)
        for name, value in scalar_dict.items():
            self.add_scalar(name, value, step)
        # The values of a killed run must be in the file.
        self._tensorboard.flush()

    def close(self) -> None:
        if hasattr(self, "_tensorboard"):
            self._tensorboard.close()


@VISBACKENDS.register_module()
class WandbVisBackend(BaseVisBackend):
    """Store values with Weights & Biases. Needs ``pip install stratagem[wandb]``.

    Args:
        save_dir: the folder for the files of W&B.
        init_kwargs: arguments of ``wandb.init``.
        define_metric_cfg: the summaries of metrics by name, or a list of arguments of ``define_metric``.
        commit: whether each call stores a row; otherwise it adds to the current row.
        log_code_name: the name of the artifact with the code.
        watch_kwargs: arguments of ``wandb.watch``.
    """

    def __init__(
        self,
        save_dir: str,
        init_kwargs: dict[str, Any] | None = None,
        define_metric_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        commit: bool | None = True,
        log_code_name: str | None = None,
        watch_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(save_dir)
        if define_metric_cfg is not None and not isinstance(define_metric_cfg, dict | list):
            raise ConfigValueError(f"define_metric_cfg should be dict or list, got {define_metric_cfg!r}.")
        self._init_kwargs = init_kwargs
        self._define_metric_cfg = define_metric_cfg
        self._commit = commit
        self._log_code_name = log_code_name
        self._watch_kwargs = watch_kwargs or {}

    def _init_env(self) -> None:
        Path(self._save_dir).mkdir(parents=True, exist_ok=True)
        self._init_kwargs = {"dir": self._save_dir, **(self._init_kwargs or {})}
        self._wandb: Any = import_module("wandb", extra="wandb")
        self._wandb.init(**self._init_kwargs)
        if isinstance(self._define_metric_cfg, dict):
            for metric, summary in self._define_metric_cfg.items():
                self._wandb.define_metric(metric, summary=summary)
        for options in self._define_metric_cfg or () if not isinstance(self._define_metric_cfg, dict) else ():
            self._wandb.define_metric(**options)

    @property
    @force_init_env
    def experiment(self) -> Any:
        return self._wandb

    @force_init_env
    def add_config(self, config: Config, **kwargs: Any) -> None:
        allow = (self._init_kwargs or {}).get("allow_val_change", False)
        self._wandb.config.update(config.to_dict(), allow_val_change=allow)
        self._wandb.run.log_code(name=self._log_code_name)

    @force_init_env
    def add_graph(self, model: nn.Module, data_batch: Any, **kwargs: Any) -> None:
        self._wandb.watch(model, **self._watch_kwargs)

    @force_init_env
    def add_image(self, name: str, image: npt.NDArray[Any], step: int = 0, **kwargs: Any) -> None:
        self._wandb.log({name: self._wandb.Image(image)}, commit=self._commit)

    @force_init_env
    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        self._wandb.log({name: value}, commit=self._commit)

    @force_init_env
    def add_scalars(
        self, scalar_dict: dict[str, Any], step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        self._wandb.log(scalar_dict, commit=self._commit)

    def close(self) -> None:
        if hasattr(self, "_wandb"):
            self._wandb.finish()


@VISBACKENDS.register_module()
class MLflowVisBackend(BaseVisBackend):
    """Store values with MLflow. Needs ``pip install stratagem[mlflow]``.

    Args:
        save_dir: the folder for the runs if there is no server.
        exp_name: the name of the experiment.
        run_name: the name of the run.
        tags: tags of the run.
        params: parameters of the run.
        tracking_uri: the server or database; by default the SQLite file ``mlflow.db`` in ``save_dir``.
        artifact_suffix: the ends of the names of the files in the work directory that are stored at the end.
        tracked_config_keys: the sections of the config that become parameters; all by default.
        artifact_location: where the files of the experiment are stored.
    """

    def __init__(
        self,
        save_dir: str,
        exp_name: str | None = None,
        run_name: str | None = None,
        tags: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
        tracking_uri: str | None = None,
        artifact_suffix: SUFFIX_TYPE = (".json", ".log", ".py", "yaml"),
        tracked_config_keys: Any = None,
        artifact_location: str | None = None,
    ) -> None:
        super().__init__(save_dir)
        self._exp_name = exp_name
        self._run_name = run_name
        self._tags = tags
        self._params = params
        self._tracking_uri = tracking_uri
        self._artifact_suffix = artifact_suffix
        self._tracked_config_keys = tracked_config_keys
        self._artifact_location = artifact_location
        self.cfg: Config | None = None

    def _init_env(self) -> None:
        Path(self._save_dir).mkdir(parents=True, exist_ok=True)
        self._mlflow: Any = import_module("mlflow", extra="mlflow")
        self._mlflow.set_tracking_uri(
            self._tracking_uri or f"sqlite:///{Path(self._save_dir).absolute() / 'mlflow.db'}"
        )
        self._exp_name = self._exp_name or "Default"
        if self._mlflow.get_experiment_by_name(self._exp_name) is None:
            self._mlflow.create_experiment(self._exp_name, artifact_location=self._artifact_location)
        self._mlflow.set_experiment(self._exp_name)
        if self._run_name is not None:
            self._mlflow.set_tag("mlflow.runName", self._run_name)
        if self._tags is not None:
            self._mlflow.set_tags(self._tags)
        if self._params is not None:
            self._log_params(self._params)

    @property
    @force_init_env
    def experiment(self) -> Any:
        return self._mlflow

    @force_init_env
    def add_config(self, config: Config, **kwargs: Any) -> None:
        self.cfg = config
        sections = config.to_dict()
        for name in self._tracked_config_keys or ():
            if name not in sections:
                raise ConfigKeyError(f"The config has no section {name!r} for tracked_config_keys. Remove it there.")
        tracked = sections if self._tracked_config_keys is None else self._tracked_config_keys
        self._log_params(self._flatten({name: sections[name] for name in tracked}))
        self._mlflow.log_text(config.pretty_text, "config.py")

    def _log_params(self, params: Mapping[str, Any]) -> None:
        """Store parameters, in as many requests as MLflow needs."""
        items = [(name, str(value)[:_LONGEST_PARAM]) for name, value in params.items()]
        for begin in range(0, len(items), _MOST_PARAMS):
            self._mlflow.log_params(dict(items[begin : begin + _MOST_PARAMS]))

    @force_init_env
    def add_image(self, name: str, image: npt.NDArray[Any], step: int = 0, **kwargs: Any) -> None:
        self._mlflow.log_image(image, name if Path(name).suffix else f"{name}_{step}.png")

    @force_init_env
    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        self._mlflow.log_metric(name, value, step)

    @force_init_env
    def add_scalars(
        self, scalar_dict: dict[str, Any], step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        _check_scalars(scalar_dict)
        self._mlflow.log_metrics(scalar_dict, step)

    def close(self) -> None:
        if not hasattr(self, "_mlflow"):
            return
        work_dir = None if self.cfg is None else self.cfg.get("work_dir")
        if work_dir is not None:
            self._log_artifacts(work_dir)
        self._mlflow.end_run()

    def _log_artifacts(self, work_dir: str) -> None:
        suffixes = self._artifact_suffix if isinstance(self._artifact_suffix, str) else tuple(self._artifact_suffix)
        for name in scandir(work_dir, suffixes, True):
            folder = str(Path(name).parent)
            self._mlflow.log_artifact(str(Path(work_dir, name)), None if folder == "." else folder)

    def _flatten(self, d: Mapping[str, Any], parent_key: str = "", sep: str = ".") -> dict[str, Any]:
        """Return the values of a nested dict by their dotted names. Lists without dicts are values."""
        return dict(_flat(d, parent_key, sep))


def _flat(value: Any, name: str, sep: str) -> Iterator[tuple[str, Any]]:
    items: Any = None
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from _flat(item, f"{name}{sep}{key}" if name else str(key), sep)


def _check_scalars(scalar_dict: Any) -> None:
    require(isinstance(scalar_dict, dict), f"scalar_dict must be a dict, got {type(scalar_dict).__name__}.")
    require("step" not in scalar_dict, "scalar_dict contains 'step'. Pass it as the argument `step`.")


_INSTEAD = "LocalVisBackend, TensorboardVisBackend, WandbVisBackend or MLflowVisBackend, or subclass BaseVisBackend"
AimVisBackend = not_supported("AimVisBackend", _INSTEAD)
ClearMLVisBackend = not_supported("ClearMLVisBackend", _INSTEAD)
DVCLiveVisBackend = not_supported("DVCLiveVisBackend", _INSTEAD)
NeptuneVisBackend = not_supported("NeptuneVisBackend", _INSTEAD)
for _unsupported in (AimVisBackend, ClearMLVisBackend, DVCLiveVisBackend, NeptuneVisBackend):
    VISBACKENDS.register_module(module=_unsupported)
