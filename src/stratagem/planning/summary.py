"""Summarize a model: the shapes, parameters, floating-point operations and activations of its modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stratagem.config import Config
from stratagem.data import build_dataloader
from stratagem.errors import ConfigValueError, StateError
from stratagem.hardware import format_bytes, three_digits
from stratagem.model import BaseDataPreprocessor, BaseModel
from stratagem.optim import AmpOptimWrapper
from stratagem.planning.batch import BatchSpec, describe_batch, fake_batch, first_batch, parse_batch
from stratagem.planning.fake_world import fake_copies, new_fake_mode
from stratagem.planning.model_copies import meta_copy
from stratagem.planning.module_trace import ModuleRecord, ModuleTrace
from stratagem.planning.planner import model_factory
from stratagem.planning.simulate import Job, simulating
from stratagem.registry import switch_scope
from stratagem.step import call_forward, parse_losses
from stratagem.strategies.setup.building import build_model, with_preprocessor
from stratagem.utils import generator_state, restore_generator_state
from stratagem.utils.overridden import overridden

__all__ = ["HEADINGS", "ModelSummary", "ModuleSummary", "summarize_config", "summary"]

_CPU = torch.device("cpu")
HEADINGS = ("module", "type", "output shape", "parameters", "trainable", "FLOPs", "activations")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSummary:
    """One module, with its submodules.

    Attributes:
        name: its path in the model; empty for the model.
        type: its class.
        depth: the number of modules that contain it.
        output_shapes: the shapes of the tensors that its first call returns.
        calls: the number of calls in a forward pass; 0 for lists of modules, None without a forward pass.
        is_called: whether the forward pass calls the module or one of its submodules. Parameters of others may be used directly.
        parameters: the number of elements of its parameters. Shared parameters count for the first module that has them.
        trainable: those of them that require gradients.
        flops: the floating-point operations of its calls in a forward pass; None without a forward pass.
        activation_bytes: what it saves for the backward pass; None without a forward pass.
        shares: the first names of its parameters that an earlier module has, or of the module itself.
    """

    name: str
    type: str
    depth: int
    parameters: int
    trainable: int
    output_shapes: tuple[tuple[int, ...], ...] = ()
    calls: int | None = None
    is_called: bool = True
    flops: int | None = None
    activation_bytes: int | None = None
    shares: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """A model and its modules. ``str(summary)`` is a table.

    Attributes:
        modules: the model, followed by its modules in the order of ``named_modules``.
        parameters: the number of elements of all parameters, each counted once.
        trainable: those of them that require gradients.
        parameter_bytes: the size of the parameters.
        buffer_bytes: the size of the buffers.
        batch: a description of each tensor of the batch.
        batch_size: the number of samples in the batch; None if it is unknown.
        source: where the batch comes from.
        forward_flops: the floating-point operations of a forward pass; None without a forward pass.
        training_flops: those of a forward and backward pass; None without a backward pass.
        recomputed_flops: those that activation checkpointing adds.
        activation_bytes: the size of the tensors that a forward pass saves for the backward pass.
        notes: how the numbers were obtained if that is not obvious, one sentence each.
    """

    modules: tuple[ModuleSummary, ...]
    parameters: int
    trainable: int
    parameter_bytes: int
    buffer_bytes: int
    batch: tuple[str, ...] = ()
    batch_size: int | None = None
    source: str = ""
    forward_flops: int | None = None
    training_flops: int | None = None
    recomputed_flops: int | None = None
    activation_bytes: int | None = None
    notes: tuple[str, ...] = ()

    def to_depth(self, depth: int | None) -> ModelSummary:
        """Return the summary without modules that are nested more deeply; the totals are unchanged."""
        if depth is None:
            return self
        return replace(self, modules=tuple(each for each in self.modules if each.depth <= depth))

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as values for JSON."""
        return asdict(self)

    def rows(self, *, is_narrow: bool = False) -> Iterator[tuple[str, ...]]:
        """Yield the cells of the table; see ``HEADINGS``. A narrow table does not contain the names of shared parameters."""
        for each in self.modules:
            name = each.name.rpartition(".")[2] or each.type
            shared = f"  (shares {', '.join(each.shares)})" if each.shares else ""
            if shared and is_narrow:
                shared = " (shared)"
            yield (
                f"{'  ' * each.depth}{name}{shared}",
                each.type,
                _shapes(each),
                f"{each.parameters:,}",
                f"{each.trainable:,}",
                "-" if each.flops is None else _flops(each.flops),
                "-" if each.activation_bytes is None else format_bytes(each.activation_bytes),
            )

    def totals(self) -> Iterator[tuple[str, str]]:
        """Yield the names and values of the totals."""
        yield (
            "parameters",
            f"{self.parameters:,} ({format_bytes(self.parameter_bytes)}), {self.trainable:,} of them trainable",
        )
        if self.buffer_bytes:
            yield "buffers", format_bytes(self.buffer_bytes)
        if self.batch:
            yield "batch", f"{', '.join(self.batch)} ({self.source})"
        if self.forward_flops is not None:
            yield "FLOPs of a forward pass", _flops(self.forward_flops)
        if self.training_flops is not None:
            per_sample = f", {_flops(self.training_flops / self.batch_size)} per sample" if self.batch_size else ""
            yield "FLOPs of a forward and backward pass", f"{_flops(self.training_flops)}{per_sample}"
        if self.recomputed_flops:
            yield "FLOPs of repeated forward passes", _flops(self.recomputed_flops)
        if self.activation_bytes is not None:
            yield "activations saved for the backward pass", format_bytes(self.activation_bytes)

    def __str__(self) -> str:
        table = [HEADINGS, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) if index < 3 else cell.rjust(width) for index, (cell, width) in enumerate(row))
            for row in (list(zip(cells, widths, strict=True)) for cells in table)
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.append("-" * len(lines[0]))
        names = max(len(name) for name, _ in self.totals())
        lines += [f"{name:<{names}}  {value}" for name, value in self.totals()]
        return "\n".join([*(line.rstrip() for line in lines), *self.notes])


def summary(model: nn.Module, inputs: Any = None, *, depth: int | None = None) -> ModelSummary:
    """Summarize a module. It is not changed, and no memory is allocated if it can run on tensors without values.

    Args:
        model: any module; a ``BaseModel`` computes its losses, as in training.
        inputs: its inputs: a mapping (keyword arguments), a tuple or list (positional arguments), a single tensor, or a
            description such as ``"float32[8,3,32,32]"``. Values do not matter, unless the module depends on them. Without inputs,
            only the parameters are listed.
        depth: omit modules that are nested more deeply.

    Raises:
        ConfigValueError: if a description of the inputs cannot be parsed, or ``depth`` is negative.
        StateError: if the forward pass fails.
    """
    spec = None if inputs is None else _given(inputs)
    real = None if isinstance(inputs, str) else inputs
    return _summarize(lambda: meta_copy(model), lambda: model, spec, lambda: real, None).to_depth(_depth(depth))


def _given(inputs: Any) -> BatchSpec:
    return replace(parse_batch(inputs), source="the given batch") if isinstance(inputs, str) else BatchSpec.of(inputs)


def summarize_config(config: Config, *, batch: str | None = None, depth: int | None = None) -> ModelSummary:
    """Summarize the model of a configuration with the first batch of its training data.

    Args:
        config: the configuration.
        batch: a description of another batch, such as ``"tokens=int64[8,1024]"``.
        depth: omit modules that are nested more deeply.

    Raises:
        ConfigError: (or a subclass) if the model is missing, or the data or a description is invalid.
        StateError: if the forward pass fails.
    """
    if config.get("model") is None:
        raise ConfigValueError("A summary requires the section 'model' in the configuration.")
    with switch_scope(config.get("default_scope")):
        section = with_preprocessor(config["model"], config.get("data_preprocessor"))
        data = config.get("train_dataloader")
        spec = parse_batch(batch) if batch is not None else None if data is None else first_batch(data)
        make_model, optim_wrapper = model_factory(section), config.get("optim_wrapper")
        if spec is not None and optim_wrapper is not None and _has_custom_step(make_model()):
            found = _in_training_step(Job(make_model=make_model, optim_wrapper=optim_wrapper), spec)
        else:
            found = _summarize(
                make_model,
                lambda: build_model(section),
                spec,
                lambda: None if data is None or batch is not None else _real_batch(data),
                _autocast_dtype(optim_wrapper),
            )
    return found.to_depth(_depth(depth))


def _has_custom_step(model: nn.Module) -> bool:
    return getattr(type(model), "train_step", None) is not BaseModel.train_step


def _in_training_step(job: Job, spec: BatchSpec) -> ModelSummary:
    """Summarize a model that implements its training step, with a simulated one."""
    name = type(job.make_model()).__name__
    with simulating(job, "SingleDeviceStrategy", 1) as sim:
        model: Any = sim.model
        batch = fake_batch(spec.batch, _CPU)
        known = [each for each in tree_leaves(batch) if isinstance(each, Tensor)]
        try:
            with ModuleTrace(model, known, simulated=True) as trace:
                model.train_step(batch, optim_wrapper=sim.strategy.optim_wrapper)
        except Exception as error:
            raise StateError(
                f"{name}.train_step failed with {', '.join(describe_batch(spec.batch))} on tensors without values: "
                f"{type(error).__name__}: {error}. Summarize its networks with stratagem.summary(network, inputs)."
            ) from error
        found = _traced(model, trace, spec, has_backward=True)
    return replace(found, notes=(f"The numbers are those of {name}.train_step, which the model implements.",))


def _depth(depth: int | None) -> int | None:
    if depth is not None and depth < 0:
        raise ConfigValueError(f"depth={depth} must be at least 0, which shows only the model.")
    return depth


def _real_batch(data: Any) -> Any:
    if isinstance(data, Mapping):
        data = {key: value for key, value in data.items() if key not in ("persistent_workers", "prefetch_factor")}
        data["num_workers"] = 0
    return next(iter(build_dataloader(data, seed=0, training=True).batches(0)))


def _autocast_dtype(optim_wrapper: Any) -> torch.dtype | None:
    """Return the dtype of autocast that an optimizer wrapper uses; None if it does not use autocast."""
    if isinstance(optim_wrapper, AmpOptimWrapper):
        return optim_wrapper.dtype
    if not isinstance(optim_wrapper, Mapping) or optim_wrapper.get("type") not in ("AmpOptimWrapper", AmpOptimWrapper):
        return None
    dtype = optim_wrapper.get("dtype") or torch.bfloat16
    found: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return found


def _summarize(
    make_meta: Any, make_real: Any, spec: BatchSpec | None, real_batch: Any, dtype: torch.dtype | None
) -> ModelSummary:
    generators = generator_state()
    try:
        model = make_meta()
        if spec is None:
            return _static(model, None)
        try:
            return _on_fake_tensors(model, spec, dtype)
        except Exception as error:
            batch = real_batch()
            if batch is None:
                raise StateError(
                    f"The forward pass of {type(model).__name__} failed with {', '.join(describe_batch(spec.batch))} on tensors "
                    f"without values: {type(error).__name__}: {error}. Check the shapes of the batch; if the model depends on "
                    "values, pass real inputs to stratagem.summary(model, inputs)."
                ) from error
            return _on_real_tensors(make_real(), batch, spec, dtype, error)
    finally:
        restore_generator_state(generators)


def _on_fake_tensors(model: nn.Module, spec: BatchSpec, dtype: torch.dtype | None) -> ModelSummary:
    mode = new_fake_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        fake_copies(mode, model, _CPU)
        with mode:
            trace, has_backward = _trace(model, fake_batch(spec.batch, _CPU), dtype, simulated=True)
    return _traced(model, trace, spec, has_backward=has_backward)


def _on_real_tensors(
    model: nn.Module, batch: Any, spec: BatchSpec, dtype: torch.dtype | None, error: Exception
) -> ModelSummary:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [(each, each.grad) for each in model.parameters()]
    try:
        trace, has_backward = _trace(model, batch, dtype, simulated=False)
    except Exception as failure:
        raise StateError(
            f"The forward pass of {type(model).__name__} failed with {', '.join(describe_batch(spec.batch))}: "
            f"{type(failure).__name__}: {failure}"
        ) from failure
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.data.copy_(buffers[name])
    note = f"The model was run with real values, because it depends on them ({type(error).__name__}: {error})."
    return replace(_traced(model, trace, spec, has_backward=has_backward), notes=(note.splitlines()[0],))


def _trace(model: nn.Module, batch: Any, dtype: torch.dtype | None, *, simulated: bool) -> tuple[ModuleTrace, bool]:
    """Run a forward and backward pass; return what was recorded, and whether there was a backward pass."""
    known = [each for each in tree_leaves(batch) if isinstance(each, Tensor)]
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    with ExitStack() as stack:
        stack.callback(_restore_modes, modes)
        # The weight of the batch, which a single process does not need, would depend on the values of the targets.
        stack.enter_context(overridden(model, "needs_loss_weight", False))
        trace = stack.enter_context(ModuleTrace(model, known, simulated=simulated))
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            loss = _loss(model, batch)
        if loss is None:
            return trace, False
        loss.backward()
    return trace, True


def _restore_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _loss(model: nn.Module, batch: Any) -> Tensor | None:
    """Run the forward pass; return a scalar to differentiate, or None if the outputs have no gradients."""
    if callable(getattr(model, "train_step", None)):
        preprocessor = getattr(model, "data_preprocessor", None)
        data = preprocessor(batch, True) if callable(preprocessor) else batch
        losses = call_forward(model, data, "loss")
        loss: Tensor = parse_losses(losses)[0]
        return loss if loss.requires_grad else None
    outputs = (
        model(**batch)
        if isinstance(batch, Mapping)
        else model(*batch)
        if isinstance(batch, tuple | list)
        else model(batch)
    )
    found = [each.sum() for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.requires_grad]
    return sum(found[1:], found[0]) if found else None


def _static(model: nn.Module, trace: ModuleTrace | None) -> ModelSummary:
    parameters = list(model.parameters())
    return ModelSummary(
        modules=tuple(_modules(model, None if trace is None else trace.records)),
        parameters=sum(each.numel() for each in parameters),
        trainable=sum(each.numel() for each in parameters if each.requires_grad),
        parameter_bytes=sum(each.nbytes for each in parameters),
        buffer_bytes=sum(each.nbytes for each in model.buffers()),
    )


def _traced(model: nn.Module, trace: ModuleTrace, spec: BatchSpec, *, has_backward: bool) -> ModelSummary:
    return replace(
        _static(model, trace),
        batch=describe_batch(spec.batch),
        batch_size=spec.size,
        source=spec.source,
        forward_flops=trace.forward_flops,
        training_flops=trace.counter.model if has_backward else None,
        recomputed_flops=trace.counter.recomputation if has_backward else None,
        activation_bytes=trace.activations,
    )


def _modules(model: nn.Module, records: Mapping[nn.Module, ModuleRecord] | None) -> Iterator[ModuleSummary]:
    first_names: dict[nn.Module, str] = {}
    named: set[nn.Module] = set()
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        owners.setdefault(id(parameter), name)
    for name, module in model.named_modules(remove_duplicate=False):
        base = ModuleSummary(
            name=name, type=type(module).__name__, depth=name.count(".") + 1 if name else 0, parameters=0, trainable=0
        )
        if module in first_names:
            if module in named:
                continue  # a part of a shared module
            named.update(module.modules())
            yield replace(base, shares=(first_names[module] or type(model).__name__,))
            continue
        first_names[module] = name
        if type(module) is BaseDataPreprocessor:
            continue  # It only moves the batch.
        record = None if records is None else _record(module, records)
        prefix = f"{name}." if name else ""
        own = [each for each in module.parameters() if owners[id(each)].startswith(prefix)]
        yield replace(
            base,
            parameters=sum(each.numel() for each in own),
            trainable=sum(each.numel() for each in own if each.requires_grad),
            output_shapes=() if record is None else record.shapes,
            calls=None if record is None else record.calls,
            is_called=record is None or record.is_called,
            flops=None if record is None else record.flops,
            activation_bytes=None if record is None else record.activations,
            shares=tuple(
                owners[id(each)] for each in module.parameters(recurse=False) if not owners[id(each)].startswith(prefix)
            ),
        )


def _record(module: nn.Module, records: Mapping[nn.Module, ModuleRecord]) -> ModuleRecord:
    """Return the record of a module; for one that is not called itself, such as a list of modules, the sum of its submodules."""
    own = records[module]
    parts = [] if own.calls else [_record(each, records) for each in module.children()]
    return ModuleRecord(
        calls=own.calls,
        shapes=own.shapes,
        flops=own.flops + sum(each.flops for each in parts),
        activations=own.activations + sum(each.activations for each in parts),
        is_called=bool(own.calls) or any(each.is_called for each in parts),
    )


def _shapes(module: ModuleSummary) -> str:
    if not module.is_called:
        return "not called"
    shapes = [str(list(shape)) for shape in module.output_shapes]
    more = f", {len(shapes) - 2} more" if len(shapes) > 2 else ""
    called = f" (x{module.calls})" if module.calls is not None and module.calls > 1 else ""
    return f"{', '.join(shapes[:2])}{more}{called}" or "-"


def _flops(count: float) -> str:
    """Return a number of operations with three digits and a decimal unit, such as ``1.31 M``."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{three_digits(count / size)} {unit}"
    return f"{count:.0f}"
