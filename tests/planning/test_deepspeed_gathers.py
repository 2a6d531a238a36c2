"""Stage 3 of DeepSpeed gathers and releases parameters in the planned order; the expected orders are written by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

import pytest

from stratagem.planning.deepspeed_gathers import (
    GatherObserver,
    GatherRules,
    ParameterCoordinator,
    Releases,
    first_releases,
)
from stratagem.planning.ledger import EngineStep, Ledger, replay
from stratagem.planning.model_copies import meta_copy
from stratagem.planning.simulate import Job
from stratagem.planning.timeline import Timeline, Visit, record_timeline
from tests.support.planned_models import Irregular, irregular_batch

# A model (module 0) with two layers, whose parameters have 10 and 20 elements.
RULES = GatherRules(
    numels=(10, 20),
    modules=((), (0,), (1,)),
    persistent=frozenset(),
    prefetch_bucket_size=100,
    max_live_parameters=100,
    max_reuse_distance=100,
)
NO_LIMITS: dict[str, int] = {}
NOTHING_LIVE = {"max_live_parameters": 0, "max_reuse_distance": 0}


def visits(*, input_has_gradient: bool) -> list[Visit]:
    """Return the visits of a micro-batch; the first layer is left only if its input has a gradient."""
    forward = [(0, True), (1, True), (1, False), (2, True), (2, False), (0, False)]
    backward = [(0, True), (2, True), (2, False), (1, True)]
    backward += [(1, False), (0, False)] if input_has_gradient else []
    return [
        *(Visit(module, enters, True, "forward") for module, enters in forward),
        *(Visit(module, enters, False, "backward") for module, enters in backward),
    ]


class Recorder(GatherObserver):
    """Records the messages and the releases in order."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_gather(self, parameters: Sequence[int]) -> None:
        self.found.append("gather " + " ".join(map(str, parameters)))

    def on_arrival(self, parameters: Sequence[int]) -> None:
        pass

    def on_release(self, parameter: int) -> None:
        self.found.append(f"release {parameter}")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (NO_LIMITS, ["gather 0 1", "release 1", "release 0"]),
        (
            NOTHING_LIVE,
            ["gather 0", "release 0", "gather 1", "release 1", "gather 1", "release 1", "gather 0", "release 0"],
        ),
    ],
    ids=["no limits", "nothing live"],
)
def test_limits_decide_when_parameters_are_gathered(limits: dict[str, int], expected: list[str]) -> None:
    """Without limits, one message gathers both parameters for both passes; otherwise, each layer gathers its own twice."""
    rules = replace(RULES, **limits)
    micro_batch = visits(input_has_gradient=False)
    recorder = Recorder()
    coordinator = ParameterCoordinator(rules, micro_batch, recorder, first_releases(rules, micro_batch, 1))
    for visit in micro_batch:
        coordinator.visit(visit)
    coordinator.end_backward()
    assert recorder.found == expected


def test_the_second_micro_batch_of_a_run_decides_what_modules_release() -> None:
    """Without an update before it, it gathers the persistent parameter, and has no room to prefetch the backward pass."""
    rules = replace(RULES, persistent=frozenset({0}), max_live_parameters=25, max_reuse_distance=0)
    releases: list[Releases] = [
        first_releases(rules, visits(input_has_gradient=True), accumulation) for accumulation in (1, 2)
    ]
    # The second layer ends its forward pass after three modules were entered.
    assert [each[2, 3] for each in releases] == [frozenset(), frozenset({1})]


@pytest.mark.slow
def test_modules_are_visited_as_often_as_by_the_hooks_of_deepspeed() -> None:
    """Each output of a module is a visit of the backward pass, and only the last call of a module ends its visit."""
    timeline = record_timeline(
        Job(make_model=lambda: meta_copy(Irregular()), optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}}),
        {name: tensor.to("meta") for name, tensor in irregular_batch().items()},
        None,
    )
    names = [name for name, _ in Irregular().named_modules()]
    found: dict[str, Counter[str]] = {name: Counter() for name in names}
    for event in timeline.events:
        if isinstance(event, Visit):
            kind = "forward" if event.forward else "enters backward" if event.enters else "leaves backward"
            found[names[event.module]][kind] += 1
    expected = {
        "first": (2, 1, 0),  # its input has no gradient
        "block": (4, 2, 1),
        "pairs.0": (2, 2, 1),
        "pairs.0.shared": (8, 4, 1),  # hooks of both parents
        "frozen": (2, 1, 1),
        "unused": (0, 0, 0),
    }
    kinds = ("forward", "enters backward", "leaves backward")
    assert {name: tuple(found[name][kind] for kind in kinds) for name in expected} == expected


EMPTY = Timeline(
    events=(), numels=(), trainable=(), modules=(), saved=0, largest=0, flops=0, compute_dtype="float32", buffers=0, batch=0,
    weight=0,
)  # fmt: skip


class Engine(EngineStep):
    """Sends 1 byte in a micro-batch that begins in state 0, and 10 bytes in others; the state has a period."""

    def __init__(self, ledger: Ledger, period: int) -> None:
        super().__init__(ledger, EMPTY, 2)
        self.period = period
        self.state = self.replayed = 0

    def gradient_ready(self, parameter: int, nbytes: int, *, last: bool) -> None:
        pass

    def end_backward(self, *, last: bool) -> None:
        self.ledger.send("all_gather", 10 if self.state else 1, 2)
        self.state = (self.state + 1) % self.period
        self.replayed += 1

    def update(self) -> None:
        pass

    def carried(self) -> Hashable:
        return self.state


@pytest.mark.parametrize(
    ("period", "micro_batches", "total", "replayed"), [(1, 1000, 1000, 3), (2, 7, 34, 7), (1, 2, 2, 2)]
)
def test_micro_batches_are_counted_without_a_replay_if_they_leave_the_same(
    period: int, micro_batches: int, total: int, replayed: int
) -> None:
    """Micro-batches between the second and the last are equal if the second leaves what it found, and replayed otherwise."""
    ledger = Ledger({}, 8)
    engine = Engine(ledger, period)
    replay(EMPTY, engine, micro_batches)
    [sent] = ledger.collectives()
    assert (sent.count, sent.bytes, engine.replayed) == (micro_batches, total, replayed)
