"""The base class of inferencers, which predict with a model from a configuration and weights."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from rich.progress import track
from torch import nn

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.config import Config, ConfigDict
from stratagem.compat.mmengine.config.utils import MODULE2PACKAGE
from stratagem.compat.mmengine.dataset import pseudo_collate
from stratagem.compat.mmengine.device import get_device
from stratagem.compat.mmengine.fileio import get_file_backend, join_path, list_dir_or_file, load
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.registry import FUNCTIONS, MODELS, VISUALIZERS, DefaultScope
from stratagem.compat.mmengine.runner.checkpoint import _load_checkpoint, _load_checkpoint_to_model
from stratagem.compat.mmengine.structures import InstanceData
from stratagem.compat.mmengine.visualization import Visualizer
from stratagem.errors import ConfigFileError, ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.utils import did_you_mean, import_module

__all__ = ["BaseInferencer"]

InstanceList = list[InstanceData]
InputType = str | np.ndarray | torch.Tensor
InputsType = InputType | Sequence[InputType]
ImgType = np.ndarray | Sequence[np.ndarray]
ResType = dict[str, Any] | list[dict[str, Any]]
ConfigType = Config | ConfigDict
ModelType = dict[str, Any] | ConfigType | str

_KINDS = ("preprocess", "forward", "visualize", "postprocess")


class InferencerMeta(ABCMeta):
    """Checks that each argument belongs to one step of an inferencer."""

    def __init__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names: list[str] = []
        for kind in _KINDS:
            own = getattr(cls, f"{kind}_kwargs")
            require(isinstance(own, set), f"{kind}_kwargs of {cls.__name__} must be a set, got {own!r}.")
            names.extend(own)
        repeated = sorted({name for name in names if names.count(name) > 1})
        require(
            not repeated, f"Class define error! The steps of {cls.__name__} share arguments: {', '.join(repeated)}."
        )


class BaseInferencer(metaclass=InferencerMeta):
    """Predict with a model: prepare the inputs, call the model, and show and return the results.

    Subclasses implement ``_init_pipeline``, ``visualize`` and ``postprocess``. The names of the arguments of each step are in
    ``preprocess_kwargs``, ``forward_kwargs``, ``visualize_kwargs`` and ``postprocess_kwargs``.

    Args:
        model: a configuration, its file, or the name of a model of the library; by default the configuration in the weights.
        weights: the checkpoint; by default that of the model of the library.
        device: the device of the model; the accelerator by default.
        scope: the library; the default scope by default.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError: if neither a model nor weights are given.
        TypeError: if ``model`` has another type.
    """

    preprocess_kwargs: ClassVar[set[str]] = set()
    forward_kwargs: ClassVar[set[str]] = set()
    visualize_kwargs: ClassVar[set[str]] = set()
    postprocess_kwargs: ClassVar[set[str]] = set()

    def __init__(
        self,
        model: ModelType | None = None,
        weights: str | None = None,
        device: str | None = None,
        scope: str | None = None,
        show_progress: bool = True,
    ) -> None:
        current = DefaultScope.get_current_instance()
        self.scope = scope if scope is not None or current is None else current.scope_name
        cfg, weights = self._read_model(model, weights)
        self.model = self._init_model(cfg, weights, device or get_device())
        self.pipeline = self._init_pipeline(cfg)
        self.collate_fn = self._init_collate(cfg)
        self.visualizer = self._init_visualizer(cfg)
        self.cfg = cfg
        self.show_progress = show_progress

    def _read_model(self, model: Any, weights: str | None) -> tuple[Any, str | None]:
        if isinstance(model, str):
            if Path(model).is_file():
                return Config.fromfile(model), weights
            cfg, known_weights = self._load_model_from_metafile(model)
            return cfg, known_weights if weights is None else weights
        if isinstance(model, Config | ConfigDict):
            return copy.deepcopy(model), weights
        if isinstance(model, dict):
            return copy.deepcopy(ConfigDict(model)), weights
        if model is not None:
            raise ConfigTypeError(f"model must be a filepath or any ConfigType object, but got {type(model)}")
        if weights is None:
            raise ConfigValueError("Neither a model nor weights are given. Pass at least one of them.")
        return ConfigDict(), weights

    def __call__(self, inputs: InputsType, return_datasamples: bool = False, batch_size: int = 1, **kwargs: Any) -> Any:
        """Return the results for inputs.

        Args:
            inputs: an input or several; the address of a folder stands for its files.
            return_datasamples: whether ``postprocess`` returns data elements.
            batch_size: how many inputs the model receives at a time.
            kwargs: arguments of the steps.

        Raises:
            ValueError: if an argument does not belong to a step.
        """
        of_preprocess, of_forward, of_visualize, of_postprocess = self._dispatch_kwargs(**kwargs)
        items = self._inputs_to_list(inputs)
        batches = self.preprocess(items, batch_size=batch_size, **of_preprocess)
        predictions: list[Any] = []
        for batch in track(batches, description="Inference") if self.show_progress else batches:
            predictions.extend(self.forward(batch, **of_forward))
        shown = self.visualize(items, predictions, **of_visualize)
        return self.postprocess(predictions, shown, return_datasamples, **of_postprocess)

    def _inputs_to_list(self, inputs: Any) -> list[Any]:
        if isinstance(inputs, str):
            backend = get_file_backend(inputs)
            if hasattr(backend, "isdir") and backend.isdir(inputs):
                return [join_path(inputs, name) for name in list_dir_or_file(inputs, list_dir=False)]
        return list(inputs) if isinstance(inputs, list | tuple) else [inputs]

    def preprocess(self, inputs: Any, batch_size: int = 1, **_: Any) -> Iterator[Any]:
        """Return an iterator over batches of the inputs, after the pipeline."""
        return map(self.collate_fn, self._get_chunk_data(map(self.pipeline, inputs), batch_size))

    @torch.no_grad()
    def forward(self, inputs: Any, **_: Any) -> Any:
        """Return the predictions for a batch."""
        return self.model.test_step(inputs)

    @abstractmethod
    def visualize(self, inputs: list[Any], preds: Any, show: bool = False, **kwargs: Any) -> Any:
        """Return images of the predictions, or None."""

    @abstractmethod
    def postprocess(self, preds: Any, visualization: Any, return_datasample: bool = False, **kwargs: Any) -> Any:
        """Return the results for the caller."""

    @abstractmethod
    def _init_pipeline(self, cfg: Any) -> Callable[..., Any]:
        """Return the function that prepares an input."""

    def _init_model(self, cfg: Any, weights: str | None, device: str = "cpu") -> Any:
        """Return the model on the device, with the weights, for evaluation."""
        checkpoint = None if weights is None else _load_checkpoint(weights, map_location="cpu")
        if not cfg:
            cfg.update(Config.fromstring(_config_text(checkpoint or {}), file_format=".py")._cfg_dict)
        if cfg.model.get("pretrained") is not None:
            del cfg.model.pretrained
        model = MODELS.build(cfg.model)
        model.cfg = cfg
        self._load_weights_to_model(model, checkpoint, cfg)
        return model.to(device).eval()

    def _load_weights_to_model(self, model: nn.Module, checkpoint: Any, cfg: Any) -> None:
        if checkpoint is not None:
            _load_checkpoint_to_model(model, checkpoint)
            return
        warnings.warn(
            "No weights are given, so the results are those of a model with random weights. Pass weights=...",
            stacklevel=2,
        )

    def _init_collate(self, cfg: Any) -> Callable[..., Any]:
        """Return the function that makes batches: that of ``test_dataloader``, or ``pseudo_collate``."""
        loader = cfg.get("test_dataloader") or {}
        name = loader.get("collate_fn")
        default: Callable[..., Any] = pseudo_collate
        if not isinstance(name, str):
            return default
        with FUNCTIONS.switch_scope_and_registry(self.scope) as registry:
            collate: Callable[..., Any] = registry.get(name)
        return collate

    def _init_visualizer(self, cfg: Any) -> Visualizer | None:
        """Build the visualizer of the configuration, with a name that no other one has; None without one."""
        if "visualizer" not in cfg:
            return None
        cfg.visualizer.name = Visualizer.unused_name(cfg.visualizer.get("name", type(self).__name__))
        visualizer: Visualizer = VISUALIZERS.build(cfg.visualizer)
        return visualizer

    def _get_chunk_data(self, inputs: Iterable[Any], chunk_size: int) -> Iterator[Any]:
        """Return an iterator over lists of ``chunk_size`` inputs; the last one may be shorter."""
        items = iter(inputs)
        while chunk := list(itertools.islice(items, chunk_size)):
            yield chunk

    def _dispatch_kwargs(self, **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """Return the arguments of each step."""
        known: list[set[str]] = [getattr(self, f"{kind}_kwargs") for kind in _KINDS]
        unknown = sorted(set(kwargs).difference(*known))
        if unknown:
            raise ConfigValueError(
                f"unknown argument {unknown[0]!r} of {type(self).__name__}. {did_you_mean(unknown[0], set().union(*known))}"
            )
        return tuple({name: value for name, value in kwargs.items() if name in names} for names in known)

    def _load_model_from_metafile(self, model: str) -> tuple[Config, str]:
        """Return the configuration and the address of the weights of a model of the library."""
        require(self.scope is not None, "scope should be initialized to load a model by its name. Pass scope=...")
        folder = self._get_repo_or_mim_dir(self.scope)
        wanted, known = model.lower(), []
        for entry in self._get_models_from_metafile(folder):
            names = _names(entry)
            known.extend(names)
            if wanted in (name.lower() for name in names):
                weights = entry["Weights"]
                path = str(Path(folder) / entry["Config"])
                return Config.fromfile(path), weights[0] if isinstance(weights, list) else weights
        raise ConfigValueError(f"Cannot find model: {model} in {self.scope}. {did_you_mean(model, known)}")

    @staticmethod
    def _get_repo_or_mim_dir(scope: Any) -> str:
        """Return the folder that contains the configurations of a library."""
        require(scope in MODULE2PACKAGE, f"{scope} not in {', '.join(MODULE2PACKAGE)}! Pass the name of a library.")
        package = Path(next(iter(import_module(scope).__path__)))
        for folder in (package.parent, package / ".mim"):
            if (folder / "configs").is_dir():
                return str(folder)
        raise ConfigFileError(
            f"{package} has no configurations, neither in {package.parent / 'configs'} nor in {package / '.mim'}. Install "
            f"{MODULE2PACKAGE[scope]} again."
        )

    @staticmethod
    def _get_models_from_metafile(dir: str) -> Iterator[dict[str, Any]]:  # noqa: A002 -- the name in MMEngine
        """Return an iterator over the entries of a library's models."""
        for path in load(Path(dir) / "model-index.yml")["Import"]:
            yield from load(Path(dir) / path)["Models"]

    @staticmethod
    def list_models(scope: str | None = None, patterns: str = ".*") -> list[str]:
        """Return and log the names of a library's models that match a regular expression.

        Args:
            scope: the library; the default scope by default.
            patterns: the regular expression, which must match the start of the name.

        Raises:
            AssertionError: if there is no scope, or it is not a library of OpenMMLab.
        """
        if scope is None:
            current = DefaultScope.get_current_instance()
            if current is None:
                raise InvalidArgumentError("scope should be initialized. Pass scope=..., or call init_default_scope().")
            scope = current.scope_name
        folder = BaseInferencer._get_repo_or_mim_dir(scope)
        names = [name for entry in BaseInferencer._get_models_from_metafile(folder) for name in _names(entry)]
        matched = [name for name in names if re.match(patterns, name)]
        print_log("".join(f"model_name: {name}\n" for name in matched), logger="current")
        return matched


def _names(entry: dict[str, Any]) -> list[str]:
    """Return the name of a model and its aliases."""
    aliases = entry.get("Alias", [])
    return [entry["Name"], *([aliases] if isinstance(aliases, str) else aliases)]


def _config_text(checkpoint: Any) -> str:
    """Return the configuration that a checkpoint contains."""
    facts = (checkpoint.get("message_hub") or {}).get("runtime_info") or {}
    text = facts.get("cfg") or (checkpoint.get("meta") or {}).get("cfg")
    if not text:
        raise ConfigKeyError(
            "The checkpoint contains no configuration. Pass model=..., the configuration of the model."
        )
    return str(text)
