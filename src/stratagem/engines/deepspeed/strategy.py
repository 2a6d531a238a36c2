"""DeepSpeed's engine: ZeRO, offload and its own kernels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, final

from torch import nn

from stratagem.checkpoint import save_checkpoint
from stratagem.engines.deepspeed.elementwise_check import refuse_by_name
from stratagem.engines.deepspeed.optimizer_section import (
    kernels_explained,
    with_accumulation,
    with_clipping,
    with_optimizer,
)
from stratagem.engines.deepspeed.options import Options
from stratagem.errors import ConfigValueError
from stratagem.parallel import AnyOptim, Placement
from stratagem.strategies.base import CheckpointWriter
from stratagem.strategies.composed import ComposedStrategy
from stratagem.strategies.state.state_io import StateAccess
from stratagem.utils import did_you_mean, import_object

__all__ = ["DeepSpeedStrategy"]

_FORMATS: Final = ("portable", "deepspeed")
_HERE: Final = "stratagem.engines.deepspeed"


@final
class DeepSpeedStrategy(ComposedStrategy):
    """Trains by DeepSpeed's engine: ZeRO's stages 0 to 3, with the optimizer and the parameters offloaded where wanted.

    Options may stand in ``config`` or be given by name; those given in both must agree. Values ``"auto"`` count as not
    given.

    Args:
        config: a DeepSpeed configuration: a mapping, or the path of its JSON file.
        zero_optimization: ``stage`` and the options of ZeRO.
        gradient_clipping: the largest norm of the gradients; the same as the wrapper's ``clip_grad=dict(max_norm=...)``.
        fp16: True, or the options of float16 and its loss scale.
        bf16: True, or the options of bfloat16.
        inputs_to_half: which inputs of the model's ``forward`` are cast to its type: positions and names. By default all
            that are floating-point.
        amp: Apex's, which DeepSpeed no longer has; refused.
        activation_checkpointing: options of ``deepspeed.checkpointing``, for models that call it.
        aio: options of NVMe offload; refused.
        train_micro_batch_size_per_gpu: samples of a rank in an iteration, where they are to be checked.
        gradient_accumulation_steps: micro-batches of an update; the same as the wrapper's ``accumulative_counts``.
        steps_per_print: how many updates lie between two lines of DeepSpeed's own log; by default there are none.
        checkpoint_format: ``"portable"``: any strategy resumes it; or ``"deepspeed"``: folders of DeepSpeed's own form, which
            other programs read. Both are resumed on any number of ranks and under any stage.
        exclude_frozen_parameters: whether DeepSpeed's own form leaves out what does not learn.
        kwargs: those of :class:`BaseStrategy`.

    Raises:
        LaunchError: if no launcher started this process.
        MissingDependencyError: if DeepSpeed is not installed.
        ConfigError: in one of its kinds, if an option is unknown, refused, or given twice with different values.
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
        named = {
            "zero_optimization": zero_optimization,
            "gradient_clipping": gradient_clipping,
            "fp16": fp16,
            "bf16": bf16,
            "amp": amp,
            "activation_checkpointing": activation_checkpointing,
            "aio": aio,
            "train_micro_batch_size_per_gpu": train_micro_batch_size_per_gpu,
            "gradient_accumulation_steps": gradient_accumulation_steps,
        }
        if checkpoint_format not in _FORMATS:
            raise ConfigValueError(
                f"checkpoint_format={checkpoint_format!r} is not known. {did_you_mean(str(checkpoint_format), _FORMATS)}"
            )
        if exclude_frozen_parameters and checkpoint_format == "portable":
            raise ConfigValueError(
                "exclude_frozen_parameters is for checkpoint_format='deepspeed': portable checkpoints are whole. Choose that "
                "form, or leave it out."
            )
        self._is_native = checkpoint_format == "deepspeed"
        self._exclude_frozen = exclude_frozen_parameters
        self._options = Options.parse(config, named, inputs_to_half, steps_per_print=steps_per_print)
        super().__init__(**kwargs)

    def _make_placement(self) -> Placement:
        self._require_processes()
        placement: Placement = import_object(f"{_HERE}.placement:DeepSpeedPlacement")(
            self.logger,
            self._options,
            self.world,
            lambda: self.dispatch_kwargs.get("train_micro_batch_size_per_gpu"),
        )
        return placement

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> AnyOptim:
        wanted = self.complete_optim_wrapper(optim_wrapper)
        refuse_by_name(wanted)
        with kernels_explained(wanted):
            return super().build_optim_wrapper(wanted, model)

    def complete_optim_wrapper(self, optim_wrapper: Any) -> Any:
        wanted = with_optimizer(optim_wrapper, self._options.optimizer)
        return with_clipping(with_accumulation(wanted, self._options.accumulation), self._options.clipping)

    def _writer(self, write: CheckpointWriter) -> CheckpointWriter:
        if not self._is_native:
            return write
        if write is not save_checkpoint:
            raise ConfigValueError(
                "checkpoint_format='deepspeed' is written by the engine, at once. Set async_save=False in the "
                "CheckpointHook, or use checkpoint_format='portable'."
            )
        writer: CheckpointWriter = import_object(f"{_HERE}.native:DeepSpeedFormatWriter")(
            self.optim_wrapper, exclude_frozen_parameters=self._exclude_frozen
        )
        return writer

    def _make_access(self) -> StateAccess:
        access: StateAccess = import_object(f"{_HERE}.state:DeepSpeedState")(self._placement)
        return access
