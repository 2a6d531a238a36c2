"""What :class:`DeepSpeedStrategy` was asked for, parsed once, without DeepSpeed."""

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
    """A DeepSpeed configuration without what the run itself decides, and what this strategy adds to it.

    Attributes:
        config: DeepSpeed's own options; batch sizes, accumulation, clipping and the optimizer are apart.
        stage: that of ZeRO, from 0 to 3.
        dtype: what the model computes in; None for the types of its own parameters.
        micro_batch: samples of a rank in an iteration, where they were given.
        global_batch: samples of an update over all ranks, where they were given.
        accumulation: micro-batches of an update, where they were given.
        clipping: the largest norm of the gradients, where it was given.
        optimizer: the section of that name, for runs that give no other.
        half_inputs: which inputs of ``forward`` are cast to ``dtype``: positions and names; None for all that are
            floating-point.
        offloads_parameters: whether parameters lie in the CPU's master_weights.
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
        """Read a configuration and the arguments that say the same by name; neither is changed.

        ``steps_per_print`` is for configurations that do not say it.

        Raises:
            ConfigError: in one of its kinds, if the file cannot be read, an option is unknown or refused, or one is
                given twice with different values.
        """
        merged = check_keys(_merged(config, named), "config" if config is not None else "DeepSpeedStrategy")
        zero = merged.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        if isinstance(stage, bool) or stage not in _STAGES:
            raise ConfigValueError(f"zero_optimization: stage={stage!r}; 0, 1, 2 or 3 is due.")
        dtype = _dtype(merged)
        _refuse_offload(zero, stage)
        if inputs_to_half is not None and dtype is None:
            raise ConfigValueError(
                "inputs_to_half casts inputs to the type of bf16 or fp16. Enable one, or leave it out."
            )
        own = {
            "micro_batch": _whole(merged.pop("train_micro_batch_size_per_gpu", None), "train_micro_batch_size_per_gpu"),
            "global_batch": _whole(merged.pop("train_batch_size", None), "train_batch_size"),
            "accumulation": _whole(merged.pop("gradient_accumulation_steps", None), "gradient_accumulation_steps"),
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
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state lies in the CPU's master_weights, and it steps there."""
        return _device(self.config.get("zero_optimization", {}), "offload_optimizer") == "cpu"

    def for_engine(self, *, micro_batch: int, accumulation: int, clipping: float, world_size: int) -> dict[str, Any]:
        """Return the configuration that DeepSpeed gets: a copy, which it may change.

        Raises:
            ConfigValueError: if batch sizes that were given are not those of the run.
        """
        self._require_batch(micro_batch, accumulation, world_size)
        config = unmark_data(copy.deepcopy(dict(self.config)))
        return {
            **config,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clipping,
            # Which optimizers step parts of tensors rightly is decided before, by their arithmetic.
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": config.get("zero_force_ds_cpu_optimizer", False),
        }

    def _require_batch(self, micro_batch: int, accumulation: int, world_size: int) -> None:
        if self.micro_batch not in (None, micro_batch):
            raise ConfigValueError(
                f"train_micro_batch_size_per_gpu={self.micro_batch}, but train_dataloader gives a rank {micro_batch} samples "
                "in an iteration. Leave it out, or make them equal."
            )
        batch = micro_batch * accumulation * world_size
        if self.global_batch not in (None, batch):
            raise ConfigValueError(
                f"train_batch_size={self.global_batch}, but the run's is {batch}: {micro_batch} samples x {accumulation} "
                f"accumulated x {world_size} ranks. Leave it out, or make them equal."
            )


def _merged(config: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    merged = _without_auto(_read(config))
    for key, said in named.items():
        if said is None:
            continue
        value = {"enabled": said} if key in ("fp16", "bf16") and isinstance(said, bool) else said
        if key in merged and merged[key] not in ({}, value):
            raise ConfigValueError(f"{key}={value!r} is given, and config says {key}={merged[key]!r}. Give it once.")
        merged[key] = value
    return copy.deepcopy(merged)


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what another program would fill in."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not (isinstance(value, str) and value == "auto")
    }


def _read(config: Any) -> Mapping[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, str | os.PathLike):
        raise ConfigTypeError(f"config is {config!r}; a path of a JSON file or a mapping is due.")
    path = Path(config)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigFileError(f"config: {path} cannot be read: {error.strerror}.") from error
    try:
        read = json.loads(text, object_pairs_hook=lambda pairs: _without_duplicates(pairs, path))
    except json.JSONDecodeError as error:
        raise ConfigParsingError(f"config: {path}, line {error.lineno}: {error.msg}. JSON is due.") from error
    if not isinstance(read, Mapping):
        raise ConfigTypeError(f"config: {path} holds {read!r}; an object with DeepSpeed's options is due.")
    # The file is data, whoever names it: its optimizer's type is not imported.
    marked: Mapping[str, Any] = mark_data(read)
    return marked


def _without_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        twice = sorted({key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1})
        raise ConfigParsingError(f"config: {path} has {', '.join(map(repr, twice))} twice. Give it once.")
    return read


def _dtype(merged: Mapping[str, Any]) -> torch.dtype | None:
    on = [key for key in ("bf16", "fp16") if merged.get(key, {}).get("enabled", False)]
    if len(on) > 1:
        raise ConfigValueError("bf16 and fp16 are both enabled. Choose one.")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[on[0]] if on else None


def _refuse_offload(zero: Mapping[str, Any], stage: int) -> None:
    if _device(zero, "offload_optimizer") == "cpu" and stage == 0:
        raise ConfigValueError("zero_optimization: offload_optimizer needs stage 1, 2 or 3.")
    if _device(zero, "offload_param") == "cpu" and stage < 3:
        raise ConfigValueError(
            "zero_optimization: offload_param needs stage=3, which alone cuts parameters into parts."
        )


def _device(zero: Mapping[str, Any], section: str) -> str:
    return str((zero.get(section) or {}).get("device", "none"))


def _whole(value: Any, key: str) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigValueError(f"{key} is {value!r}; a whole number from 1 is due.")
    return value


def _clipping(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ConfigValueError(f"gradient_clipping is {value!r}; the largest norm is due, or 0 for none.")
    return float(value) or None


def _inputs(inputs_to_half: Any) -> tuple[int | str, ...]:
    if isinstance(inputs_to_half, str) or not all(isinstance(each, int | str) for each in inputs_to_half):
        raise ConfigTypeError(
            f"inputs_to_half is {inputs_to_half!r}; a list of positions and names of forward's inputs is due."
        )
    return tuple(inputs_to_half)
