"""The variants that ``stratagem parity`` trains, and their configurations."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, final

from stratagem.cli.options import with_strategy
from stratagem.cli.parity.schedules import hooks_in_steps, schedules_in_steps
from stratagem.config import Config
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.optim.amp import HALF_DTYPES
from stratagem.registry import OPTIMIZERS
from stratagem.registry.strategy_names import strategy_name
from stratagem.train.building import accumulation_of

__all__ = [
    "Family",
    "NoiseSource",
    "ParitySettings",
    "Variant",
    "accumulation_count",
    "parse_dtypes",
    "parse_names",
    "parse_numbers",
    "parse_strategies",
    "run_length",
    "variant_config",
    "variants",
    "variants_for",
]

# Sections that the comparison does not need, or whose effect depends on how the batch is split.
_REMOVED = (
    "auto_scale_lr", "resume", "val_dataloader", "val_cfg", "val_evaluator",
    "test_dataloader", "test_cfg", "test_evaluator", "limit_val_batches", "limit_test_batches", "trackers",
    "limit_train_batches", "overfit_batches",
)  # fmt: skip
# Default options of engines: sharded training in float32, which can be compared with the other variants.
_ENGINE_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "DeepSpeedStrategy": {"zero_optimization": {"stage": 2}},
    "ColossalAIStrategy": {"plugin": {"type": "LowLevelZeroPlugin", "stage": 1, "precision": "fp32"}},
}
_QUIET = dict.fromkeys(("runtime_info", "logger", "checkpoint"))
# The options that --optimizer keeps.
_SHARED = ("lr", "weight_decay")
_AMP_KEYS = ("type", "dtype", "loss_scale")
# A constant, because an update that a dynamic scale skips would shift all later steps.
_LOSS_SCALE = 1024.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ParitySettings:
    """The options of ``stratagem parity``.

    Attributes:
        steps: the number of optimizer steps.
        nproc: the number of processes in the distributed variants.
        eval_layers: whether dropout and batch normalization are in evaluation mode.
        tolerance: the largest relative difference that counts as rounding; None to derive it from a reference in float64.
        strategies: the class names of the strategies that train in ``nproc`` processes.
        optimizers: the optimizers to train with, each with its own reference; the configured one if empty.
        dtypes: the dtypes to train in, each with its own reference; the configured one if empty.
        accumulate: the numbers of micro-batches per step; by default ``nproc``.
        workers: the numbers of data workers to compare with.
        compiled: whether to include compiled variants.
        resumed: whether to include variants that are stopped and resumed.
    """

    steps: int
    nproc: int
    eval_layers: bool = False
    tolerance: float | None = None
    strategies: tuple[str, ...] = ("DDPStrategy",)
    optimizers: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    accumulate: tuple[int, ...] | None = None
    workers: tuple[int, ...] = ()
    compiled: bool = False
    resumed: bool = True


@final
@dataclass(frozen=True, slots=True)
class Family:
    """Variants that are compared with each other: they have the same optimizer and dtype. None stands for the configured one."""

    optimizer: str | None = None
    dtype: str | None = None

    @property
    def name(self) -> str:
        """The name in the table; empty if both are configured."""
        return ", ".join(each for each in (self.optimizer, self.dtype) if each)


class NoiseSource(StrEnum):
    """A way to measure the rounding errors of a reference: the distance of another training from it."""

    FLOAT64 = "float64"
    ROUNDED = "gradients rounded differently"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train the same steps.

    Attributes:
        key: the name of the folder with its recorded steps.
        name: the name in the table.
        against: the key of the variant that it is compared with; None for a reference.
        exact: whether the results must be bitwise identical; otherwise rounding differences are allowed.
        family: the optimizer and the dtype.
        nproc: the number of processes, which share the batch.
        micro_batches: the number of micro-batches per micro-batch of the configuration.
        resumed: whether the run is stopped halfway and resumed.
        strategy: the class name of the strategy.
        workers: the number of data workers; None for the configured number.
        compiled: whether the model is compiled.
        noise: how the rounding errors of the reference are measured with this variant; None if it is compared instead.
    """

    key: str
    name: str
    against: str | None = None
    exact: bool = True
    family: Family = Family()
    nproc: int = 1
    micro_batches: int = 1
    resumed: bool = False
    strategy: str = "SingleDeviceStrategy"
    workers: int | None = None
    compiled: bool = False
    noise: NoiseSource | None = None


def variants(settings: ParitySettings, *, accumulates: bool) -> list[Variant]:
    """Return the variants in order; each is compared with an earlier one.

    Args:
        settings: the options of the command.
        accumulates: whether the configuration allows to change the number of micro-batches per step.
    """
    families = [
        Family(optimizer, dtype) for optimizer in settings.optimizers or (None,) for dtype in settings.dtypes or (None,)
    ]
    return [
        _in_family(variant, family) for family in families for variant in _of_family(settings, accumulates=accumulates)
    ]


def _of_family(settings: ParitySettings, *, accumulates: bool) -> Iterator[Variant]:
    one, resumed = "one process", "stopped and resumed"
    nproc = settings.nproc
    yield Variant(key="one", name=one)
    for source in NoiseSource:
        yield Variant(key=source.name.lower(), name=f"{one}, {source}", against="one", exact=False, noise=source)
    yield Variant(key="again", name=f"{one}, again", against="one")
    if settings.resumed:
        yield Variant(key="resumed", name=f"{one}, {resumed}", against="one", resumed=True)
    counts = (nproc,) if settings.accumulate is None else settings.accumulate
    for count in (each for each in counts if accumulates and each > 1):
        name = f"{one}, {count} micro-batches per step"
        yield Variant(key=f"accumulated_{count}", name=name, against="one", exact=False, micro_batches=count)
    if settings.compiled:
        yield Variant(key="compiled", name=f"{one}, compiled", against="one", exact=False, compiled=True)
    for count in settings.workers:
        name = f"{one}, {_workers(count)}"
        yield Variant(key=f"workers_{count}", name=name, against="one", workers=count)
        if settings.resumed:
            name = f"{name}, {resumed}"
            yield Variant(key=f"workers_{count}_resumed", name=name, against="one", workers=count, resumed=True)
    for strategy in settings.strategies if nproc > 1 else ():
        yield from _of_strategy(strategy, settings)


def _of_strategy(strategy: str, settings: ParitySettings) -> Iterator[Variant]:
    key, name = f"ranks_{strategy}", f"{settings.nproc} processes, {strategy.removesuffix('Strategy')}"
    ranks = Variant(key=key, name=name, against="one", exact=False, nproc=settings.nproc, strategy=strategy)
    yield ranks
    if settings.resumed:
        yield replace(
            ranks, key=f"{key}_resumed", name=f"{name}, stopped and resumed", against=key, exact=True, resumed=True
        )
    for count in settings.workers:
        yield replace(
            ranks, key=f"{key}_workers_{count}", name=f"{name}, {_workers(count)}", against=key, exact=True, workers=count
        )  # fmt: skip
    if settings.compiled:
        yield replace(ranks, key=f"{key}_compiled", name=f"{name}, compiled", compiled=True)


def _workers(count: int) -> str:
    return f"{count} data worker{'' if count == 1 else 's'}"


def _in_family(variant: Variant, family: Family) -> Variant:
    if not family.name:
        return variant
    prefix = family.name.replace(", ", "_")
    return replace(
        variant,
        key=f"{prefix}_{variant.key}",
        name=f"{family.name}: {variant.name}",
        against=None if variant.against is None else f"{prefix}_{variant.against}",
        family=family,
    )


def parse_names(listed: str | None) -> tuple[str, ...]:
    """Return the names in a comma-separated list, each once."""
    return tuple(dict.fromkeys(name.strip() for name in (listed or "").split(",") if name.strip()))


def parse_numbers(option: str, listed: str | None, *, least: int) -> tuple[int, ...]:
    """Return the numbers in a comma-separated list, each once.

    Raises:
        ConfigValueError: if one of them is not an integer of at least ``least``.
    """
    names = parse_names(listed)
    for name in names:
        if not name.isdigit() or int(name) < least:
            raise ConfigValueError(f"{option} {listed}: {name!r} is not an integer of at least {least}.")
    return tuple(int(name) for name in names)


def parse_dtypes(listed: str | None) -> tuple[str, ...]:
    """Return the names of dtypes in a comma-separated list.

    Raises:
        ConfigValueError: if one of them is unknown.
    """
    names = parse_names(listed)
    known = {"float32": "float32", "fp32": "float32", **{name: str(dtype)[6:] for name, dtype in HALF_DTYPES.items()}}
    for name in names:
        if name not in known:
            raise ConfigValueError(f"--dtype {listed}: {name!r} is unknown. Use float32, bfloat16 or float16.")
    return tuple(dict.fromkeys(known[name] for name in names))


def parse_strategies(listed: str) -> tuple[str, ...]:
    """Return the class names of strategies, given a comma-separated list of names.

    Raises:
        ConfigValueError: if a strategy is unknown or does not support several processes.
    """
    names = tuple(dict.fromkeys(strategy_name(name) for name in parse_names(listed)))
    if "SingleDeviceStrategy" in names:
        raise ConfigValueError(
            f"--strategy {listed}: SingleDeviceStrategy is always included as the reference. List only "
            "multi-process strategies."
        )
    return names


def variants_for(config: Config, settings: ParitySettings) -> list[Variant]:
    """Return the variants for a configuration, without accumulation if it has several optimizers.

    Raises:
        ConfigValueError: if an option does not apply to the configuration, or the batch cannot be split as requested.
    """
    optim = config["optim_wrapper"]
    accumulates = "optimizer" in optim
    _require_changeable(optim, settings)
    listed = variants(settings, accumulates=accumulates)
    total = config["train_dataloader"]["batch_size"] * settings.nproc
    for variant in listed:
        parts = _num_parts(variant, _strategy_config(config, variant))
        if total % parts:
            raise ConfigValueError(
                f"{variant.name}: {total} samples per step ({total // settings.nproc} for each of {settings.nproc} processes) "
                f"cannot be split into {parts} equal micro-batches. Change --accumulate, or set train_dataloader.batch_size."
            )
    return listed


def _strategy_config(config: Config, variant: Variant) -> dict[str, Any]:
    """Return the ``strategy`` of a variant, with the configured options if it is the configured strategy."""
    defaults = _ENGINE_DEFAULTS.get(variant.strategy, {})
    return {**defaults, **with_strategy(config.get("strategy"), variant.strategy)}


def _num_parts(variant: Variant, strategy: Mapping[str, Any]) -> int:
    """Return the number of micro-batches into which a variant splits the samples of a step.

    Raises:
        ConfigValueError: if the ranks that share a micro-batch under tensor parallelism do not divide the processes.
    """
    plugin = strategy.get("plugin")
    sharing = plugin.get("tp_size") if isinstance(plugin, Mapping) else strategy.get("tp")
    sharing = sharing if isinstance(sharing, int) and sharing > 0 else 1
    if variant.nproc % sharing:
        raise ConfigValueError(
            f"{variant.name}: tensor parallelism shards layers across {sharing} ranks, which do not divide the number of "
            f"processes. Set --nproc to a multiple of {sharing}."
        )
    return variant.nproc // sharing * variant.micro_batches


def _require_changeable(optim: Mapping[str, Any], settings: ParitySettings) -> None:
    """Require that the options can change the optimizer wrapper of the configuration."""
    if "optimizer" not in optim:
        for option, given in (
            ("--optimizer", settings.optimizers),
            ("--dtype", settings.dtypes),
            ("--accumulate", settings.accumulate),
        ):
            if given:
                raise ConfigValueError(
                    f"{option} requires optim_wrapper.optimizer, but the configuration has several optimizers or a constructor "
                    f"for them (optim_wrapper has the keys {', '.join(map(str, optim))}). Omit {option}."
                )
    if settings.optimizers and not isinstance(optim["optimizer"], Mapping):
        raise ConfigTypeError(
            f"--optimizer requires optim_wrapper.optimizer to be a mapping, got {optim['optimizer']!r}."
        )
    if not settings.dtypes:
        return
    kind = optim.get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ConfigValueError(
            f"--dtype replaces OptimWrapper by AmpOptimWrapper, but optim_wrapper has type={kind!r}. Omit --dtype, and set the "
            "dtype in the configuration."
        )
    engines = [name for name in settings.strategies if name in _ENGINE_DEFAULTS]
    if engines:
        raise ConfigValueError(
            f"--dtype cannot be combined with --strategy {engines[0]}, whose dtype is an option of the engine. Omit --dtype, and "
            f"set the dtype in the configuration: strategy=dict(type={engines[0]!r}, ...)."
        )


def variant_config(
    config: Config, variant: Variant, settings: ParitySettings, folder: Path, *, epoch_length: int | None = None
) -> Config:
    """Return the configuration of a variant, whose steps process the same samples as in all other variants.

    Args:
        config: the configuration of the user.
        variant: the variant.
        settings: the options of the command.
        folder: the folder for work directories.
        epoch_length: the number of steps per epoch, for schedules that count epochs; None if it is unknown.
    """
    result = copy.deepcopy(config)
    for key in _REMOVED:
        result.pop(key, None)
    accumulative_counts = accumulation_count(config)
    result["work_dir"] = str(folder / f"{variant.key}_run")
    result["report"] = False
    result["strategy"] = _strategy_config(config, variant)
    max_iters = settings.steps * accumulative_counts * variant.micro_batches
    result["train_cfg"] = {"by_epoch": False, "max_iters": max_iters}
    length = run_length(config, settings, epoch_length)
    result["param_scheduler"] = schedules_in_steps(config.get("param_scheduler"), epoch_length, length).schedules
    result["default_hooks"] = {**(config.get("default_hooks") or {}), **_QUIET}
    result["custom_hooks"] = hooks_in_steps(config.get("custom_hooks"), variant.micro_batches)
    result["randomness"] = {"seed": 0, **(config.get("randomness") or {}), "diff_rank_seed": False}
    result["log_level"] = "ERROR"
    batch_size = config["train_dataloader"]["batch_size"] * settings.nproc // _num_parts(variant, result["strategy"])
    changes: dict[str, Any] = {"train_dataloader.batch_size": batch_size}
    if variant.micro_batches > 1:
        changes["optim_wrapper.accumulative_counts"] = accumulative_counts * variant.micro_batches
    if variant.workers is not None:
        changes["train_dataloader.num_workers"] = variant.workers
        if not variant.workers:
            result["train_dataloader"] = _without_worker_options(result["train_dataloader"])
    result.merge_from_dict(changes, source="parity")
    if settings.compiled:
        result["compile"] = (config.get("compile") or True) if variant.compiled else False
    if variant.family.optimizer is not None:
        result["optim_wrapper"]["optimizer"] = _other_optimizer(
            result["optim_wrapper"]["optimizer"], variant.family.optimizer
        )
    if variant.noise is NoiseSource.FLOAT64:
        _set_dtype(result, "float32")
    elif variant.family.dtype is not None:
        _set_dtype(result, variant.family.dtype)
    return result


def run_length(config: Config, settings: ParitySettings, epoch_length: int | None) -> int:
    """Return the number of steps of the configured run; if it is unknown, that of the comparison."""
    length = config.get("train_cfg") or {}
    if length.get("max_steps") is not None:
        return int(length["max_steps"])
    if length.get("max_iters") is not None:
        return max(1, int(length["max_iters"]) // accumulation_count(config))
    if length.get("max_epochs") is not None and epoch_length is not None:
        return int(length["max_epochs"]) * epoch_length
    return settings.steps


def _without_worker_options(loader: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in loader.items() if key not in ("persistent_workers", "prefetch_factor")}


def _other_optimizer(configured: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the configuration of an optimizer with those of the configured options that it is likely to share."""
    if configured.get("type") == name:
        return dict(configured)
    target = OPTIMIZERS.get(name)
    accepted = inspect.signature(target).parameters if target is not None else {}
    return {"type": name, **{key: configured[key] for key in _SHARED if key in configured and key in accepted}}


def _set_dtype(config: Config, dtype: str) -> None:
    """Train in float32, or under autocast with another dtype. Wrappers of several optimizers are not changed."""
    if "optimizer" not in config["optim_wrapper"]:
        return
    optim = {key: value for key, value in config["optim_wrapper"].items() if key not in _AMP_KEYS}
    kind = config["optim_wrapper"].get("type", "OptimWrapper")
    if dtype != "float32":
        scale = {"loss_scale": _LOSS_SCALE} if dtype == "float16" else {}
        optim |= {"type": "AmpOptimWrapper", "dtype": dtype, **scale}
    elif kind != "AmpOptimWrapper":
        optim["type"] = kind
    config["optim_wrapper"] = optim


def accumulation_count(config: Config) -> int:
    """Return the configured number of micro-batches per optimizer step."""
    return accumulation_of(config["optim_wrapper"])
