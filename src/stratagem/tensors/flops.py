"""Count the floating-point operations that a training step executes, with real or fake tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from stratagem.utils.torch_private import backward_pass_id, observe_created_graphs

__all__ = ["FlopCounter", "FlopKind", "flops_of_call", "operand_dtype"]


class FlopKind(NamedTuple):
    """A kind of floating-point operations.

    Attributes:
        part: ``"model"`` for the forward and backward pass; ``"recomputation"`` for forward passes that activation checkpointing
            repeats during the backward pass; ``"update"`` for the optimizer.
        dtype: the dtype of the operands, such as ``"bfloat16"``.
        operation: ``"matmul"`` or ``"convolution"``.
    """

    part: str
    dtype: str
    operation: str


@final
class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention inside its ``with`` block.

    They are counted as by torch's ``FlopCounterMode``: a product of matrices with n x k and k x m elements has 2nkm operations.
    Nothing is computed differently. Of sharded tensors, the operations of this rank are counted. A forward pass is recognized as
    a repeated one if it runs, with gradients enabled, in a backward pass that does not create a graph.

    Args:
        on_count: called with each number of operations, while the operation that has them is on the stack.
        simulated: whether the step runs on fake tensors, which are otherwise not counted.

    Attributes:
        flops: the operations by kind.
    """

    def __init__(self, on_count: Callable[[int], None] | None = None, *, simulated: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.flops: Counter[FlopKind] = Counter()
        self._on_count = on_count
        self._is_simulated = simulated
        self._is_update = False
        # The number of backward passes in progress that create a graph, such as those of gradient penalties.
        self._creating_graphs = 0
        self._exit = ExitStack()

    @property
    def model(self) -> int:
        """The operations of the forward and backward pass."""
        return self._sum("model")

    @property
    def recomputation(self) -> int:
        """The operations of repeated forward passes."""
        return self._sum("recomputation")

    @property
    def update(self) -> int:
        """The operations of the optimizer, such as the products of matrices of Muon."""
        return self._sum("update")

    def _sum(self, part: str) -> int:
        return sum(count for kind, count in self.flops.items() if kind.part == part)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Count the operations in the ``with`` block as those of the optimizer."""
        before, self._is_update = self._is_update, True
        try:
            yield
        finally:
            self._is_update = before

    def __enter__(self) -> FlopCounter:
        self._exit.enter_context(observe_created_graphs(self._change_created_graphs))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._exit.close()

    def _change_created_graphs(self, change: int) -> None:
        self._creating_graphs += change

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            # Let DTensor compute with its local tensors first; this mode then sees these operations.
            return NotImplemented
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flops_of_call(func, args, kwargs, out)
        if count and (self._is_simulated or not _computes_shapes(args)):
            self.flops[FlopKind(self._part(), operand_dtype(args), _operation(func))] += count
            if self._on_count is not None:
                self._on_count(count)
        return out

    def _part(self) -> str:
        if self._is_update:
            return "update"
        in_backward = backward_pass_id() != -1
        return "recomputation" if in_backward and torch.is_grad_enabled() and not self._creating_graphs else "model"


def flops_of_call(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Return the floating-point operations of a call as torch counts them on GPUs.

    Torch has no formula for attention on the CPU, but for the same operation on GPUs.
    """
    packet = getattr(func, "_overloadpacket", None)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(each.shape for each in args[:3])))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(each.shape for each in args[:4])))
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


def _computes_shapes(args: Any) -> bool:
    """Return whether the operands have no values: DTensor runs operations on fake tensors to find the shapes of results."""
    return any(isinstance(each, FakeTensor) for each in tree_leaves(args))


def operand_dtype(args: Any) -> str:
    """Return the name of the dtype of the first tensor among the arguments of an operation; ``"float32"`` if there is none."""
    found = next((each.dtype for each in tree_leaves(args) if isinstance(each, Tensor)), torch.float32)
    return str(found).removeprefix("torch.")


def _operation(func: Any) -> str:
    return "convolution" if "conv" in func._overloadpacket.__name__ else "matmul"
