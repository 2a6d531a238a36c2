"""The ways in which ``stratagem parity`` trains the same steps, and their configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from stratagem.cli.options import strategy_name, with_strategy
from stratagem.config import Config
from stratagem.errors import ConfigValueError
from stratagem.train.building import accumulation_of

__all__ = ["Trial", "Variant", "cut_config", "strategies_of", "variants", "variants_of", "windows_of"]

# What plays no part, or counts in units that another cut of the batch changes.
_LEFT_OUT = (
    "param_scheduler", "auto_scale_lr", "resume", "val_dataloader", "val_cfg", "val_evaluator",
    "test_dataloader", "test_cfg", "test_evaluator",
)  # fmt: skip
# How engines train where the configuration says nothing of them: with the parameters cut, and in full precision, which is
# what can be compared.
_PLAIN: Final[Mapping[str, Mapping[str, Any]]] = {
    "DeepSpeedStrategy": {"zero_optimization": {"stage": 2}},
    "ColossalAIStrategy": {"plugin": {"type": "LowLevelZeroPlugin", "stage": 1, "precision": "fp32"}},
}
_QUIET = dict.fromkeys(("runtime_info", "logger", "checkpoint"))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The options of ``parity``; ``strategies`` are those that train in several processes."""

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
        key: the name of its folder.
        name: what it is called.
        against: the key of the variant with which it is compared; None for the first.
        exact: whether every bit must be equal, or sums may be rounded otherwise.
        nproc: how many processes train; each takes its part of the batch.
        micro_batches: into how many micro-batches the batch is cut beyond what the configuration does.
        resumed: whether it is stopped half-way and resumed.
        strategy: what places the model, as the configuration's section says it, or else as :data:`_PLAIN` does.
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
    """Return the ways to train, in order; each is compared with one before it."""
    listed = [
        Variant(key="one", name="one process"),
        Variant(key="again", name="one process, again", against="one"),
        Variant(key="resumed", name="one process, stopped and resumed", against="one", resumed=True),
    ]
    if accumulates and nproc > 1:
        name = f"one process, {nproc} micro-batches a step"
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


def strategies_of(listed: str) -> tuple[str, ...]:
    """Return the strategies that the command line names, parted by commas.

    Raises:
        ConfigValueError: if there is no such strategy, or it trains in one process alone.
    """
    names = tuple(dict.fromkeys(strategy_name(name.strip()) for name in listed.split(",")))
    if "SingleDeviceStrategy" in names:
        raise ConfigValueError(
            f"--strategy {listed}: one process is what all others are compared with. Name those that train in several."
        )
    return names


def variants_of(config: Config, trial: Trial) -> list[Variant]:
    """Return the ways to train a configuration."""
    accumulates = "optimizer" in config["optim_wrapper"]
    return variants(trial.nproc, accumulates=accumulates, strategies=trial.strategies)


def cut_config(config: Config, variant: Variant, trial: Trial, folder: Path) -> Config:
    """Return the configuration of a variant: the same samples a step, otherwise cut."""
    cut = copy.deepcopy(config)
    for key in _LEFT_OUT:
        cut.pop(key, None)
    windows = windows_of(config)
    cut["work_dir"] = str(folder / f"{variant.key}_run")
    cut["strategy"] = {**_PLAIN.get(variant.strategy, {}), **with_strategy(config.get("strategy"), variant.strategy)}
    cut["train_cfg"] = {"by_epoch": False, "max_iters": trial.steps * windows * variant.micro_batches}
    cut["default_hooks"] = {**(config.get("default_hooks") or {}), **_QUIET}
    cut["randomness"] = {"seed": 0, **(config.get("randomness") or {}), "diff_rank_seed": False}
    cut["log_level"] = "ERROR"
    share = trial.nproc // (variant.nproc * variant.micro_batches)
    cut.merge_from_dict(
        {"train_dataloader.batch_size": config["train_dataloader"]["batch_size"] * share}, source="parity"
    )
    if variant.micro_batches > 1:
        counts = {"optim_wrapper.accumulative_counts": windows * variant.micro_batches}
        cut.merge_from_dict(counts, source="parity")
    return cut


def windows_of(config: Config) -> int:
    """Return the micro-batches of an update as configured."""
    return accumulation_of(config["optim_wrapper"])
