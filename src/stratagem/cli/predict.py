"""Implement ``stratagem predict``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from stratagem.cli.launch.processes import launch_ranks
from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import echo
from stratagem.runner import Runner
from stratagem.train.prediction.files import require_prediction_file

__all__ = ["predict"]


def predict(options: RunOptions, *, checkpoint: str, out: Path | None) -> None:
    """Predict the samples of the data with the weights of a checkpoint; write the results to a file, or as JSON lines to stdout.

    Raises:
        ConfigError: or a subclass, if the configuration or the file is invalid.
        CheckpointError: or a subclass, if the checkpoint cannot be loaded.
        typer.Exit: with the exit status of the first rank that failed, if ``--nproc`` started ranks.
    """
    config = read_config(options)
    if out is not None:
        require_prediction_file(out.absolute())
    if options.nproc is not None:
        launch_ranks(options.nproc, by=options.launcher)
        return
    config.merge_from_dict({"load_from": checkpoint, "resume": False}, source="CHECKPOINT")
    runner = Runner.from_cfg(config)
    try:
        if out is not None:
            runner.predict(out=out, strict=True)
            if runner.strategy.rank == 0:
                echo(f"Saved the results to {out}")
            return
        # In the folder of the session, which all ranks share.
        with tempfile.TemporaryDirectory(dir=runner.strategy.log_dir) as folder:
            path = Path(folder) / "predictions.jsonl"
            runner.predict(out=path, strict=True)
            if runner.strategy.rank == 0:
                with path.open(encoding="utf-8") as lines:
                    sys.stdout.writelines(lines)
    finally:
        runner.close()
