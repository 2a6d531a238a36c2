"""Implement ``stratagem test``."""

from __future__ import annotations

from stratagem.cli.launch.processes import launch_ranks
from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import echo, print_json
from stratagem.runner import Runner

__all__ = ["test"]


def test(options: RunOptions, *, checkpoint: str, as_json: bool) -> None:
    """Evaluate the weights of a checkpoint on the test data, and print the metrics on rank 0, as JSON if requested.

    Raises:
        ConfigError: or a subclass, if the configuration is invalid.
        CheckpointError: or a subclass, if the checkpoint cannot be loaded.
        typer.Exit: with the exit status of the first rank that failed, if ``--nproc`` started ranks.
    """
    config = read_config(options)
    if options.nproc is not None:
        launch_ranks(options.nproc, by=options.launcher)
        return
    config.merge_from_dict({"load_from": checkpoint, "resume": False}, source="CHECKPOINT")
    runner = Runner.from_cfg(config)
    try:
        metrics = runner.test(strict=True)
        if runner.strategy.rank == 0 and as_json:
            print_json(metrics)
        elif runner.strategy.rank == 0:
            for name, value in metrics.items():
                echo(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    finally:
        runner.close()
