"""What a training iteration of the engine costs beyond the loop that one would write by hand.

    python benchmarks/step_overhead.py [--pairs 40] [--iterations 500]

Blocks of both loops alternate in random order, in one process and one thread, and CPU time is compared within each
pair, so that what else the machine does falls on both. Function calls are counted by cProfile in a pass of their own;
they are the same on every machine, so the exit status is 1 where their budget is broken, and never for time.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys

from mlp_arms import CallCounter, CpuClock, final_loss, one_thread, train_by_hand, train_with_engine

MOST_RATIO = 1.10
MOST_CALLS = 20


def main() -> int:
    """Measure with a DataLoader and with a list of batches; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="pairs of blocks (default 40)")
    parser.add_argument("--iterations", type=int, default=500, help="iterations of a block (default 500)")
    arguments = parser.parse_args()
    with one_thread():
        held = [report(arguments.pairs, arguments.iterations, listed=listed) for listed in (False, True)]
    return 0 if all(held) else 1


def report(pairs: int, iterations: int, *, listed: bool) -> bool:
    """Print the figures for one source of batches; return whether the budget of calls holds."""
    require_equal_work(iterations, listed=listed)
    times = [measure_pair(iterations, listed=listed) for _ in range(pairs)]
    ratio = statistics.quantiles([engine / hand for hand, engine in times], n=4)
    hand_us, engine_us = (statistics.median(column) / iterations * 1e6 for column in zip(*times, strict=True))
    hand_calls, engine_calls = (counter.calls / iterations for counter in count_calls(iterations, listed=listed))
    more = engine_calls - hand_calls
    print("Batches from a list" if listed else "Batches from a DataLoader")
    print(f"  CPU time, engine / by hand   {ratio[1]:.3f}  (quartiles {ratio[0]:.3f} to {ratio[2]:.3f}, {pairs} pairs)")
    print(f"  an iteration                 {engine_us:.1f} us, by hand {hand_us:.1f} us")
    print(f"  function calls               {engine_calls:.1f}, by hand {hand_calls:.1f}: {more:+.1f}")
    print(f"  ratio at most {MOST_RATIO:.2f}           {'holds' if ratio[1] <= MOST_RATIO else 'DOES NOT HOLD'}")
    print(f"  at most {MOST_CALLS} calls more        {'holds' if more <= MOST_CALLS else 'DOES NOT HOLD'}")
    return more <= MOST_CALLS


def require_equal_work(iterations: int, *, listed: bool) -> None:
    """Train both ways once; this also loads whatever loads at first use.

    Raises:
        AssertionError: if the trained networks' losses differ: then the two did not do the same work.
    """
    hand = final_loss(train_by_hand(iterations, CpuClock(), listed=listed), iterations)
    engine = final_loss(train_with_engine(iterations, CpuClock(), listed=listed), iterations)
    # The two schedules compute the same rate by different formulas, which differ in the last digits of float64.
    if not math.isclose(hand, engine, rel_tol=1e-5):
        raise AssertionError(f"By hand the final loss is {hand}, with the engine {engine}: not the same work.")


def measure_pair(iterations: int, *, listed: bool) -> tuple[float, float]:
    """Return the seconds of CPU time of a block by hand and of one with the engine, run in random order."""
    hand, engine = CpuClock(), CpuClock()
    arms = [(train_by_hand, hand), (train_with_engine, engine)]
    random.shuffle(arms)
    for train, clock in arms:
        train(iterations, clock, listed=listed)
    return hand.seconds, engine.seconds


def count_calls(iterations: int, *, listed: bool) -> tuple[CallCounter, CallCounter]:
    """Return the counted calls of a block by hand and of one with the engine."""
    hand, engine = CallCounter(), CallCounter()
    train_by_hand(iterations, hand, listed=listed)
    train_with_engine(iterations, engine, listed=listed)
    return hand, engine


if __name__ == "__main__":
    sys.exit(main())
