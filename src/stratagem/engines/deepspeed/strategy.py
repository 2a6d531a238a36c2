"""The strategy for DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from torch import nn

from stratagem.checkpoint import save_checkpoint
from stratagem.engines.deepspeed.elementwise_check import refuse_by_name, require_elementwise
from stratagem.engines.deepspeed.optimizer_section import (
    explain_kernel_errors,
    with_accumulation,
    with_clipping,
    with_optimizer,
)
from stratagem.engines.deepspeed.options import Options
from stratagem.engines.deepspeed.wrapper import require_plain_wrapper
from stratagem.errors import ConfigValueError
from stratagem.parallel import AnyOptim, Placement
from stratagem.strategies.base import CheckpointWriter, require_master_weights
from stratagem.strategies.composed import ComposedStrategy
from stratagem.strategies.setup.trial import StandInOptimizer
from stratagem.strategies.state.state_io import StateAccess
from stratagem.utils import did_you_mean, import_object

__all__ = ["DeepSpeedStrategy", "parse_for_plan"]

_FORMATS: Final = ("portable", "deepspeed")
_NAMED: Final = (
    "zero_optimization", "gradient_clipping", "fp16", "bf16", "amp", "activation_checkpointing", "aio",
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
)  # fmt: skip
_HERE: Final = "stratagem.engines.deepspeed"


@final
class DeepSpeedStrategy(ComposedStrategy):
    """Trains with DeepSpeed's engine: ZeRO stages 0 to 3, optionally with the optimizer and the parameters offloaded.

    Options can be specified in ``config`` or as arguments; if an option is specified in both, the values must be equal.
    The value ``"auto"`` is treated as if the option was not specified.

    Args:
        config: a DeepSpeed configuration: a mapping, or the path of a JSON file.
        zero_optimization: ``stage`` and other ZeRO options.
        gradient_clipping: the maximum gradient norm, equivalent to ``clip_grad=dict(max_norm=...)`` of the wrapper.
        fp16: True, or the options of float16 and its loss scale.
        bf16: True, or the options of bfloat16.
        inputs_to_half: the positions and names of the inputs of ``forward`` that are cast to float16 or bfloat16; by default
            all floating-point inputs.
        amp: options for Apex, which DeepSpeed no longer supports; enabling it raises an error.
        activation_checkpointing: options of ``deepspeed.checkpointing``, for models that call it.
        aio: options for NVMe offloading, which is not supported; a nonempty value raises an error.
        train_micro_batch_size_per_gpu: the number of samples that a rank processes in an iteration; must match the data loader.
        gradient_accumulation_steps: the number of micro-batches in an update, equivalent to ``accumulative_counts`` of the
            wrapper.
        steps_per_print: the number of updates between two DeepSpeed log lines; by default, DeepSpeed logs none.
        checkpoint_format: ``"portable"``, or ``"deepspeed"`` for folders in DeepSpeed's own format, which other programs can
            read. Both can be resumed on any number of ranks and with any stage.
        exclude_frozen_parameters: whether to exclude frozen parameters from checkpoints in DeepSpeed's own format.
        kwargs: the arguments of :class:`BaseStrategy`.

    Raises:
        LaunchError: if no launcher started this process.
        MissingDependencyError: if DeepSpeed is not installed.
        ConfigError: or a subclass, if an option is unknown, not supported, or specified twice with different values.
    """

    def __init__(
        self,
        *,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        zero_optimization: Mapping[str, Any] | None = None,
        gradient_clipping: float | None = None,
        fp16: bool | Mapping[str, Any] | None = None,
        bf16: bool | Mapping[str, Any] | None = None,
        inputs_to_half: Sequence[int | str] | None = None,
        amp: Mapping[str, Any] | None = None,
        activation_checkpointing: Mapping[str, Any] | None = None,
        aio: Mapping[str, Any] | None = None,
        train_micro_batch_size_per_gpu: int | None = None,
        gradient_accumulation_steps: int | None = None,
        steps_per_print: int = 10**13,
        checkpoint_format: Literal["portable", "deepspeed"] = "portable",
        exclude_frozen_parameters: bool = False,
        **kwargs: Any,
    ) -> None:
        self._parsed = _Arguments.parse(
            {
                "config": config,
                "zero_optimization": zero_optimization,
                "gradient_clipping": gradient_clipping,
                "fp16": fp16,
                "bf16": bf16,
                "inputs_to_half": inputs_to_half,
                "amp": amp,
                "activation_checkpointing": activation_checkpointing,
                "aio": aio,
                "train_micro_batch_size_per_gpu": train_micro_batch_size_per_gpu,
                "gradient_accumulation_steps": gradient_accumulation_steps,
                "steps_per_print": steps_per_print,
                "checkpoint_format": checkpoint_format,
                "exclude_frozen_parameters": exclude_frozen_parameters,
            }
        )
        self._options = self._parsed.options
        super().__init__(**kwargs)

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        _Arguments.parse(arguments)
        super().check_arguments(arguments)

    @classmethod
    def check_optim_wrapper(
        cls, arguments: Mapping[str, Any], optim_wrapper: Any, build: Callable[[Any], AnyOptim | None]
    ) -> AnyOptim | None:
        options = _Arguments.parse(arguments).options
        completed = _completed(options, optim_wrapper)
        refuse_by_name(completed)
        built = super().check_optim_wrapper(arguments, completed, build)
        if built is not None:
            optimizer = require_plain_wrapper(built).optimizer
            if not isinstance(optimizer, StandInOptimizer):
                require_elementwise(optimizer, stage=options.stage, allow_unknown=options.allows_unknown_optimizers)
        return built

    @classmethod
    def check_hooks(cls, arguments: Mapping[str, Any], *, averages: bool, saves_in_background: bool) -> None:
        parsed = _Arguments.parse(arguments)
        if saves_in_background and parsed.is_native:
            raise _not_in_background()
        if averages:
            require_master_weights(cls.__name__, available=parsed.options.params_are_master_weights)

    def _make_placement(self) -> Placement:
        self._require_processes()
        placement: Placement = import_object(f"{_HERE}.placement:DeepSpeedPlacement")(
            self.logger,
            self._options,
            self.world,
            lambda: self.dispatch_kwargs.get("train_micro_batch_size_per_gpu"),
        )
        return placement

    def close(self) -> None:
        super().close()
        import_object(f"{_HERE}.bootstrap:restore_linear")()

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> AnyOptim:
        completed = self.complete_optim_wrapper(optim_wrapper)
        refuse_by_name(completed)
        with explain_kernel_errors(completed):
            return super().build_optim_wrapper(completed, model)

    def complete_optim_wrapper(self, optim_wrapper: Any) -> Any:
        return _completed(self._options, optim_wrapper)

    def _writer(self, write: CheckpointWriter) -> CheckpointWriter:
        if not self._parsed.is_native:
            return write
        if write is not save_checkpoint:
            raise _not_in_background()
        writer: CheckpointWriter = import_object(f"{_HERE}.native:DeepSpeedFormatWriter")(
            self.optim_wrapper, exclude_frozen_parameters=self._parsed.excludes_frozen
        )
        return writer

    def _make_access(self) -> StateAccess:
        access: StateAccess = import_object(f"{_HERE}.state:DeepSpeedState")(self._placement)
        return access


@final
@dataclass(frozen=True, slots=True)
class _Arguments:
    """The parsed arguments of a ``DeepSpeedStrategy``."""

    options: Options
    is_native: bool
    excludes_frozen: bool

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> _Arguments:
        """Parse the arguments of a ``DeepSpeedStrategy``; all other arguments are ignored."""
        kind = arguments.get("checkpoint_format", "portable")
        excludes_frozen = bool(arguments.get("exclude_frozen_parameters", False))
        if kind not in _FORMATS:
            raise ConfigValueError(f"Unknown checkpoint_format={kind!r}. {did_you_mean(str(kind), _FORMATS)}")
        if excludes_frozen and kind == "portable":
            raise ConfigValueError(
                "exclude_frozen_parameters requires checkpoint_format='deepspeed': portable checkpoints contain all parameters. "
                "Set checkpoint_format='deepspeed', or omit exclude_frozen_parameters."
            )
        options = Options.parse(
            arguments.get("config"),
            {name: arguments.get(name) for name in _NAMED},
            arguments.get("inputs_to_half"),
            steps_per_print=arguments.get("steps_per_print", 10**13),
        )
        return cls(options, kind == "deepspeed", excludes_frozen)


def parse_for_plan(arguments: Mapping[str, Any], optim_wrapper: Any) -> tuple[Options, Any]:
    """Return the parsed arguments of a ``DeepSpeedStrategy``, and the optimizer wrapper completed with them.

    Raises:
        ConfigError: (or a subclass) if an option is invalid.
    """
    options = _Arguments.parse(arguments).options
    return options, _completed(options, optim_wrapper)


def _not_in_background() -> ConfigValueError:
    return ConfigValueError(
        "checkpoint_format='deepspeed' cannot be written in the background. Set async_save=False in the "
        "CheckpointHook, or use checkpoint_format='portable'."
    )


def _completed(options: Options, optim_wrapper: Any) -> Any:
    """Return an optimizer wrapper, or its configuration, completed with the options for DeepSpeed."""
    completed = with_optimizer(optim_wrapper, options.optimizer)
    return with_clipping(with_accumulation(completed, options.accumulation), options.clipping)
