"""Save and restore the gradients of an accumulation window that is incomplete when a checkpoint is saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.checkpoint import with_known_names
from stratagem.distributed import World, all_gather_object
from stratagem.optim import AccumulatingOptimWrapper, OptimWrapperDict
from stratagem.parallel import AnyOptim
from stratagem.tensors.dtensor import stack_over_ranks
from stratagem.utils import named_parameters

__all__ = ["gather_accumulation_state", "restore_accumulation_state"]


def gather_accumulation_state(optim: AnyOptim, model: nn.Module, world: World) -> dict[str, Any] | None:
    """Return the gradients of incomplete accumulation windows; None if all windows are complete. Collective.

    Gradients are synchronized when a window completes. Until then they differ between ranks, so each saved tensor has one
    row per rank, which that rank writes. With several optimizers all gradients are saved, since a backward pass may leave
    gradients for another optimizer.
    """
    parameters = named_parameters(model)
    held = {name: each.grad for name, each in parameters.items() if each.grad is not None}
    if not (optim.pending_micro_batches or isinstance(optim, OptimWrapperDict)):
        held = {}
    sparse = [name for name, gradient in held.items() if gradient.is_sparse]
    states = all_gather_object({"gradients": list(held), "sparse": sparse, "optimizers": _incomplete_windows(optim)})
    names = {name for theirs in states for name in theirs["gradients"]}
    if not names:
        return None
    rows = {name: _as_row(held.get(name), parameters[name]) for name in sorted(names)}
    return {
        "gradients": {name: stack_over_ranks(row, world.size, world.device) for name, row in rows.items()},
        "ranks": {str(rank): theirs for rank, theirs in enumerate(states)},
    }


def restore_accumulation_state(
    optim: AnyOptim, window: Mapping[str, Any], optim_state: Mapping[str, Any], model: nn.Module, world: World
) -> None:
    """Restore the incomplete windows that :func:`gather_accumulation_state` saved, with the gradients of this rank.

    If the number of ranks has changed, the gradients are redistributed so that synchronization yields the same result. An
    optimizer starts a new window without these gradients if the length of its windows has changed, or if float16 overflowed
    in the window and it now trains without a loss scale.

    Args:
        optim: the optimizer wrapper, or an ``OptimWrapperDict`` for several optimizers.
        window: the value that :func:`gather_accumulation_state` returned.
        optim_state: the optimizer part of the same checkpoint. It contains the loss scale with which the gradients were
            computed; if the current scale differs, the gradients are multiplied by the ratio of the scales.
        model: the unwrapped model.
        world: the rank of this process and the number of ranks.
    """
    parameters = named_parameters(model)
    window = _with_known_names(window, parameters)
    ranks = window["ranks"]
    own = ranks.get(str(world.rank), ranks["0"])
    weighted: dict[nn.Parameter, bool] = {}
    rescaled: dict[nn.Parameter, float] = {}
    for name, wrapper in optim.each().items():
        state = own["optimizers"].get(name)
        scale, saved_scale = wrapper.loss_scale, _saved_scale(optim_state.get(name, {}) if name else optim_state)
        continues = state is None or state["length"] == wrapper.accumulative_counts
        if continues and saved_scale is not None and scale is None:
            own_parameters = set(wrapper.model_parameters())
            rows_of = [rows for key, rows in window["gradients"].items() if parameters[key] in own_parameters]
            continues = all(bool(rows.isfinite().all()) for rows in rows_of)
        if state is not None and continues and isinstance(wrapper, AccumulatingOptimWrapper):
            shares = [theirs["optimizers"][name]["weight"] for theirs in ranks.values()]
            weight = state["weight"] if len(ranks) == world.size else _sum(shares, world.size)
            wrapper.resume_accumulation({**state, "weight": weight})
        if continues:
            is_weighted = state is not None and state["weight"] is not None
            weighted.update(dict.fromkeys(wrapper.model_parameters(), is_weighted))
            ratio = (1.0 if scale is None else scale) / (1.0 if saved_scale is None else saved_scale)
            rescaled.update(dict.fromkeys(wrapper.model_parameters(), ratio))
    for name, rows in window["gradients"].items():
        parameter = parameters[name]
        if parameter not in weighted:
            continue
        if len(rows) == world.size:
            gradient = rows[world.rank] if name in own["gradients"] else None
        else:
            gradient = rows.sum(0) / (world.size if weighted[parameter] else len(rows))
        if gradient is None:
            continue
        if rescaled[parameter] != 1.0:
            # At least float32, because the ratio of two scales may exceed the range of float16.
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * rescaled[parameter]
        # Make a copy with the dtype and strides that a backward pass would produce.
        gradient = torch.empty_like(parameter).detach().copy_(gradient)
        parameter.grad = gradient.to_sparse(1) if name in own["sparse"] else gradient


def _with_known_names(window: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Replace parameter names that include wrappers inside the model, as saved by earlier versions."""

    def renamed(names: Sequence[str]) -> list[str]:
        return list(with_known_names(dict.fromkeys(names), known))

    ranks = {
        rank: {**theirs, "gradients": renamed(theirs["gradients"]), "sparse": renamed(theirs["sparse"])}
        for rank, theirs in window["ranks"].items()
    }
    return {**window, "gradients": with_known_names(window["gradients"], known), "ranks": ranks}


def _incomplete_windows(optim: AnyOptim) -> dict[str, Any]:
    return {
        name: wrapper.accumulation_state()
        for name, wrapper in optim.each().items()
        if isinstance(wrapper, AccumulatingOptimWrapper) and wrapper.pending_micro_batches
    }


def _saved_scale(state: Mapping[str, Any]) -> float | None:
    """Return the loss scale in the saved state of an optimizer wrapper; None if the wrapper had no scaler."""
    scale = state.get("loss_scaler", {}).get("scale")
    return None if scale is None else float(scale)


def _as_row(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter).detach() if gradient is None else gradient.detach().to_dense()


def _sum(shares: list[Any], size: int) -> Any:
    return None if shares[0] is None else sum(shares) / size
