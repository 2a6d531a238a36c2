"""Count something for each operator and module of a model that is traced."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Number
from typing import Any, Self

import torch
from torch import Tensor, nn

from stratagem.compat.mmengine.analysis.jit_handles import Handle
from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.logging import print_log
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, StateError
from stratagem.utils import did_you_mean

__all__ = ["JitModelAnalysis"]

Inputs = Tensor | tuple[Any, ...]

# Operators that count as nothing: they move or compare data, or are cheap.
_IGNORED_OPS = frozenset(
    {"aten::Int", "aten::ScalarImplicit", "aten::__and__", "aten::arange", "aten::bitwise_not", "aten::cat", "aten::chunk",
     "aten::clamp", "aten::clamp_", "aten::constant_pad_nd", "aten::contiguous", "aten::copy_", "aten::detach", "aten::dropout",
     "aten::empty", "aten::eq", "aten::expand", "aten::flatten", "aten::floor", "aten::floor_divide", "aten::full",
     "aten::full_like", "aten::gather", "aten::ge", "aten::gt", "aten::index", "aten::index_put_", "aten::masked_fill",
     "aten::max", "aten::narrow", "aten::new_empty", "aten::new_full", "aten::new_zeros", "aten::nonzero", "aten::ones",
     "aten::permute", "aten::relu", "aten::relu_", "aten::remainder", "aten::reshape", "aten::roll", "aten::select",
     "aten::size", "aten::slice", "aten::split", "aten::split_with_sizes", "aten::squeeze", "aten::stack", "aten::t",
     "aten::to", "aten::transpose", "aten::type_as", "aten::unbind", "aten::unsqueeze", "aten::unsqueeze_", "aten::view",
     "aten::zeros", "aten::zeros_like"}
)  # fmt: skip
_TRACER_WARNINGS = ("all", "no_tracer_warning", "none")
_ANCESTOR_MODES = ("owner", "caller")
# Calls of code that the trace does not show, which must not be ignored silently.
_OPAQUE = ("prim::PythonOp", "prim::CallFunction")
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@dataclass(frozen=True, slots=True)
class Statistics:
    """The counts and the operators without a handle, both by module, and the modules that were not called."""

    counts: dict[str, Counter[str]]
    unsupported_ops: dict[str, Counter[str]]
    uncalled_mods: set[str]


class AnalysisNotRunError(StateError, RuntimeError):
    """Results that the analysis finds out were requested before it."""


class JitModelAnalysis:
    """Count something for each operator that a model executes, and add it up by operator and module.

    The model is traced when a result is first requested. Modules have the names of ``named_modules``; a module with several names
    is counted under the first one.

    Args:
        model: the model.
        inputs: its arguments: a tensor or a tuple.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._model = model
        self._inputs = inputs
        self._op_handles: dict[str, Handle] = {}
        self._ignored_ops = set(_IGNORED_OPS)
        self._named_modules = dict(model.named_modules(remove_duplicate=False))
        first_names: dict[nn.Module, str] = {}
        for name, module in self._named_modules.items():
            first_names.setdefault(module, name)
        self._aliases = {name: first_names[module] for name, module in self._named_modules.items()}
        self._stats: Statistics | None = None
        self._enable_warn_unsupported_ops = True
        self._enable_warn_uncalled_mods = True
        self._warn_trace = "no_tracer_warning"
        self._ancestor_mode = "owner"

    def total(self, module_name: str = "") -> Any:
        """Return the sum of a module."""
        return sum(self.by_operator(module_name).values())

    def by_operator(self, module_name: str = "") -> Counter[str]:
        """Return the sums of a module by operator."""
        return self._analyze().counts[self.canonical_module_name(module_name)]

    def by_module_and_operator(self) -> dict[str, Counter[str]]:
        """Return the sums by module and operator."""
        return self._analyze().counts

    def by_module(self) -> Counter[str]:
        """Return the sums by module."""
        return Counter({name: sum(counts.values()) for name, counts in self._analyze().counts.items()})

    def unsupported_ops(self, module_name: str = "") -> Counter[str]:
        """Return how often each operator without a handle was executed in a module.

        Raises:
            RuntimeError: if no count has been requested before.
        """
        if self._stats is None:
            raise AnalysisNotRunError("The model has not been analyzed. Request a count first, such as total().")
        return self._stats.unsupported_ops[self.canonical_module_name(module_name)]

    def uncalled_modules(self) -> set[str]:
        """Return the names of the modules that were not called."""
        return self._analyze().uncalled_mods

    def set_op_handle(self, *args: Any, **kwargs: Handle | None) -> Self:
        """Set the functions that count for operators, as pairs of arguments or by name. None ignores an operator.

        Raises:
            TypeError: if the arguments are not pairs.
        """
        self._stats = None
        if len(args) % 2 != 0:
            raise ConfigTypeError(f"set_op_handle() takes pairs of names and handles, got {len(args)} arguments.")
        for name, handle in {**dict(zip(args[::2], args[1::2], strict=True)), **kwargs}.items():
            if handle is None:
                self._ignored_ops.add(name)
            else:
                self._op_handles[name] = handle
        return self

    def clear_op_handles(self) -> Self:
        """Remove all functions that count for operators."""
        self._op_handles = {}
        self._ignored_ops = set(_IGNORED_OPS)
        self._stats = None
        return self

    def canonical_module_name(self, name: str) -> str:
        """Return the name under which a module is counted.

        Raises:
            KeyError: if the model has no such module.
            AssertionError: if the name is not a string.
        """
        require(isinstance(name, str), f"The name of a module must be a string, got {name!r}.")
        if name not in self._aliases:
            raise ConfigKeyError(f"The model has no module {name!r}. {did_you_mean(name, self._aliases)}")
        return self._aliases[name]

    def copy(self, new_model: nn.Module | None = None, new_inputs: Inputs | None = None) -> JitModelAnalysis:
        """Return an analysis with the same handles and settings, of other inputs or another model if they are given."""
        copied = JitModelAnalysis(
            self._model if new_model is None else new_model, self._inputs if new_inputs is None else new_inputs
        )
        copied.set_op_handle(**self._op_handles)
        copied.unsupported_ops_warnings(self._enable_warn_unsupported_ops)
        copied.uncalled_modules_warnings(self._enable_warn_uncalled_mods)
        return copied.tracer_warnings(self._warn_trace)

    def tracer_warnings(self, mode: str) -> Self:
        """Set which warnings of the trace are shown: ``"all"``, ``"no_tracer_warning"`` or ``"none"``.

        Raises:
            ValueError: if it is something else.
        """
        self._warn_trace = _one_of(mode, _TRACER_WARNINGS, "tracer warning mode")
        return self

    def ancestor_mode(self, mode: str) -> Self:
        """Set to which modules an operator counts: to those that contain its module, or to those that called it.

        Args:
            mode: ``"owner"`` or ``"caller"``.

        Raises:
            ValueError: if it is something else.
        """
        self._ancestor_mode = _one_of(mode, _ANCESTOR_MODES, "ancestor mode")
        return self

    def unsupported_ops_warnings(self, enabled: bool) -> Self:
        """Set whether operators without a handle are logged."""
        self._enable_warn_unsupported_ops = enabled
        return self

    def uncalled_modules_warnings(self, enabled: bool) -> Self:
        """Set whether modules that were not called are logged."""
        self._enable_warn_uncalled_mods = enabled
        return self

    def _analyze(self) -> Statistics:
        if self._stats is not None:
            return self._stats
        with warnings.catch_warnings():
            if self._warn_trace == "none":
                warnings.simplefilter("ignore")
            elif self._warn_trace == "no_tracer_warning":
                warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
            graph = self._trace()
        names = set(self._aliases.values())
        stats = Statistics({name: Counter() for name in names}, {name: Counter() for name in names}, set())
        called: set[str] = set()
        for node in graph.nodes():
            scopes = node.scopeName().split("/")
            modules = set(scopes) if self._ancestor_mode == "caller" else _with_parents(scopes[-1])
            called.update(scopes, modules)
            self._count(node, modules & names, stats)
        stats.uncalled_mods.update(names - called)
        self._stats = stats
        self._warn(stats)
        return stats

    def _count(self, node: Any, modules: set[str], stats: Statistics) -> None:
        kind = node.kind()
        kind = f"{kind}.{node.pyname()}" if kind == "prim::PythonOp" else kind
        if kind not in self._op_handles:
            if kind not in self._ignored_ops and (not kind.startswith("prim::") or kind.startswith(_OPAQUE)):
                for name in modules:
                    stats.unsupported_ops[name][kind] += 1
            return
        counted = self._op_handles[kind](list(node.inputs()), list(node.outputs()))
        counts = counted if isinstance(counted, Mapping) else {kind.removeprefix("aten::"): counted}
        for value in counts.values():
            if not isinstance(value, Number):
                raise ConfigValueError(f"The handle of {kind} returned {value!r}, which is not a number.")
        for name in modules:
            for operator, value in counts.items():
                stats.counts[name][operator] += value

    def _trace(self) -> Any:
        """Return the graph of the model, in which each operator has the names of the modules that called it."""
        model = self._model.module if isinstance(self._model, _WRAPPERS) else self._model
        with ExitStack() as hooks:
            # The names of modules by object, outermost first; a wrapper does not take part in the trace.
            named = dict(reversed([(module, self._aliases[name]) for name, module in self._named_modules.items()]))
            if model is not self._model:
                _add_scope(hooks, model, "")
            for module, name in named.items():
                if module is not self._model or module is model:
                    _add_scope(hooks, module, name)
            graph, _ = torch.jit._get_trace_graph(model, self._inputs)  # type: ignore[attr-defined, no-untyped-call]
        return graph

    def _warn(self, stats: Statistics) -> None:
        if self._enable_warn_unsupported_ops:
            for operator, times in stats.unsupported_ops[""].items():
                _log(f"Unsupported operator {operator} encountered {times} time(s)")
        # Containers such as ModuleList are never called.
        uncalled = sorted(name for name in stats.uncalled_mods if _has_forward(self._named_modules[name]))
        if self._enable_warn_uncalled_mods and uncalled:
            _log(
                f"These modules were never called: {', '.join(uncalled)}. They are unused, or the model uses them without "
                "calling them, so that they have no counts of their own; the counts of their parents include them."
            )


def _add_scope(hooks: ExitStack, module: nn.Module, name: str) -> None:
    """Give the operators that a module executes its name, until the hooks are removed."""

    def enter(*_: Any) -> None:
        state = torch._C._get_tracing_state()
        if state:
            state.push_scope(name)

    def leave(*_: Any) -> None:
        state = torch._C._get_tracing_state()
        if state:
            state.pop_scope()

    remove: Callable[[], None] = module.register_forward_pre_hook(enter).remove
    hooks.callback(remove)
    hooks.callback(module.register_forward_hook(leave).remove)


def _with_parents(name: str) -> set[str]:
    parts = name.split(".")
    return {"", *(".".join(parts[:end]) for end in range(1, len(parts) + 1))}


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _one_of(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        raise ConfigValueError(f"Unrecognized {what} {value!r}. {did_you_mean(str(value), known)}")
    return value


def _log(message: str) -> None:
    print_log(message, logger="current", level=logging.WARNING)
