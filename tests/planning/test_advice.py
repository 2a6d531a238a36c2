"""The best strategies of a plan, what takes the most memory, and what to try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stratagem.planning.advice import advise, best_choices, segments_of
from stratagem.planning.result import MemoryPlan, StepPlan
from stratagem.planning.timing import Cluster, Estimate, estimate
from tests.planning.plans import GIB, collective, memory, step
from tests.planning.test_timing import CLUSTER

WHOLE = memory(parameters=28, gradients=28, optimizer=56)
SHARDED = memory(parameters=2, gradients=2, optimizer=4)
HALF = memory(parameters=14, gradients=14, optimizer=28)


def estimates(*steps: StepPlan, cluster: Cluster = CLUSTER) -> list[Estimate]:
    """Return the estimates of steps."""
    return [estimate(each, cluster, start_bytes=0) for each in steps]


def gathers(nbytes: int) -> dict[str, Any]:
    """Return the arguments of a step with an all-gather in a node."""
    return {"collectives": (collective("all_gather", nbytes, group=8),)}


def labels(*steps: StepPlan, cluster: Cluster = CLUSTER) -> list[str]:
    """Return the labels of the best strategies."""
    return [choice.estimate.step.label for choice in best_choices(estimates(*steps, cluster=cluster))]


def test_the_fastest_strategy_that_fits_is_the_best() -> None:
    """A strategy that is fast but does not fit is not chosen, and at most three are."""
    steps = (
        step("DDP", WHOLE),
        step("slow", SHARDED, **gathers(300 * 10**9)),
        step("fast", SHARDED, **gathers(100 * 10**9)),
        step("slower", SHARDED, **gathers(400 * 10**9)),
        step("slowest", SHARDED, **gathers(500 * 10**9)),
    )
    assert labels(*steps) == ["fast", "slow", "slower"]


def test_of_equally_fast_strategies_the_one_with_more_free_memory_is_better() -> None:
    """A difference in speed of less than 3 % is less than the error of the estimate."""
    first, second = best_choices(estimates(step("half", HALF), step("sharded", SHARDED, **gathers(10**9))))
    assert (
        first.why
        == "one of the fastest of the 2 strategies that fit, 2.02 s to 2.03 s for a step; 63.0 GiB of the memory remain free."
    )
    assert second.estimate.step.label == "half"
    assert second.why == "about as fast as sharded; 15.0 GiB of the memory remain free."


def test_a_single_strategy_is_not_compared() -> None:
    """If only one strategy was planned, the sentence states its time and memory."""
    (choice,) = best_choices(estimates(step("FSDP", SHARDED)))
    assert choice.why == "takes 2.02 s for a step; 63.0 GiB of the memory remain free."


def test_the_reason_compares_with_the_best() -> None:
    """2.0214 s against 2.0214 + 0.875 s are 43 %."""
    _, second = best_choices(estimates(step("half", HALF), step("sharded", SHARDED, **gathers(100 * 10**9))))
    assert second.why == "43 % slower than half; 63.0 GiB of the memory remain free, 48.0 GiB more."


def test_a_strategy_that_takes_more_than_twice_as_long_has_a_factor() -> None:
    """2.0214 s against 2.0214 + 3.5 s are 2.73 times as long."""
    _, second = best_choices(estimates(step("half", HALF), step("sharded", SHARDED, **gathers(400 * 10**9))))
    assert second.why.startswith("takes 2.73 times as long as half; ")


def test_speed_is_that_of_a_sample() -> None:
    """With tensor parallelism, a step is shorter but has fewer samples."""
    assert labels(step("tp", SHARDED, dp_size=2, flops=10**15 // 4), step("dp", SHARDED)) == ["dp", "tp"]


def test_without_times_the_bytes_that_are_sent_decide() -> None:
    """For a device that is not in the table, the strategy that sends the least is the best."""
    unknown = replace(CLUSTER, device=None, topology=None)
    first, _ = best_choices(
        estimates(
            step("more", SHARDED, **gathers(80 * GIB)), step("less", SHARDED, **gathers(8 * GIB)), cluster=unknown
        )
    )
    assert first.estimate.step.label == "less"
    assert (
        first.why
        == "sends the least of the 2 strategies that fit, 7.00 GiB per rank for a step; 63.0 GiB of the memory remain free."
    )


def test_if_nothing_fits_the_smallest_is_first() -> None:
    """The reason is the memory that is missing."""
    first, second = best_choices(estimates(step("DDP", WHOLE), step("FSDP", replace(HALF, context=60 * GIB))))
    assert (first.estimate.step.label, first.why) == (
        "DDP",
        "does not fit: 41.0 GiB are missing, the least of all strategies.",
    )
    assert second.why == "does not fit: 44.0 GiB are missing."


def test_a_strategy_that_was_not_simulated_does_not_count_as_fitting() -> None:
    """Its activations are unknown, so it is only listed if there is nothing else."""
    unknown = step(
        "unknown", memory(parameters=2, gradients=2, optimizer=4, activations=None), flops=None, failure="a reason"
    )
    assert labels(unknown, step("FSDP", HALF)) == ["FSDP"]
    (choice,) = best_choices(estimates(unknown))
    assert choice.why == "needs 9.00 GiB without activations; its step could not be simulated."


def test_a_strategy_that_cannot_train_the_model_is_never_chosen() -> None:
    """A refused strategy has sizes of zero, which would fit."""
    zero = MemoryPlan(parameters=0, gradients=0, optimizer_state=0)
    assert labels(step("refused", zero, refusal="a reason")) == []


def test_the_parts_of_the_memory_add_up() -> None:
    """Kinds that have no part of their own are temporary, so that nothing is lost."""
    sizes = {
        "parameters": 3,
        "master weights": 5,
        "optimizer state": 7,
        "gathered parameters": 11,
        "batch": 13,
        "new kind": 17,
    }
    parts = segments_of(
        MemoryPlan(parameters=3, gradients=0, optimizer_state=7, peak=sum(sizes.values()), at_peak=sizes, context=19)
    )
    assert parts == {
        "parameters": 3, "gradients": 0, "optimizer state": 12, "activations": 0, "communication": 11, "temporary": 17,
        "other": 13, "driver": 19,
    }  # fmt: skip
    static = memory(parameters=1, gradients=2, optimizer=3, activations=None, buffers=5, batch=7)
    assert sum(segments_of(static).values()) == static.total


def test_the_largest_part_and_a_smaller_strategy() -> None:
    """The optimizer state is the largest part of DDP, and FSDP saves 104 GiB."""
    whole, sharded = estimates(step("DDP", WHOLE, strategy="DDPStrategy", micro_batch=1), step("FSDP", SHARDED))
    advice = advise(whole, [whole, sharded], None)
    assert (advice.largest, advice.nbytes) == ("optimizer state", 56 * GIB)
    (suggestion,) = advice.suggestions
    assert (suggestion.change, suggestion.saves, suggestion.fits) == ("use FSDP", 104 * GIB, True)


class Variants:
    """Plans variants that save a number of GiB of activations by option, or half of them with half of the batch."""

    def __init__(self, **saves: int) -> None:
        self.saves = saves
        self.tried: list[tuple[dict[str, Any], int | None]] = []

    def __call__(self, planned: StepPlan, changes: Mapping[str, Any], batch: int | None) -> StepPlan | None:
        self.tried.append((dict(changes), batch))
        left = 8 - sum(self.saves.get(name, 0) for name in changes)
        return replace(
            planned,
            memory=memory(parameters=2, gradients=2, optimizer=4, activations=left if batch is None else left // 2),
        )


def test_options_are_tried_one_by_one() -> None:
    """Each suggestion has the bytes that a plan with the option needs less, and options without effect are not listed."""
    (each,) = estimates(step("FSDP", SHARDED, options={"mixed_precision": "bfloat16"}))
    advice = advise(each, [each], Variants(activation_checkpointing=7, cpu_offload=2))
    assert [(suggestion.change.partition(",")[0], suggestion.saves // GIB) for suggestion in advice.suggestions] == [
        ("activation_checkpointing=True", 7),
        ("batch_size=1 with accumulative_counts=2", 4),
        ("cpu_offload=True", 2),
    ]


def test_options_that_are_set_are_not_suggested() -> None:
    """An option that the strategy already has is not tried again."""
    variants = Variants()
    (each,) = estimates(
        step("FSDP", SHARDED, options={"mixed_precision": "float16", "cpu_offload": True}, micro_batch=1)
    )
    advise(each, [each], variants)
    assert variants.tried == [({"activation_checkpointing": True}, None), ({"reshard_after_forward": True}, None)]


def test_if_no_change_is_enough_all_options_are_tried_together() -> None:
    """On a device with 10 GiB, only both savings together make 17 GiB fit."""
    (each,) = estimates(step("FSDP", SHARDED, micro_batch=1), cluster=replace(CLUSTER, memory=10 * GIB))
    first, *others = advise(each, [each], Variants(activation_checkpointing=5, cpu_offload=2)).suggestions
    assert (
        first.change
        == "mixed_precision='bfloat16', activation_checkpointing=True, reshard_after_forward=True, cpu_offload=True"
    )
    assert (first.saves, first.fits) == (7 * GIB, True)
    assert not any(suggestion.fits for suggestion in others)


def test_changes_that_would_take_too_long_are_listed() -> None:
    """They have no number of bytes, and the user can plan them."""
    (each,) = estimates(step("FSDP", SHARDED, options={"mixed_precision": "bfloat16", "cpu_offload": True}))
    advice = advise(each, [each], lambda *_: None)
    assert advice.suggestions == ()
    assert [change.partition(",")[0].partition(" ")[0] for change in advice.untried] == [
        "activation_checkpointing=True", "reshard_after_forward=True", "batch_size=1",
    ]  # fmt: skip


def test_a_change_that_is_already_planned_is_neither_planned_again_nor_listed_twice() -> None:
    """FSDP with activation checkpointing is among the strategies, so only the other options are planned."""
    each, planned = estimates(
        step("FSDP", HALF, options={"mixed_precision": "bfloat16"}),
        step("FSDP", SHARDED, options={"mixed_precision": "bfloat16", "activation_checkpointing": True}),
    )
    tried: list[Any] = []

    def replan(_: StepPlan, changes: Any, micro_batch: int | None) -> None:
        tried.append((dict(changes), micro_batch))

    advice = advise(each, [each, planned], replan)
    assert ({"activation_checkpointing": True}, None) not in tried
    assert ({"cpu_offload": True}, None) in tried
    (suggestion,) = advice.suggestions
    assert suggestion.change == "activation_checkpointing=True, which computes activations twice"
    assert suggestion.saves == each.step.memory.total - planned.step.memory.total
