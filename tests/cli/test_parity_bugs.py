"""The comparison of variants finds seeded bugs in the right part of the step; ``make proof`` has all of them."""

import pytest

from tests.support.ranks import Ranks
from tests.support.seeded_bugs.bugs import BUGS
from tests.support.seeded_bugs.trial import Trial, compare, placed_in

pytestmark = pytest.mark.slow
# Each bug once; models and strategies alternate.
CASES = [
    (bug, ("cnn", "gpt", "gru")[number % 3], ("DDPStrategy", "FSDPStrategy")[number % 2])
    for number, bug in enumerate(BUGS)
]


@pytest.mark.parametrize(("bug", "model", "strategy"), CASES)
def test_a_seeded_bug_is_found_in_the_right_part(ranks: Ranks, bug: str, model: str, strategy: str):
    """A bug that raises no error is found, and attributed to the part of the step in which it was injected."""
    report = compare(Trial(model=model, strategy=strategy, bug=bug), ranks)
    assert report.exit_status == 1
    assert placed_in(report) == [BUGS[bug].part]


@pytest.mark.parametrize(
    ("model", "strategy"), [("cnn", "FSDPStrategy"), ("gpt", "DDPStrategy"), ("gru", "FSDPStrategy")]
)
def test_a_run_without_a_bug_raises_no_alarm(ranks: Ranks, model: str, strategy: str):
    """Without a bug, all variants are equal up to rounding, with momentum, Adam, schedules, averages and clipping."""
    report = compare(Trial(model=model, strategy=strategy, settings={"resumed": True, "accumulate": (2,)}), ranks)
    assert (report.exit_status, placed_in(report)) == (0, [])


def test_an_optimizer_that_computes_in_bfloat16_raises_no_alarm(ranks: Ranks):
    """Muon rounds to bfloat16 in a run in float64 too, and its micro-batches and ranks are equal up to rounding."""
    changes = {"randomness.seed": 1}  # DIFFERENT if rounding errors are only measured in float64
    trial = Trial(model="gpt_muon", strategy="DDPStrategy", changes=changes, settings={"accumulate": (2,)})
    report = compare(trial, ranks)
    assert (report.exit_status, placed_in(report)) == (0, [])


def test_ranks_that_share_samples_raise_no_alarm(ranks: Ranks):
    """With tensor parallelism over both ranks, which see the same samples, all values are equal up to rounding."""
    changes = {"strategy": {"type": "FSDPStrategy", "tp": 2}}
    report = compare(Trial(model="gpt", strategy="FSDPStrategy", changes=changes), ranks)
    assert (report.exit_status, placed_in(report)) == (0, [])
