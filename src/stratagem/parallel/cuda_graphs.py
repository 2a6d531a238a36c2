"""Keep the results of compiled models that replay CUDA graphs.

With ``torch.compile(mode="reduce-overhead")``, a compiled function returns its outputs in the same memory in each call, and its
backward pass its gradients. Whatever is kept after an iteration must be copied before the next one overwrites it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stratagem.optim import AccumulatingOptimWrapper

__all__ = ["keep_outputs_of_replays", "may_replay_cuda_graphs"]

# The attribute of compiled functions and modules that returns the options of torch's default compiler.
_CONFIG: Final = "get_compiler_config"


def may_replay_cuda_graphs(model: nn.Module, compile_options: Mapping[str, Any] | None, device: torch.device) -> bool:
    """Return whether a compiled part of a model may use CUDA graphs: ``mode="reduce-overhead"`` or ``"max-autotune"``.

    Parts that the model compiles itself count as well.

    Args:
        model: the model, after it was compiled.
        compile_options: the arguments of ``torch.compile``, of which ``backend="cudagraphs"`` leaves no trace in the model.
        device: the device that computes.
    """
    if device.type != "cuda":
        return False
    return (compile_options or {}).get("backend") == "cudagraphs" or any(map(_uses_graphs, _compiled_parts(model)))


def _compiled_parts(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        for part in (module, *vars(module).values()):
            # Do not look up the attribute on modules that forward unknown attributes to their children.
            if _CONFIG in getattr(part, "__dict__", ()):
                yield part


def _uses_graphs(compiled: Any) -> bool:
    config = getattr(compiled, _CONFIG)()
    return bool(config and config.get("triton.cudagraphs"))


def keep_outputs_of_replays(model: nn.Module) -> None:
    """Make the ``*_step`` methods of a placed model return copies, and mark the start of each iteration.

    If gradients are accumulated, the gradients of the first micro-batch are copied once, and later ones are added to the copies.
    """
    for name in ("train_step", "val_step", "test_step", "predict_step"):
        step = getattr(model, name, None)
        if callable(step):
            wrapper = _training if name == "train_step" else _evaluating
            model.__dict__[name] = functools.wraps(step)(wrapper(step))


def _evaluating(step: Callable[..., Any]) -> Callable[..., Any]:
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(_copied, step(*args, **kwargs))

    return evaluate


def _training(step: Callable[..., Any]) -> Callable[..., Any]:
    own_gradients: dict[int, Tensor] = {}

    def train(data: Any, optim_wrapper: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        outputs = tree_map(_copied, step(data, optim_wrapper=optim_wrapper))
        _own_gradients(optim_wrapper, own_gradients)
        return outputs

    return train


def _own_gradients(optim: Any, own: dict[int, Tensor]) -> None:
    """Copy the gradients of incomplete accumulation windows that are not among ``own``, the gradients already copied."""
    wrappers = optim.each().values()
    pending = [each for each in wrappers if isinstance(each, AccumulatingOptimWrapper) and each.pending_micro_batches]
    if not pending:
        own.clear()
    for wrapper in pending:
        for parameter in wrapper.model_parameters():
            if parameter.grad is not None and own.get(id(parameter)) is not parameter.grad:
                parameter.grad = own[id(parameter)] = parameter.grad.clone()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
