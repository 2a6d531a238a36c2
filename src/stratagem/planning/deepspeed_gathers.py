"""Which parameters DeepSpeed's stage 3 gathers and releases, by the rules of its ``PartitionedParameterCoordinator``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

from stratagem.planning.timeline import Timeline, Visit

__all__ = ["GatherObserver", "GatherRules", "ParameterCoordinator", "Releases", "first_releases", "model_visits"]

# The parameters that a module releases, by the module and the number of modules that have been entered before.
Releases = dict[tuple[int, int], frozenset[int]]


class GatherObserver(ABC):
    """Is called when parameters are gathered and released."""

    @abstractmethod
    def on_gather(self, parameters: Sequence[int]) -> None:
        """Handle that one message gathers parameters."""

    @abstractmethod
    def on_arrival(self, parameters: Sequence[int]) -> None:
        """Handle that the parameters of a message are copied to their storages."""

    @abstractmethod
    def on_release(self, parameter: int) -> None:
        """Handle that the storage of a gathered parameter is freed."""


@final
class _Unobserved(GatherObserver):
    def on_gather(self, parameters: Sequence[int]) -> None:
        pass

    def on_arrival(self, parameters: Sequence[int]) -> None:
        pass

    def on_release(self, parameter: int) -> None:
        pass


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GatherRules:
    """What the gathers of a model depend on.

    Attributes:
        numels: the number of elements of each parameter.
        modules: the parameters of each module.
        persistent: the parameters that stay on all ranks.
        prefetch_bucket_size: the number of elements from which a message for later modules has no more parameters.
        max_live_parameters: the number of gathered elements from which nothing is gathered for later modules.
        max_reuse_distance: the number of elements up to the next use of a parameter from which it is released.
    """

    numels: tuple[int, ...]
    modules: tuple[tuple[int, ...], ...]
    persistent: frozenset[int]
    prefetch_bucket_size: int
    max_live_parameters: int
    max_reuse_distance: int


def model_visits(timeline: Timeline) -> tuple[Visit, ...]:
    """Return the visits of a micro-batch that follow the beginning of the model's forward pass.

    A module that runs earlier, such as the data preprocessor, is the last one of DeepSpeed's trace and has no parameters.
    """
    visits = [each for each in timeline.events if isinstance(each, Visit)]
    first = next((at for at, visit in enumerate(visits) if visit.module == 0), 0)
    return tuple(visits[first:])


def first_releases(rules: GatherRules, visits: Sequence[Visit], accumulation: int) -> Releases:
    """Return which parameters each module releases.

    DeepSpeed decides this in the second micro-batch of a run and uses the result until the end of the run. In the first one, it
    records the order of the modules, and every module releases all of its parameters, even persistent ones. If an update follows
    the first micro-batch, persistent parameters are gathered before the second one; otherwise, the second one gathers them.

    Args:
        rules: the parameters and the limits.
        visits: the visits of a micro-batch.
        accumulation: the number of micro-batches of an update.
    """
    coordinator = ParameterCoordinator(rules, visits, _Unobserved(), {})
    for records in (True, False):
        coordinator.begin_forward(records=records)
        for visit in visits:
            coordinator.visit(visit)
        coordinator.end_backward()
        if accumulation == 1:
            coordinator.end_step()
    return coordinator.releases


@final
class ParameterCoordinator:
    """The parameters that are gathered at each point of a run.

    Args:
        rules: the parameters and the limits.
        visits: the visits of a micro-batch.
        observer: is called when parameters are gathered and released.
        releases: the known decisions of modules; others are added.
    """

    def __init__(
        self, rules: GatherRules, visits: Sequence[Visit], observer: GatherObserver, releases: Releases
    ) -> None:
        self._rules = rules
        self._observer = observer
        self.releases = releases
        entered = [visit.module for visit in visits if visit.enters]
        self._order = [(each, step) for step, module in enumerate(entered) for each in sorted(rules.modules[module])]
        self._uses: dict[int, list[int]] = {}
        for parameter, step in self._order:
            self._uses.setdefault(parameter, []).append(step)
        sizes = [sum(rules.numels[each] for each in rules.modules[module]) for module in entered]
        self._passed = [0, *accumulate(sizes)]
        self._available: set[int] = set()
        # The message of each parameter that no module has waited for; another one of the same message may have arrived.
        self._in_flight: dict[int, tuple[int, ...]] = {}
        self._active: dict[int, set[int]] = {}
        self._backward: dict[int, None] = {}
        self.begin_forward()

    @property
    def available(self) -> frozenset[int]:
        """The parameters that are gathered."""
        return frozenset(self._available)

    def begin_forward(self, *, records: bool = False) -> None:
        """Begin the forward pass of a micro-batch.

        Args:
            records: whether the order of the modules is not known.
        """
        for parameter in list(self._in_flight):
            self._wait(parameter)
            self._release_one(parameter)
        self._records = records
        self._queue = deque(() if records else self._order)
        self._fetched_for: dict[int, int] = {}
        self._step = 0
        self._live = 0

    def visit(self, visit: Visit) -> None:
        """Enter or leave a module."""
        if not visit.enters:
            self._leave(visit.module, forward=visit.forward)
            return
        if not visit.forward:
            self._backward[visit.module] = None
        self._enter(visit.module)

    def end_backward(self) -> None:
        """Release the parameters of modules whose input has no gradient, so that their backward pass does not end."""
        for module in reversed(self._backward):
            for each in self._rules.modules[module]:
                self._active.get(each, set()).discard(module)
                if each not in self._rules.persistent:
                    self._release_one(each)
        self._backward.clear()

    def end_step(self) -> None:
        """Release all parameters except the persistent ones, which an update gathers again."""
        for parameter in list(self._in_flight):
            self._wait(parameter)
        self._active.clear()
        for parameter in sorted(self._available - self._rules.persistent):
            self._release_one(parameter)
        self._available = set(self._rules.persistent)

    def _enter(self, module: int) -> None:
        needed = sorted(set(self._rules.modules[module]))
        self._gather(needed)
        for each in needed:
            self._active.setdefault(each, set()).add(module)
            self._wait(each)
        new = {each for each in needed if self._fetched_for.get(each, -1) < self._step}
        passed: set[int] = set()
        while self._queue and len(passed) < len(new):
            parameter, step = self._queue.popleft()
            self._fetched_for[parameter] = step
            passed.add(parameter)
        if not self._records:
            self._prefetch()
        self._step += 1

    def _prefetch(self) -> None:
        rules = self._rules
        most = min(rules.max_live_parameters - self._live, rules.prefetch_bucket_size)
        chosen: dict[int, None] = {}
        numel = 0
        while self._queue and numel < most:
            parameter, step = self._queue.popleft()
            self._fetched_for[parameter] = max(self._fetched_for.get(parameter, -1), step)
            if self._is_missing(parameter) and parameter not in chosen:
                chosen[parameter] = None
                numel += rules.numels[parameter]
        self._gather(chosen)

    def _is_missing(self, parameter: int) -> bool:
        return parameter not in self._available and parameter not in self._in_flight

    def _gather(self, parameters: Iterable[int]) -> None:
        missing = tuple(each for each in parameters if self._is_missing(each))
        if missing:
            self._live += sum(self._rules.numels[each] for each in missing)
            self._observer.on_gather(missing)
            self._in_flight.update(dict.fromkeys(missing, missing))

    def _wait(self, parameter: int) -> None:
        message = self._in_flight.pop(parameter, ())
        if message and parameter not in self._available:
            self._available.update(message)
            self._observer.on_arrival(message)

    def _leave(self, module: int, *, forward: bool) -> None:
        released = frozenset(self._rules.modules[module]) if self._records else self._releases_of(module)
        if not forward:
            self._backward.pop(module, None)
        for each in self._rules.modules[module]:
            self._active.get(each, set()).discard(module)
            if each in released:
                self._release_one(each)

    def _releases_of(self, module: int) -> frozenset[int]:
        key = module, self._step
        if key not in self.releases:
            own = self._rules.modules[module]
            self.releases[key] = frozenset(each for each in own if not self._is_kept(each))
        return self.releases[key]

    def _is_kept(self, parameter: int) -> bool:
        """Return whether a module does not release a parameter: it is persistent, fetched for a later module, or used soon."""
        if parameter in self._rules.persistent or self._fetched_for.get(parameter, -1) > self._step:
            return True
        uses = self._uses[parameter]
        following = bisect_left(uses, self._step)
        if following == len(uses):
            return False
        distance = self._passed[uses[following]] - self._passed[min(self._step, len(self._passed) - 1)]
        return distance < self._rules.max_reuse_distance

    def _release_one(self, parameter: int) -> None:
        if parameter in self._available and not self._active.get(parameter):
            self._available.discard(parameter)
            self._live -= self._rules.numels[parameter]
            self._observer.on_release(parameter)
