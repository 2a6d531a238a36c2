"""What importing Stratagem adds to importing torch, in fresh interpreters.

    python benchmarks/import_time.py [--runs 10] [--top 20]

Each run imports torch and then measures the CPU time of the import that follows: the difference of two interpreters
would drown in the seconds that torch takes. ``--top`` also lists the modules that take longest, as
``python -X importtime`` sees them; one of them carries a full garbage collection of torch's objects, about 0.1 s, that
happens to fall on it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

MOST_S = 0.15
PACKAGE = "import stratagem"
EVERYTHING = "import stratagem; [getattr(stratagem, name) for name in stratagem.__all__]"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="fresh interpreters for each figure (default 10)")
    parser.add_argument("--top", type=int, default=0, help="how many of the slowest modules to list (default none)")
    arguments = parser.parse_args()
    seconds_of(EVERYTHING)  # files come into the page cache, and byte code is written
    added = report("import stratagem", PACKAGE, arguments.runs)
    report("every public name", EVERYTHING, arguments.runs)
    print(f"import stratagem at most {MOST_S} s: {'holds' if added <= MOST_S else 'DOES NOT HOLD'}")
    if arguments.top:
        print("\n".join(slowest_modules(EVERYTHING, arguments.top)))


def report(name: str, statement: str, runs: int) -> float:
    """Print and return the median of the seconds that a statement adds to ``import torch``."""
    low, median, high = statistics.quantiles([seconds_of(statement) for _ in range(runs)], n=4)
    print(f"{name:18} adds {median:.4f} s to import torch (quartiles {low:.4f} to {high:.4f}, {runs} runs)")
    return median


def seconds_of(statement: str) -> float:
    """Return the CPU time of a statement in a fresh interpreter that has imported torch."""
    code = f"import time, torch; start = time.process_time(); {statement}; print(time.process_time() - start)"
    return float(_run("-c", code).stdout)


def slowest_modules(statement: str, count: int) -> list[str]:
    """Return the lines of ``-X importtime`` with the longest time of their own, of all that comes after torch."""
    lines = _run("-X", "importtime", "-c", f"import torch; {statement}").stderr.splitlines()
    torch_done = next(index for index, line in enumerate(lines) if line.endswith("| torch"))
    own = [line for line in lines[torch_done + 1 :] if line.startswith("import time:")]
    slowest = sorted(own, key=lambda line: int(line.removeprefix("import time:").partition("|")[0]), reverse=True)
    return [lines[0], *slowest[:count]]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)


if __name__ == "__main__":
    main()
