"""Try all parts of a run for a few iterations in a temporary folder."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final, final

from torch import Generator
from torch.utils.data import DataLoader, Dataset, Sampler

from stratagem.checkpoint import find_latest_checkpoint
from stratagem.distributed import RankGroup, close_dist, infer_launcher, init_dist, is_distributed
from stratagem.errors import ConfigValueError, TrainingError
from stratagem.storage import tree_bytes
from stratagem.strategies import BaseStrategy
from stratagem.train.goodput.clock import DATA, EVALUATION, SAVE, START, TRAIN
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.checkpoint import CheckpointHook
from stratagem.train.run.context import Run
from stratagem.train.tools.preserve_state import isolate_rng
from stratagem.utils import absolute

__all__ = ["DryRun", "TriedPart", "dry_run"]

_ITERATIONS: Final = 4
_WINDOWS: Final = 2
_EVALUATED_BATCHES: Final = 2
_DATA_ARGUMENTS: Final = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TriedPart:
    """A part of a run that a dry run has tried.

    Attributes:
        name: the name of the part, such as ``"validation"``.
        seconds: how long it took; None if it was skipped.
        details: what was done, or why the part was skipped.
    """

    name: str
    seconds: float | None
    details: str = ""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """The result of a dry run that succeeded.

    Attributes:
        strategy: the name of the class of the strategy.
        rank: the rank of this process.
        ranks: the number of processes.
        iterations: the number of training iterations.
        parts: the parts of the run.
    """

    strategy: str
    rank: int
    ranks: int
    iterations: int
    parts: tuple[TriedPart, ...]

    def describe(self) -> str:
        """Return a summary with one line for each part."""
        where = "1 process" if self.ranks == 1 else f"{self.ranks} processes"
        lines = [f"The dry run with {self.strategy} in {where} succeeded. Its files were removed."]
        width = max(len(part.name) for part in self.parts)
        for part in self.parts:
            duration = "skipped" if part.seconds is None else f"{part.seconds:.2f} s"
            lines.append(f"  {part.name:<{width}}  {duration:>9}  {part.details}".rstrip())
        return "\n".join(lines)


@final
class _Shortening(Hook):
    """Ends the training after a few iterations, as if the run were complete.

    The lengths change when the training begins, so that the schedules are those of the whole run.

    Attributes:
        stage: the part of the run that is in progress.
        iterations: the number of iterations; 0 before the training.
    """

    priority = Priority.VERY_HIGH

    def __init__(self) -> None:
        self.stage = "start-up"
        self.iterations = 0

    def before_train(self, run: Run) -> None:
        self.stage = "training"
        progress = run.progress
        window = max(wrapper.accumulative_counts for wrapper in run.optim_wrapper.each().values())
        wanted = max(_ITERATIONS, _WINDOWS * window)
        length = progress.epoch_length if progress.max_epochs is not None else progress.max_iters
        self.iterations = wanted if length is None else min(wanted, length)
        progress.max_iters = self.iterations
        if progress.max_steps is not None:
            progress.max_steps = max(1, min(progress.max_steps, self.iterations // window))
            progress.max_iters = self.iterations = progress.max_steps * window
        if progress.max_epochs is not None:
            progress.max_epochs, progress.epoch_length = 1, self.iterations

    def after_train_epoch(self, run: Run) -> None:
        run.progress.stop_training = True

    def before_val(self, run: Run) -> None:
        self.stage = "validation"

    def after_val(self, run: Run) -> None:
        self.stage = "training"

    def before_save_checkpoint(self, run: Run, checkpoint: dict[str, Any]) -> None:
        self.stage = "saving"

    def before_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None) -> None:
        self.stage = "training"


def dry_run(build: Callable[..., Any], arguments: Mapping[str, Any]) -> DryRun:
    """Train, validate, save, test and load with the arguments of a run for a few iterations; return what was tried. Collective.

    Everything is written to a temporary folder next to the work directory, which is removed at the end. Trackers are not started.
    The arguments are copied, except for the data, so that models, optimizers and hooks do not change.

    Args:
        build: builds a runner from its arguments.
        arguments: the arguments of the run.

    Raises:
        ConfigValueError: if the arguments contain a strategy that is already built, or nothing to train.
        Exception: if a part of the run fails; a note names the part.
    """
    _require_copies(arguments)
    with _process_group(arguments), isolate_rng(), _kept_generators(arguments), _temporary_folder(arguments) as folder:
        hook = _Shortening()
        runner: Any = None
        try:
            runner = build(**_shortened(arguments, folder, hook))
            strategy, world = type(runner.strategy).__name__, runner.strategy.world
            runner.train()
            parts = _training_parts(runner, hook)
            hook.stage = "test"
            parts.append(_try_test(runner, arguments))
            checkpoint = runner.run.last_checkpoint
            runner.close()
            runner = None
            hook.stage = "loading the checkpoint"
            parts.append(_try_load(build, arguments, folder, hook.iterations, checkpoint))
        except BaseException as error:
            error.add_note(f"The dry run failed in this part: {hook.stage}. Its files were removed.")
            raise
        finally:
            if runner is not None:
                runner.close()
    return DryRun(strategy=strategy, rank=world.rank, ranks=world.size, iterations=hook.iterations, parts=tuple(parts))


def _require_copies(arguments: Mapping[str, Any]) -> None:
    if isinstance(arguments.get("strategy"), BaseStrategy):
        raise ConfigValueError(
            "A dry run builds the strategy twice, but the strategy is already built. Pass its name or configuration instead."
        )
    if arguments.get("train_cfg") is None:
        raise ConfigValueError("A dry run trains, but there is no train_cfg. To try an evaluation, run stratagem test.")


@contextmanager
def _process_group(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Create the process group if a launcher started this process; it is used by both runners."""
    launcher = arguments.get("launcher") or infer_launcher()
    if launcher == "none" or is_distributed():
        yield
        return
    init_dist(**{**((arguments.get("env_cfg") or {}).get("dist_cfg") or {}), "launcher": launcher})
    try:
        yield
    finally:
        close_dist()


@contextmanager
def _kept_generators(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Restore the states of the generators of loaders and samplers on exit."""
    loaders = [value for name in _DATA_ARGUMENTS for value in _loaders(arguments.get(name))]
    parts = [part for each in loaders for part in (each, each.sampler, getattr(each.batch_sampler, "sampler", None))]
    generators = [generator for part in parts if isinstance(generator := getattr(part, "generator", None), Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _data_objects(value: Any) -> Iterator[Any]:
    """Yield the loaders, datasets and samplers in the configuration of dataloaders."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _data_objects(each)
    elif isinstance(value, DataLoader | Dataset | Sampler):
        yield value


def _loaders(value: Any) -> list[DataLoader[Any]]:
    values = value.values() if isinstance(value, Mapping) else [value]
    return [each for each in values if isinstance(each, DataLoader)]


@contextmanager
def _temporary_folder(arguments: Mapping[str, Any]) -> Iterator[Path]:
    """Create a folder on the file system of the work directory, which all ranks share; remove it on exit. Collective on entry."""
    group = RankGroup.of()
    folder = group.run_on_rank0(lambda: _make_folder(absolute(arguments.get("work_dir") or "work_dirs")))
    try:
        yield folder
    except BaseException:
        # Other ranks may still be running: do not wait for them.
        if group.is_rank0:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    group.run_on_rank0(lambda: shutil.rmtree(folder))


def _make_folder(work_dir: Path) -> Path:
    parent = next(each for each in (work_dir, *work_dir.parents) if each.is_dir())
    # Next to the work directory rather than in it, because a run may be using it.
    parent = parent.parent if parent == work_dir else parent
    return Path(tempfile.mkdtemp(prefix=".stratagem-dry-run-", dir=parent))


def _shortened(arguments: Mapping[str, Any], folder: Path, hook: Hook | None) -> dict[str, Any]:
    """Return copies of the arguments for a run in a folder that ends early."""
    # The data is not copied, because it may be large.
    shared = {id(each): each for name in _DATA_ARGUMENTS for each in _data_objects(arguments.get(name))}
    changed = copy.deepcopy({name: value for name, value in arguments.items() if name != "cfg"}, shared)
    changed |= {"work_dir": str(folder / "run"), "resume": False, "requeue": False, "report": False, "trackers": None}
    changed["load_from"] = _weights(arguments)
    strategy = changed.get("strategy")
    if isinstance(strategy, dict) and "work_dir" in strategy:
        strategy["work_dir"] = changed["work_dir"]
    changed["train_cfg"] = _validating(changed["train_cfg"])
    changed["default_hooks"] = _saving(changed.get("default_hooks"))
    changed["custom_hooks"] = [
        *(_with_temporary_files(each) for each in changed.get("custom_hooks") or ()),
        *([] if hook is None else [hook]),
    ]
    for mode in ("val", "test"):
        if changed.get(f"{mode}_dataloader") is not None and not (mode == "val" and changed.get("overfit_batches")):
            limit = changed.get(f"limit_{mode}_batches")
            changed[f"limit_{mode}_batches"] = (
                min(limit, _EVALUATED_BATCHES) if type(limit) is int else _EVALUATED_BATCHES
            )
    if "cfg" in arguments:
        changed["cfg"] = arguments["cfg"]
    return changed


def _weights(arguments: Mapping[str, Any]) -> Any:
    """Return the checkpoint whose weights the run loads or, if it resumes, that of the checkpoint; None if there is none."""
    load_from, resume = arguments.get("load_from"), arguments.get("resume")
    if not isinstance(resume, bool | None):
        return resume
    if not resume or load_from is not None:
        return load_from
    work_dir = absolute(arguments.get("work_dir") or "work_dirs")
    return RankGroup.of().run_on_rank0(lambda: find_latest_checkpoint(work_dir))


def _validating(train_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the training loop without those that delay validations."""
    first = {"val_begin": min(1, train_cfg["val_begin"])} if "val_begin" in train_cfg else {}
    return {**train_cfg, **first}


def _saving(default_hooks: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the default hooks with a CheckpointHook that saves the last checkpoint to the work directory."""
    hooks = dict(default_hooks or {})
    if "checkpoint" in hooks and hooks["checkpoint"] is None:
        return hooks
    hooks["checkpoint"] = _with_temporary_files(hooks.get("checkpoint", {}), default="CheckpointHook")
    return hooks


def _with_temporary_files(hook: Any, default: str | None = None) -> Any:
    """Return a hook, or its configuration, with checkpoints in the work directory."""
    if isinstance(hook, CheckpointHook):
        return hook.for_dry_run()
    if isinstance(hook, Mapping) and hook.get("type", default) in ("CheckpointHook", CheckpointHook):
        return {**hook, "save_last": True, "out_dir": None}
    return hook


def _training_parts(runner: Any, hook: _Shortening) -> list[TriedPart]:
    """Return the parts of a training that is complete."""
    run: Run = runner.run
    seconds = run.clock.read().seconds
    counts = ", ".join(
        f"{_count(wrapper.num_steps_applied, 'update')}{f' of {name}' if name else ''}"
        for name, wrapper in run.optim_wrapper.each().items()
    )
    parts = [
        TriedPart(name="start-up", seconds=seconds.get(START, 0.0), details="processes, data, model and optimizer"),
        TriedPart(
            name="training",
            seconds=seconds.get(TRAIN, 0.0),
            details=f"{_count(hook.iterations, 'iteration')}, {counts}",
        ),
        TriedPart(name="waiting for data", seconds=seconds.get(DATA, 0.0)),
    ]
    validated = run.progress.validated >= 0
    metrics = ", ".join(run.metrics)
    why = f"metrics: {metrics}" if validated else "there is no val_dataloader"
    parts.append(TriedPart(name="validation", seconds=seconds.get(EVALUATION, 0.0) if validated else None, details=why))
    checkpoint = run.last_checkpoint
    if checkpoint is None:
        parts.append(TriedPart(name="saving", seconds=None, details="there is no CheckpointHook"))
    else:
        size = RankGroup.of().run_on_rank0(lambda: tree_bytes(checkpoint))
        details = f"the last checkpoint ({checkpoint.name}) has {_bytes_text(size)}"
        parts.append(TriedPart(name="saving", seconds=seconds.get(SAVE, 0.0), details=details))
    return parts


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def _bytes_text(size: int) -> str:
    return f"{size / 2**10:,.1f} KiB" if size < 2**20 else f"{size / 2**20:,.1f} MiB"


def _try_test(runner: Any, arguments: Mapping[str, Any]) -> TriedPart:
    if arguments.get("test_dataloader") is None:
        return TriedPart(name="test", seconds=None, details="there is no test_dataloader")
    began = perf_counter()
    metrics = runner.test()
    return TriedPart(name="test", seconds=perf_counter() - began, details=f"metrics: {', '.join(metrics)}")


def _try_load(
    build: Callable[..., Any], arguments: Mapping[str, Any], folder: Path, iterations: int, checkpoint: Path | None
) -> TriedPart:
    """Resume from the checkpoint in a new run, without training."""
    if checkpoint is None:
        return TriedPart(name="loading", seconds=None, details="no checkpoint was saved")
    began = perf_counter()
    changed = {**_shortened(arguments, folder, None), "load_from": None, "resume": str(checkpoint)}
    runner = build(**changed)
    try:
        runner.prepare()
        if runner.run.iter != iterations:
            raise TrainingError(
                f"The checkpoint was saved after iteration {iterations}, but resumes after iteration {runner.run.iter}."
            )
    finally:
        runner.close()
    return TriedPart(
        name="loading", seconds=perf_counter() - began, details=f"resumed after iteration {iterations} in a new run"
    )
