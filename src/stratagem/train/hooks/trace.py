"""Record a trace of a run, under every strategy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from stratagem.checkpoint import ShardedTensorState
from stratagem.errors import ConfigValueError, StateError
from stratagem.optim import AccumulatingOptimWrapper
from stratagem.tensors.dtensor import full_tensor
from stratagem.trace import FULL_LIMIT, Group, TraceWriter
from stratagem.trace.gradients import RankGradients
from stratagem.trace.recorder import groups_of
from stratagem.trace.samples import generator_digest, sample_digests
from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.hooks.averaging import EMAHook
from stratagem.train.run.context import Run
from stratagem.utils import named_buffers, named_parameters

__all__ = ["SampleIds", "TraceHook"]

#: Returns the identifiers of the samples in a batch, given the run and the index of the batch in the epoch.
SampleIds = Callable[[Run, int], Sequence[object]]

_HIDDEN: Final = "the engine does not expose it"


@final
class TraceHook(Hook):
    """Record the optimizer steps of a run in a trace, like :func:`stratagem.trace.record`, without changing the training.

    Samples are recorded by their index in the dataset if the order of the data is known, and by digests of their contents
    otherwise. The gradients, the clipping and the updates of engines are recorded as far as they are accessible; other values
    are absent, with the reason. Collective for sharded parameters.

    Args:
        path: the JSON file of the trace.
        steps: the number of optimizer steps to record; None to record until the end of the run.
        label: a description of the run.
        ids: returns identifiers of the samples to record instead.
        full: as in :func:`stratagem.trace.record`.
    """

    # After the hooks that update schedules and averages.
    priority = Priority.VERY_LOW

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        steps: int | None = None,
        label: str = "",
        ids: SampleIds | None = None,
        full: bool | None = None,
    ) -> None:
        if steps is not None and steps < 1:
            raise ConfigValueError(f"TraceHook: steps={steps} must be at least 1.")
        self._path = Path(path)
        self._limit = steps
        self._label = label
        self._ids = ids
        self._full = full
        self._observer: _RunObserver | None = None

    def before_train(self, run: Run) -> None:
        writer = self._open(run)
        self._observer = _RunObserver(run, writer, self._ids)
        run.at_close.append(self._close)
        run.logger.info("Recording optimizer steps in %s.", writer.file)

    def before_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None) -> None:
        if self._observer is not None:
            self._observer.begin(batch_idx, data_batch)

    def after_train_iter(self, run: Run, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._observer is not None:
            self._observer.end(outputs)
            if self._observer.writer.num_steps == self._limit:
                self._close()

    def after_train(self, run: Run) -> None:
        self._close()

    def _open(self, run: Run) -> TraceWriter:
        strategy, full = run.strategy, self._full
        if full is None:
            parameters = strategy.unwrap_model().parameters()
            full = sum(strategy.global_numel(each) * each.element_size() for each in parameters) <= FULL_LIMIT
        return TraceWriter(
            self._path,
            rank=strategy.rank,
            world_size=strategy.world_size,
            dp_rank=strategy.dp_rank,
            dp_size=strategy.dp_size,
            label=self._label or type(strategy).__name__,
            full=full,
        )

    def _close(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.close()
            observer.writer.close()


@final
class _RunObserver:
    """Observes the steps of a run.

    Args:
        run: the run.
        writer: records the values.
        ids: returns identifiers of the samples.
    """

    def __init__(self, run: Run, writer: TraceWriter, ids: SampleIds | None) -> None:
        self.writer = writer
        self._run = run
        self._ids = ids
        self._model = run.strategy.unwrap_model()
        self._gradients = RankGradients(self._model)
        self._average = next((hook for hook in run.events.hooks if isinstance(hook, EMAHook)), None)
        self._stack = ExitStack()
        self._stack.callback(self._gradients.close)
        self._wrappers = dict(run.optim_wrapper.each())
        self._applied, self._attempted = self._counts()
        self._step = _RunStep()
        self._continues_window = bool(run.optim_wrapper.pending_micro_batches)
        self._is_engine = False
        for wrapper in self._wrappers.values():
            self._observe(wrapper)

    def begin(self, batch_idx: int, batch: Any) -> None:
        """Record the samples of a micro-batch, before its forward pass."""
        self._gradients.watch()
        samples = self._samples(batch_idx, batch)
        if samples is None:
            self._step.has_unknown_samples = True
        else:
            self._step.samples.append(tuple(samples))
        self._step.generator_now = generator_digest()
        if self._step.generator is None:
            self._step.generator = self._step.generator_now
        if self._is_engine:
            self._begin_engine_micro_batch()

    def end(self, outputs: Any) -> None:
        """Record the loss of a micro-batch, and finish the step if the parameters were updated."""
        step = self._step
        # Backward passes do not draw random numbers, apart from repeated forward passes, which restore the generators.
        step.draws = step.draws or step.generator_now != generator_digest()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor) and loss.numel() == 1:
            step.losses.append(float(loss))
        else:
            step.has_unknown_loss = True
        self._note_weight(self._total_weight())
        applied, attempted = self._counts()
        if applied != self._applied:
            self._finish()
        elif attempted != self._attempted:
            # The update was skipped, for example because of NaN.
            self.writer.discard_step()
            self._gradients.discard()
            self._step = _RunStep()
        self._applied, self._attempted = applied, attempted

    def close(self) -> None:
        """Remove everything that observes the run."""
        self._stack.close()

    # Observe the optimizer wrappers.

    def _observe(self, wrapper: Any) -> None:
        if not isinstance(wrapper, AccumulatingOptimWrapper) or hasattr(wrapper, "engine"):
            self._is_engine = True
            self._observe_weights(wrapper)
            return
        complete = wrapper.gradient_policy.complete

        def observed_complete() -> None:
            if complete is not None:
                complete()
            self._before_gradients_are_used(wrapper)

        policy = replace(wrapper.gradient_policy, complete=observed_complete)
        wrapper.gradient_policy = policy
        self._stack.callback(partial(self._restore_policy, wrapper, complete))
        clipping: Any = wrapper.clipping
        if clipping is not None:
            observed: Any = _ObservedClipping(clipping, partial(self._before_clipping, wrapper))
            wrapper.clipping = observed
            self._stack.callback(partial(setattr, wrapper, "clipping", clipping))
        optimizer = wrapper.optimizer
        for handle in (
            optimizer.register_step_pre_hook(lambda *_: self._before_update(wrapper)),
            optimizer.register_step_post_hook(lambda *_: self._after_update(wrapper)),
        ):
            self._stack.callback(handle.remove)

    def _observe_weights(self, wrapper: Any) -> None:
        """Note the weights of the micro-batches before the update of an engine resets them."""
        weight_factor = getattr(wrapper, "weight_factor", None)
        if weight_factor is None:
            return

        def observed(micro_batches: int) -> Tensor:
            self._note_weight(self._total_weight())
            factor: Tensor = weight_factor(micro_batches)
            return factor

        wrapper.weight_factor = observed
        self._stack.callback(partial(delattr, wrapper, "weight_factor"))

    def _restore_policy(self, wrapper: AccumulatingOptimWrapper, complete: Callable[[], None] | None) -> None:
        wrapper.gradient_policy = replace(wrapper.gradient_policy, complete=complete)

    def _before_gradients_are_used(self, wrapper: AccumulatingOptimWrapper) -> None:
        """Record the local gradients, after the reduction, while the weights of the micro-batches are known."""
        self._note_weight(self._total_weight())
        scale = 1.0 if wrapper.grad_scaler is None else 1.0 / wrapper.grad_scaler.get_scale()
        local = self._gradients.take()
        if local:
            self._put_local(local, scale * self._weight_scale(wrapper, self._step))

    def _weight_scale(self, wrapper: AccumulatingOptimWrapper, step: _RunStep) -> float:
        """Return the factor that turns the gradients of the sum of weighted losses into those of their mean."""
        if step.weights is None:
            return 1.0
        total = sum(step.weights)
        return wrapper.weight_unit / total if total else 0.0

    def _put_local(self, local: Mapping[str, Tensor], scale: float) -> None:
        self.writer.put("local", local if scale == 1.0 else {name: each * scale for name, each in local.items()})

    def _before_clipping(self, wrapper: AccumulatingOptimWrapper, factor: Tensor | None) -> None:
        gradients = self._read_gradients(wrapper)
        self.writer.put(
            "reduced", gradients if factor is None else {name: each * factor for name, each in gradients.items()}
        )
        self._step.clipped.add(id(wrapper))

    def _before_update(self, wrapper: AccumulatingOptimWrapper) -> None:
        names = self._parameters_of(wrapper)
        gradients = self._read_gradients(wrapper)
        if id(wrapper) not in self._step.clipped:
            self.writer.put("reduced", gradients)
        self.writer.put("clipped", gradients)
        self.writer.put("before", {name: full_tensor(each.detach()) for name, each in names.items()})
        self.writer.add_groups(
            groups_of(wrapper.optimizer.param_groups, {id(each): name for name, each in names.items()})
        )

    def _after_update(self, wrapper: AccumulatingOptimWrapper) -> None:
        parameters = self._parameters_of(wrapper)
        self.writer.put("after", {name: full_tensor(each.detach()) for name, each in parameters.items()})

    def _parameters_of(self, wrapper: AccumulatingOptimWrapper) -> dict[str, Tensor]:
        its = {id(each) for group in wrapper.optimizer.param_groups for each in group["params"]}
        return {name: each for name, each in named_parameters(self._model).items() if id(each) in its}

    def _read_gradients(self, wrapper: AccumulatingOptimWrapper) -> dict[str, Tensor]:
        parameters = self._parameters_of(wrapper)
        return {name: full_tensor(each.grad.detach()) for name, each in parameters.items() if each.grad is not None}

    # Engines update the parameters themselves.

    def _engine_parameters(self) -> dict[str, Tensor]:
        trained = named_parameters(self._model)
        state = self._run.strategy.model_state_dict()
        return {name: _whole(value) for name, value in state.items() if name in trained}

    def _begin_engine_micro_batch(self) -> None:
        step = self._step
        # The schedules change the options after an iteration, so the update uses these.
        step.groups = [group for wrapper in self._wrappers.values() for group in self._engine_groups(wrapper)]
        if len(step.samples) + step.has_unknown_samples == 1:
            parameters = self._engine_parameters()
            step.shapes = {name: value.shape for name, value in parameters.items()}
            self.writer.put("before", parameters)

    def _engine_groups(self, wrapper: Any) -> list[Group]:
        """Return the parameter groups of an engine, which may contain master weights instead of parameters."""
        names: dict[int, str] = {id(each): name for name, each in named_parameters(self._model).items()}
        for shard in getattr(wrapper, "param_shards", {}).values():
            names[id(shard.master)] = names[id(shard.working)] = shard.name
        originals = getattr(wrapper, "groups", None)
        members = None if originals is None else [group.parameters for group in originals]
        return groups_of(wrapper.param_groups, names, members)

    def _write_engine_step(self, step: _RunStep) -> None:
        for name in ("reduced", "clipped"):
            self.writer.set_absent(name, _HIDDEN)
        self.writer.add_groups(step.groups)
        self._write_engine_gradients(step)
        self.writer.put("after", self._engine_parameters())

    def _write_engine_gradients(self, step: _RunStep) -> None:
        """Record the local gradients if they are whole and there is no loss scale."""
        local = self._gradients.take()
        [wrapper, *others] = self._wrappers.values()
        are_whole = bool(local) and all(step.shapes.get(name) == each.shape for name, each in local.items())
        if are_whole and not others and wrapper.loss_scale is None and isinstance(wrapper, AccumulatingOptimWrapper):
            self._put_local(local, self._weight_scale(wrapper, step))
        else:
            self.writer.set_absent("local", _HIDDEN)

    # Steps.

    def _finish(self) -> None:
        step, self._step = self._step, _RunStep()
        writer = self.writer
        if self._is_engine:
            self._write_engine_step(step)
        buffers = {name: full_tensor(each.detach()) for name, each in named_buffers(self._model).items()}
        writer.put("buffers", buffers)
        if step.has_unknown_samples:
            writer.set_absent("samples", "the batches contain no tensor with samples")
        else:
            for samples in step.samples:
                writer.add_samples(samples)
        if step.has_unknown_loss:
            writer.set_absent("loss", "train_step returned no 'loss'")
        else:
            _write_losses(writer, step)
        if step.generator is not None:
            writer.set_generator(step.generator, draws=step.draws)
        norms = [
            norm for wrapper in self._wrappers.values() if (norm := getattr(wrapper, "grad_norm", None)) is not None
        ]
        if len(norms) == len(self._wrappers) == 1:
            writer.set_grad_norm(float(full_tensor(torch.as_tensor(norms[0]))))
        if self._continues_window:
            # Only a part of the micro-batches was observed.
            self._continues_window = False
            for name in ("samples", "losses", "loss", "local"):
                writer.set_absent(name, "the accumulation window began before the recording")
        if self._average is not None and self._average.average.steps:
            averages = self._average.average.averages
            writer.put("averaged", {name: full_tensor(each.detach()) for name, each in averages.items()})
        writer.end_step()

    def _samples(self, batch_idx: int, batch: Any) -> Iterable[str] | None:
        if self._ids is not None:
            return tuple(str(each) for each in self._ids(self._run, batch_idx))
        data = self._run.train_data
        if data is not None:
            try:
                return tuple(str(each) for each in data.indices_of(self._run.epoch, batch_idx))
            except (StateError, ConfigValueError):
                pass  # The order of the data is custom or endless.
        return sample_digests(batch)

    def _counts(self) -> tuple[int, int]:
        """Return the number of applied and attempted steps of all optimizers."""
        wrappers = self._wrappers.values()
        return sum(each.num_steps_applied for each in wrappers), sum(each.num_steps_attempted for each in wrappers)

    def _total_weight(self) -> float | None:
        """Return the sum of the weights in the accumulation window; None if its micro-batches have no weights."""
        weights = [each.weight for each in self._wrappers.values() if isinstance(each, AccumulatingOptimWrapper)]
        return float(weights[0]) if len(weights) == 1 and weights[0] is not None else None

    def _note_weight(self, total: float | None) -> None:
        """Note the weight of a micro-batch, from the sum of the weights after its backward pass."""
        if total is None:
            return
        weights = self._step.weights
        if weights is None:
            weights = self._step.weights = []
        if len(weights) < len(self._step.samples) or self._step.has_unknown_samples:
            weights.append(total - sum(weights))


@final
class _RunStep:
    """What was observed of the current step and is not written yet."""

    def __init__(self) -> None:
        self.samples: list[tuple[str, ...]] = []
        self.has_unknown_samples = False
        self.losses: list[float] = []
        self.has_unknown_loss = False
        self.weights: list[float] | None = None
        self.generator: str | None = None
        self.generator_now: str | None = None
        self.draws = False
        self.clipped: set[int] = set()
        # Only for engines.
        self.groups: list[Group] = []
        self.shapes: dict[str, torch.Size] = {}


@final
class _ObservedClipping:
    """Calls a function before gradients are clipped; in all other respects like the original."""

    def __init__(self, clipping: Any, before: Callable[[Tensor | None], None]) -> None:
        self._clipping = clipping
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clipping, name)

    def apply(self, gradients: Sequence[Tensor], norm: Tensor | None, factor: Tensor | None = None) -> None:
        """Clip the gradients."""
        self._before(factor)
        self._clipping.apply(gradients, norm, factor)


def _write_losses(writer: TraceWriter, step: _RunStep) -> None:
    for loss in step.losses:
        writer.add_loss(loss)
    if step.weights is None or len(step.weights) != len(step.losses):
        writer.set_loss(sum(step.losses) / len(step.losses))
        return
    total = sum(step.weights)
    mean = sum(loss * weight for loss, weight in zip(step.losses, step.weights, strict=True) if weight)
    writer.set_loss(mean / total if total else 0.0, total)


def _whole(value: Any) -> Tensor:
    """Return the full tensor of a value of a state dict. Collective if it is sharded."""
    whole: Tensor = value.full_tensor() if isinstance(value, ShardedTensorState) else full_tensor(value)
    return whole
