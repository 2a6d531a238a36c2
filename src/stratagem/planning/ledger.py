"""Replay the timeline of a model with the buffers, gradients and collectives of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import final

from stratagem.planning.result import Collective
from stratagem.planning.storage_history import Change
from stratagem.planning.timeline import GradientReady, Sent, Timeline, Visit

__all__ = ["EngineStep", "Ledger", "replay"]


@final
class Ledger:
    """The memory of a rank during a step, and what it sends.

    Args:
        persistent: the sizes of what exists during the whole run, by kind.
        ranks_per_node: the number of ranks on a node.

    Attributes:
        phase: the part of the step.
        totals: the sum of all sizes after each change.
        at_peak: the sizes at the largest sum by kind.
        peak_phase: the part of the step with the largest sum.
        most: the largest sizes of each kind, which need not coincide.
    """

    def __init__(self, persistent: Mapping[str, int], ranks_per_node: int) -> None:
        self._live: Counter[str] = Counter(persistent)
        self._ranks_per_node = ranks_per_node
        self._sent: dict[tuple[str, int, int, str], list[int]] = {}
        self.phase = "forward"
        self.totals = [sum(persistent.values())]
        self._best = self.totals[0]
        self.at_peak: dict[str, int] = dict(self._live)
        self.peak_phase = self.phase
        self.most = Counter(persistent)

    def add(self, kind: str, nbytes: int) -> None:
        """Allocate bytes, or free them if ``nbytes`` is negative."""
        live = self._live
        live[kind] += nbytes
        total = self.totals[-1] + nbytes
        self.totals.append(total)
        if nbytes > 0:
            self.most[kind] = max(self.most[kind], live[kind])
            if total > self._best:
                self._best, self.at_peak, self.peak_phase = total, dict(live), self.phase

    def live(self, kind: str) -> int:
        """Return the current size of a kind."""
        return self._live[kind]

    def set(self, kind: str, nbytes: int) -> None:
        """Change the size of a kind to a given value."""
        self.add(kind, nbytes - self._live[kind])

    def send(self, kind: str, nbytes: int, ranks: int, *, stride: int = 1) -> None:
        """Count a collective.

        Args:
            kind: its kind.
            nbytes: the size of its largest tensor.
            ranks: the number of ranks of its group.
            stride: the distance between the ranks of the group.
        """
        near = len(range(0, min(ranks * stride, self._ranks_per_node), stride))
        self._sent.setdefault((kind, ranks, near, self.phase), []).append(nbytes)

    def sent(self) -> dict[tuple[str, int, int, str], int]:
        """Return the number of collectives so far by kind, number of ranks, ranks on a node, and phase."""
        return {key: len(sizes) for key, sizes in self._sent.items()}

    def repeat_since(self, sent: Mapping[tuple[str, int, int, str], int], times: int) -> None:
        """Count the collectives since ``sent`` was returned several more times."""
        for key, sizes in self._sent.items():
            sizes.extend(sizes[sent.get(key, 0) :] * times)

    def collectives(self) -> tuple[Collective, ...]:
        return tuple(
            Collective(kind=kind, count=len(sizes), bytes=sum(sizes), group_size=size, ranks_per_node=near, phase=phase)
            for (kind, size, near, phase), sizes in self._sent.items()
        )


class EngineStep(ABC):
    """What an engine does during an optimizer step.

    Args:
        ledger: the record of the step.
        timeline: a micro-batch of the model.
        world: the number of ranks.
    """

    def __init__(self, ledger: Ledger, timeline: Timeline, world: int) -> None:
        self.ledger = ledger
        self._weight = timeline.weight
        self._world = world

    def sum_weights(self) -> None:
        """Count the sum of the weights of losses over ranks, before the gradients are multiplied by it."""
        if self._weight and self._world > 1:
            self.ledger.send("all_reduce", self._weight, self._world)

    @abstractmethod
    def gradient_ready(self, parameter: int, nbytes: int, *, last: bool) -> None:
        """Handle a complete gradient, which has a new storage of ``nbytes`` bytes. ``last`` is of the micro-batch."""

    @abstractmethod
    def end_backward(self, *, last: bool) -> None:
        """Handle the end of the backward pass of a micro-batch."""

    @abstractmethod
    def update(self) -> None:
        """Update the parameters."""

    def visit(self, visit: Visit) -> None:  # noqa: B027 -- only engines that gather parameters use it
        """Handle that a module is entered or left."""

    def carried(self) -> Hashable:
        """Return what a micro-batch leaves to the next one and what changes its collectives; gradients do not."""
        return None


def replay(timeline: Timeline, engine: EngineStep, accumulation: int) -> None:
    """Run an optimizer step of an engine on the timeline of a micro-batch.

    If a micro-batch after the first one leaves the same to the next one as the micro-batch before, its collectives count as often
    as there are others, except the last one.
    """
    ledger = engine.ledger
    left = accumulation
    while left:
        before, sent = engine.carried(), ledger.sent()
        _run_micro_batch(timeline, engine, last=left == 1)
        left -= 1
        if left > 1 and left < accumulation - 1 and engine.carried() == before:
            ledger.repeat_since(sent, left - 1)
            left = 1
    ledger.phase = "update"
    engine.update()


def _run_micro_batch(timeline: Timeline, engine: EngineStep, *, last: bool) -> None:
    ledger = engine.ledger
    for event in timeline.events:
        if isinstance(event, Change):
            ledger.phase = "backward" if event.phase == "update" else event.phase
            ledger.add(event.kind, event.nbytes)
        elif isinstance(event, GradientReady):
            ledger.phase = "backward"
            engine.gradient_ready(event.parameter, event.nbytes, last=last)
        elif isinstance(event, Sent):
            ledger.send(event.kind, event.nbytes, event.ranks)
        else:
            ledger.phase = event.phase
            engine.visit(event)
    for kind in ("activations", "temporary"):
        ledger.set(kind, 0)
    engine.end_backward(last=last)
