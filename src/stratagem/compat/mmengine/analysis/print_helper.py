"""Describe the complexity of a model: totals, a table of its modules, and its structure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stratagem.compat.mmengine.analysis.complexity_analysis import (
    ActivationAnalyzer,
    FlopAnalyzer,
    format_size,
    parameter_count,
    render_table,
)
from stratagem.compat.mmengine.utils import is_tuple_of
from stratagem.errors import ConfigValueError

__all__ = ["complexity_stats_str", "complexity_stats_table", "get_model_complexity_info"]


# The tools of OpenMMLab's packages import it under this name.
_format_size = format_size


def get_model_complexity_info(
    model: nn.Module,
    input_shape: tuple[int, ...] | tuple[tuple[int, ...], ...] | None = None,
    inputs: Any = None,
    show_table: bool = True,
    show_arch: bool = True,
) -> dict[str, Any]:
    """Return the operations, activations and parameters of a model.

    Args:
        model: the model.
        input_shape: the shape of its input without the batch, or the shapes of several; random values are used.
        inputs: its arguments instead: a tensor or a tuple.
        show_table: whether the result has a table of the modules.
        show_arch: whether the result has the structure of the model with the counts of each module.

    Returns:
        A dict with the numbers ``flops``, ``activations`` and ``params``, these as text under the names ``flops_str``,
        ``activations_str`` and ``params_str``, and the texts ``out_table`` and ``out_arch``.

    Raises:
        ValueError: if neither or both of ``input_shape`` and ``inputs`` are given, or the shape is invalid.
    """
    if input_shape is None and inputs is None:
        raise ConfigValueError('One of "input_shape" and "inputs" should be set.')
    if input_shape is not None and inputs is not None:
        raise ConfigValueError('"input_shape" and "inputs" cannot be both set.')
    if inputs is None:
        inputs = _random_inputs(model, input_shape)
    flops, activations = FlopAnalyzer(model, inputs), ActivationAnalyzer(model, inputs)
    totals = {
        "flops": flops.total(),
        "activations": activations.total(),
        "params": parameter_count(model)[""],
    }
    return {
        **totals,
        **{f"{name}_str": format_size(value) for name, value in totals.items()},
        "out_table": "\n" + complexity_stats_table(flops, activations=activations) if show_table else "",
        "out_arch": "\n" + complexity_stats_str(flops, activations) if show_arch else "",
    }


def _random_inputs(model: nn.Module, shape: Any) -> tuple[torch.Tensor, ...]:
    shapes = (shape,) if is_tuple_of(shape, int) else shape
    if not (is_tuple_of(shapes, tuple) and all(is_tuple_of(each, int) for each in shapes)):
        raise ConfigValueError(f"input_shape must be a tuple of integers, or a tuple of such tuples, got {shape!r}.")
    device = next(model.parameters()).device
    return tuple(torch.randn(1, *each, device=device) for each in shapes)


def complexity_stats_table(
    flops: FlopAnalyzer,
    max_depth: int = 3,
    activations: ActivationAnalyzer | None = None,
    show_param_shapes: bool = True,
) -> str:
    """Return a table with the parameters, operations and activations of each module that has any.

    Args:
        flops: the analysis of the operations.
        max_depth: how many levels of modules are shown.
        activations: the analysis of the activations; no column without it.
        show_param_shapes: whether parameters have rows with their shapes.
    """
    params = parameter_count(flops._model)
    shapes = {name: str(tuple(value.shape)) for name, value in flops._model.named_parameters()}
    columns: dict[str, Mapping[str, Any]] = {"#flops": flops.by_module()}
    if activations is not None:
        columns["#activations"] = activations.by_module()
    rows = []
    for name in _rows(flops._model, with_parameters=show_param_shapes):
        depth = name.count(".") + 1 if name else 0
        counts = {title: column.get(name, 0) for title, column in columns.items()}
        if depth > max_depth or not (name == "" or params.get(name, 0) or any(counts.values())):
            continue
        indent = " " * depth
        numbers = ["" if name in shapes else indent + format_size(count) for count in counts.values()]
        rows.append(
            [indent + (name or "model"), indent + (shapes.get(name) or format_size(params.get(name, 0))), *numbers]
        )
    title = "#parameters or shape" if show_param_shapes else "#parameters"
    return render_table(["module", title, *columns], rows)


def _rows(model: nn.Module, *, with_parameters: bool, prefix: str = "") -> list[str]:
    """Return the names of modules, each followed by those of its parameters and of the modules in it."""
    names = [prefix.removesuffix(".")]
    if with_parameters:
        names += [prefix + name for name, _ in model.named_parameters(recurse=False)]
    for name, child in model.named_children():
        names += _rows(child, with_parameters=with_parameters, prefix=f"{prefix}{name}.")
    return names


def complexity_stats_str(flops: FlopAnalyzer, activations: ActivationAnalyzer | None = None) -> str:
    """Return the structure of the model with the parameters, operations and activations of each module.

    ``N/A`` means that the model does not call the module, so that the counts of its parent include it.
    """
    params = parameter_count(flops._model)
    analyses = {"#flops": flops} if activations is None else {"#flops": flops, "#acts": activations}

    def counts_of(name: str) -> str:
        counts = {"#params": format_size(params.get(name, 0), digits=2)}
        for title, analysis in analyses.items():
            is_called = analysis.canonical_module_name(name) not in analysis.uncalled_modules()
            counts[title] = format_size(analysis.total(name), digits=2) if is_called else "N/A"
        return ", ".join(f"{title}: {text}" for title, text in counts.items() if text != "0")

    def describe(module: nn.Module, prefix: str) -> str:
        lines = [line for line in (module.extra_repr(), counts_of(prefix.removesuffix("."))) if line]
        lines += [f"({name}): {describe(child, f'{prefix}{name}.')}" for name, child in module.named_children()]
        inner = textwrap.indent("\n".join(lines), "  ")
        return f"{type(module).__name__}(\n{inner}\n)" if lines else f"{type(module).__name__}()"

    return describe(flops._model, "")
