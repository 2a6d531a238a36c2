"""Implement ``stratagem profile``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from stratagem.cli.launch.processes import launch_ranks
from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import echo, print_json
from stratagem.config import Config
from stratagem.errors import ConfigValueError
from stratagem.runner import Runner
from stratagem.train.building import accumulation_of
from stratagem.train.hooks.profiler import ProfilerHook

__all__ = ["ProfileSettings", "profile"]

# Sections that would evaluate, publish or resume.
_REMOVED = (
    "val_dataloader", "val_cfg", "val_evaluator", "test_dataloader", "test_cfg", "test_evaluator", "trackers", "load_from",
)  # fmt: skip


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    """The options of ``stratagem profile``.

    Attributes:
        steps: the number of optimizer steps to record.
        skip: the number of optimizer steps before the profiler starts.
        with_stack: whether the trace contains the lines that call operators.
    """

    steps: int
    skip: int
    with_stack: bool


def profile(options: RunOptions, settings: ProfileSettings, *, as_json: bool) -> None:
    """Train a few steps of a configuration, without evaluations and checkpoints, and print where their time goes.

    Raises:
        ConfigError: or a subclass, if the configuration is invalid or the training is too short.
        typer.Exit: with the exit status of the first rank that failed, if ``--nproc`` started ranks.
    """
    config = read_config(options)
    if options.nproc is not None:
        launch_ranks(options.nproc, by=options.launcher)
        return
    if options.work_dir is None:
        config.merge_from_dict({"work_dir": f"{config['work_dir']}_profile"}, source="stratagem profile")
    iterations = accumulation_of(config.get("optim_wrapper"))
    hook_config = {
        "type": "ProfilerHook",
        "start": settings.skip * iterations,
        "warmup": iterations,
        "active": settings.steps * iterations,
        "with_stack": settings.with_stack,
        "stop_after": True,
    }
    _simplify(config, quiet=as_json)
    is_new = not Path(config["work_dir"]).exists()
    hooks = [*(config.get("custom_hooks") or ()), hook_config]
    config.merge_from_dict({"custom_hooks": hooks}, source="stratagem profile")
    runner = Runner.from_cfg(config)
    runner.run.saves_if_interrupted = False
    try:
        (hook,) = [each for each in runner.run.events.hooks if isinstance(each, ProfilerHook) and each.stops_after]
        runner.train()
        if runner.strategy.rank != 0:
            return
        if hook.profile is None:
            raise ConfigValueError(
                f"The training ended before {settings.skip + settings.steps + 1} optimizer steps. Reduce --steps or --skip, or "
                "increase the length in train_cfg."
            )
        if as_json:
            print_json(hook.profile.as_dict())
        else:
            for line in hook.profile.lines():
                echo(line)
    finally:
        runner.close()
        if runner.interrupted is not None and runner.strategy.rank == 0:
            # An interrupted profile leaves no trace.
            shutil.rmtree(runner.strategy.work_dir if is_new else runner.strategy.log_dir, ignore_errors=True)


def _simplify(config: Config, *, quiet: bool) -> None:
    """Remove everything that a profile of the training step does not need."""
    changes: dict[str, Any] = {key: None for key in _REMOVED if config.get(key) is not None}
    schedules = config.get("param_scheduler")
    if "ReduceOnPlateau" in str(schedules):
        changes["param_scheduler"] = None  # It requires an evaluation.
    hooks = config.get("default_hooks")
    changes["default_hooks"] = {**(hooks if isinstance(hooks, Mapping) else {}), "checkpoint": None}
    changes |= {"resume": False, "report": False, "requeue": False, "log_level": "ERROR" if quiet else "WARNING"}
    config.merge_from_dict(changes, source="stratagem profile")
