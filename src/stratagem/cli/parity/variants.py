"""The variants that ``stratagem parity`` trains, and their configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from stratagem.cli.options import with_strategy
from stratagem.config import Config
from stratagem.errors import ConfigValueError
from stratagem.registry.strategy_names import strategy_name
from stratagem.train.building import accumulation_of

__all__ = [
    "ParitySettings",
    "Variant",
    "variant_config",
    "parse_strategies",
    "variants",
    "variants_for",
    "accumulation_count",
]

# Sections that the comparison does not need, or whose effect depends on how the batch is split.
_REMOVED = (
    "param_scheduler", "auto_scale_lr", "resume", "val_dataloader", "val_cfg", "val_evaluator",
    "test_dataloader", "test_cfg", "test_evaluator",
)  # fmt: skip
# Default options of engines: sharded training in float32, which can be compared with the other variants.
_ENGINE_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "DeepSpeedStrategy": {"zero_optimization": {"stage": 2}},
    "ColossalAIStrategy": {"plugin": {"type": "LowLevelZeroPlugin", "stage": 1, "precision": "fp32"}},
}
_QUIET = dict.fromkeys(("runtime_info", "logger", "checkpoint"))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ParitySettings:
    """The options of ``stratagem parity``.

    Attributes:
        steps: the number of optimizer steps.
        nproc: the number of processes in the distributed variants.
        eval_layers: whether dropout and batch normalization are in evaluation mode.
        tolerance: the largest relative difference that counts as rounding.
        strategies: the class names of the strategies that train in ``nproc`` processes.
    """

    steps: int
    nproc: int
    eval_layers: bool
    tolerance: float
    strategies: tuple[str, ...] = ("DDPStrategy",)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train the same steps.

    Attributes:
        key: the name of the folder with its recorded steps.
        name: the name in the table.
        against: the key of the variant that it is compared with; None for the reference.
        exact: whether the results must be bitwise identical; otherwise rounding differences are allowed.
        nproc: the number of processes, which share the batch.
        micro_batches: the number of micro-batches per micro-batch of the configuration.
        resumed: whether the run is stopped halfway and resumed.
        strategy: the class name of the strategy.
    """

    key: str
    name: str
    against: str | None = None
    exact: bool = True
    nproc: int = 1
    micro_batches: int = 1
    resumed: bool = False
    strategy: str = "SingleDeviceStrategy"


def variants(nproc: int, *, accumulates: bool, strategies: Sequence[str] = ("DDPStrategy",)) -> list[Variant]:
    """Return the variants in order; each is compared with an earlier one.

    Args:
        nproc: the number of processes in the distributed variants.
        accumulates: whether to include gradient accumulation.
        strategies: the class names of the strategies for the distributed variants.
    """
    listed = [
        Variant(key="one", name="one process"),
        Variant(key="again", name="one process, again", against="one"),
        Variant(key="resumed", name="one process, stopped and resumed", against="one", resumed=True),
    ]
    if accumulates and nproc > 1:
        name = f"one process, {nproc} micro-batches per step"
        listed.append(Variant(key="accumulated", name=name, against="one", exact=False, micro_batches=nproc))
    for strategy in strategies if nproc > 1 else ():
        key, name = f"ranks_{strategy}", f"{nproc} processes, {strategy.removesuffix('Strategy')}"
        listed += [
            Variant(key=key, name=name, against="one", exact=False, nproc=nproc, strategy=strategy),
            Variant(
                key=f"{key}_resumed",
                name=f"{name}, stopped and resumed",
                against=key,
                nproc=nproc,
                strategy=strategy,
                resumed=True,
            ),
        ]
    return listed


def parse_strategies(listed: str) -> tuple[str, ...]:
    """Return the class names of strategies, given a comma-separated list of names.

    Raises:
        ConfigValueError: if a strategy is unknown or does not support several processes.
    """
    names = tuple(dict.fromkeys(strategy_name(name.strip()) for name in listed.split(",")))
    if "SingleDeviceStrategy" in names:
        raise ConfigValueError(
            f"--strategy {listed}: SingleDeviceStrategy is always included as the reference. List only "
            "multi-process strategies."
        )
    return names


def variants_for(config: Config, settings: ParitySettings) -> list[Variant]:
    """Return the variants for a configuration, without accumulation if it has several optimizers."""
    accumulates = "optimizer" in config["optim_wrapper"]
    return variants(settings.nproc, accumulates=accumulates, strategies=settings.strategies)


def variant_config(config: Config, variant: Variant, settings: ParitySettings, folder: Path) -> Config:
    """Return the configuration of a variant, whose steps process the same samples as in all other variants."""
    result = copy.deepcopy(config)
    for key in _REMOVED:
        result.pop(key, None)
    accumulative_counts = accumulation_count(config)
    result["work_dir"] = str(folder / f"{variant.key}_run")
    result["strategy"] = {
        **_ENGINE_DEFAULTS.get(variant.strategy, {}),
        **with_strategy(config.get("strategy"), variant.strategy),
    }
    max_iters = settings.steps * accumulative_counts * variant.micro_batches
    result["train_cfg"] = {"by_epoch": False, "max_iters": max_iters}
    result["default_hooks"] = {**(config.get("default_hooks") or {}), **_QUIET}
    result["randomness"] = {"seed": 0, **(config.get("randomness") or {}), "diff_rank_seed": False}
    result["log_level"] = "ERROR"
    factor = settings.nproc // (variant.nproc * variant.micro_batches)
    batch_size = config["train_dataloader"]["batch_size"] * factor
    result.merge_from_dict({"train_dataloader.batch_size": batch_size}, source="parity")
    if variant.micro_batches > 1:
        counts = {"optim_wrapper.accumulative_counts": accumulative_counts * variant.micro_batches}
        result.merge_from_dict(counts, source="parity")
    return result


def accumulation_count(config: Config) -> int:
    """Return the configured number of micro-batches per optimizer step."""
    return accumulation_of(config["optim_wrapper"])
