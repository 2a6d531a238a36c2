"""Measure training steps of a real run: what is allocated, sent and computed, without the code that plans use."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from stratagem import Hook
from stratagem.train import Priority
from tests.support.engine_sizes import Updates, bytes_of, storages_of

__all__ = ["Measurement", "WitnessHook", "bytes_key"]

# The collectives by their name in torch's profiler.
_KINDS: Final = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
    "recv_": "recv",
}
_ITEM_SIZES: Final = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4}
_ITEM_SIZES_SMALL: Final = {"unsigned char": 1, "signed char": 1, "bool": 1}

Measurement = dict[str, Any]


@final
class Allocations(TorchDispatchMode):
    """Adds up the storages of a step after every operation.

    A storage that existed when this object was created counts from the beginning of the step. One that did not, and that no
    operation returned, was created inside a kernel, or inside Gloo, which copies the input of a reduce-scatter. Such storages
    are not counted; the peak of the allocator includes them.

    Attributes:
        peak: the largest sum.
        at_backward: the largest sum of storages that exist when a backward pass starts and did not before its
            forward pass.
        existing: the sum of the storages that existed before the step.
        unknown: storages that did not exist and that no operation returned.
    """

    def __init__(self, before: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()
        self._kept: set[int] = set()
        found = [each for each in gc.get_objects() if isinstance(each, Tensor) and _has_storage(each)]
        self._existed = {each._cdata: each.nbytes() for each in before}
        self._existed |= {key: each.nbytes() for key, each in storages_of(found).items()}
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._old: set[int] = set()
        self._largest = 0
        self.existing = 0
        self._in_backward = False
        self.at_backward = 0
        self.unknown: list[weakref.ref[torch.UntypedStorage]] = []

    @property
    def peak(self) -> int:
        return self._largest + self.existing

    def begin(self, tensors: Iterable[Tensor], model: nn.Module) -> None:
        """Count tensors that exist; parameters of the model that are or will be gathered are not activations."""
        self._model = model
        for storage in storages_of(tensors).values():
            self._meet(storage, is_new=False)

    def _meet(self, storage: torch.UntypedStorage, *, is_new: bool) -> None:
        key = storage._cdata
        if key in self._live and self._live[key]() is not None:
            return
        if not is_new and key not in self._existed:
            self.unknown.append(weakref.ref(storage))
            return
        self._live[key] = weakref.ref(storage)
        if is_new:
            self._old.discard(key)
        else:
            self._old.add(key)
            self.existing += self._existed.pop(key)

    def _look(self) -> None:
        now = 0
        for key, reference in list(self._live.items()):
            storage = reference()
            if storage is None:
                del self._live[key]
            else:
                now += storage.nbytes()
        self._largest = max(self._largest, now - self.existing)

    def begin_micro_batch(self) -> None:
        """Note what remains of the micro-batches before."""
        self._kept = {key for key, reference in self._live.items() if reference() is not None}

    def _note_backward(self) -> None:
        gathered = storages_of([*self._model.parameters(), *_messages_to(self._model)])
        created = {
            key: storage.nbytes()
            for key, reference in self._live.items()
            if key not in gathered
            and key not in self._old
            and key not in self._kept
            and (storage := reference()) is not None
        }
        self.at_backward = max(self.at_backward, sum(created.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        runs_backward = torch._C._current_graph_task_id() != -1
        if runs_backward and not self._in_backward:
            self._note_backward()
        self._in_backward = runs_backward
        given = storages_of(each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        for storage in given.values():
            self._meet(storage, is_new=False)
        out = func(*args, **(kwargs or {}))
        for key, storage in storages_of(each for each in tree_leaves(out) if isinstance(each, Tensor)).items():
            # Gloo splits its copy of the input of a reduce-scatter; these views are not new.
            if key not in given:
                self._meet(storage, is_new=True)
        self._look()
        return out


def _messages_to(model: nn.Module) -> list[Tensor]:
    """Return the buffers of the parameters that DeepSpeed is gathering."""
    messages = getattr(model, "ds_inflight_param_registry", {}).values()
    # A message has one handle for each dtype.
    handles = [handle for each in messages for handle in getattr(each, "handles", [each])]
    return _tensors([getattr(each, "partitions", ()) for each in handles])


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


@final
class Operations(TorchDispatchMode):
    """Counts the floating-point operations of a rank with the formulas of torch, and for attention those of its GPU kernels.

    Attributes:
        total: the number of operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            self.total += sdpa_flop_count(*(each.shape for each in args[:3]))
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            self.total += sdpa_backward_flop_count(*(each.shape for each in args[:4]))
        elif func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _collectives(profiled: profile) -> dict[str, int]:
    """Return the number of collectives by kind, and the bytes that this rank contributes, as the profiler saw them.

    Gloo computes a reduce-scatter with an all-reduce, so their bytes are one number.
    """
    found: Counter[str] = Counter()
    for event in profiled.events() or ():
        if event.name.startswith("c10d::"):
            kind = _KINDS.get(event.name.removeprefix("c10d::"), event.name)
            found[kind] += 1
            if kind == "all_to_all":
                # A rank may receive more than it sends.
                found[bytes_key(kind)] += max(map(_bytes_of_input, event.input_shapes[:2], event.input_dtypes[:2]))
        elif event.name == "gloo:all_reduce" and event.input_shapes == [[2]] and event.input_dtypes == ["long int"]:
            # A run asks all ranks after some iterations whether one of them stops.
            found["all_reduce"] -= 1
        elif event.name.startswith("gloo:") and event.name != "gloo:all_to_all":
            size = sum(map(_bytes_of_input, event.input_shapes, event.input_dtypes))
            found[bytes_key(event.name.removeprefix("gloo:"))] += size
    return dict(found)


def bytes_key(kind: str) -> str:
    """Return the key of the bytes of a kind of collectives."""
    return f"bytes of {'reductions' if kind in {'all_reduce', 'reduce_scatter'} else kind}"


def _bytes_of_input(shape: list[int], dtype: str) -> int:
    return torch.Size(shape).numel() * {**_ITEM_SIZES, **_ITEM_SIZES_SMALL}[dtype]


def _largest_allocation(profiled: profile) -> int:
    """Return the largest sum of what the allocator of the CPU gave during the step, more than at its beginning."""
    found = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = [each for each in found if each.name() == "[memory]"]
    now = largest = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        largest = max(largest, now)
    return largest


@final
class WitnessHook(Hook):
    """Measures steps of a run, after two steps that are not measured.

    Args:
        accumulation: the number of iterations of a step.

    Attributes:
        found: the measurements.
    """

    priority = Priority.LOWEST
    STEPS: Final = 7

    def __init__(self, accumulation: int = 1) -> None:
        self.accumulation = accumulation
        self.found: Measurement = {}
        self._exit = ExitStack()
        self._iteration = 0
        self._mode: Allocations | None = None
        self._unknown: list[weakref.ref[torch.UntypedStorage]] = []

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        step, micro_batch = divmod(self._iteration, self.accumulation)
        if self._mode is not None:
            self._mode.begin_micro_batch()
        if micro_batch == 0 and step >= 2:
            # The second measurement of allocations knows which storages existed.
            measure = (self._allocations, self._allocations, self._profile, self._flops, self._updates)[step - 2]
            measure(run, data_batch)

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._iteration += 1
        if self._iteration % self.accumulation == 0:
            self._exit.close()
        if self._iteration == self.STEPS * self.accumulation:
            self._static(run, data_batch)

    def _allocations(self, run: Any, batch: Any) -> None:
        model = run.strategy.unwrap_model()
        mode = Allocations([storage for each in self._unknown if (storage := each()) is not None])
        mode.begin([*_tensors(batch), *model.parameters(), *model.buffers(), *_state_of(run), *_staging_of(run)], model)
        self._mode = mode

        def end() -> None:
            self._mode = None
            self._unknown = mode.unknown
            self.found |= {"peak": mode.peak, "activations": mode.at_backward, "existing": mode.existing}

        self._exit.callback(end)
        self._exit.enter_context(mode)

    def _profile(self, run: Any, batch: Any) -> None:
        profiled = profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True, acc_events=True)

        def end() -> None:
            self.found |= {
                "collectives": _collectives(profiled),
                "allocator_peak": self.found["existing"] + _largest_allocation(profiled),
            }

        self._exit.callback(end)
        self._exit.enter_context(profiled)

    def _flops(self, run: Any, batch: Any) -> None:
        counter = Operations()
        self._exit.callback(lambda: self.found.update(flops=counter.total))
        self._exit.enter_context(counter)

    def _updates(self, run: Any, batch: Any) -> None:
        updates = Updates(run.strategy)
        self._exit.callback(lambda: self.found.update(updates.sizes()))
        self._exit.enter_context(updates)

    def _static(self, run: Any, batch: Any) -> None:
        averages = [each for hook in run.events.hooks if type(hook).__name__ == "EMAHook" for each in _averages(hook)]
        self.found |= {"ema": bytes_of(averages), "batch": bytes_of(_tensors(batch))}


def _averages(hook: Any) -> list[Tensor]:
    return list(hook.average.averages.values())


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]


def _state_of(run: Any) -> list[Tensor]:
    states = [dict(wrapper.optimizer.state) for wrapper in run.strategy.optim_wrapper.each().values()]
    return [each for each in _tensors(states) if not isinstance(each, nn.Parameter)]


def _staging_of(run: Any) -> list[Tensor]:
    """Return the buffers of an optimizer that DeepSpeed offloads; a step without accumulation leaves them unused."""
    names = ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload")
    optimizers = [
        getattr(getattr(wrapper, "engine", None), "optimizer", None)
        for wrapper in run.strategy.optim_wrapper.each().values()
    ]
    return _tensors([getattr(each, name, None) for each in optimizers for name in names])
