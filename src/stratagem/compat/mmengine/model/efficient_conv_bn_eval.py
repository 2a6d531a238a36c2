"""Evaluate a convolution and the BatchNorm layer after it as one convolution in eval mode.

The statistics of BatchNorm are then constants, so ``bn(conv(x))`` is a convolution with other weights, which needs less memory.
In training mode, nothing changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

__all__ = ["turn_on_efficient_conv_bn_eval", "turn_on_efficient_conv_bn_eval_for_single_model"]


def efficient_conv_bn_eval_forward(bn: Any, conv: Any, x: Tensor) -> Tensor:
    """Return ``bn(conv(x))`` for a BatchNorm layer in eval mode, computed with one convolution."""
    scale = torch.rsqrt(bn.running_var + bn.eps)
    if bn.weight is not None:
        scale = bn.weight * scale
    mean = bn.running_mean if conv.bias is None else bn.running_mean - conv.bias
    shift = -mean * scale
    if bn.bias is not None:
        shift = bn.bias + shift
    weight = conv.weight * scale.reshape(-1, *[1] * (conv.weight.dim() - 1))
    result: Tensor = conv._conv_forward(x, weight, shift)
    return result


def efficient_conv_bn_eval_control(bn: nn.Module, conv: Any, x: Tensor) -> Tensor:
    """Return ``bn(conv(x))``, computed with one convolution if the BatchNorm layer is in eval mode."""
    if bn.training:
        result: Tensor = bn(conv._conv_forward(x, conv.weight, conv.bias))
        return result
    return efficient_conv_bn_eval_forward(bn, conv, x)


def efficient_conv_bn_eval_graph_transform(fx_model: fx.GraphModule) -> None:
    """Combine each convolution whose only use is a BatchNorm layer with this layer, in place."""
    modules = dict(fx_model.named_modules())
    for node in list(fx_model.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], _BatchNorm):
            continue
        conv = node.args[0]
        if conv.op != "call_module" or not isinstance(modules[conv.target], _ConvNd) or len(conv.users) > 1:
            continue
        with fx_model.graph.inserting_before(conv):
            layers = [fx_model.graph.get_attr(each.target) for each in (node, conv)]
            combined = fx_model.graph.call_function(efficient_conv_bn_eval_control, (*layers, conv.args[0]))
        node.replace_all_uses_with(combined)
        fx_model.graph.erase_node(node)
        fx_model.graph.erase_node(conv)
    fx_model.graph.lint()
    fx_model.recompile()


def turn_on_efficient_conv_bn_eval_for_single_model(model: nn.Module) -> None:
    """Combine convolutions and BatchNorm layers of a module that ``torch.fx`` can trace, by replacing its ``forward``."""
    traced = fx.symbolic_trace(model)
    efficient_conv_bn_eval_graph_transform(traced)
    model.forward = traced.forward


def turn_on_efficient_conv_bn_eval(model: nn.Module, modules: str | Sequence[str]) -> None:
    """Combine convolutions and BatchNorm layers in some submodules of a model.

    Args:
        model: the model.
        modules: the name of a submodule, or several names.
    """
    for name in [modules] if isinstance(modules, str) else modules:
        turn_on_efficient_conv_bn_eval_for_single_model(attrgetter(name)(model))
