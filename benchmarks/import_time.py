"""Measure the import time of Stratagem after torch has been imported, in new interpreters.

    python benchmarks/import_time.py [--runs 10] [--top 20]

Each interpreter imports torch and then measures the CPU time of the next import. (The difference between two interpreters
would be lost in the noise of importing torch, which takes seconds.) ``--top`` also lists the slowest modules according to
``python -X importtime``. The time of one of them includes a full garbage collection of torch objects, about 0.1 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

MAX_S = 0.15
PACKAGE = "import stratagem"
EVERYTHING = "import stratagem; [getattr(stratagem, name) for name in stratagem.__all__]"


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="number of interpreters per measurement (default: 10)")
    parser.add_argument("--top", type=int, default=0, help="number of slowest modules to list (default: 0)")
    arguments = parser.parse_args()
    seconds_of(EVERYTHING)  # fill the page cache and write the bytecode
    added = report("import stratagem", PACKAGE, arguments.runs)
    report("all public names", EVERYTHING, arguments.runs)
    print(f"import stratagem at most {MAX_S} s: {'met' if added <= MAX_S else 'NOT MET'}")
    if arguments.top:
        print("\n".join(slowest_modules(EVERYTHING, arguments.top)))


def report(name: str, statement: str, runs: int) -> float:
    """Print and return the median time in seconds that a statement takes after ``import torch``."""
    low, median, high = statistics.quantiles([seconds_of(statement) for _ in range(runs)], n=4)
    print(f"{name:18} adds {median:.4f} s to import torch (quartiles {low:.4f} to {high:.4f}, {runs} runs)")
    return median


def seconds_of(statement: str) -> float:
    """Return the CPU time of a statement in a new interpreter, after importing torch."""
    code = f"import time, torch; start = time.process_time(); {statement}; print(time.process_time() - start)"
    return float(_run("-c", code).stdout)


def slowest_modules(statement: str, count: int) -> list[str]:
    """Return the lines of ``-X importtime`` with the largest self times, for modules imported after torch."""
    lines = _run("-X", "importtime", "-c", f"import torch; {statement}").stderr.splitlines()
    torch_done = next(index for index, line in enumerate(lines) if line.endswith("| torch"))
    own = [line for line in lines[torch_done + 1 :] if line.startswith("import time:")]
    slowest = sorted(own, key=lambda line: int(line.removeprefix("import time:").partition("|")[0]), reverse=True)
    return [lines[0], *slowest[:count]]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


if __name__ == "__main__":
    main()
