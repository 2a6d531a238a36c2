"""What a strategy stores on this rank, including what engines keep outside of the model, to compare with plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import stratagem
from stratagem.planning.result import StepPlan
from stratagem.planning.trace import StepTrace
from stratagem.strategies.choice import choose_strategy
from tests.support.planned_models import OPTIMIZER, counted

__all__ = ["SIZES", "Updates", "bytes_of", "measured_engine", "planned_engine", "storages_of"]

SIZES: Final = ("parameters", "gradients", "optimizer_state", "master_weights", "buffers")
Makers = tuple[Callable[[], nn.Module], Callable[[], Any]]


def storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Return the storages of this rank's parts of tensors, each once."""
    local = (each._local_tensor if isinstance(each, DTensor) else each for each in tensors)
    storages = (getattr(each, "elem", each).untyped_storage() for each in local)
    return {storage._cdata: storage for storage in storages}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of this rank's parts of tensors, each storage once."""
    return sum(storage.nbytes() for storage in storages_of(tensors).values())


@final
class Updates:
    """Notes what the optimizers of a prepared strategy read and update inside the ``with`` block.

    Args:
        strategy: the strategy.
    """

    def __init__(self, strategy: Any) -> None:
        self._model: nn.Module = strategy.unwrap_model()
        self._wrappers = list(strategy.optim_wrapper.each().values())
        self._hooks: list[Any] = []
        # The storages are kept, so that their addresses stay unique.
        self._gradients: dict[int, torch.UntypedStorage] = {}
        self._updated: dict[int, torch.UntypedStorage] = {}

    def __enter__(self) -> Updates:
        self._hooks = [each.optimizer.register_step_pre_hook(self._note) for each in self._wrappers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, optimizer: Any, *_: Any) -> None:
        updated = [each for group in optimizer.param_groups for each in group["params"]]
        gradients = [each.grad for each in (*updated, *self._model.parameters()) if each.grad is not None]
        engines = [wrapper.engine for wrapper in self._wrappers if hasattr(wrapper, "engine")]
        self._updated.update(storages_of(updated))
        self._gradients.update(storages_of([*gradients, *(each for own in engines for each in _stored(own))]))

    def sizes(self) -> dict[str, int]:
        """Return the sizes in ``SIZES``, in bytes. Collects nothing if no update was run in the block."""
        parameters = list(self._model.parameters())
        parameters += [each.ds_tensor for each in parameters if hasattr(each, "ds_tensor")]
        own = storages_of(parameters)
        masters = [storage for key, storage in self._updated.items() if key not in own]
        states = [dict(wrapper.optimizer.state) for wrapper in self._wrappers]
        state = [
            each for each in tree_leaves(states) if isinstance(each, Tensor) and not isinstance(each, nn.Parameter)
        ]
        return {
            "parameters": sum(each.nbytes() for each in own.values()),
            "gradients": sum(each.nbytes() for each in self._gradients.values()),
            "optimizer_state": bytes_of(state),
            "master_weights": sum(each.nbytes() for each in masters),
            "buffers": bytes_of(self._model.buffers()),
        }


def _stored(engine: Any) -> Iterator[Tensor]:
    """Yield the gradients that ZeRO of an engine stores outside of the parameters."""
    for store in getattr(engine, "pg_to_grad_store", {}).values():
        yield from (each for each in tree_leaves(store._grads_of_params) if isinstance(each, Tensor))
    buffer = getattr(getattr(engine, "optimizer", None), "grad_partitions_flat_buffer", None)
    if buffer is not None:
        yield buffer


def measured_engine(makers: Makers, strategy: dict[str, Any], folder: str, accumulation: int = 1) -> dict[str, Any]:
    """Train three steps on this rank; return the sizes of the last one, its collectives and its operations."""
    make_model, make_batch = makers
    torch.manual_seed(0)
    built = choose_strategy(
        strategy, launcher="pytorch", work_dir=folder, experiment_name=None, env_cfg=None, randomness=None,
        auto_scale_lr=None, log_level="ERROR",
    )  # fmt: skip
    optim_wrapper = {**OPTIMIZER, "accumulative_counts": accumulation}
    built.prepare(make_model(), optim_wrapper=optim_wrapper, dispatch_kwargs={"max_iters": 99})
    trace = StepTrace({})
    updates = Updates(built)
    for step in range(3):
        with updates if step == 2 else torch.enable_grad(), trace if step == 2 else torch.enable_grad():
            for _ in range(accumulation):
                built.model.train_step(make_batch(), optim_wrapper=built.optim_wrapper)
    found = {**updates.sizes(), "collectives": counted(trace.calls), "flops": trace.flops}
    built.close()
    return found


def planned_engine(makers: Makers, strategy: dict[str, Any], world: int, accumulation: int = 1) -> StepPlan:
    """Return the plan of what ``measured_engine`` trains."""
    make_model, make_batch = makers
    optim_wrapper = {**OPTIMIZER, "accumulative_counts": accumulation}
    [step] = stratagem.plan(
        make_model(), optim_wrapper=optim_wrapper, batch=make_batch(), strategies=[strategy], worlds=[world]
    ).steps
    assert (step.refusal, step.failure) == (None, None)
    return step
