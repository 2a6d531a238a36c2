"""Compare training with the sources of a Git revision and with those of the working tree, bit for bit.

    python benchmarks/bits.py [--base REVISION] [--only PATTERN] [--folder FOLDER]

The jobs of ``bits_cases.py`` train under every strategy with the sources of both, in the same environment and with the same
job script (``bits_job.py``). Each job runs from beginning to end, and a second time from a checkpoint in the middle. All
recorded values must have the same type, shape and bytes: samples, losses, options of the optimizer, gradients, parameters,
moments, buffers, random number generators, metrics, and the checkpoints on disk, which are read without Stratagem. A job that
fails at either revision, or that did not record a category that it must record, counts as a difference. Jobs whose engine is
not installed are skipped.

It prints the number of values compared in each category, and the first difference of each job. The exit status is 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from bits_cases import CASES, CATEGORIES, Case
from environments import ENGINES, python_of
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

ROOT: Final = Path(__file__).resolve().parent.parent
JOB: Final = ROOT / "benchmarks" / "bits_job.py"
# Both timeouts are generous, because they only need to end launches that hang, for example after one rank failed.
STARTUP_S, CASE_S = 180.0, 120.0
# Keys of a checkpoint whose values differ between any two runs. Only their presence is compared.
VOLATILE: Final = frozenset(
    {"digest", "experiment_name", "files", "lineage", "run_id", "saved_at", "stratagem", "time"}
)

Value = Tensor | str


# ---- comparison ---------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Identifies a recorded value.

    Attributes:
        run: ``"whole"`` or ``"resumed"``.
        iteration: the number of the iteration, counted from 1.
        category: one of ``CATEGORIES``.
        rank: the rank that recorded it, or -1 for a checkpoint on disk.
        name: the name of the value.
        occurrence: counts values of the same name in the same iteration.
    """

    run: str
    iteration: int
    category: str
    rank: int
    name: str
    occurrence: int = 0

    @property
    def order(self) -> tuple[bool, int, int, int]:
        """The position in time. A difference in one category usually causes those in the following categories."""
        return self.run != "whole", self.iteration, CATEGORIES.index(self.category), self.rank

    @property
    def is_on_disk(self) -> bool:
        """Whether the value was read from a checkpoint."""
        return self.rank < 0

    def __str__(self) -> str:
        source = "disk" if self.is_on_disk else f"rank {self.rank}"
        again = f" (number {self.occurrence + 1} of this name)" if self.occurrence else ""
        return f"{self.run} run, iteration {self.iteration}, {source}, {self.category}: {self.name}{again}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The result for one job.

    Attributes:
        counts: number of values compared, by category.
        different: number of values that differ or that only one revision has, by category.
        problems: descriptions of all problems; empty if everything is equal.
        added: names of values in checkpoints that only the working tree saves; these are not problems.
    """

    counts: Mapping[str, int]
    different: Mapping[str, int]
    problems: tuple[str, ...]
    added: tuple[str, ...] = ()


def same_bits(one: Value | None, other: Value | None) -> bool:
    """Return whether two values have the same type, shape and bytes."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and one == other
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bytes(one), _bytes(other))


def compare(base: Mapping[Key, Value], tree: Mapping[Key, Value], expected: Iterable[str]) -> Comparison:
    """Compare the records of a job; ``expected`` are the categories that must not be empty."""
    added = {key for key in tree if key not in base and key.is_on_disk}
    # Additional entries also change the size and the digest of the file that contains them.
    changed = {f"manifest.json/files/{key.name.partition('/')[0]}/" for key in added}
    keys = [
        key
        for key in dict.fromkeys((*base, *tree))
        if key not in added and not (key.is_on_disk and key.name.startswith(tuple(changed)))
    ]
    different = [key for key in keys if not same_bits(base.get(key), tree.get(key))]
    counts = Counter(key.category for key in keys)
    problems = [f"no {category} were recorded, so none were compared" for category in expected if not counts[category]]
    if different:
        # Sorting is stable: values of one category keep the order in which they were recorded.
        first = min(different, key=lambda key: key.order)
        problems.append(f"first difference: {first}\n{_explain(base.get(first), tree.get(first))}")
    return Comparison(
        counts=counts,
        different=Counter(key.category for key in different),
        problems=tuple(problems),
        added=tuple(sorted({key.name for key in added})),
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _explain(base: Value | None, tree: Value | None) -> str:
    if (
        not isinstance(base, Tensor)
        or not isinstance(tree, Tensor)
        or (base.dtype, base.shape) != (tree.dtype, tree.shape)
    ):
        return f"  base: {_shown(base)}\n  tree: {_shown(tree)}"
    rows = (_bytes(each).view(-1, base.element_size()) for each in (base, tree))
    one, other = rows
    places = (one != other).any(dim=1).nonzero().flatten().tolist()
    at = places[0]
    return (
        f"  {len(places)} of {base.numel()} elements differ, first element {at}\n"
        f"  base: {base.reshape(-1)[at].item()!r}, bytes {bytes(one[at].tolist()).hex()}\n"
        f"  tree: {tree.reshape(-1)[at].item()!r}, bytes {bytes(other[at].tolist()).hex()}"
    )


def _shown(value: Value | None) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {list(value.shape)}"
    return "not recorded" if value is None else value


# ---- records ------------------------------------------------------------------------------------------------------


def read_records(folder: Path, case: Case) -> dict[Key, Value]:
    """Read the records of a job's ranks, and the checkpoints that they saved."""
    values: dict[Key, Value] = {}
    for rank in range(case.processes):
        seen: Counter[tuple[str, int, str, str]] = Counter()
        for run, iteration, category, name, value in torch.load(folder / f"rank_{rank}.pt"):
            occurrence = seen[run, iteration, category, name]
            seen[run, iteration, category, name] += 1
            key = Key(run=run, iteration=iteration, category=category, rank=rank, name=name, occurrence=occurrence)
            values[key] = value
    for run in ("whole", "resumed"):
        for checkpoint in sorted((folder / run).glob("iter_*")):
            iteration = int(checkpoint.name.removeprefix("iter_"))
            for name, value in read_checkpoint(checkpoint):
                category = "average" if name.startswith("average.safetensors") else "checkpoint"
                values[Key(run=run, iteration=iteration, category=category, rank=-1, name=name)] = value
    return values


def read_checkpoint(folder: Path) -> Iterator[tuple[str, Value]]:
    """Yield the values of a checkpoint by name: those of its tensor files, and those of its JSON files as text."""
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            yield f"{file.name} {name}", tensor
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    yield from _leaves({**state, "meta": _masked(state["meta"])}, "state.json")
    yield from _leaves(_masked(manifest), "manifest.json")


def _masked(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: "varies" if key in VOLATILE else value for key, value in tree.items()}


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the values at the leaves of a tree of JSON, as text."""
    if isinstance(tree, (dict, list)) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{name}/{key}")
    else:
        yield name, json.dumps(tree)


# ---- launching ----------------------------------------------------------------------------------------------------


@final
class Launcher:
    """Runs jobs with one revision of the sources.

    Args:
        label: what the progress lines call the revision.
        source: the folder that contains the package ``stratagem``.
        folder: where records are written.
        console: where progress is printed.
    """

    def __init__(self, label: str, source: Path, folder: Path, console: Console) -> None:
        self.folder = folder
        self.failures: dict[str, str] = {}
        self._label = label
        self._source = source
        self._console = console

    def run(self, python: str, processes: int, names: Sequence[str]) -> None:
        """Run jobs one after another in the same processes. After a failure, restart with the jobs that remain."""
        pending = list(names)
        while pending:
            log = self.folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', pending[0])}.log"
            ended = self._launch(python, processes, pending, log)
            unfinished = [name for name in pending if not self._is_complete(name)]
            if not unfinished:
                return
            self.failures[unfinished[0]] = f"{self._label}: {ended}\n{self._details(unfinished[0], log)}"
            self._console.print(f"{self._label}: {unfinished[0]} failed", style="red", highlight=False)
            pending = unfinished[1:]

    def _launch(self, python: str, processes: int, names: Sequence[str], log: Path) -> str:
        """Run jobs in one launch; return a description of its outcome."""
        start = [python]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        job = [str(JOB), "--folder", str(self.folder), "--source", str(self._source), *names]
        deadline = time.monotonic() + STARTUP_S + CASE_S * len(names)
        waiting = list(names)
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                [*start, *job],
                env=self._environment(python),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    waiting = self._report(waiting)
                    time.sleep(0.1)
            finally:
                timed_out = process.poll() is None
                if timed_out:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._report(waiting)
        return "timed out" if timed_out else f"exit status {process.returncode}"

    def _environment(self, python: str) -> dict[str, str]:
        folder = Path(python).parent
        return {
            **os.environ,
            "PYTHONPATH": str(self._source),
            "OMP_NUM_THREADS": "1",
            # DeepSpeed builds its operators with the tools of its environment.
            "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
            "TORCH_EXTENSIONS_DIR": str(folder.parent / "operators"),
        }

    def _report(self, waiting: Sequence[str]) -> list[str]:
        """Print the jobs that have finished; return those that have not."""
        left = []
        for name in waiting:
            file = self.folder / name / "finished.json"
            if file.exists() and (text := file.read_text(encoding="utf-8")):
                seconds = json.loads(text)["seconds"]
                self._console.print(f"{self._label}: {name}, {seconds:.1f} s", highlight=False)
            else:
                left.append(name)
        return left

    def _is_complete(self, name: str) -> bool:
        """Return whether all ranks completed and recorded a job."""
        folder, ranks = self.folder / name, range(CASES[name].processes)
        recorded = all((folder / f"rank_{rank}.pt").exists() for rank in ranks)
        return recorded and not any(folder.glob("error_*.txt"))

    def _details(self, name: str, log: Path) -> str:
        """Return the traceback of a failed job, or the end of the log."""
        errors = sorted((self.folder / name).glob("error_*.txt"))
        text = errors[0].read_text(encoding="utf-8") if errors else log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(f"  {line}" for line in text.splitlines()[-15:])


def extract(revision: str, folder: Path) -> Path:
    """Extract the sources of a revision; return the folder that contains the package."""
    archive = folder / "source.tar"
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", f"--output={archive}", revision, "src"]
    subprocess.run(command, check=True)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / "src"


def copy_tree(folder: Path) -> Path:
    """Copy the sources of the working tree, which may change during the run; return the folder with the package."""
    source = folder / "src"
    shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
    return source


# ---- the report ---------------------------------------------------------------------------------------------------


def show(results: Mapping[str, Comparison]) -> Table:
    """Return the table of results: the number of values in each category, and of those that differ."""
    table = Table("job", *CATEGORIES, "result", padding=(0, 0), pad_edge=False)
    for name, result in results.items():
        cells = (_cell(result, category) for category in CATEGORIES)
        table.add_row(name, *cells, _verdict(result))
    return table


def _verdict(result: Comparison) -> str:
    if not result.problems:
        return "equal"
    return "[red]DIFFERENT" if result.counts else "[red]FAILED"


def _cell(result: Comparison, category: str) -> str:
    count, different = result.counts.get(category, 0), result.different.get(category, 0)
    if different:
        return f"[red]{different} of {count}"
    return str(count) if count else "-"


def describe_revision(revision: str) -> str:
    """Return the short hash and the subject of a revision."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%h %s", revision, "--"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Run the jobs with both sources, compare them, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HEAD", help="the git revision to compare with (default: HEAD)")
    parser.add_argument("--only", default="", help="a regular expression: run the jobs whose name contains a match")
    parser.add_argument("--folder", type=Path, help="keep sources, records and logs in this new folder")
    options = parser.parse_args()
    console = Console(width=max(150, Console().width))
    begin = time.monotonic()
    chosen = [name for name in CASES if re.search(options.only, name, re.IGNORECASE)]
    names = [name for name in chosen if python_of(CASES[name].strategy["type"]) is not None]
    if not names:
        console.print(
            f"No job to run: {options.only!r} matches {chosen or 'none'}, and their engines are not installed."
        )
        return 1
    console.print(f"base: {describe_revision(options.base)}\ntree: {ROOT}", highlight=False)
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stratagem-bits-")))
        (folder / "base").mkdir(parents=True)
        (folder / "tree").mkdir()
        launchers = {
            "base": Launcher("base", extract(options.base, folder / "base"), folder / "base", console),
            "tree": Launcher("tree", copy_tree(folder / "tree"), folder / "tree", console),
        }
        for python, processes in dict.fromkeys((_python(name), CASES[name].processes) for name in names):
            alike = [name for name in names if (_python(name), CASES[name].processes) == (python, processes)]
            for launcher in launchers.values():
                launcher.run(python, processes, alike)
        results = {name: _compare_job(name, launchers) for name in names}
    console.print(show(results), highlight=False)
    for name in chosen:
        if name not in names:
            library, environment = ENGINES[CASES[name].strategy["type"]]
            console.print(f"{name}: skipped: {library} is not installed (no {environment})", style="yellow")
    failed = [name for name, result in results.items() if result.problems]
    for name in failed:
        for problem in results[name].problems:
            console.print(f"{name}: {problem}", style="red", highlight=False, markup=False)
    added = sorted({name for result in results.values() for name in result.added})
    if added:
        console.print(f"Only the working tree saves: {', '.join(added)}", highlight=False, markup=False)
    values = sum(sum(result.counts.values()) for result in results.values())
    verdict = (
        f"{len(failed)} of {len(results)} jobs differ or failed" if failed else f"all {len(results)} jobs are equal"
    )
    console.print(f"{verdict}; {values} values compared in {time.monotonic() - begin:.0f} s", highlight=False)
    return 1 if failed else 0


def _python(name: str) -> str:
    return str(python_of(CASES[name].strategy["type"]))


def _compare_job(name: str, launchers: Mapping[str, Launcher]) -> Comparison:
    failures = tuple(each.failures[name] for each in launchers.values() if name in each.failures)
    if failures:
        return Comparison(counts={}, different={}, problems=failures)
    base, tree = (read_records(launchers[label].folder / name, CASES[name]) for label in ("base", "tree"))
    return compare(base, tree, CASES[name].expected)


if __name__ == "__main__":
    sys.exit(main())
