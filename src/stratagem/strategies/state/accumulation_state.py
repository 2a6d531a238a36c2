"""The accumulation window that is open where a checkpoint is made: its gradients, which no update has used yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stratagem.distributed import World, all_gather_object
from stratagem.optim import AccumulatingOptimWrapper, OptimWrapperDict
from stratagem.parallel import AnyOptim
from stratagem.tensors.dtensor import stack_over_ranks

__all__ = ["gather_accumulation_state", "restore_accumulation_state"]


def gather_accumulation_state(optim: AnyOptim, model: nn.Module, world: World) -> dict[str, Any] | None:
    """Return the gradients that wait for an update; None where no window is open. Collective.

    Ranks exchange gradients when a window is complete, so until then each has its own: a tensor has a row for each rank,
    which writes it itself. Of several optimizers all gradients count, since a backward pass may leave some to another one.
    """
    held = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    if not (optim.pending_micro_batches or isinstance(optim, OptimWrapperDict)):
        held = {}
    sparse = [name for name, gradient in held.items() if gradient.is_sparse]
    told = all_gather_object({"gradients": list(held), "sparse": sparse, "optimizers": _open_windows(optim)})
    names = {name for theirs in told for name in theirs["gradients"]}
    if not names:
        return None
    parameters = dict(model.named_parameters())
    rows = {name: _as_row(held.get(name), parameters[name]) for name in sorted(names)}
    return {
        "gradients": {name: stack_over_ranks(row, world.size, world.device) for name, row in rows.items()},
        "ranks": {str(rank): theirs for rank, theirs in enumerate(told)},
    }


def restore_accumulation_state(
    optim: AnyOptim, window: Mapping[str, Any], optim_state: Mapping[str, Any], model: nn.Module, world: World
) -> None:
    """Open the windows again that :func:`gather_accumulation_state` found, with the gradients of this rank.

    Where there are more or fewer ranks than rows, each rank gets such a share that their exchange comes to the same. An
    optimizer whose windows have another length now begins a new one, without these gradients. So does one that trains
    without a loss scale now if float16 overflowed in the window.

    Gradients carry the loss scale that they were computed with. ``optim_state`` is the optimizers' part of the same
    checkpoint, which has that scale; where it is not the present one, the gradients are multiplied by the ratio.
    """
    ranks = window["ranks"]
    own = ranks.get(str(world.rank), ranks["0"])
    parameters = dict(model.named_parameters())
    weighted: dict[nn.Parameter, bool] = {}
    rescaled: dict[nn.Parameter, float] = {}
    for name, wrapper in optim.each().items():
        state = own["optimizers"].get(name)
        scale, saved_scale = wrapper.loss_scale, _saved_scale(optim_state.get(name, {}) if name else optim_state)
        goes_on = state is None or state["length"] == wrapper.accumulative_counts
        if goes_on and saved_scale is not None and scale is None:
            own_parameters = set(wrapper.model_parameters())
            rows_of = [rows for key, rows in window["gradients"].items() if parameters[key] in own_parameters]
            goes_on = all(bool(rows.isfinite().all()) for rows in rows_of)
        if state is not None and goes_on and isinstance(wrapper, AccumulatingOptimWrapper):
            shares = [theirs["optimizers"][name]["weight"] for theirs in ranks.values()]
            weight = state["weight"] if len(ranks) == world.size else _sum(shares, world.size)
            wrapper.resume_accumulation({**state, "weight": weight})
        if goes_on:
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
            # In float32 at least: the ratio of two scales is not in the range of float16.
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * rescaled[parameter]
        # With the type and strides that a backward pass would give it, in memory of its own.
        gradient = torch.empty_like(parameter).detach().copy_(gradient)
        parameter.grad = gradient.to_sparse(1) if name in own["sparse"] else gradient


def _open_windows(optim: AnyOptim) -> dict[str, Any]:
    return {
        name: wrapper.accumulation_state()
        for name, wrapper in optim.each().items()
        if isinstance(wrapper, AccumulatingOptimWrapper) and wrapper.pending_micro_batches
    }


def _saved_scale(state: Mapping[str, Any]) -> float | None:
    """Return the loss scale in an optimizer wrapper's saved state; None if it trained without a scaler."""
    scale = state.get("loss_scaler", {}).get("scale")
    return None if scale is None else float(scale)


def _as_row(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter).detach() if gradient is None else gradient.detach().to_dense()


def _sum(shares: list[Any], size: int) -> Any:
    return None if shares[0] is None else sum(shares) / size
