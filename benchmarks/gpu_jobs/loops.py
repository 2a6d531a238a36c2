"""The hand-written loop, and the runner that is interleaved with it."""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import nn
from torch.utils.data import DataLoader

from gpu_jobs.models import Job
from stratagem import Runner
from stratagem.train import Hook, Priority

__all__ = ["HAND", "RESIDENT", "RUNNER", "Peaks", "Stall", "Variant", "measure_blocks", "measure_peaks", "measure_save"]

HAND: Final = "hand-written"
# The hand-written loop with one batch that is on the device already: the floor for loops that load data.
RESIDENT: Final = "without loading"
RUNNER: Final = "Runner"
_LOG_INTERVAL: Final = 50


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How a job is trained.

    Attributes:
        amp: whether the forward pass is computed in bfloat16.
        compile: the arguments of ``torch.compile``; None for eager execution.
        workers: the number of data workers.
    """

    amp: bool
    compile: Mapping[str, Any] | None
    workers: int


@final
@dataclass(frozen=True, slots=True)
class Peaks:
    """The peak memory of tensors on the GPU in bytes, for training with each loop."""

    hand: int
    runner: int


@final
@dataclass(frozen=True, slots=True)
class Stall:
    """The seconds for which training waits while a checkpoint is saved, and the bytes of its tensors."""

    torch_save: float
    foreground: float
    background: float
    size: int


def hand_written(job: Job, variant: Variant, device: torch.device, *, loads: bool) -> Iterator[None]:
    """Train with the usual loop of torch; yield after every iteration."""
    torch.manual_seed(0)
    model: nn.Module = job.model().to(device).train()
    options = {name: value for name, value in job.optimizer.items() if name != "type"}
    optimizer = getattr(torch.optim, job.optimizer["type"])(model.parameters(), fused=True, **options)
    forward: Any = model if variant.compile is None else torch.compile(model, **variant.compile)
    pin = device.type == "cuda"
    loader = DataLoader(job.dataset(), job.batch_size, num_workers=variant.workers, pin_memory=pin, drop_last=True)
    batches: Iterator[Any] = iter(loader)
    if not loads:
        batches = itertools.repeat([part.to(device) for part in next(batches)])
    for count, batch in enumerate(batches, start=1):
        inputs, targets = (part.to(device, non_blocking=True) for part in batch)
        with torch.autocast(device.type, torch.bfloat16) if variant.amp else nullcontext():
            loss = forward(inputs, targets, mode="loss")["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if count % _LOG_INTERVAL == 0:
            # What a log line takes.
            float(loss)
        yield


def build_runner(
    job: Job, variant: Variant, folder: Path, iterations: int, hooks: list[Hook], **changes: Any
) -> Runner:
    """Return a runner with all default hooks for the same training."""
    torch.manual_seed(0)
    wrapper: dict[str, Any] = {"optimizer": dict(job.optimizer)}
    if variant.amp:
        wrapper |= {"type": "AmpOptimWrapper", "dtype": "bfloat16"}
    return Runner(
        job.model(),
        folder,
        train_dataloader={
            "dataset": job.dataset(),
            "batch_size": job.batch_size,
            "num_workers": variant.workers,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "default_collate"},
        },
        optim_wrapper=wrapper,
        train_cfg={"by_epoch": False, "max_iters": iterations},
        compile=False if variant.compile is None else dict(variant.compile),
        custom_hooks=hooks,
        randomness={"seed": 0},
        launcher="none",
        log_level="WARNING",
        **{"default_hooks": {"checkpoint": None}, **changes},
    )


@final
class _Clock:
    """Measures blocks with CUDA events, or with the host's clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin: Any = None

    def start(self) -> None:
        """Wait for the device, and start a block."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()
        else:
            self._begin = time.perf_counter()

    def stop(self) -> float:
        """Return the seconds from the start of the block to the end of its last kernel."""
        if self._device.type != "cuda":
            return float(time.perf_counter() - self._begin)
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        return float(self._begin.elapsed_time(end)) / 1000


@final
class _Interleaved(Hook):
    """Runs a block of each hand-written loop after each block of the runner, in random order, and measures all blocks."""

    priority = Priority.HIGHEST

    def __init__(self, others: Mapping[str, Iterator[None]], block: int, device: torch.device) -> None:
        self.rounds: list[dict[str, float]] = []
        self._others = others
        self._block = block
        self._clock = _Clock(device)
        self._order = random.Random(0)

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        if run.iter % self._block:
            return
        if run.iter:
            # The first block of each loop warms up.
            times = {RUNNER: self._clock.stop()}
            for name in self._order.sample(sorted(self._others), len(self._others)):
                self._clock.start()
                for _ in range(self._block):
                    next(self._others[name])
                times[name] = self._clock.stop()
            self.rounds.append({name: seconds / self._block for name, seconds in times.items()})
        self._clock.start()


def measure_blocks(
    job: Job, variant: Variant, device: torch.device, folder: Path, *, rounds: int, block: int
) -> list[dict[str, float]]:
    """Return the seconds per iteration of each loop in each round."""
    others = {
        HAND: hand_written(job, variant, device, loads=True),
        RESIDENT: hand_written(job, variant, device, loads=False),
    }
    hook = _Interleaved(others, block, device)
    runner = build_runner(job, variant, folder, block * (rounds + 1) + 1, [hook])
    try:
        runner.train()
    finally:
        runner.close()
    return hook.rounds[1:]


def measure_peaks(job: Job, variant: Variant, device: torch.device, folder: Path, iterations: int) -> Peaks:
    """Return the peaks of a few iterations of each loop, each alone on the GPU; 0 on the CPU."""

    def by_hand() -> None:
        loop = hand_written(job, variant, device, loads=True)
        for _ in range(iterations):
            next(loop)

    def with_runner() -> None:
        runner = build_runner(job, variant, folder, iterations, [])
        runner.train()
        runner.close()

    return Peaks(_peak_of(by_hand, device), _peak_of(with_runner, device))


def _peak_of(train: Callable[[], None], device: torch.device) -> int:
    if device.type != "cuda":
        train()
        return 0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    train()
    return torch.cuda.max_memory_allocated(device) - before


@final
class _SaveTimer(Hook):
    """Measures for how long the hooks of an iteration, and loading a batch, keep the host from starting the next one."""

    priority = Priority.HIGHEST

    def __init__(self, device: torch.device, interval: int) -> None:
        self._saves: list[float] = []
        self._others: list[float] = []
        self._clock = _Clock(device)
        self._interval = interval

    @property
    def stall(self) -> float:
        """The seconds that a save adds."""
        return min(self._saves) - statistics.median(self._others)

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._clock.start()

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        if run.iter:
            (self._others if run.iter % self._interval else self._saves).append(self._clock.stop())


def measure_save(job: Job, variant: Variant, device: torch.device, folder: Path, *, saves: int, every: int) -> Stall:
    """Return the shortest stall of several saves: of ``torch.save``, in the foreground and in the background."""
    found: dict[bool, float] = {}
    written, size = 0.0, 0
    for asynchronous in (False, True):
        hook = _SaveTimer(device, every)
        checkpoint = {"by_epoch": False, "interval": every, "async_save": asynchronous, "max_keep_ckpts": 1}
        path = folder / ("background" if asynchronous else "foreground")
        runner = build_runner(
            job,
            variant,
            path,
            every * saves + 1,
            [hook],
            default_hooks={"checkpoint": {**checkpoint, "save_last": False}},
        )
        model = runner.train()
        found[asynchronous] = hook.stall
        if not asynchronous:
            wrapper: Any = runner.strategy.optim_wrapper
            state = {"model": model.state_dict(), "optimizer": wrapper.optimizer.state_dict()}
            size = sum(value.nbytes for value in _tensors(state))
            times = []
            for _ in range(saves):
                begin = time.perf_counter()
                torch.save(state, folder / "torch_save.pt")
                times.append(time.perf_counter() - begin)
            written = min(times)
            del state
        runner.close()
    return Stall(written, found[False], found[True], size)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
