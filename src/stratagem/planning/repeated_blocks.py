"""Plan a model with many equal blocks from simulations of models with a few of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, takewhile
from typing import Any, Final, TypeVar, final

from torch import nn

from stratagem.planning.model_copies import ModelCopies
from stratagem.planning.simulate import Job, StepRecord
from stratagem.planning.snapshot import Snapshot
from stratagem.planning.storage_history import Change, StorageHistory

__all__ = [
    "BlockFinder",
    "RepeatedBlocks",
    "agree",
    "extended",
    "extended_history",
    "extended_changes",
    "find_repeated_blocks",
    "names_blocks",
    "with_more_samples",
]

# With fewer blocks, simulating all of them does not take longer.
_LEAST: Final = 14
_NUMBERED: Final = re.compile(r"\.\W*\d|\[\d")
# Tensors with fewer bytes may have an element for each parameter.
_SMALL: Final = 1024
_PLAIN: Final = (bool, int, float, str, type(None))
_T = TypeVar("_T", bound=Hashable)


@final
@dataclass(frozen=True, slots=True)
class RepeatedBlocks:
    """A list of equal modules in a model: its name, and the number of modules."""

    name: str
    count: int

    def shorten(self, model: nn.Module, keep: int) -> nn.Module:
        """Remove all modules but the first ``keep`` from a model, and return it."""
        blocks: Any = model.get_submodule(self.name)
        del blocks[keep:]
        return model


def find_repeated_blocks(model: nn.Module) -> RepeatedBlocks | None:
    """Return the list of many equal modules with the most parameters; None if there is none.

    Modules are equal if all of their submodules have the same types, shapes and plain attributes, except attributes with the
    position of the module.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) >= _LEAST
    }
    best = max(lists.items(), key=lambda each: sum(p.numel() for p in each[1].parameters()), default=None)
    if best is None:
        return None
    name, blocks = best
    inside = {id(each) for each in blocks.modules()}
    outside = {
        id(each) for module in model.modules() if id(module) not in inside for each in module.parameters(recurse=False)
    }
    own = [id(each) for block in blocks for each in block.parameters()]
    shares = len(set(own)) < len(own) or not outside.isdisjoint(own)
    return None if shares or not _are_equal(list(blocks)) else RepeatedBlocks(name, len(blocks))


def _are_equal(blocks: Sequence[nn.Module]) -> bool:
    described = [_described(block) for block in blocks]
    if any(each.keys() != described[0].keys() for each in described):
        return False
    positions = list(range(len(blocks)))
    for key in described[0]:
        values = [each[key] for each in described]
        if any(value != values[0] for value in values) and values != positions:
            return False
    return True


def _described(block: nn.Module) -> dict[tuple[str, str], Any]:
    """Return what the size of a block may depend on."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in block.named_modules():
        found[name, "type"] = type(module)
        found[name, "training"] = module.training
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[name, f"tensor {own}"] = (tensor.shape, tensor.dtype, tensor.requires_grad)
        for key, value in vars(module).items():
            if isinstance(value, _PLAIN) and key != "training":
                found[name, key] = value
            elif isinstance(value, tuple | list) and all(isinstance(each, _PLAIN) for each in value):
                found[name, key] = tuple(value)
    return found


def names_blocks(options: Any) -> bool:
    """Return whether options contain a string that may select modules by number, such as ``"blocks.31"``, or a function."""
    if isinstance(options, Mapping):
        return any(names_blocks(each) for pair in options.items() for each in pair)
    if isinstance(options, list | tuple | set | frozenset):
        return any(map(names_blocks, options))
    if isinstance(options, str):
        return _NUMBERED.search(options) is not None
    return not isinstance(options, (*_PLAIN, type))


def extended(short: Snapshot, long: Snapshot, times: int) -> Snapshot | None:
    """Return the sizes with additional blocks; None if they do not follow from two models.

    Args:
        short: the sizes of a model.
        long: those of the same model with one more block.
        times: the number of blocks in addition to those of ``long``.
    """

    def grown(name: str) -> int:
        before: int = getattr(short, name)
        value: int = getattr(long, name)
        return value + times * (value - before)

    same = ("largest_parameter", "is_sharded", "dp_size", "accumulation", "notes")
    if any(getattr(short, name) != getattr(long, name) for name in same):
        return None
    if long.state_excess is not None:
        # Each additional parameter has its state on another rank.
        return None
    step = None
    if short.step is not None and long.step is not None:
        step = _extended_step(short.step, long.step, times)
        if step is None:
            return None
    return replace(
        long,
        parameters=grown("parameters"),
        gradients=grown("gradients"),
        optimizer_state=grown("optimizer_state"),
        averages=grown("averages"),
        buffers=grown("buffers"),
        own_checkpoint=grown("own_checkpoint"),
        checkpoint=grown("checkpoint"),
        step=step,
    )


def _extended_step(short: StepRecord, long: StepRecord, times: int) -> StepRecord | None:
    if (short.largest, short.main_dtype) != (long.largest, long.main_dtype):
        return None
    history = extended_history(short.history, long.history, times)
    calls = _grown(Counter(short.calls), Counter(long.calls), times)
    if history is None or calls is None:
        return None
    return replace(
        long,
        history=history,
        gradients=long.gradients + times * (long.gradients - short.gradients),
        calls=tuple(call for call, count in calls.items() for _ in range(count)),
        flops=long.flops + times * (long.flops - short.flops),
        activations=long.activations + times * (long.activations - short.activations),
    )


def extended_history(short: StorageHistory, long: StorageHistory, times: int) -> StorageHistory | None:
    """Return the storages of a step with additional blocks; None if they do not follow from two models."""
    before = _grown(Counter(short.before), Counter(long.before), times)
    changes = extended_changes(short.changes, long.changes, times)
    return None if before is None or changes is None else StorageHistory(before, tuple(changes))


def _grown(short: Counter[_T], long: Counter[_T], times: int) -> Counter[_T] | None:
    found = Counter({key: count + times * (count - short[key]) for key, count in long.items()})
    return found if short.keys() <= long.keys() and all(count >= 0 for count in found.values()) else None


def extended_changes(short: Sequence[Change], long: Sequence[Change], times: int) -> list[Change] | None:
    """Return the changes that have each part by which ``long`` is longer than ``short`` more often.

    Small tensors, such as the norms of all gradients, may grow with the number of blocks.

    Args:
        short: the changes of a step.
        long: those of a step with another block.
        times: how often each additional part is repeated in addition to ``long``.

    Returns:
        The changes, or None if ``long`` is not ``short`` with additional parts.
    """
    parts = _additional_parts(short, long)
    if parts is None:
        return None
    found: list[Change] = []
    at = 0
    for change, size in zip(short, parts, strict=False):
        found += [*long[at : at + size]] * (1 + times)
        at += size
        found.append(replace(change, nbytes=long[at].nbytes + times * (long[at].nbytes - change.nbytes)))
        at += 1
    return [*found, *[*long[at:]] * (1 + times)]


def _additional_parts(short: Sequence[Change], long: Sequence[Change]) -> list[int] | None:
    """Return the length of the additional part of ``long`` before each change of ``short``; None if other changes differ."""
    found: list[int] = []
    at = 0
    missing = len(long) - len(short)
    if missing < 0:
        return None
    for index, change in enumerate(short):
        size = 0 if long[at] == change else _additional(short, index, long, at, missing)
        if size is None:
            return None
        found.append(size)
        at += size + 1
        missing -= size
    return found


def with_more_samples(short: StorageHistory, long: StorageHistory, larger: StorageHistory) -> StorageHistory | None:
    """Return the storages of a step of ``short`` with as many samples as ``larger``; None if they do not follow.

    Args:
        short: a step.
        long: a step with another block.
        larger: the same as ``long`` with more samples.
    """
    parts = _additional_parts(short.changes, long.changes)
    same = (
        len(long.changes) == len(larger.changes) and long.before.keys() == larger.before.keys() == short.before.keys()
    )
    if parts is None or not same:
        return None
    # The positions in ``long`` of the changes of ``short``.
    positions = [index + added for index, added in enumerate(accumulate(parts))]
    pairs = [(long.changes[at], larger.changes[at]) for at in positions]
    if any((one.kind, one.phase) != (other.kind, other.phase) for one, other in pairs):
        return None
    changes = tuple(
        replace(change, nbytes=change.nbytes + other.nbytes - one.nbytes)
        for change, (one, other) in zip(short.changes, pairs, strict=True)
    )
    return StorageHistory(
        {kind: size + larger.before[kind] - long.before[kind] for kind, size in short.before.items()}, changes
    )


def _additional(short: Sequence[Change], index: int, long: Sequence[Change], at: int, most: int) -> int | None:
    """Return the length of the part of ``long`` at ``at`` after which the most changes equal those of ``short`` at ``index``.

    The first of these changes may have another size.
    """
    best = None
    longest = -1
    for size in range(most + 1):
        one, other = short[index], long[at + size]
        if one != other and not (one.kind == other.kind and one.phase == other.phase and _are_small(one, other)):
            continue
        following = zip(islice(short, index + 1, None), islice(long, at + size + 1, None), strict=False)
        equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], following))
        if equal > longest:
            best, longest = size, equal
    return best


def _are_small(one: Change, other: Change) -> bool:
    return max(abs(one.nbytes), abs(other.nbytes)) < _SMALL and (one.nbytes > 0) == (other.nbytes > 0)


def agree(one: Snapshot, other: Snapshot) -> bool:
    """Return whether two snapshots are equal, with the same collectives in any order."""
    if one.step is None or other.step is None:
        return one == other
    same_calls = Counter(one.step.calls) == Counter(other.step.calls)
    return same_calls and _without_calls(one) == _without_calls(other)


def _without_calls(each: Snapshot) -> Snapshot:
    return each if each.step is None else replace(each, step=replace(each.step, calls=()))


@final
class BlockFinder:
    """Finds the equal blocks of a model once, and shortens the model.

    Args:
        job: the model and the optimizer.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._found: list[RepeatedBlocks | None] = []
        self._jobs: dict[int, Job] = {}

    def find(self) -> RepeatedBlocks | None:
        """Return the blocks; None if there are none, or if the configuration of the optimizer may refer to single blocks.

        Whether they behave equally is unknown.
        """
        if not self._found:
            named = names_blocks(self._job.optim_wrapper)
            self._found.append(None if named else find_repeated_blocks(self._job.make_model()))
        return self._found[0]

    def shortened(self, blocks: RepeatedBlocks, keep: int) -> Job:
        """Return a job whose model has only the first ``keep`` blocks."""
        if keep not in self._jobs:
            make_model = ModelCopies(lambda: blocks.shorten(self._job.make_model(), keep))
            self._jobs[keep] = replace(self._job, make_model=make_model)
        return self._jobs[keep]
