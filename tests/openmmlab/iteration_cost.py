"""Measure the CPU time of an iteration of the same trainings on MMEngine and on Stratagem.

    python tests/openmmlab/iteration_cost.py [--blocks 30] [--calls]

Both trainings run at the same time, but only one of them computes: they take turns after each block of a few iterations, so that
changes of the machine's speed affect both alike. Printed are the medians over the blocks and, in brackets, 95 % intervals of the
medians, and the median of the ratios of neighboring blocks. With ``--calls``, the cost is the number of calls of Python and
built-in functions, which does not depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, which finds this package from its own folder.
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.openmmlab.jobs import DEIT, RESNET
from tests.openmmlab.trainings import ENGINES, Engine, Training, arguments, command, environment

BLOCK = 5
WARM_UP_BLOCKS = 2
# The jobs log every iteration; the configurations every 100.
OPTIONS = (
    "default_hooks.logger.interval=100",
    "log_processor.window_size=10",
    "train_cfg.max_epochs=1000",
    "train_cfg.val_interval=1000",
    "default_hooks.checkpoint.interval=-1",
    "default_hooks.paced.type=PacedIterations",
    f"default_hooks.paced.block={BLOCK}",
)
JOBS: dict[str, tuple[Training, tuple[str, ...]]] = {
    "ResNet-18, 32 x 32, batch of 16": (RESNET, ()),
    "DeiT-tiny, 64 x 64, batch of 8": (DEIT, ()),
    "ResNet-18 with 4 channels, batch of 2": (
        RESNET,
        ("model.backbone.base_channels=4", "model.head.in_channels=32", "train_dataloader.batch_size=2"),
    ),
}


class PacedTraining:
    """A training that computes a block of iterations when it is asked to."""

    def __init__(self, training: Training, engine: Engine, data: Path, work_dir: Path, options: Sequence[str]) -> None:
        work_dir.mkdir(parents=True)
        config, *rest = arguments(training, data, work_dir, (*OPTIONS, *options))
        paced = work_dir.parent / "paced.py"
        paced.write_text(f"_base_ = {config!r}\ncustom_imports = dict(imports=['paced_iterations'])\n")
        self._process = subprocess.Popen(
            command(engine, training.tool("train.py"), [str(paced), *rest]),
            cwd=work_dir,
            env=environment(training.package),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run_block(self) -> float:
        """Return the CPU time of an iteration in seconds, or its number of calls."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("BLOCK "):
                return float(line.split()[1])
        raise RuntimeError(f"the training ended with exit code {self._process.wait()}")

    def stop(self) -> None:
        """Stop the training."""
        self._process.kill()
        self._process.wait()


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and a 95 % interval of it, which makes no assumption about the distribution (order statistics)."""
    ordered, half_width = sorted(values), 0.98 * len(values) ** 0.5
    low = max(0, round(len(values) / 2 - half_width))
    high = min(len(values) - 1, round(len(values) / 2 + half_width))
    return statistics.median(values), ordered[low], ordered[high]


def measure(
    training: Training, data: Path, folder: Path, options: Sequence[str], blocks: int
) -> list[dict[str, float]]:
    """Return the cost of an iteration in each block, by engine; the engines take turns, in alternating order."""
    running = {engine: PacedTraining(training, engine, data, folder / engine / "work", options) for engine in ENGINES}
    try:
        for _ in range(WARM_UP_BLOCKS):
            for each in running.values():
                each.run_block()
        order = list(running)
        rows = []
        for _ in range(blocks):
            rows.append({engine: running[engine].run_block() for engine in order})
            order.reverse()
    finally:
        for each in running.values():
            each.stop()
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--calls", action="store_true", help="count calls instead of measuring the CPU time")
    given = parser.parse_args()
    unit, factor = ("calls", 1) if given.calls else ("ms", 1000)
    print(f"| training | MMEngine ({unit}) | Stratagem ({unit}) | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (training, options)) in enumerate(JOBS.items()):
            folder = Path(scratch) / str(number)
            data = training.data(folder / "data")
            counting = (f"default_hooks.paced.counts_calls={given.calls}",)
            rows = measure(training, data, folder, (*options, *counting), given.blocks)
            columns = [[factor * row[engine] for row in rows] for engine in ENGINES]
            ratios = [row["stratagem"] / row["mmengine"] for row in rows]
            cells = ["{:.1f} ({:.1f} to {:.1f})".format(*median_interval(column)) for column in columns]
            print(
                f"| {name} |",
                " | ".join(cells),
                "| {:.3f} ({:.3f} to {:.3f}) |".format(*median_interval(ratios)),
                flush=True,
            )


if __name__ == "__main__":
    main()
