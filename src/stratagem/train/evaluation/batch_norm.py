"""Recompute the running statistics of BatchNorm for the current weights of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from stratagem.distributed import all_reduce
from stratagem.model import BaseModel
from stratagem.step import call_forward
from stratagem.train.evaluation.precision import training_autocast
from stratagem.train.run.context import Run
from stratagem.train.tools.preserve_state import isolate_rng
from stratagem.utils import canonical_names

__all__ = ["can_recompute_statistics", "recompute_statistics"]


def can_recompute_statistics(model: nn.Module) -> bool:
    """Return whether a forward pass of the model with ``mode="loss"`` is the forward pass of its training step."""
    return isinstance(model, BaseModel) and type(model).train_step is BaseModel.train_step


@torch.no_grad()
def recompute_statistics(run: Run, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the BatchNorm buffers of the model for its current weights, by name; empty without BatchNorm. Collective.

    They are the means of the statistics of all batches of all ranks, as in ``torch.optim.swa_utils.update_bn``. The forward
    passes run in training mode. Afterwards, the buffers, the modes and the random states are as before.

    Args:
        run: the run with the model.
        batches: the batches of this rank; the number must be the same on all ranks.
    """
    model = cast("BaseModel", run.strategy.unwrap_model())
    with isolate_rng(), _preserving(model):
        model.train()
        # A model may keep some layers in evaluation mode.
        norms = {name: each for name, each in model.named_modules() if _is_recomputed(each)}
        if not norms:
            return {}
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        try:
            for batch in batches:
                with training_autocast(run):
                    call_forward(model, model.data_preprocessor(batch, True), "loss")
        finally:
            run.strategy.release_gathered_parameters()
        return _combined(norms, model, run.strategy.dp_group)


def _is_recomputed(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.training and module.running_mean is not None


def _combined(norms: dict[str, Any], model: nn.Module, group: ProcessGroup | None) -> dict[str, Tensor]:
    """Return the statistics over the batches of all ranks, weighted by their number of batches. Collective."""
    canonical = canonical_names(model)
    combined: dict[str, Tensor] = {}
    for name, norm in norms.items():
        count = norm.num_batches_tracked.clone()
        own = int(count)
        all_reduce(count, "sum", group)
        total = max(1, int(count))
        prefix = f"{name}." if name else ""
        for key in ("running_mean", "running_var"):
            statistic = getattr(norm, key)
            weighted = statistic.to(torch.promote_types(statistic.dtype, torch.float32)) * own
            all_reduce(weighted, "sum", group)
            combined[canonical(prefix + key)] = (weighted / total).to(statistic.dtype)
        combined[canonical(f"{prefix}num_batches_tracked")] = count
    return combined


@contextmanager
def _preserving(model: nn.Module) -> Iterator[None]:
    """Restore the buffers, the training modes and the momenta of BatchNorm on exit."""
    slots = [(owner, key, buffer) for owner in model.modules() for key, buffer in owner._buffers.items()]
    kept = [(owner, key, buffer, None if buffer is None else buffer.detach().clone()) for owner, key, buffer in slots]
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(module, module.momentum) for module in model.modules() if isinstance(module, _BatchNorm)]
    try:
        yield
    finally:
        for owner, key, buffer, values in kept:
            if buffer is not None and values is not None:
                buffer.copy_(values)
            owner._buffers[key] = buffer
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
