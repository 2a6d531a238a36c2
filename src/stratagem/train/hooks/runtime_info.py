"""Log the environment of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import final

from stratagem.distributed import describe_launcher
from stratagem.storage import write_record
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run
from stratagem.utils import mask_secrets, mask_text

__all__ = ["RuntimeInfoHook"]


@final
class RuntimeInfoHook(Hook):
    """Log the placement and size of the model, and write an environment report to ``<log_dir>/environment.json``."""

    priority = Priority.VERY_HIGH

    def before_run(self, run: Run) -> None:
        if run.rank != 0:
            return
        system, runtime = run.strategy.collect_env()
        report = {
            "system": system,
            "runtime": {key: mask_text(str(value)) for key, value in mask_secrets(runtime).items()},
        }
        write_record(Path(run.log_dir) / "environment.json", json.dumps(report, indent=2) + "\n", run.logger)
        sizes = {parameter: run.strategy.global_numel(parameter) for parameter in run.model.parameters()}
        trainable = sum(size for parameter, size in sizes.items() if parameter.requires_grad)
        run.logger.info(
            "%s: %d process(es) on %s, %s, seed %d",
            type(run.strategy).__name__, run.world_size, run.world.device, describe_launcher(run.world.launcher),
            run.strategy.seed,
        )  # fmt: skip
        run.logger.info(
            "Model %s: %s parameters, %s of them trainable",
            type(run.strategy.unwrap_model()).__name__, f"{sum(sizes.values()):,}", f"{trainable:,}",
        )  # fmt: skip
        run.logger.info("Logs and environment report: %s", run.log_dir)
