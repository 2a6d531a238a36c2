"""Find what is wrong with a training by itself: nothing moves, a gradient is zero, or samples repeat."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from stratagem.cli.parity.report import Finding
from stratagem.trace import Part, RankStep, Trace, Value

__all__ = ["findings_of"]

_MOST_NAMES = 5


def findings_of(variant: str, trace: Trace, zero_gradients: str | None) -> Iterator[Finding]:
    """Yield what is wrong with the training that a trace records.

    Args:
        variant: the name of the variant.
        trace: its trace.
        zero_gradients: a regular expression of the names of parameters whose gradients may be zero in all steps.
    """
    steps = trace.ranks[0].steps
    still = _still(steps)
    if still is not None:
        yield Finding(variant=variant, part=still[0], text=still[1])
        return
    zero = [name for name in _zero_gradients(trace) if not (zero_gradients and re.search(zero_gradients, name))]
    if zero:
        more = f" and {len(zero) - _MOST_NAMES} more" if len(zero) > _MOST_NAMES else ""
        yield Finding(
            variant=variant,
            part=Part.BACKWARD,
            text=f"the gradients of {', '.join(zero[:_MOST_NAMES])}{more} are zero in all {len(steps)} steps. If they are not "
            "used in training, freeze them (requires_grad=False), or permit it with --zero-grad REGEX.",
        )
    repeated = _repeated(trace)
    if repeated:
        sample, count = repeated.most_common(1)[0]
        yield Finding(
            variant=variant,
            part=Part.DATA,
            text=f"{len(repeated)} samples repeat within an epoch, such as sample {sample}, which occurs {count} times. Check "
            "the sampler, in particular its rank, world size and seed.",
        )


def _still(steps: tuple[RankStep, ...]) -> tuple[Part, str] | None:
    """Return the cause if no parameter changed in any step."""
    pairs = [(step.before or {}, step.after or {}) for step in steps]
    names = {name for before, after in pairs for name in before if name in after}
    if not names or any(
        before[name].digest != after[name].digest for before, after in pairs for name in before if name in after
    ):
        return None
    what = f"no parameter moved in {len(steps)} steps: all {len(names)} have their initial values"
    rates = [group.options["lr"] for step in steps for group in step.groups or () if "lr" in group.options]
    if rates and not any(rates):
        return Part.SCHEDULE, f"{what}, because the learning rates are 0."
    if not any(_is_nonzero(each) for step in steps for each in (step.reduced or {}).values()):
        return Part.BACKWARD, f"{what}, because all gradients are zero."
    shown = ", ".join(f"{rate:g}" for rate in sorted(set(rates)))
    return Part.UPDATE, f"{what}, although gradients are not zero (learning rates: {shown or 'unknown'})."


def _zero_gradients(trace: Trace) -> list[str]:
    """Return the names of the parameters of the optimizers whose gradients are zero or missing in all steps."""
    steps = trace.ranks[0].steps
    if any(step.reduced is None for step in steps):
        return []
    trained = dict.fromkeys(name for step in steps for name in step.after or {})
    used = {name for step in steps for name, value in (step.reduced or {}).items() if _is_nonzero(value)}
    return [name for name in trained if name not in used]


def _is_nonzero(value: Value) -> bool:
    # The largest value of a tensor with NaN is NaN.
    return value.largest != 0


def _repeated(trace: Trace) -> Counter[str]:
    """Return the samples that occur several times in the recorded steps, which are all in one epoch, with their counts."""
    steps = [step for rank in trace.data_ranks() for step in rank.steps]
    if any(step.samples is None for step in steps):
        return Counter()
    counts = Counter(sample for step in steps for sample in step.all_samples or ())
    return Counter({sample: count for sample, count in counts.items() if count > 1})
