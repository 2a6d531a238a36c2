"""Train one variant and record its trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Final, final

from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from stratagem.cli.parity.noise_hooks import DoublePrecision, RoundedGradients
from stratagem.cli.parity.variants import NoiseSource, ParitySettings, Variant, variant_config
from stratagem.config import Config
from stratagem.errors import TrainingError
from stratagem.runner import Runner
from stratagem.trace import Trace, read_trace
from stratagem.train import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.trace import TraceHook
from stratagem.train.run.context import Run

__all__ = ["read_variant", "train_variant"]

_NOISE_HOOKS: Final = {NoiseSource.FLOAT64: DoublePrecision, NoiseSource.ROUNDED: RoundedGradients}


@final
class _EvalLayers(Hook):
    """Put dropout and batch normalization into evaluation mode before each iteration."""

    priority = Priority.VERY_HIGH

    def before_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None) -> None:
        for module in run.strategy.unwrap_model().modules():
            if isinstance(module, _DropoutNd | _BatchNorm):
                module.eval()


@final
class _StopHalfway(Hook):
    """Save a checkpoint after a number of optimizer steps, and stop the run.

    Args:
        after: the number of steps.
    """

    # After the schedules and averages have followed the step, like CheckpointHook.
    priority = Priority.VERY_LOW

    def __init__(self, after: int) -> None:
        self._after = after

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if all(each.num_steps_applied >= self._after for each in run.optim_wrapper.each().values()):
            run.save_checkpoint(Path(run.work_dir) / f"iter_{run.iter + 1}", run.progress.after_this_iteration())
            run.progress.stop_training = True


@final
class _Observer(Hook):
    """Observe properties of the model before training."""

    def __init__(self) -> None:
        self.num_batch_norms = 0

    def before_train(self, run: Run) -> None:
        parameters = list(run.strategy.unwrap_model().parameters())
        if not any(parameter.requires_grad for parameter in parameters):
            raise TrainingError(
                f"No parameter can move: all {len(parameters)} parameters of the model are frozen (requires_grad=False), so "
                "there is nothing to compare. Make some of them trainable."
            )
        modules = run.strategy.unwrap_model().modules()
        self.num_batch_norms = sum(
            isinstance(each, _BatchNorm) and not isinstance(each, SyncBatchNorm) for each in modules
        )


def train_variant(
    config: Config, variant: Variant, settings: ParitySettings, folder: Path, *, epoch_length: int | None = None
) -> int:
    """Train one variant in this process, and record its trace in a subfolder of ``folder`` named after its key.

    Returns:
        The number of layers that normalize over the batch, 0 if they are in evaluation mode.
    """
    own = folder / variant.key
    own.mkdir(parents=True, exist_ok=True)

    def run(trace: str, *hooks: Hook, resume: bool = False) -> int:
        changed = variant_config(config, variant, settings, folder, epoch_length=epoch_length)
        observer = _Observer()
        extra: list[Hook] = [observer, TraceHook(own / trace, label=variant.name), *hooks]
        if settings.eval_layers:
            extra.append(_EvalLayers())
        if variant.noise is not None:
            extra.append(_NOISE_HOOKS[variant.noise]())
        changed["custom_hooks"] = [*changed["custom_hooks"], *extra]
        changed["resume"] = resume
        runner = Runner.from_cfg(changed)
        try:
            runner.train()
        finally:
            runner.close()
        return 0 if settings.eval_layers else observer.num_batch_norms

    if not variant.resumed:
        return run("trace.json")
    found = run("first.json", _StopHalfway(settings.steps // 2))
    run("second.json", resume=True)
    return found


def _joined(first: Trace, second: Trace) -> Trace:
    """Return the trace of a run, given the traces of its two sessions."""
    ranks = tuple(
        replace(one, steps=(*one.steps, *other.steps)) for one, other in zip(first.ranks, second.ranks, strict=True)
    )
    return replace(first, ranks=ranks)


def read_variant(folder: Path, variant: Variant) -> Trace:
    """Read the trace of a variant, of both sessions if it was resumed."""
    own = folder / variant.key
    if not variant.resumed:
        return read_trace(own / "trace.json")
    return _joined(read_trace(own / "first.json"), read_trace(own / "second.json"))
