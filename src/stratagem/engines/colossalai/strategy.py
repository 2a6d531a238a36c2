"""The strategy for ColossalAI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, final

from stratagem.checkpoint import save_checkpoint
from stratagem.engines.colossalai.import_stubs import import_stubs
from stratagem.engines.colossalai.options import (
    CHECKPOINT_FORMATS,
    check_plugin_wrapper,
    parse_plugin,
    refuse_other_wrappers,
)
from stratagem.errors import CheckpointError, ConfigValueError, MissingDependencyError
from stratagem.parallel import AnyOptim, Placement
from stratagem.strategies.base import CheckpointWriter
from stratagem.strategies.composed import ComposedStrategy
from stratagem.strategies.state.state_io import StateAccess
from stratagem.utils import did_you_mean, import_object
from stratagem.utils.imports import without_working_directory

__all__ = ["ColossalAIStrategy", "parse_for_plan"]

_HERE = "stratagem.engines.colossalai"


@final
class ColossalAIStrategy(ComposedStrategy):
    """Trains with ColossalAI's Booster. A plugin determines how the model and the optimizer are sharded across ranks.

    Args:
        plugin: ``"lowlevel-zero"`` (ZeRO stage 1), ``"torch-ddp"``, ``"hybrid-parallel"`` (tensor parallelism with ZeRO), a
            mapping with one of these as ``type`` and options of the plugin, or a built plugin.
        mixed_precision: ``"bf16"`` or ``"fp16"``, or a mapping with one of these as ``type`` and options of the loss scale;
            float32 by default.
        checkpoint_format: ``"portable"``, or ``"colossalai"`` to let the Booster write weights and optimizer state in its
            own format, for other programs. Every strategy can resume from both.
        config: accepted for MMEngine's configurations; must be empty, because ColossalAI has no global configuration.
        model_wrapper: accepted for MMEngine's configurations; must be MMEngine's default.
        kwargs: the arguments of :class:`BaseStrategy`.

    Raises:
        LaunchError: if no launcher started this process.
        MissingDependencyError: if ColossalAI is not installed.
        PlacementError: if a plugin or an option is not supported; the message names an alternative.
        ConfigError: or a subclass, if an option is invalid.
    """

    def __init__(
        self,
        *,
        plugin: Any = "lowlevel-zero",
        mixed_precision: str | Mapping[str, Any] | None = None,
        checkpoint_format: Literal["portable", "colossalai"] = "portable",
        config: Mapping[str, Any] | None = None,
        model_wrapper: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._plugin = _parse(
            {
                "plugin": plugin,
                "mixed_precision": mixed_precision,
                "checkpoint_format": checkpoint_format,
                "config": config,
                "model_wrapper": model_wrapper,
            }
        )
        self._native = checkpoint_format == "colossalai"
        super().__init__(**kwargs)

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        _parse(arguments)
        super().check_arguments(arguments)

    @classmethod
    def check_optim_wrapper(
        cls, arguments: Mapping[str, Any], optim_wrapper: Any, build: Callable[[Any], AnyOptim | None]
    ) -> AnyOptim | None:
        built = super().check_optim_wrapper(arguments, optim_wrapper, build)
        if built is not None:
            check_plugin_wrapper(_parse(arguments), built)
        return built

    @classmethod
    def check_hooks(cls, arguments: Mapping[str, Any], *, averages: bool, saves_in_background: bool) -> None:
        del averages  # Where the master weights are stored depends on the plugin that is built.
        if saves_in_background and arguments.get("checkpoint_format", "portable") == "colossalai":
            raise _not_in_background()

    def _make_placement(self) -> Placement:
        self._require_processes()
        placement: Placement = _load("placement:ColossalAIPlacement")(self._plugin, self.world)
        return placement

    def _make_access(self) -> StateAccess:
        access: StateAccess = _load("state:ColossalAIState")(self._placement)
        return access

    def _writer(self, write: CheckpointWriter) -> CheckpointWriter:
        if not self._native:
            return write
        if write is not save_checkpoint:
            raise _not_in_background()
        writer: CheckpointWriter = _load("native:ColossalAIFormatWriter")(self._placement)
        return writer


def parse_for_plan(arguments: Mapping[str, Any]) -> Any:
    """Return the plugin specification of a ``ColossalAIStrategy``, or the built plugin.

    Raises:
        ConfigError: (or a subclass) if an option is invalid.
        PlacementError: if a plugin or an option is not supported.
    """
    return _parse(arguments)


def _not_in_background() -> CheckpointError:
    return CheckpointError(
        "checkpoint_format='colossalai' cannot be written in the background. Set async_save=False, or "
        "checkpoint_format='portable'."
    )


def _parse(arguments: Mapping[str, Any]) -> Any:
    """Return the plugin specification, or the built plugin; arguments of other classes are ignored."""
    refuse_other_wrappers(arguments.get("config"), arguments.get("model_wrapper"))
    kind = arguments.get("checkpoint_format", "portable")
    if kind not in CHECKPOINT_FORMATS:
        raise ConfigValueError(f"Unknown checkpoint_format={kind!r}. {did_you_mean(str(kind), CHECKPOINT_FORMATS)}")
    return parse_plugin(arguments.get("plugin", "lowlevel-zero"), arguments.get("mixed_precision"))


def _load(target: str) -> Any:
    """Import an object from a module of this package that imports ColossalAI.

    Raises:
        MissingDependencyError: if ColossalAI or one of its dependencies is not installed.
    """
    try:
        with import_stubs(), without_working_directory():
            return import_object(f"{_HERE}.{target}")
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"ColossalAIStrategy requires ColossalAI 0.5.0 ({error}). Install it in a separate environment, without "
            "its pinned dependencies: pip install --no-deps colossalai==0.5.0, and pip install einops packaging "
            "psutil setuptools tqdm. See docs/strategies/colossalai.md."
        ) from error
