"""Count the operations, activations and parameters of models."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from stratagem.compat.mmengine.analysis import jit_handles as handles
from stratagem.compat.mmengine.analysis.jit_analysis import Inputs, JitModelAnalysis
from stratagem.compat.mmengine.analysis.jit_handles import Handle

__all__ = [
    "ActivationAnalyzer",
    "FlopAnalyzer",
    "activation_count",
    "flop_count",
    "format_size",
    "parameter_count",
    "parameter_count_table",
    "render_table",
]

_DEFAULT_SUPPORTED_FLOP_OPS: Final[Mapping[str, Handle]] = {
    "aten::addmm": handles.addmm_flop_jit,
    "aten::bmm": handles.bmm_flop_jit,
    "aten::_convolution": handles.conv_flop_jit,
    "aten::einsum": handles.einsum_flop_jit,
    "aten::matmul": handles.matmul_flop_jit,
    "aten::mm": handles.matmul_flop_jit,
    "aten::linear": handles.linear_flop_jit,
    "aten::batch_norm": handles.batchnorm_flop_jit,
    "aten::group_norm": handles.norm_flop_counter(2),
    "aten::layer_norm": handles.norm_flop_counter(2),
    "aten::instance_norm": handles.norm_flop_counter(1),
    "aten::upsample_nearest2d": handles.elementwise_flop_counter(0, 1),
    "aten::upsample_bilinear2d": handles.elementwise_flop_counter(0, 4),
    "aten::adaptive_avg_pool2d": handles.elementwise_flop_counter(1, 0),
    "aten::grid_sampler": handles.elementwise_flop_counter(0, 4),
}
_DEFAULT_SUPPORTED_ACT_OPS: Final[Mapping[str, Handle]] = {
    "aten::_convolution": handles.generic_activation_jit("conv"),
    **dict.fromkeys(
        ("aten::addmm", "aten::bmm", "aten::einsum", "aten::matmul", "aten::linear"), handles.generic_activation_jit()
    ),
}
_UNITS = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3))


class FlopAnalyzer(JitModelAnalysis):
    """Count the operations of a model; a multiplication with an addition is one operation. See :class:`JitModelAnalysis`."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__(model, inputs)
        self.set_op_handle(**_DEFAULT_SUPPORTED_FLOP_OPS)


class ActivationAnalyzer(JitModelAnalysis):
    """Count the elements of the outputs of convolutions and matrix products. See :class:`JitModelAnalysis`."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__(model, inputs)
        self.set_op_handle(**_DEFAULT_SUPPORTED_ACT_OPS)


def flop_count(
    model: nn.Module, inputs: tuple[Any, ...], supported_ops: Mapping[str, Handle] | None = None
) -> tuple[defaultdict[str, float], Counter[str]]:
    """Return the operations of a model in units of 1e9 by operator, and how often operators were not counted."""
    return _scaled(FlopAnalyzer(model, inputs), supported_ops, 1e9)


def activation_count(
    model: nn.Module, inputs: tuple[Any, ...], supported_ops: Mapping[str, Handle] | None = None
) -> tuple[defaultdict[str, float], Counter[str]]:
    """Return the activations of a model in units of 1e6 by operator, and how often operators were not counted."""
    return _scaled(ActivationAnalyzer(model, inputs), supported_ops, 1e6)


def _scaled(
    analyzer: JitModelAnalysis, supported_ops: Mapping[str, Handle] | None, unit: float
) -> tuple[defaultdict[str, float], Counter[str]]:
    counts = analyzer.set_op_handle(**(supported_ops or {})).by_operator()
    scaled: defaultdict[str, float] = defaultdict(float, {name: count / unit for name, count in counts.items()})
    return scaled, analyzer.unsupported_ops()


def parameter_count(model: nn.Module) -> defaultdict[str, int]:
    """Return the number of elements of each parameter, and of the parameters in each module, by name."""
    counts: defaultdict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        for end in range(len(parts) + 1):
            counts[".".join(parts[:end])] += parameter.numel()
    return counts


def parameter_count_table(model: nn.Module, max_depth: int = 3) -> str:
    """Return a table of the parameters of a model: their shapes, and their number in each module.

    Args:
        model: the model.
        max_depth: how many levels of modules are shown.
    """
    counts = parameter_count(model)
    shapes = {name: str(tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    rows = [["model", format_size(counts.pop(""), digits=1)]]
    for name, count in _in_tree_order(counts):
        depth = name.count(".") + 1
        if depth <= max_depth:
            indent = " " * depth
            rows.append([indent + name, indent + shapes.get(name, format_size(count, digits=1))])
    title = f"parameter count of {type(model).__name__}"
    return render_table(["name", "#elements or shape"], rows, title=title)


def _in_tree_order(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return names and counts so that each module is followed by what it contains."""
    order = {name: index for index, name in enumerate(counts)}
    key = {name: [order[".".join(name.split(".")[: end + 1])] for end in range(name.count(".") + 1)] for name in counts}
    return sorted(counts.items(), key=lambda item: key[item[0]])


def format_size(count: float, digits: int = 3) -> str:
    """Return a number with a unit: 1.25M for 1,250,000. A unit is used from a tenth of it."""
    for unit, size in _UNITS:
        if abs(count) > size / 10:
            return f"{count / size:.{digits}f}".rstrip("0").rstrip(".") + unit
    return str(count)


def render_table(columns: list[str], rows: list[list[str]], title: str | None = None) -> str:
    """Return a table as text."""
    table = Table(*columns, title=title, box=box.ASCII2)
    for row in rows:
        table.add_row(*row)
    console = Console()
    with console.capture() as capture:
        console.print(table, end="")
    return capture.get()
