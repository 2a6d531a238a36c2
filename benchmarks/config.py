"""Measure loading, reading and writing a configuration of 13 kB in five files with three levels of ``_base_``.

Machines differ, so each time is compared with a baseline from the same run:

- load: executing the same files with ``exec`` and merging their dicts; the target is at most 3 times the baseline;
- dump: ``pprint.pformat`` of the merged dict; the target is at most 10 times the baseline;
- reading ``config.model.backbone.depth``: the target is at most 1 microsecond.

The command prints the best of several rounds for each measurement and exits with 1 if a target is missed:
``python benchmarks/config.py``.
"""

from __future__ import annotations

import pprint
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stratagem.config import Config

ROUNDS = 15
READS = 100_000


def write_files(folder: Path) -> Path:
    """Write the five files: the run inherits from a recipe and a dataset, and the recipe from a model and a schedule."""
    (folder / "model.py").write_text(
        _stages("model", 22) + "model['backbone'] = dict(type='ResNet', depth=50, width=64)\n"
    )
    (folder / "schedule.py").write_text(_stages("schedules", 14))
    (folder / "recipe.py").write_text(
        "_base_ = ['model.py', 'schedule.py']\n" + _stages("model", 6) + _stages("extra", 6)
    )
    (folder / "data.py").write_text(_stages("data", 22))
    (folder / "run.py").write_text(
        "_base_ = ['recipe.py', 'data.py']\n" + _stages("model", 3) + "work_dir = 'runs/a'\n"
    )
    return folder / "run.py"


def _stages(name: str, count: int) -> str:
    stage = (
        "    stage{0}=dict(type='Stage', index={0}, channels=[64, 128, {0}], strides=(1, 2),\n"
        "                norm=dict(type='BatchNorm2d', momentum=0.1, eps=1e-5), dropout=0.{0}, fused=True),\n"
    )
    return f"{name} = dict(\n" + "".join(stage.format(index) for index in range(1, count + 1)) + ")\n"


def load_plainly(path: Path) -> dict[str, Any]:
    """Execute a file and its ``_base_`` files, and merge their dicts; every loader has to do at least this."""
    namespace: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    data: dict[str, Any] = {}
    for base in namespace.pop("_base_", []):
        data = merge_plainly(load_plainly(path.parent / base), data)
    return merge_plainly({key: value for key, value in namespace.items() if not key.startswith("_")}, data)


def merge_plainly(over: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested dicts; values of ``over`` take precedence."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge_plainly(value, below) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def best(action: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the minimum of several times in seconds, which is affected least by other processes."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def read_often(config: Config) -> None:
    """Read an attribute at the third level ``READS`` times."""
    for _ in range(READS):
        config.model.backbone.depth  # noqa: B018


def main() -> int:
    """Measure and print; return 1 if a target is missed."""
    with tempfile.TemporaryDirectory() as name:
        path = write_files(Path(name))
        size = sum(file.stat().st_size for file in path.parent.glob("*.py"))
        plain = best(lambda: load_plainly(path))
        loaded = best(lambda: Config.fromfile(path))
        config = Config.fromfile(path)
        assert config.to_dict() == load_plainly(path)
        printed = best(lambda: pprint.pformat(config.to_dict()))
        dumped = best(config.dump)
        read = best(lambda: read_often(config), 5) / READS
    rows = [
        (
            "load",
            f"{loaded * 1e3:.2f} ms",
            f"{loaded / plain:.2f} times exec and merge ({plain * 1e3:.2f} ms)",
            loaded <= 3 * plain,
        ),
        (
            "dump",
            f"{dumped * 1e3:.2f} ms",
            f"{dumped / printed:.2f} times pprint ({printed * 1e3:.2f} ms)",
            dumped <= 10 * printed,
        ),
        ("read", f"{read * 1e6:.3f} us", "for config.model.backbone.depth", read <= 1e-6),
    ]
    print(f"{size / 1000:.1f} kB in five files, best of {ROUNDS} rounds")
    for what, figure, relation, met in rows:
        print(f"{what}: {figure:>10}  {relation}  {'met' if met else 'MISSED'}")
    return 0 if all(met for *_, met in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
