"""Record a trace of any training loop, by observing the model, the optimizers and the backward passes."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel

from stratagem.distributed import get_dist_info, get_world_size
from stratagem.errors import TraceError
from stratagem.tensors.dtensor import full_tensor, to_local
from stratagem.trace.format import Group
from stratagem.trace.gradients import RankGradients
from stratagem.trace.samples import generator_digest, sample_digests
from stratagem.trace.writer import FULL_LIMIT, TraceWriter
from stratagem.utils import named_buffers, named_parameters, unwrap_data_parallel
from stratagem.utils.torch_private import observe_backward, observe_grad_norms

__all__ = ["Recording", "groups_of", "record"]

logger = logging.getLogger(__name__)

#: Averaged weights: a module, or a function that returns a module or a mapping of tensors.
Averaged = nn.Module | Callable[[], nn.Module | Mapping[str, Tensor]]


def record(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    steps: int = 10,
    averaged: Averaged | None = None,
    scaler: Any = None,
    label: str = "",
    full: bool | None = None,
) -> Recording:
    """Record the next optimizer steps of a training loop in a trace, without changing the training.

    The result is a context manager. Inside the ``with`` block, or until ``close()``, hooks of the model, of all optimizers that
    have its parameters, and of the backward passes observe each step. The loop can be hand-written or that of another library.
    Every rank calls this function; there are no collectives, except those that gather parameters sharded as ``DTensor``.

    Args:
        path: the trace, such as ``"A.json"``. The numbers are in ``A.values``; the files of rank 1 are ``A.rank1.json`` and
            ``A.rank1.values``. They are published when the recording ends, and replace older ones.
        model: the model that is trained. If it has a method ``training_step``, as a ``LightningModule``, this method's batch is
            recorded; otherwise, the inputs of its forward passes.
        steps: how many optimizer steps to record. After them, the trace is complete and all hooks are removed.
        averaged: the averaged weights, such as an EMA: a module, or a function that returns a module or a mapping of tensors.
        scaler: the ``GradScaler`` of the loop. Losses and gradients are divided by its scale.
        label: a description of the run, which comparisons show.
        full: whether to record all elements of large tensors. By default, this is the case if all parameters together have at
            most 64 MiB; otherwise, tensors with more than 321 elements are summarized (``stratagem.trace.values``).
    """
    return Recording(Path(path), model, steps=steps, averaged=averaged, scaler=scaler, label=label, full=full)


@final
class Recording:
    """A recording of a training loop; see :func:`record`.

    A step starts with the first forward pass after an update, and ends before the next one, so that changes after the update,
    such as those of averaged weights, belong to it. All updates without a forward or backward pass in between are one step.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        *,
        steps: int,
        averaged: Averaged | None,
        scaler: Any,
        label: str,
        full: bool | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TraceError(
                f"record({str(path)!r}, ...) requires the model that is trained, got a {type(model).__name__}."
            )
        if steps < 1:
            raise TraceError(f"record({str(path)!r}, steps={steps}): there must be at least one step to record.")
        self._path = path
        self._model = unwrap_data_parallel(model)
        self._called = model
        self._limit = steps
        self._averaged = averaged
        self._scaler = scaler
        self._label = label
        self._full = full
        self._writer: TraceWriter | None = None
        self._gradients = RankGradients(self._model)
        self._stack = ExitStack()
        self._step = _OpenStep()
        self._closed = False
        self._given_samples: list[tuple[str, ...]] = []
        self._attach()
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def batch(self, batch: Any, *, ids: Iterable[object] | None = None) -> None:
        """Record the samples of the next forward pass, instead of those in its inputs.

        Use this if the inputs of the model do not contain everything that the loss depends on, such as labels.

        Args:
            batch: the batch of the data loader.
            ids: identifiers of the samples, such as their indices in the dataset, to record instead of digests of their contents.
        """
        if not self._closed:
            self._begin()
            samples = sample_digests(batch) if ids is None else tuple(str(each) for each in ids)
            if samples is not None:
                self._given_samples.append(samples)

    def loss(self, loss: Tensor | float) -> None:
        """Record the loss of the current micro-batch, instead of the tensor whose gradient is computed."""
        if not self._closed:
            self._step.given_losses.append(float(loss))

    def reduced(self) -> None:
        """Record the gradients as they are now as those after the reduction over ranks.

        Call this in a hand-written loop that reduces or clips gradients without ``DistributedDataParallel`` or
        ``torch.nn.utils.clip_grad_norm_``.
        """
        if not self._closed:
            self._note_reduced()

    def close(self) -> None:
        """Remove all hooks and publish the trace. Idempotent."""
        if self._closed:
            return
        self._finish()
        self._detach()

    # Attach and detach.

    def _attach(self) -> None:
        stack = self._stack
        stack.callback(self._gradients.close)
        method = getattr(self._model, "training_step", None)
        if callable(method):
            self._model.training_step = self._observed_training_step(method)  # type: ignore[assignment]
            stack.callback(lambda: self._model.__dict__.pop("training_step", None))
        else:
            for hook in (
                self._called.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                self._called.register_forward_hook(self._after_forward),
            ):
                stack.callback(hook.remove)
        for handle in (
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ):
            stack.callback(handle.remove)
        stack.enter_context(observe_backward(self._before_backward, self._after_backward))
        stack.enter_context(observe_grad_norms(self._before_norm, self._after_norm))

    def _detach(self) -> None:
        self._closed = True
        self._stack.close()
        atexit.unregister(self.close)
        writer = self._open_writer()
        file = writer.close()
        logger.info("Recorded %d optimizer steps in %s.", writer.num_steps, file)

    def _open_writer(self) -> TraceWriter:
        if self._writer is None:
            rank, world_size = get_dist_info()
            if self._full is None:
                size = sum(each.numel() * each.element_size() for each in self._model.parameters())
                self._full = size <= FULL_LIMIT
            self._writer = TraceWriter(self._path, rank=rank, world_size=world_size, label=self._label, full=self._full)
        return self._writer

    # What the hooks observe.

    def _observed_training_step(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def observed(*args: Any, **kwargs: Any) -> Any:
            if self._closed or not torch.is_grad_enabled():
                return method(*args, **kwargs)
            self._begin_forward(args[0] if args else kwargs)
            result = method(*args, **kwargs)
            self._end_forward()
            return result

        return observed

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Evaluation does not belong to a step.
        if torch.is_grad_enabled() and self._model.training:
            self._begin_forward((args, kwargs))

    def _after_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled() and self._model.training:
            self._end_forward()

    def _begin_forward(self, batch: Any) -> None:
        self._begin()
        if self._closed:
            return
        step = self._step
        self._gradients.watch()
        samples = self._given_samples.pop(0) if self._given_samples else sample_digests(batch)
        if samples is None:
            step.unseen_samples = True
        else:
            step.samples.append(samples)
        step.generator_now = generator_digest()
        if step.generator is None:
            step.generator = step.generator_now

    def _end_forward(self) -> None:
        if not self._closed:
            self._step.draws = self._step.draws or self._step.generator_now != generator_digest()

    def _before_backward(self, tensors: Any) -> None:
        if self._closed:
            return
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        self._step.root = (
            float(sum(root.detach().double().item() for root in roots)) if all(r.numel() == 1 for r in roots) else None
        )
        if self._step.updated:
            self._begin()
        self._gradients.watch()

    def _after_backward(self) -> None:
        # A backward pass of another model has not reached a parameter of this one.
        if self._closed or not self._gradients.seen:
            return
        step = self._step
        step.num_backward += 1
        if step.root is None:
            step.unseen_loss = True
        else:
            step.losses.append(step.root * self._inverse_scale())
        step.root = None
        step.after_backward = self._read_gradients(self._inverse_scale())

    def _before_norm(self, gradients: Sequence[Tensor]) -> None:
        if self._closed or self._step.reduced is not None:
            return
        own = {id(each.grad) for each in self._model.parameters() if each.grad is not None}
        if any(id(each) in own for each in gradients):
            self._note_reduced()
            self._step.expects_norm = True

    def _after_norm(self, norm: Tensor) -> None:
        if not self._closed and self._step.expects_norm:
            self._step.expects_norm = False
            self._step.norm = float(full_tensor(norm.detach()))

    def _note_reduced(self) -> None:
        self._step.reduced = self._read_gradients()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._closed or not self._owns(optimizer):
            return None
        # If a class of optimizers calls step() of its base class, both call the hooks.
        self._step.depth += 1
        if self._step.depth > 1:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._before_update(optimizer)
            return None

        # The optimizer computes the gradients itself, by calling the closure.
        @wraps(closure)
        def observed() -> Any:
            if self._step.closures:
                self._step.discard_micro_batches()
                self._gradients.discard()
            result = closure()
            self._step.closures += 1
            if self._step.closures == 1:
                self._before_update(optimizer)
            else:
                for name in ("local", "reduced", "clipped", "samples", "loss"):
                    self._open_writer().set_absent(
                        name, f"{type(optimizer).__name__} calls its closure several times per step"
                    )
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": observed}
        return (args[0], observed, *args[2:]), kwargs

    def _before_update(self, optimizer: Optimizer) -> None:
        writer, step = self._open_writer(), self._step
        names = self._names(optimizer)
        if not step.written:
            step.written = True
            self._write_gradients(writer, step)
            writer.put("buffers", {name: full_tensor(each) for name, each in named_buffers(self._model).items()})
        # A fused optimizer unscales the gradients itself.
        is_scaled = getattr(optimizer, "grad_scale", None) is not None
        clipped = self._read_gradients(self._inverse_scale() if is_scaled else 1.0, names=names)
        writer.put("clipped", clipped)
        writer.put("before", {name: full_tensor(each.detach()) for name, each in names.items()})
        writer.add_groups(groups_of(optimizer.param_groups, {id(each): name for name, each in names.items()}))

    def _write_gradients(self, writer: TraceWriter, step: _OpenStep) -> None:
        scale = self._inverse_scale()
        taken = self._gradients.take()
        local = taken if scale == 1.0 else {name: each * scale for name, each in taken.items()}
        writer.put("local", local)
        reduced = step.reduced
        if reduced is None:
            in_backward = get_world_size() == 1 or self._reduces_in_backward(step.after_backward, local)
            reduced = step.after_backward if in_backward else self._read_gradients()
        writer.put("reduced", reduced)

    def _reduces_in_backward(self, gradients: Mapping[str, Tensor], local: Mapping[str, Tensor]) -> bool:
        """Return whether the backward pass itself reduced the gradients over ranks."""
        if isinstance(self._called, DistributedDataParallel):
            return True
        return any(
            name in local and not torch.equal(each.to(local[name].dtype), local[name])
            for name, each in gradients.items()
        )

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._closed or not self._owns(optimizer):
            return
        self._step.depth -= 1
        if self._step.depth > 0:
            return
        self._step.updated = True
        self._step.closures = 0
        self._open_writer().put(
            "after", {name: full_tensor(each.detach()) for name, each in self._names(optimizer).items()}
        )

    # Steps.

    def _begin(self) -> None:
        """Finish the step if its update is done; discard its micro-batches if the loop skipped the update."""
        if self._step.updated:
            self._finish()
            if not self._closed and self._open_writer().num_steps >= self._limit:
                self._detach()
        elif self._step.num_backward and not self._has_gradients():
            self._step = _OpenStep()
            self._gradients.discard()
            if self._writer is not None:
                self._writer.discard_step()

    def _finish(self) -> None:
        step, self._step = self._step, _OpenStep()
        if not step.updated:
            return
        writer = self._open_writer()
        if step.unseen_samples or not step.samples:
            writer.set_absent(
                "samples", "the inputs of the model contain no tensor with samples; call batch() of the recording"
            )
        else:
            for samples in step.samples:
                writer.add_samples(samples)
        losses = step.given_losses or step.losses
        if step.unseen_loss and not step.given_losses:
            writer.set_absent("loss", "the backward pass did not start at a scalar; call loss() of the recording")
        elif losses:
            for loss in losses:
                writer.add_loss(loss)
            # The gradient of the step is that of the sum of what was differentiated.
            writer.set_loss(sum(losses) / (len(losses) if step.given_losses else 1))
        if step.generator is not None:
            writer.set_generator(step.generator, draws=step.draws)
        if step.norm is not None:
            writer.set_grad_norm(step.norm)
        if self._averaged is not None:
            writer.put("averaged", _averaged_tensors(self._averaged))
        writer.end_step()

    # Values.

    def _owns(self, optimizer: Optimizer) -> bool:
        own = {id(parameter) for parameter in self._model.parameters()}
        return any(id(each) in own for group in optimizer.param_groups for each in group["params"])

    def _names(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """Return the parameters of the model that the optimizer has, by name."""
        its = {id(each) for group in optimizer.param_groups for each in group["params"]}
        return {name: each for name, each in named_parameters(self._model).items() if id(each) in its}

    def _read_gradients(self, scale: float = 1.0, *, names: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return copies of the gradients. Collective for gradients that are sharded as ``DTensor``."""
        parameters = named_parameters(self._model) if names is None else names
        found = {}
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                full = full_tensor(parameter.grad.detach())
                found[name] = full * scale if scale != 1.0 else full.clone()
        return found

    def _has_gradients(self) -> bool:
        gradients = [each.grad for each in self._model.parameters() if each.grad is not None]
        return any(bool(to_local(each).any()) for each in gradients)

    def _inverse_scale(self) -> float:
        return 1.0 if self._scaler is None else 1.0 / float(self._scaler.get_scale())


class _OpenStep:
    """What was observed of the current step and is not written yet."""

    def __init__(self) -> None:
        self.samples: list[tuple[str, ...]] = []
        self.unseen_samples = False
        self.losses: list[float] = []
        self.given_losses: list[float] = []
        self.unseen_loss = False
        self.root: float | None = None
        self.num_backward = 0
        self.generator: str | None = None
        self.generator_now: str | None = None
        self.draws = False
        self.after_backward: dict[str, Tensor] = {}
        self.reduced: dict[str, Tensor] | None = None
        self.expects_norm = False
        self.norm: float | None = None
        self.closures = 0
        self.depth = 0
        self.written = False
        self.updated = False

    def discard_micro_batches(self) -> None:
        """Discard the micro-batches, because the optimizer evaluates the loss of the same step again."""
        self.samples, self.losses, self.given_losses = [], [], []
        self.num_backward = 0


def groups_of(
    param_groups: Iterable[Mapping[str, Any]],
    names: Mapping[int, str],
    members: Iterable[Iterable[Tensor]] | None = None,
) -> list[Group]:
    """Return parameter groups with their numeric options.

    Args:
        param_groups: the groups of an optimizer.
        names: the name of each parameter by its ``id``; other parameters are not listed.
        members: the parameters of each group, if they are not those in the group.
    """
    groups = list(param_groups)
    members = [group["params"] for group in groups] if members is None else members
    return [
        Group(
            parameters=tuple(names[id(each)] for each in some if id(each) in names),
            options=dict(_numeric_options(group)),
        )
        for group, some in zip(groups, members, strict=True)
    ]


def _numeric_options(group: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numeric options of a parameter group that an update may use."""
    for key, value in group.items():
        # Schedulers store initial_lr, which the update does not use.
        if key in ("params", "initial_lr"):
            continue
        entries = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for index, entry in entries:
            number = entry.item() if isinstance(entry, Tensor) and entry.numel() == 1 else entry
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield key if index is None else f"{key}[{index}]", float(number)


def _averaged_tensors(averaged: Averaged) -> dict[str, Tensor]:
    found = averaged if isinstance(averaged, nn.Module) else averaged()
    if isinstance(found, nn.Module):
        inner = found.module if isinstance(found, AveragedModel) else found
        return {
            name: full_tensor(each.detach()) for name, each in named_parameters(unwrap_data_parallel(inner)).items()
        }
    return {name: full_tensor(each.detach()) for name, each in found.items()}
