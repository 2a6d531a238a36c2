"""Measure the overhead of a training iteration in Stratagem, compared with a hand-written loop.

    python benchmarks/step_overhead.py [--pairs 40] [--iterations 500]

Blocks of iterations of both loops alternate in random order, in one process and one thread. CPU times are compared within each
pair, so that other load on the machine affects both. A separate pass counts function calls with cProfile. The counts are the
same on every machine, so the exit status is 1 if they exceed the budget; it does not depend on the time.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys

from mlp_arms import CallCounter, CpuClock, final_loss, one_thread, train_by_hand, train_with_runner

MAX_RATIO = 1.10
MAX_MORE_CALLS = 20


def main() -> int:
    """Measure with a DataLoader and with a list of batches; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="number of pairs of blocks (default: 40)")
    parser.add_argument("--iterations", type=int, default=500, help="iterations per block (default: 500)")
    arguments = parser.parse_args()
    with one_thread():
        held = [report(arguments.pairs, arguments.iterations, listed=listed) for listed in (False, True)]
    return 0 if all(held) else 1


def report(pairs: int, iterations: int, *, listed: bool) -> bool:
    """Print the results for one source of batches; return whether the call budget is met."""
    require_equal_work(iterations, listed=listed)
    times = [measure_pair(iterations, listed=listed) for _ in range(pairs)]
    ratio = statistics.quantiles([runner / hand for hand, runner in times], n=4)
    hand_us, runner_us = (statistics.median(column) / iterations * 1e6 for column in zip(*times, strict=True))
    hand_calls, runner_calls = (counter.calls / iterations for counter in count_calls(iterations, listed=listed))
    more = runner_calls - hand_calls
    print("Batches from a list" if listed else "Batches from a DataLoader")
    print(f"  CPU time, ratio              {ratio[1]:.3f}  (quartiles {ratio[0]:.3f} to {ratio[2]:.3f}, {pairs} pairs)")
    print(f"  iteration                    {runner_us:.1f} us, hand-written {hand_us:.1f} us")
    print(f"  function calls               {runner_calls:.1f}, hand-written {hand_calls:.1f}: {more:+.1f}")
    print(f"  ratio at most {MAX_RATIO:.2f}           {'met' if ratio[1] <= MAX_RATIO else 'NOT MET'}")
    print(f"  at most {MAX_MORE_CALLS} more calls        {'met' if more <= MAX_MORE_CALLS else 'NOT MET'}")
    return more <= MAX_MORE_CALLS


def require_equal_work(iterations: int, *, listed: bool) -> None:
    """Train once with both loops and compare the results. This also triggers all imports on first use.

    Raises:
        AssertionError: if the losses of the trained networks differ.
    """
    hand = final_loss(train_by_hand(iterations, CpuClock(), listed=listed), iterations)
    runner = final_loss(train_with_runner(iterations, CpuClock(), listed=listed), iterations)
    # The two schedulers compute the learning rate with different formulas, which differ by float64 rounding errors.
    if not math.isclose(hand, runner, rel_tol=1e-5):
        raise AssertionError(f"The final losses differ: hand-written {hand}, Stratagem {runner}.")


def measure_pair(iterations: int, *, listed: bool) -> tuple[float, float]:
    """Return the CPU times in seconds of a hand-written and a Stratagem block, run in random order."""
    hand, runner = CpuClock(), CpuClock()
    arms = [(train_by_hand, hand), (train_with_runner, runner)]
    random.shuffle(arms)
    for train, clock in arms:
        train(iterations, clock, listed=listed)
    return hand.seconds, runner.seconds


def count_calls(iterations: int, *, listed: bool) -> tuple[CallCounter, CallCounter]:
    """Count the calls of a hand-written and of a Stratagem block."""
    hand, runner = CallCounter(), CallCounter()
    train_by_hand(iterations, hand, listed=listed)
    train_with_runner(iterations, runner, listed=listed)
    return hand, runner


if __name__ == "__main__":
    sys.exit(main())
