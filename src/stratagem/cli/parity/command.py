"""Implement ``stratagem parity``: train the variants, compare their traces, and print the differences."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import final

import typer

from stratagem.cli.launch.processes import launch_ranks
from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.parity.comparing import compare_all, compare_files, note_failure
from stratagem.cli.parity.output import show
from stratagem.cli.parity.processes import read_settings, train_in_processes
from stratagem.cli.parity.report import ParityReport
from stratagem.cli.parity.schedules import schedules_in_steps
from stratagem.cli.parity.training import train_variant
from stratagem.cli.parity.variants import ParitySettings, Variant, accumulation_count, run_length, variants_for
from stratagem.cli.progress_line import ProgressLine
from stratagem.config import Config
from stratagem.config_schema import require_valid
from stratagem.data import build_dataloader
from stratagem.distributed import close_dist, infer_launcher, init_dist
from stratagem.errors import ConfigKeyError, ConfigValueError, ParityError, StratagemError
from stratagem.registry import switch_scope

__all__ = ["parity"]

_NEEDED = ("model", "train_dataloader", "optim_wrapper")


def parity(
    files: Sequence[Path],
    options: RunOptions,
    settings: ParitySettings,
    *,
    record: Path | None,
    as_json: bool = False,
    out: Path | None = None,
    zero_gradients: str | None = None,
) -> None:
    """Train all variants, or read two traces, and print how they compare.

    Args:
        files: the configuration, or two traces.
        options: the configuration with its overrides.
        settings: the settings of the comparison.
        record: if given, this process only trains the variants with several processes, and records them in this folder.
        as_json: whether to print the results as JSON.
        out: the PNG file to write, if any.
        zero_gradients: a regular expression of the names of parameters whose gradients may be zero in all steps.

    Raises:
        ConfigError: or a subclass, if the configuration is invalid or its batches cannot be split.
        ParityError: if training a variant fails, or the traces cannot be compared.
        typer.Exit: with status 1 if a difference is unexplained or a training is wrong by itself, and with status 2 if
            variants cannot be compared.
    """
    _require_pattern(zero_gradients)
    if len(files) == 2:
        report = compare_files(files[0], files[1], settings.tolerance, zero_gradients)
    elif len(files) != 1:
        raise ConfigValueError(
            f"parity compares the variants of one configuration, or two traces; got {len(files)} files."
        )
    elif record is not None:
        _train_as_rank(options, settings.nproc, record)
        return
    else:
        report = _compare_variants(options, settings, zero_gradients, quiet=as_json)
    show(report, json=as_json, out=out)
    if report.exit_status:
        raise typer.Exit(report.exit_status)


def _require_pattern(pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ConfigValueError(f"--zero-grad {pattern!r} is not a regular expression: {error}.") from error


def _train_as_rank(options: RunOptions, nproc: int, folder: Path) -> None:
    """Train the variants with several processes: start the ranks or, as one of them, train. Collective."""
    if infer_launcher() == "none":
        launch_ranks(nproc, by=None)
        return
    config = read_config(options)
    plan = _Plan.of(config, read_settings(folder))
    # All variants share one process group, which the individual runs neither create nor destroy.
    init_dist(**(config.get("env_cfg") or {}).get("dist_cfg", {}))
    try:
        for variant in plan.variants:
            if variant.nproc > 1:
                train_variant(config, variant, plan.settings, folder, epoch_length=plan.epoch_length)
    finally:
        close_dist()


@final
@dataclass(frozen=True, slots=True)
class _Plan:
    """The variants to train, with settings that fit the data."""

    settings: ParitySettings
    variants: tuple[Variant, ...]
    epoch_length: int | None

    @classmethod
    def of(cls, config: Config, settings: ParitySettings) -> _Plan:
        """Return the plan for a configuration.

        Raises:
            ConfigKeyError: if the configuration lacks a section that training needs.
            ConfigValueError: if a batch cannot be split, or the dataset has too few samples for two steps.
        """
        _require_mappings(config)
        epoch_length = _epoch_length(config, settings)
        steps = settings.steps if epoch_length is None else min(settings.steps, epoch_length)
        settings = replace(settings, steps=steps)
        return cls(settings, tuple(variants_for(config, settings)), epoch_length)


def _compare_variants(
    options: RunOptions, settings: ParitySettings, zero_gradients: str | None, *, quiet: bool
) -> ParityReport:
    config = read_config(options)
    require_valid(config)
    plan = _Plan.of(config, settings)
    progress = ProgressLine(len(plan.variants), quiet=quiet)
    with tempfile.TemporaryDirectory(prefix="stratagem-parity-") as name:
        folder = Path(name)
        with progress.shown():
            num_batch_norms = _train(options, config, plan, folder, progress)
            report = compare_all(
                f"{options.config}: {plan.settings.steps} steps of {_samples_per_step(config, plan.settings)} samples",
                config, plan.settings, plan.variants, folder, num_batch_norms, zero_gradients,
            )  # fmt: skip
    report.notes += _notes(config, plan)
    return report


def _train(options: RunOptions, config: Config, plan: _Plan, folder: Path, progress: ProgressLine) -> int:
    """Train all variants, and return the number of layers of the model that normalize over the batch.

    Raises:
        ParityError: if a variant fails.
    """
    num_batch_norms = 0
    for variant in plan.variants:
        if variant.nproc > 1:
            continue
        progress.start(variant.name)
        try:
            found = train_variant(config, variant, plan.settings, folder, epoch_length=plan.epoch_length)
        except Exception as error:
            if variant.noise is not None:
                # The comparison works without it.
                note_failure(folder, variant, error)
                continue
            if isinstance(error, StratagemError) and error.exit_status == ParityError.exit_status:
                raise
            raise ParityError(f"{variant.name}: training failed: {type(error).__name__}: {error}") from error
        num_batch_norms = max(num_batch_norms, found)
    several = [variant for variant in plan.variants if variant.nproc > 1]
    for _, group in groupby(sorted(several, key=lambda each: each.strategy), key=lambda each: each.strategy):
        train_in_processes(options, plan.settings, folder, list(group), progress)
    return num_batch_norms


def _samples_per_step(config: Config, settings: ParitySettings) -> int:
    batch_size: int = config["train_dataloader"]["batch_size"]
    return batch_size * settings.nproc * accumulation_count(config)


def _epoch_length(config: Config, settings: ParitySettings) -> int | None:
    """Return the number of steps in an epoch; None if the dataset has no length.

    Raises:
        ConfigValueError: if the batch size is not a number, or the dataset has too few samples for two steps.
    """
    loader = config["train_dataloader"]
    size = loader.get("batch_size")
    if not isinstance(size, int):
        raise ConfigValueError(
            f"train_dataloader has batch_size={size!r}; it must be a number, so that the batch can be split."
        )
    with switch_scope(config.get("default_scope")):
        dataset = build_dataloader(copy.deepcopy(loader), seed=0, training=True).dataset
    if not isinstance(dataset, Sized):
        return None
    per_step = _samples_per_step(config, settings)
    # The resumed variants train at least one step before the stop and one after it.
    if len(dataset) // per_step < 2:
        raise ConfigValueError(
            f"The dataset has {len(dataset)} samples, but two steps in {settings.nproc} processes need {2 * per_step}. Use a "
            "smaller batch: --set train_dataloader.batch_size=1"
        )
    return len(dataset) // per_step


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


def _notes(config: Config, plan: _Plan) -> Iterator[str]:
    """Yield what differs from the training that the configuration describes."""
    if "optimizer" not in config["optim_wrapper"]:
        yield (
            "Gradient accumulation was not compared: the configuration has no optim_wrapper.optimizer, for which "
            "optim_wrapper.accumulative_counts could be set."
        )
    if config.get("auto_scale_lr") is not None:
        yield "auto_scale_lr is disabled, because it depends on how the batch is split."
    converted = schedules_in_steps(
        config.get("param_scheduler"), plan.epoch_length, run_length(config, plan.settings, plan.epoch_length)
    )
    if converted.omitted:
        names = ", ".join(converted.omitted)
        yield f"Omitted from param_scheduler, because they depend on metrics or on an unknown length: {names}."
    if converted.schedules and accumulation_count(config) > 1:
        yield "Schedules count optimizer steps here, not micro-batches, so that they do not depend on accumulation."
