"""Train through ColossalAI's Booster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, final

from stratagem.checkpoint import save_checkpoint
from stratagem.engines.colossalai.import_stubs import import_stubs
from stratagem.engines.colossalai.options import CHECKPOINT_FORMATS, parse_plugin, refuse_other_wrappers
from stratagem.errors import CheckpointError, ConfigValueError, MissingDependencyError
from stratagem.parallel import Placement
from stratagem.strategies.base import CheckpointWriter
from stratagem.strategies.composed import ComposedStrategy
from stratagem.strategies.state.state_io import StateAccess
from stratagem.utils import did_you_mean, import_object
from stratagem.utils.imports import without_working_directory

__all__ = ["ColossalAIStrategy"]

_HERE = "stratagem.engines.colossalai"


@final
class ColossalAIStrategy(ComposedStrategy):
    """ColossalAI's Booster: a plugin says how model and optimizer are spread over ranks.

    Args:
        plugin: ``"lowlevel-zero"`` (ZeRO stage 1), ``"torch-ddp"``, ``"hybrid-parallel"`` (tensor parallel, with ZeRO), a
            mapping with one of these as ``type`` and the plugin's options, or a plugin that is built.
        mixed_precision: ``"bf16"`` or ``"fp16"``, float32 where it is not given; or a mapping with that as ``type`` and
            the options of the loss scale.
        config: nothing: ColossalAI has no configuration of its own any more.
        checkpoint_format: ``"portable"``: checkpoints that every strategy resumes; ``"colossalai"``: the Booster writes
            weights and optimizer in its own form, for its other programs, with the rest of ours around them. Every
            strategy resumes that too.
        model_wrapper: MMEngine's name of the only wrapper there is.
        kwargs: those of :class:`BaseStrategy`.

    Raises:
        LaunchError: if no launcher started this process.
        MissingDependencyError: if ColossalAI is not installed.
        PlacementError: for what ColossalAI or a plugin cannot do here; the message says what to do instead.
        ConfigError: in one of its kinds, if an option is wrong.
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
        refuse_other_wrappers(config, model_wrapper)
        if checkpoint_format not in CHECKPOINT_FORMATS:
            raise ConfigValueError(
                f"checkpoint_format={checkpoint_format!r} is not known. {did_you_mean(checkpoint_format, CHECKPOINT_FORMATS)}"
            )
        self._native = checkpoint_format == "colossalai"
        self._plugin = parse_plugin(plugin, mixed_precision)
        super().__init__(**kwargs)

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
            raise CheckpointError(
                "ColossalAI's own form is written by its Booster while training waits, so not in the background. Set "
                "async_save=False, or checkpoint_format='portable'."
            )
        writer: CheckpointWriter = _load("native:ColossalAIFormatWriter")(self._placement)
        return writer


def _load(target: str) -> Any:
    """Return what a module of ours that imports ColossalAI defines.

    Raises:
        MissingDependencyError: if ColossalAI or what it needs is not installed.
    """
    try:
        with import_stubs(), without_working_directory():
            return import_object(f"{_HERE}.{target}")
    except MissingDependencyError as error:
        raise MissingDependencyError(
            f"ColossalAIStrategy needs ColossalAI 0.5.0 in an environment of its own, since it pins old versions of much "
            f"else ({error}). Install it without them: pip install --no-deps colossalai==0.5.0, and what it really uses: "
            "pip install einops packaging psutil setuptools tqdm. See docs/strategies/colossalai.md."
        ) from error
