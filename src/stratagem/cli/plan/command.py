"""Implement ``stratagem plan``."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import echo, print_json
from stratagem.cli.plan.facts import bar_chart
from stratagem.cli.plan.html import write_html
from stratagem.cli.plan.processes import PlanSource, TaskPlanner
from stratagem.cli.plan.terminal import print_report
from stratagem.cli.plot.bars import write_bars_png
from stratagem.cli.progress_line import ProgressLine
from stratagem.config import Config, require
from stratagem.config_schema import SECTIONS
from stratagem.errors import ConfigValueError
from stratagem.hardware import parse_bytes, parse_duration, parse_rate
from stratagem.planning.advice import Replan
from stratagem.planning.clusters import ClusterOptions, clusters_of
from stratagem.planning.planner import plan_config
from stratagem.planning.report import Report, build_report
from stratagem.planning.result import Plan, StepPlan
from stratagem.planning.tasks import DEFAULT_STRATEGIES, PlanTask, StrategySpec

__all__ = ["PlanSettings", "plan"]

# Variants of a strategy are planned for the advice for about this CPU time, or for twice that of the strategy if it is longer.
_ADVICE_S: Final = 40.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """The options of ``stratagem plan`` as given on the command line; None if omitted.

    Attributes:
        world: numbers of ranks, separated by commas.
        gpus_per_node: the number of ranks on a node.
        device: names of devices, separated by commas.
        memory: the memory of a device, with a unit.
        strategies: names of strategies, separated by commas.
        every_strategy: whether to compare all strategies.
        batch: a description of the batch.
        inside_link: the link inside a node.
        across_link: the link of a network adapter.
        adapters: the number of network adapters of a node.
        links: a file with measured links.
        utilization: the part of the peak rate.
        tf32: whether products of float32 matrices use TF32.
        storage: the bandwidth at which checkpoints are written, with a unit.
        mtbf: the mean time between failures of a device, with a unit.
    """

    world: str | None = None
    gpus_per_node: int = 8
    device: str | None = None
    memory: str | None = None
    strategies: str | None = None
    every_strategy: bool = False
    batch: str | None = None
    inside_link: str | None = None
    across_link: str | None = None
    adapters: int | None = None
    links: Path | None = None
    utilization: float | None = None
    tf32: bool = False
    storage: str | None = None
    mtbf: str | None = None


def plan(
    options: RunOptions,
    settings: PlanSettings,
    *,
    as_json: bool = False,
    html: Path | None = None,
    out: Path | None = None,
) -> None:
    """Print what each rank of a training job needs, sends and computes, without running it.

    Args:
        options: the configuration.
        settings: the ranks, devices and strategies.
        as_json: print JSON instead of tables.
        html: the HTML file to write, if any.
        out: the PNG file to write, if any.

    Raises:
        ConfigError: or a subclass, if the configuration or an option is invalid.
        ConfigValueError: if ``out`` is given and no strategy can train the model.
        MissingDependencyError: if ``out`` is given and matplotlib is not installed.
    """
    cluster_options = _cluster_options(settings)
    worlds = _worlds(settings)
    strategies = _strategies(settings)
    clusters = clusters_of(cluster_options)
    config = read_config(options)
    require(config, SECTIONS, scope=config.get("default_scope"))

    # The same simulations serve all amounts of memory.
    limits = list(dict.fromkeys(cluster.memory for cluster in clusters if cluster.memory is not None))
    progress = ProgressLine(0, quiet=False, text="Planning")
    source = PlanSource(options=options, gpus_per_node=settings.gpus_per_node, memory=limits or None)
    # The output of the model and the dataset does not belong to the result.
    with progress.shown(), redirect_stdout(sys.stderr):
        planned = plan_config(
            config,
            strategies=strategies,
            worlds=worlds,
            gpus_per_node=settings.gpus_per_node,
            memory=limits or None,
            batch=settings.batch,
            plan_all=TaskPlanner(source, progress),
        )
        pairs = [(cluster, _for_memory(planned, cluster.memory)) for cluster in clusters]
        report = build_report(str(options.config), pairs, replan=_replanner(config, settings, planned, progress))
    _write(report, as_json=as_json, html=html, out=out)


def _for_memory(planned: Plan, memory: int | None) -> Plan:
    """Return the plans for the memory of a device; without a limit, those of any device, whose search does not apply."""
    if memory is not None:
        return replace(planned, steps=tuple(step for step in planned.steps if step.memory_limit == memory))
    limit = planned.steps[0].memory_limit
    steps = (step for step in planned.steps if step.memory_limit == limit)
    return replace(planned, steps=tuple(replace(step, memory_limit=None, largest_micro_batch=None) for step in steps))


def _write(report: Report, *, as_json: bool, html: Path | None, out: Path | None) -> None:
    if html is not None:
        write_html(report, html)
    chart = bar_chart(report)
    if out is not None and chart.groups:
        write_bars_png(chart, out)
    if as_json:
        print_json(report.as_dict())
    else:
        print_report(report)
        for path in (html, out if chart.groups else None):
            if path is not None:
                echo(f"Saved {path}")
    if out is not None and not chart.groups:
        raise ConfigValueError(
            f"{out} was not written: no strategy can train this model, so there are no bars to draw."
        )


def _cluster_options(settings: PlanSettings) -> ClusterOptions:
    return ClusterOptions(
        devices=_split(settings.device),
        memory=None if settings.memory is None else parse_bytes(settings.memory, option="--memory"),
        gpus_per_node=settings.gpus_per_node,
        inside_link=settings.inside_link,
        across_link=settings.across_link,
        adapters=settings.adapters,
        links=settings.links,
        utilization=settings.utilization,
        tf32=settings.tf32,
        storage=None if settings.storage is None else parse_rate(settings.storage, option="--storage"),
        mtbf=None if settings.mtbf is None else parse_duration(settings.mtbf, option="--mtbf"),
    )


def _worlds(settings: PlanSettings) -> tuple[int, ...]:
    if settings.world is None:
        return (settings.gpus_per_node,)
    names = _split(settings.world)
    if not names or not all(name.isdecimal() and int(name) > 0 for name in names):
        raise ConfigValueError(
            f"--world {settings.world!r} is not a list of numbers of ranks. Example: --world 8,64,512."
        )
    worlds = tuple(dict.fromkeys(int(name) for name in names))
    for world in worlds:
        if world > settings.gpus_per_node and world % settings.gpus_per_node:
            raise ConfigValueError(
                f"{world} ranks (--world) cannot be distributed equally across nodes of {settings.gpus_per_node} "
                f"(--gpus-per-node). Choose a multiple of {settings.gpus_per_node}, or a different --gpus-per-node."
            )
    return worlds


def _strategies(settings: PlanSettings) -> Sequence[StrategySpec] | None:
    """Return the strategies, or None for that of the configuration."""
    if settings.every_strategy and settings.strategies is not None:
        raise ConfigValueError(f"--all and --strategy {settings.strategies} conflict. Omit one of them.")
    if settings.every_strategy:
        return DEFAULT_STRATEGIES
    return _split(settings.strategies) or None


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))


def _replanner(config: Config, settings: PlanSettings, planned: Plan, progress: ProgressLine) -> Replan:
    known = planned.steps
    spent = 0.0

    def replan(step: StepPlan, changes: Mapping[str, Any], size: int | None) -> StepPlan | None:
        nonlocal spent
        options = {**step.options, **changes}
        for each in known if size is None else ():
            # The comparison contains this variant.
            if (each.strategy, each.world, each.options) == (step.strategy, step.world, options):
                return each
        if spent + step.seconds > max(_ADVICE_S, 2 * step.seconds):
            return None
        spent += step.seconds
        own = {"type": step.strategy, **options}
        progress.expect(1)
        progress.start(f"what to try: {PlanTask.of(own, step.world).label}")
        variant = plan_config(
            config if size is None or settings.batch is not None else _with_batch_size(config, size),
            strategies=[own],
            worlds=[step.world],
            gpus_per_node=step.gpus_per_node,
            batch=_resized(settings.batch, step.micro_batch, size),
        )
        return variant.steps[0]

    return replan


def _with_batch_size(config: Config, size: int) -> Config:
    changed = config.copy()
    changed.merge_from_dict({"train_dataloader.batch_size": size}, source="stratagem plan")
    return changed


def _resized(batch: str | None, before: int | None, size: int | None) -> str | None:
    """Return a description of a batch with another number of samples, which is the first dimension of its tensors."""
    if batch is None or size is None:
        return batch
    return re.sub(rf"\[{before}(?=[,\]])", f"[{size}", batch)
