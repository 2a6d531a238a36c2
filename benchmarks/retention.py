"""Measure the CPU time of a retention pass, which runs at every save, over a folder with many checkpoints.

Run ``python benchmarks/retention.py``. The checkpoints of the folder are copies of one that was saved, with other numbers in
their manifests. Between two passes, a checkpoint is added, as by a save. Either all checkpoints are kept, or every second one
and the last 100, so that every second pass finds one to be removed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from stratagem.checkpoint import Retention, RetentionTag, checkpoints_of_run, save_checkpoint
from stratagem.checkpoint.directory.integrity import digest_of

GROUP = "iter_{}"


def save(path: Path) -> dict[str, object]:
    """Save a checkpoint and return its manifest without the digest."""
    meta = {"run_id": "run", "iter": 1, "save_order": {"session": 1, "save": 1}}
    purpose = RetentionTag(group=GROUP, number=1).as_meta()
    save_checkpoint({"model": {"weight": torch.ones(1)}, "meta": {**meta, "purpose": purpose}}, path)
    manifest: dict[str, object] = json.loads((path / "manifest.json").read_text())
    del manifest["digest"]
    return manifest


def write_copy(folder: Path, manifest: dict[str, object], number: int) -> None:
    """Write the manifest of another checkpoint."""
    path = folder / GROUP.format(number)
    path.mkdir(exist_ok=True)
    order, purpose = {"session": 1, "save": number}, RetentionTag(group=GROUP, number=number).as_meta()
    text = json.dumps({**manifest, "save_order": order, "purpose": purpose}, separators=(",", ":")).encode()[:-1]
    (path / "manifest.json").write_bytes(text + b',"digest":"' + digest_of(text).encode() + b'"}')


def measure(retention: Retention, count: int, passes: int) -> list[float]:
    """Return the CPU time of each pass in seconds; the first one reads all checkpoints."""
    times = []
    with tempfile.TemporaryDirectory(prefix="stratagem-benchmark-") as name:
        manifest = save(Path(name) / "saved")
        folder = Path(name) / "many"
        folder.mkdir()
        for number in range(1, count + 1):
            if retention.every is None or number % retention.every == 0 or number > count - 100:
                write_copy(folder, manifest, number)
        new = folder / GROUP.format(count)
        for passed in range(passes + 1):
            start = time.process_time()
            saved = checkpoints_of_run("run", folder, look_up=[new] if passed else None)
            removable = retention.find_removable(saved, "run", folder, {new})
            times.append(time.process_time() - start)
            for each in removable:
                shutil.rmtree(each.path)
            new = folder / GROUP.format(count + passed + 1)
            write_copy(folder, manifest, count + passed + 1)
    return times


def main() -> None:
    """Print the CPU time of the first pass and the median of the following ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--passes", type=int, default=25)
    options = parser.parse_args()
    for count in options.checkpoints:
        rules = {
            "all are kept": (Retention(groups=[GROUP], last=2 * count), count),
            "some are removed": (Retention(groups=[GROUP], last=100, every=2), 2 * count),
        }
        for name, (retention, numbers) in rules.items():
            first, *others = measure(retention, numbers, options.passes)
            others.sort()
            quarter = len(others) // 4
            print(
                f"{count:>7} checkpoints, {name:16}: first pass {first * 1e3:7.1f} ms, at each save "
                f"{statistics.median(others) * 1e3:6.1f} ms "
                f"(quartiles {others[quarter] * 1e3:.1f} to {others[-1 - quarter] * 1e3:.1f})"
            )


if __name__ == "__main__":
    main()
