"""Implement ``stratagem parity``: train the variants, compare them, and print a table of the differences."""

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

from stratagem.cli.launch.processes import launch_ranks
from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import Table, echo, print_table
from stratagem.cli.parity.variants import ParitySettings, Variant, accumulation_count, variant_config, variants_for
from stratagem.config import Config
from stratagem.config_schema import require_valid
from stratagem.data import build_dataloader
from stratagem.distributed import close_dist, infer_launcher, init_dist
from stratagem.errors import ConfigKeyError, ConfigValueError, TrainingError
from stratagem.registry import switch_scope
from stratagem.runner import Runner
from stratagem.train.tools.trace_comparison import (
    BatchDependence,
    Comparison,
    StepRecorder,
    compare_traces,
    require_movement,
)

__all__ = ["ParityReport", "parity", "train_variant"]

_NEEDED = ("model", "train_dataloader", "optim_wrapper")


@final
@dataclass(slots=True)
class ParityReport:
    """The results of all variants.

    Attributes:
        comparisons: the differences between each variant and its reference, keyed by variant.
        batch_dependence: the layers of the model whose results depend on how the batch is split.
    """

    comparisons: dict[str, Comparison] = field(default_factory=dict)
    batch_dependence: BatchDependence = field(
        default_factory=lambda: BatchDependence(uses_rng=False, num_batch_norms=0)
    )

    def verdict(self, variant: Variant, *, tolerance: float) -> str:
        """Return the result of a variant for the table; ``"DIFFERENT"`` if the difference is unexplained."""
        if variant.against is None:
            return "reference"
        most = self.comparisons[variant.key].most
        if most is None:
            return "bitwise identical"
        if not variant.exact and most.relative <= tolerance:
            return "equal up to rounding"
        if not variant.exact and (self.batch_dependence.uses_rng or self.batch_dependence.num_batch_norms > 0):
            return "not comparable"
        return "DIFFERENT"


def parity(options: RunOptions, settings: ParitySettings, *, record: Path | None, as_json: bool = False) -> None:
    """Train all variants and print how they compare.

    Args:
        options: the configuration.
        settings: the settings of the comparison.
        record: if given, this process only trains the variants with several processes, and records them in this folder.
        as_json: whether to print the comparisons as JSON, without notes.

    Raises:
        ConfigError: or a subclass, if the configuration is invalid or its batches cannot be split.
        TrainingError: if training in several processes fails, or training does not change any parameter.
        typer.Exit: with status 1, if a difference is unexplained.
    """
    config = read_config(options)
    if record is not None:
        if infer_launcher() == "none":
            launch_ranks(settings.nproc, by=None)
        else:
            _train_in_one_group(config, settings, record)
        return
    require_valid(config)
    steps = _steps(config, settings)
    settings = replace(settings, steps=steps)
    with tempfile.TemporaryDirectory(prefix="stratagem-parity-") as folder:
        report = _compare(options, config, settings, Path(folder))
    _show(options, config, settings, report, as_json=as_json)
    if "DIFFERENT" in _verdicts(config, settings, report):
        raise typer.Exit(1)


def _train_in_one_group(config: Config, settings: ParitySettings, folder: Path) -> None:
    """Train the variants with several processes, as one of their ranks. Collective."""
    # All variants share one process group, which the individual runs neither create nor destroy.
    init_dist(**(config.get("env_cfg") or {}).get("dist_cfg", {}))
    try:
        for variant in variants_for(config, settings):
            if variant.nproc > 1:
                train_variant(config, variant, settings, folder)
    finally:
        close_dist()


def _compare(options: RunOptions, config: Config, settings: ParitySettings, folder: Path) -> ParityReport:
    report = ParityReport()
    for variant in variants_for(config, settings):
        if variant.nproc == 1:
            batch_dependence = train_variant(config, variant, settings, folder)
            if variant.against is None:
                report.batch_dependence = batch_dependence
                require_movement(folder / variant.key, settings.steps)
        elif not (folder / variant.key).exists():
            _train_in_processes(options, replace(settings, strategies=(variant.strategy,)), folder)
        if variant.against is not None:
            report.comparisons[variant.key] = compare_traces(
                folder / variant.against, folder / variant.key, settings.steps
            )
    return report


def train_variant(config: Config, variant: Variant, settings: ParitySettings, folder: Path) -> BatchDependence:
    """Train one variant in this process, and record its steps in a subfolder of ``folder`` named after its key."""
    half = settings.steps // 2
    recorder = StepRecorder(
        folder / variant.key, eval_layers=settings.eval_layers, stop_after=half if variant.resumed else None
    )
    batch_dependence = _run(variant_config(config, variant, settings, folder), recorder)
    if variant.resumed:
        again = variant_config(config, variant, settings, folder)
        again["resume"] = True
        _run(again, StepRecorder(folder / variant.key, eval_layers=settings.eval_layers))
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


def _train_in_processes(options: RunOptions, settings: ParitySettings, folder: Path) -> None:
    """Train the variants of a strategy in several processes, by running this command with ``--record``.

    Raises:
        TrainingError: with its error output, if the command fails.
    """
    words = [sys.executable, "-m", "stratagem", "parity", str(options.config), "--record", str(folder)]
    words += [
        "--steps",
        str(settings.steps),
        "--nproc",
        str(settings.nproc),
        "--strategy",
        ",".join(settings.strategies),
    ]
    words += [word for override in options.overrides for word in ("--set", override)]
    words += ["--eval-layers"] if settings.eval_layers else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 -- this program
    if done.returncode:
        names = ", ".join(settings.strategies)
        raise TrainingError(f"Training in {settings.nproc} processes with {names} failed:\n{done.stderr.strip()}")


def _verdicts(config: Config, settings: ParitySettings, report: ParityReport) -> set[str]:
    return {report.verdict(variant, tolerance=settings.tolerance) for variant in variants_for(config, settings)}


def _steps(config: Config, settings: ParitySettings) -> int:
    """Return the number of steps to train: the requested number, or fewer if the epoch is shorter.

    Raises:
        ConfigKeyError: if the configuration lacks a section that training needs.
        ConfigValueError: if the batch size is not a number, or the dataset has too few samples for two steps.
    """
    _require_mappings(config)
    loader = config["train_dataloader"]
    size = loader.get("batch_size")
    if not isinstance(size, int):
        raise ConfigValueError(
            f"train_dataloader has batch_size={size!r}; it must be a number, so that the batch can be split."
        )
    with switch_scope(config.get("default_scope")):
        dataset = build_dataloader(copy.deepcopy(loader), seed=0, training=True).dataset
    if not isinstance(dataset, Sized):
        return settings.steps
    whole = len(dataset) // (size * settings.nproc * accumulation_count(config))
    # The resumed variants train at least one step before the stop and one after it.
    if whole < 2:
        needed = 2 * settings.nproc * size * accumulation_count(config)
        raise ConfigValueError(
            f"The dataset has {len(dataset)} samples, but two steps in {settings.nproc} processes need {needed}. Use a smaller "
            "batch: --set train_dataloader.batch_size=1"
        )
    return min(settings.steps, whole)


def _require_mappings(config: Config) -> None:
    name = config.filename or "The configuration"
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise ConfigKeyError(f"{name} has no {', '.join(missing)}, which parity requires.")
    built = [key for key in _NEEDED if not isinstance(config[key], Mapping)]
    if built:
        raise ConfigValueError(
            f"{name}: {', '.join(built)} must be a mapping with a type, because each variant builds its own object."
        )


def _show(
    options: RunOptions, config: Config, settings: ParitySettings, report: ParityReport, *, as_json: bool
) -> None:
    size = config["train_dataloader"]["batch_size"] * settings.nproc * accumulation_count(config)
    table = Table(title=f"{options.config}: {settings.steps} steps of {size} samples", title_justify="left")
    for column in ("variant", "result", "first difference", "largest difference"):
        table.add_column(column, overflow="fold")
    for variant in variants_for(config, settings):
        compared = report.comparisons.get(variant.key, Comparison(None, None))
        ends = [each.describe() if each is not None else "" for each in (compared.first, compared.most)]
        table.add_row(variant.name, report.verdict(variant, tolerance=settings.tolerance), *ends)
    print_table(table, as_json=as_json)
    for note in () if as_json else _notes(config, settings, report):
        echo(note)


def _notes(config: Config, settings: ParitySettings, report: ParityReport) -> list[str]:
    """Return notes that explain the results and list what was not compared."""
    verdicts = _verdicts(config, settings, report)
    notes = []
    if "equal up to rounding" in verdicts:
        notes.append(
            "Splitting a batch differently changes the summation order and thus the rounding. Relative differences up to "
            f"{settings.tolerance:g} count as rounding (--tolerance)."
        )
    if "not comparable" in verdicts:
        causes = [
            *(["draws random numbers (as in dropout)"] if report.batch_dependence.uses_rng else []),
            *(
                [f"normalizes over the batch in {report.batch_dependence.num_batch_norms} layers"]
                if report.batch_dependence.num_batch_norms
                else []
            ),
        ]
        notes.append(
            f"A training step of this model {' and '.join(causes)}, so the results legitimately depend on how the batch is "
            "split. Use --eval-layers to put dropout and batch normalization into evaluation mode and compare the other layers."
        )
    if "DIFFERENT" in verdicts:
        notes.append("DIFFERENT: neither rounding nor layers that depend on the batch explain the difference.")
    if "optimizer" not in config["optim_wrapper"]:
        notes.append(
            "Gradient accumulation was not compared: the configuration has no optim_wrapper.optimizer, for which "
            "optim_wrapper.accumulative_counts could be set."
        )
    left_out = [key for key in ("param_scheduler", "auto_scale_lr") if config.get(key) is not None]
    if left_out:
        notes.append(f"Disabled, because they depend on how the batch is split: {', '.join(left_out)}.")
    return notes
