"""Record what each module of a model computes and saves in a forward and backward pass, with real or fake tensors."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from stratagem.planning.trace import storages_of
from stratagem.tensors.flops import FlopCounter
from stratagem.utils.torch_private import backward_pass_id

__all__ = ["ModuleRecord", "ModuleTrace"]


@final
@dataclass(slots=True)
class ModuleRecord:
    """What a module does in a forward pass, including its submodules.

    Attributes:
        calls: the number of calls.
        shapes: the shapes of the tensors that the first call returned.
        flops: the floating-point operations of all calls.
        activations: the bytes that all calls save for the backward pass.
        is_called: whether the module or one of its submodules was called.
    """

    calls: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()
    flops: int = 0
    activations: int = 0
    is_called: bool = False


@final
@dataclass(slots=True)
class ModuleTrace:
    """Observes the modules of a model inside its ``with`` block.

    A storage that is saved several times counts for the first module that saves it. Parameters, buffers and ``known`` tensors do
    not count.

    Args:
        model: the model.
        known: tensors that are not activations, such as the batch.
        simulated: whether the tensors are fake.

    Attributes:
        records: what each module does.
        forward_flops: the operations of the forward passes.
        activations: the bytes that the forward passes save.
        counter: the operations of the whole block.
    """

    model: nn.Module
    known: Iterable[Tensor] = ()
    simulated: bool = False
    records: dict[nn.Module, ModuleRecord] = field(default_factory=dict)
    forward_flops: int = 0
    activations: int = 0
    counter: FlopCounter = field(init=False)
    _stack: list[nn.Module] = field(default_factory=list)
    # The storages are kept, so that their addresses stay unique.
    _seen: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    _exit: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> ModuleTrace:
        self._seen = storages_of([*self.model.parameters(), *self.model.buffers(), *self.known])
        self.counter = FlopCounter(self._note_flops, simulated=self.simulated)
        for module in self.model.modules():
            self.records[module] = ModuleRecord()
            enter = module.register_forward_pre_hook(self._begin)
            leave = module.register_forward_hook(self._end, always_call=True)
            self._exit.callback(enter.remove)
            self._exit.callback(leave.remove)
        self._exit.enter_context(saved_tensors_hooks(self._note_saved, _unchanged))
        self._exit.enter_context(self.counter)
        return self

    def __exit__(self, *details: object) -> None:
        self._exit.close()
        self._seen = {}

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._stack.append(module)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and self._stack[-1] is module:
            self._stack.pop()
        if backward_pass_id() != -1:
            return
        record = self.records[module]
        record.calls += 1
        if record.calls == 1:
            record.shapes = tuple(tuple(each.shape) for each in tree_leaves(output) if isinstance(each, Tensor))

    def _note_flops(self, count: int) -> None:
        if backward_pass_id() == -1:
            self.forward_flops += count
            for record in map(self.records.__getitem__, dict.fromkeys(self._stack)):
                record.flops += count

    def _note_saved(self, tensor: Tensor) -> Tensor:
        for key, storage in storages_of([tensor]).items():
            if key not in self._seen and backward_pass_id() == -1:
                self._seen[key] = storage
                size = storage.nbytes()
                self.activations += size
                for record in map(self.records.__getitem__, dict.fromkeys(self._stack)):
                    record.activations += size
        return tensor


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
