"""Parse and validate the options of :class:`DeepSpeedStrategy`, without importing DeepSpeed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch

from stratagem.engines.deepspeed.keys import check_keys
from stratagem.errors import ConfigFileError, ConfigParsingError, ConfigTypeError, ConfigValueError
from stratagem.utils.data_names import mark_data, unmark_data

__all__ = ["Options"]

_STAGES: Final = (0, 1, 2, 3)
_OPTIMIZER: Final = "optimizer"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A parsed DeepSpeed configuration. None means that an option is not specified.

    Attributes:
        config: the options for DeepSpeed, without batch sizes, accumulation, clipping and the optimizer.
        stage: the ZeRO stage, from 0 to 3.
        dtype: the dtype that the model computes in; None for the dtype of its parameters.
        micro_batch: the number of samples that a rank processes in an iteration.
        global_batch: the number of samples in an update, over all ranks.
        accumulation: the number of micro-batches in an update.
        clipping: the maximum gradient norm.
        optimizer: the ``optimizer`` section, used if ``optim_wrapper`` has no optimizer.
        half_inputs: the positions and names of the inputs of ``forward`` that are cast to ``dtype``; None for all
            floating-point inputs.
    """

    config: Mapping[str, Any]
    stage: int
    dtype: torch.dtype | None
    micro_batch: int | None
    global_batch: int | None
    accumulation: int | None
    clipping: float | None
    optimizer: Mapping[str, Any] | None
    half_inputs: tuple[int | str, ...] | None

    @classmethod
    def parse(
        cls,
        config: str | os.PathLike[str] | Mapping[str, Any] | None,
        named: Mapping[str, Any],
        inputs_to_half: Sequence[int | str] | None,
        *,
        steps_per_print: int = 10**13,
    ) -> Options:
        """Parse a configuration and the options that are passed as arguments. Neither is modified.

        Args:
            config: a mapping, or the path of a JSON file.
            named: the arguments; None if not specified.
            inputs_to_half: the inputs that are cast.
            steps_per_print: the default for configurations that do not specify it.

        Raises:
            ConfigError: or a subclass, if the file cannot be read, an option is unknown or not supported, or an option is
                specified twice with different values.
        """
        merged = check_keys(_merged(config, named), "config" if config is not None else "DeepSpeedStrategy")
        zero = merged.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        if isinstance(stage, bool) or stage not in _STAGES:
            raise ConfigValueError(f"zero_optimization: stage must be 0, 1, 2 or 3, got {stage!r}.")
        dtype = _dtype(merged)
        _refuse_offload(zero, stage)
        if inputs_to_half is not None and dtype is None:
            raise ConfigValueError(
                "inputs_to_half casts inputs to bf16 or fp16, but neither is enabled. Enable one, or omit inputs_to_half."
            )
        own = {
            "micro_batch": _positive_int(
                merged.pop("train_micro_batch_size_per_gpu", None), "train_micro_batch_size_per_gpu"
            ),
            "global_batch": _positive_int(merged.pop("train_batch_size", None), "train_batch_size"),
            "accumulation": _positive_int(
                merged.pop("gradient_accumulation_steps", None), "gradient_accumulation_steps"
            ),
            "clipping": _clipping(merged.pop("gradient_clipping", None)),
            _OPTIMIZER: merged.pop(_OPTIMIZER, None),
        }
        return cls(
            config={"steps_per_print": steps_per_print, **merged},
            stage=stage,
            dtype=dtype,
            half_inputs=None if inputs_to_half is None else _inputs(inputs_to_half),
            **own,
        )

    @property
    def params_are_master_weights(self) -> bool:
        """Whether the parameters of the model hold the float32 weights between steps."""
        return self.stage < 3 and self.dtype is None

    @property
    def allows_unknown_optimizers(self) -> bool:
        """Whether to accept optimizers that are not known to be elementwise."""
        return bool(self.config.get("zero_allow_untested_optimizer", False))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer state is stored and updated on the CPU."""
        return _device(self.config.get("zero_optimization", {}), "offload_optimizer") == "cpu"

    def for_engine(self, *, micro_batch: int, accumulation: int, clipping: float, world_size: int) -> dict[str, Any]:
        """Return the configuration for DeepSpeed, as a copy that it may modify.

        Raises:
            ConfigValueError: if a specified batch size differs from the run's batch size.
        """
        self._require_batch(micro_batch, accumulation, world_size)
        config = unmark_data(copy.deepcopy(dict(self.config)))
        return {
            **config,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clipping,
            # require_elementwise() checks the optimizer instead.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": config.get("zero_force_ds_cpu_optimizer", False),
        }

    def _require_batch(self, micro_batch: int, accumulation: int, world_size: int) -> None:
        if self.micro_batch not in (None, micro_batch):
            raise ConfigValueError(
                f"train_micro_batch_size_per_gpu={self.micro_batch}, but train_dataloader yields {micro_batch} samples per rank "
                "and iteration. Omit it, or make them equal."
            )
        batch = micro_batch * accumulation * world_size
        if self.global_batch not in (None, batch):
            raise ConfigValueError(
                f"train_batch_size={self.global_batch}, but the global batch size of the run is {batch}: {micro_batch} "
                f"samples x {accumulation} accumulated x {world_size} ranks. Omit it, or make them equal."
            )


def _merged(config: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    merged = _without_auto(_read(config))
    for key, given in named.items():
        if given is None:
            continue
        value = {"enabled": given} if key in ("fp16", "bf16") and isinstance(given, bool) else given
        if key in merged and merged[key] not in ({}, value):
            raise ConfigValueError(f"{key}={value!r}, but config has {key}={merged[key]!r}. Specify it only once.")
        merged[key] = value
    return copy.deepcopy(merged)


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove ``"auto"`` values, except those in the ``optimizer`` section, which has no meaningful defaults."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) and key != "optimizer" else value
        for key, value in config.items()
        if not (isinstance(value, str) and value == "auto")
    }


def _read(config: Any) -> Mapping[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, str | os.PathLike):
        raise ConfigTypeError(f"config must be the path of a JSON file or a mapping, got {config!r}.")
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigFileError(f"config: {path} cannot be read: {error.strerror}.") from error
    try:
        read = json.loads(text, object_pairs_hook=lambda pairs: _without_duplicates(pairs, path))
    except json.JSONDecodeError as error:
        raise ConfigParsingError(f"config: {path}, line {error.lineno}: invalid JSON: {error.msg}.") from error
    if not isinstance(read, Mapping):
        raise ConfigTypeError(f"config: {path} must contain an object with DeepSpeed options, got {read!r}.")
    # Mark the values as data, so that an optimizer type cannot import an arbitrary module.
    marked: Mapping[str, Any] = mark_data(read)
    return marked


def _without_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        twice = sorted({key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1})
        raise ConfigParsingError(f"config: {path} has {', '.join(map(repr, twice))} twice. Specify each key only once.")
    return read


def _dtype(merged: Mapping[str, Any]) -> torch.dtype | None:
    on = [key for key in ("bf16", "fp16") if merged.get(key, {}).get("enabled", False)]
    if len(on) > 1:
        raise ConfigValueError("bf16 and fp16 are both enabled. Enable only one.")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[on[0]] if on else None


def _refuse_offload(zero: Mapping[str, Any], stage: int) -> None:
    if _device(zero, "offload_optimizer") == "cpu" and stage == 0:
        raise ConfigValueError("zero_optimization: offload_optimizer requires stage 1, 2 or 3.")
    if _device(zero, "offload_param") == "cpu" and stage < 3:
        raise ConfigValueError(
            "zero_optimization: offload_param requires stage=3, which is the only stage that shards parameters."
        )


def _device(zero: Mapping[str, Any], section: str) -> str:
    return str((zero.get(section) or {}).get("device", "none"))


def _positive_int(value: Any, key: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigValueError(f"{key} must be a positive integer, got {value!r}.")
    return value


def _clipping(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ConfigValueError(f"gradient_clipping must be a maximum norm, or 0 for no clipping, got {value!r}.")
    return float(value) or None


def _inputs(inputs_to_half: Any) -> tuple[int | str, ...]:
    if isinstance(inputs_to_half, str) or not all(isinstance(each, int | str) for each in inputs_to_half):
        raise ConfigTypeError(
            f"inputs_to_half must be a list of positions and names of inputs of forward, got {inputs_to_half!r}."
        )
    return tuple(inputs_to_half)
