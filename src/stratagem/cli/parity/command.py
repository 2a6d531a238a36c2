"""``stratagem parity``: train a few steps in several ways that should come to the same, and say where they do not."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import typer
from rich.console import Console
from rich.table import Table

from stratagem.cli.launch.processes import launch_again
from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.parity.variants import Trial, Variant, cut_config, variants_of, windows_of
from stratagem.config import Config, require
from stratagem.config_schema import SECTIONS
from stratagem.data import build_dataloader
from stratagem.distributed import close_dist, infer_launcher, init_dist
from stratagem.errors import ConfigKeyError, ConfigValueError, TrainingError
from stratagem.registry import switch_scope
from stratagem.runner import Runner
from stratagem.train.tools.trace_comparison import BatchDependence, Comparison, StepRecorder, compare_traces

__all__ = ["Found", "parity", "train_variant"]

_NEEDED = ("model", "train_dataloader", "optim_wrapper")


@final
@dataclass(slots=True)
class Found:
    """What the variants came to: by key, how each compares, and what of the model may explain it."""

    comparisons: dict[str, Comparison] = field(default_factory=dict)
    batch_dependence: BatchDependence = field(
        default_factory=lambda: BatchDependence(uses_rng=False, num_batch_norms=0)
    )

    def verdict(self, variant: Variant, *, tolerance: float) -> str:
        """Return in words how a variant compares; ``"DIFFERENT"`` where nothing explains it."""
        if variant.against is None:
            return "what the others are compared with"
        most = self.comparisons[variant.key].most
        if most is None:
            return "equal to the bit"
        if not variant.exact and most.relative <= tolerance:
            return "equal but for the order of sums"
        if not variant.exact and (self.batch_dependence.uses_rng or self.batch_dependence.num_batch_norms > 0):
            return "not comparable"
        return "DIFFERENT"


def parity(options: RunOptions, trial: Trial, *, record: Path | None) -> None:
    """Train the variants and print how they compare; with ``record`` train those of several processes alone.

    Raises:
        ConfigError: in one of its kinds, if the configuration does not describe a training that can be cut so.
        typer.Exit: with 1, if a variant differs and nothing explains it.
    """
    config = read_config(options)
    if record is not None:
        if infer_launcher() == "none":
            launch_again(trial.nproc, by=None)
        else:
            _train_in_one_group(config, trial, record)
        return
    require(config, SECTIONS, scope=config.get("default_scope"))
    steps = _steps(config, trial)
    trial = replace(trial, steps=steps)
    with tempfile.TemporaryDirectory(prefix="stratagem-parity-") as folder:
        found = _compare(options, config, trial, Path(folder))
    _show(options, config, trial, found)
    if "DIFFERENT" in _verdicts(config, trial, found):
        raise typer.Exit(1)


def _train_in_one_group(config: Config, trial: Trial, folder: Path) -> None:
    """Train the variants of several processes as one of their ranks."""
    # Made here, and so not made and ended with each of the runs.
    init_dist(**(config.get("env_cfg") or {}).get("dist_cfg", {}))
    try:
        for variant in variants_of(config, trial):
            if variant.nproc > 1:
                train_variant(config, variant, trial, folder)
    finally:
        close_dist()


def _compare(options: RunOptions, config: Config, trial: Trial, folder: Path) -> Found:
    found = Found()
    for variant in variants_of(config, trial):
        if variant.nproc == 1:
            batch_dependence = train_variant(config, variant, trial, folder)
            found.batch_dependence = batch_dependence if variant.against is None else found.batch_dependence
        elif not (folder / variant.key).exists():
            _train_in_processes(options, replace(trial, strategies=(variant.strategy,)), folder)
        if variant.against is not None:
            found.comparisons[variant.key] = compare_traces(folder / variant.against, folder / variant.key, trial.steps)
    return found


def train_variant(config: Config, variant: Variant, trial: Trial, folder: Path) -> BatchDependence:
    """Train one variant here, and leave its steps in a folder of its name."""
    half = trial.steps // 2
    recorder = StepRecorder(
        folder / variant.key, eval_layers=trial.eval_layers, stop_after=half if variant.resumed else None
    )
    batch_dependence = _run(cut_config(config, variant, trial, folder), recorder)
    if variant.resumed:
        again = cut_config(config, variant, trial, folder)
        again["resume"] = True
        _run(again, StepRecorder(folder / variant.key, eval_layers=trial.eval_layers))
    return batch_dependence


def _run(config: Config, recorder: StepRecorder) -> BatchDependence:
    hooks = list(config.get("custom_hooks") or ())
    config["custom_hooks"] = [*hooks, recorder]
    runner = Runner.from_cfg(config)
    try:
        runner.train()
    finally:
        runner.close()
    return recorder.batch_dependence


def _train_in_processes(options: RunOptions, trial: Trial, folder: Path) -> None:
    """Train the variants of a strategy in several processes by this very command.

    Raises:
        TrainingError: with what it said, if it failed.
    """
    words = [sys.executable, "-m", "stratagem", "parity", str(options.config), "--record", str(folder)]
    words += ["--steps", str(trial.steps), "--nproc", str(trial.nproc), "--strategy", ",".join(trial.strategies)]
    words += [word for override in options.overrides for word in ("--set", override)]
    words += ["--eval-layers"] if trial.eval_layers else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 -- this very program
    if done.returncode:
        under = ", ".join(trial.strategies)
        raise TrainingError(f"Training in {trial.nproc} processes under {under} failed:\n{done.stderr.strip()}")


def _verdicts(config: Config, trial: Trial, found: Found) -> set[str]:
    return {found.verdict(variant, tolerance=trial.tolerance) for variant in variants_of(config, trial)}


def _steps(config: Config, trial: Trial) -> int:
    """Return how many steps can be trained before an epoch ends, at most those asked for.

    Raises:
        ConfigKeyError: if the configuration does not describe a training.
        ConfigValueError: if the batch cannot be cut, or the data has too few samples.
    """
    _refuse_other(config)
    loader = config["train_dataloader"]
    size = loader.get("batch_size")
    if not isinstance(size, int):
        raise ConfigValueError(
            f"train_dataloader has batch_size={size!r}; to cut the batch in other ways it must be a number."
        )
    with switch_scope(config.get("default_scope")):
        dataset = build_dataloader(copy.deepcopy(loader), seed=0, training=True).dataset
    if not isinstance(dataset, Sized):
        return trial.steps
    whole = len(dataset) // (size * trial.nproc * windows_of(config))
    # One before the stop and one after it.
    if whole < 2:
        raise ConfigValueError(
            f"The dataset has {len(dataset)} samples, and two steps of {trial.nproc} x {size} x {windows_of(config)} take "
            "more. Give a smaller batch: --set train_dataloader.batch_size=1"
        )
    return min(trial.steps, whole)


def _refuse_other(config: Config) -> None:
    name = config.filename or "The configuration"
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise ConfigKeyError(f"{name} has no {', '.join(missing)}: there is no training to compare.")
    built = [key for key in _NEEDED if not isinstance(config[key], Mapping)]
    if built:
        raise ConfigValueError(
            f"{name}: {', '.join(built)} is built already, and every training needs one of its own. Give a mapping."
        )


def _show(options: RunOptions, config: Config, trial: Trial, found: Found) -> None:
    size = config["train_dataloader"]["batch_size"] * trial.nproc * windows_of(config)
    table = Table(title=f"{options.config}: {trial.steps} steps of {size} samples", title_justify="left")
    for column in ("training", "result", "first difference", "largest difference"):
        table.add_column(column, overflow="fold")
    for variant in variants_of(config, trial):
        compared = found.comparisons.get(variant.key, Comparison(None, None))
        ends = [each.describe() if each is not None else "" for each in (compared.first, compared.most)]
        table.add_row(variant.name, found.verdict(variant, tolerance=trial.tolerance), *ends)
    Console().print(table)
    for note in _notes(config, trial, found):
        typer.echo(note)


def _notes(config: Config, trial: Trial, found: Found) -> list[str]:
    """Return what explains the results, and what was not compared."""
    verdicts = _verdicts(config, trial, found)
    notes = []
    if "equal but for the order of sums" in verdicts:
        notes.append(
            f"Sums over another cut of the batch round otherwise; up to {trial.tolerance:g} of a value's size is taken for "
            "that (--tolerance)."
        )
    if "not comparable" in verdicts:
        causes = [
            *(["draws random numbers, as dropout does"] if found.batch_dependence.uses_rng else []),
            *(
                [f"normalises over the batch in {found.batch_dependence.num_batch_norms} layers"]
                if found.batch_dependence.num_batch_norms
                else []
            ),
        ]
        notes.append(
            f"A training step of this model {' and '.join(causes)}: another cut of the batch gives other numbers, rightly. "
            "--eval-layers puts dropout and batch normalisation into evaluation and compares the rest."
        )
    if "DIFFERENT" in verdicts:
        notes.append("DIFFERENT is not explained by rounding or by layers that look at the batch.")
    if "optimizer" not in config["optim_wrapper"]:
        notes.append(
            "Accumulation was not compared: the configuration does not say it at optim_wrapper.accumulative_counts."
        )
    left_out = [key for key in ("param_scheduler", "auto_scale_lr") if config.get(key) is not None]
    if left_out:
        notes.append(f"Left out, since they count what a cut changes: {', '.join(left_out)}.")
    return notes
