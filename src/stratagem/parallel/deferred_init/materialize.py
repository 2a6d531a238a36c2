"""Initialize the shards of a model with the same values that a single process would compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal, final

import torch
from torch import Tensor, nn

from stratagem.distributed import World, all_gather_object, broadcast, broadcast_object
from stratagem.errors import PlacementError
from stratagem.parallel.deferred_init.recorder import OpRecorder
from stratagem.tensors.dtensor import copy_into, local_box, to_local

__all__ = [
    "CHUNK_BYTES",
    "INIT_SOURCES",
    "InitSource",
    "InitialWeights",
    "make_contiguous",
    "move_to_meta",
    "named_tensors",
    "require_same_model",
]

InitSource = Literal["rank0", "per_rank", "whole"]
INIT_SOURCES: Final[tuple[InitSource, ...]] = ("rank0", "per_rank", "whole")

# The size of a broadcast: large enough to be efficient, but small compared to a model that requires sharding.
CHUNK_BYTES: Final = 32 * 2**20


@final
class InitialWeights:
    """Builds a model on the meta device, and computes its initial values in its shards.

    Values are computed tensor by tensor, in the order in which the model initializes them and with the random numbers of a
    single process. No process ever holds the whole model, except with ``"whole"``.

    Args:
        world: the ranks and the device of this process.
        source: the ranks that compute the values. ``"rank0"``: rank 0 broadcasts them in chunks. ``"per_rank"``: every
            rank computes all values and keeps its shard, without communication. ``"whole"``: every process builds the
            whole model directly, and rank 0 broadcasts its values; for models whose constructors read tensor values.
    """

    def __init__(self, world: World, source: InitSource) -> None:
        self._world = world
        self._source = source
        self._recorder = OpRecorder()
        self._detached: dict[str, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside the ``with`` block, record how a model is built or initialized instead of allocating memory.

        Raises:
            PlacementError: if the model reads values of tensors, which meta tensors do not have.
        """
        if self._source == "whole":
            yield
            return
        try:
            with self._recorder.recording():
                yield
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error).lower():
                raise
            raise PlacementError(
                f"The model cannot be built on the meta device: {error}\nFSDPStrategy builds models on torch's meta "
                "device, where tensors have no values. Use initial_weights='whole' to build the whole model in each "
                "process, if it fits in memory."
            ) from error

    def initialize(self, model: nn.Module, init: Callable[[nn.Module], object]) -> None:
        """Call ``reset_parameters()`` on modules on the meta device that are not initialized yet, and then ``init(model)``."""
        if not any(tensor.is_meta for tensor in model.parameters()):
            init(model)
            return
        with self.recording():
            for module in model.modules():
                reset = getattr(module, "reset_parameters", None)
                own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_meta]
                if callable(reset) and not all(map(self._recorder.is_written, own)):
                    reset()
            init(model)

    def detach_storage(self, model: nn.Module) -> dict[str, Tensor]:
        """Move the model to the meta device and keep its current values; shared tensors stay shared.

        Returns a mapping from names to meta tensors, to pass to :meth:`materialize_into`.
        """
        self._detached = move_to_meta(model)
        # Return detached tensors, because memory may later be allocated for the model's own tensors in place.
        return {name: tensor.detach() for name, tensor in named_tensors(model).items()}

    def materialize_into(self, model: nn.Module, metas: Mapping[str, Tensor], *, parameters: bool = True) -> None:
        """Write the initial values into the placed model. Collective.

        Args:
            model: the placed model, with memory allocated for its shards.
            metas: the meta tensors that :meth:`detach_storage` returned.
            parameters: whether to initialize parameters and buffers, or only buffers.

        Raises:
            PlacementError: if the model does not initialize a tensor.
        """
        targets = {
            name: tensor
            for name, tensor in named_tensors(model).items()
            if parameters or not isinstance(tensor, nn.Parameter)
        }
        self._require_written(targets, metas)
        for name in broadcast_object([name for name in targets if name in self._detached]):
            _receive(targets[name], self._detached.pop(name) if self._world.is_main else None, self._world.device)
        self._detached.clear()
        names_of = {id(tensor): name for name, tensor in metas.items() if name in targets and tensor.is_meta}
        wanted = [metas[name] for name in names_of.values() if self._recorder.is_written(metas[name])]
        if self._source == "per_rank":
            for tensor, values in self._recorder.materialize(wanted, uses_rng=parameters):
                copy_into(targets[names_of[id(tensor)]], values)
            return
        order = self._recorder.materialization_order(wanted, uses_rng=parameters)
        names = broadcast_object([names_of[id(tensor)] for tensor in order])
        is_main = self._world.is_main
        materialized = self._recorder.materialize(wanted if is_main else (), uses_rng=parameters and is_main)
        for name in names:
            _receive(targets[name], next(materialized)[1] if is_main else None, self._world.device)
        # The remaining operations only advance the random generators.
        deque(materialized, maxlen=0)

    def _require_written(self, targets: Mapping[str, Tensor], metas: Mapping[str, Tensor]) -> None:
        empty = [name for name in targets if name not in self._detached and not self._recorder.is_written(metas[name])]
        empty = broadcast_object(empty)
        if empty:
            raise PlacementError(
                f"{len(empty)} tensors of the model are never initialized: {', '.join(empty[:5])}. Initialize them in "
                "the constructor or in init_weights(), or load a checkpoint with skip_init_weights=True."
            )


@torch.no_grad()
def _receive(target: Tensor, values: Tensor | None, device: torch.device) -> None:
    """Broadcast the values from rank 0 in chunks of rows; each rank keeps its shard. Collective.

    On an accelerator, its backend sends them, which is much faster than one for CPU tensors.

    Args:
        target: the tensor to write to, sharded or not.
        values: the full values on rank 0; None on other ranks.
        device: the device of this rank.
    """
    box = local_box(target)
    own = to_local(target).view(-1) if target.ndim == 0 else to_local(target)
    box = box or (slice(0, 1),)
    shape = tuple(target.shape) or (1,)
    row_bytes = max(1, target.dtype.itemsize * target.numel() // max(1, shape[0]))
    rows = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        if values is None:
            chunk = torch.empty((stop - start, *shape[1:]), dtype=target.dtype, device=device)
        else:
            chunk = values.reshape(shape)[start:stop].to(device).resolve_conj().resolve_neg().contiguous()
        # As bytes, because NCCL does not support all dtypes.
        broadcast(chunk.view(-1).view(torch.uint8))
        first, last = max(start, box[0].start), min(stop, box[0].stop)
        if first < last:
            wanted = (slice(first - start, last - start), *box[1:])
            own[first - box[0].start : last - box[0].start].copy_(chunk[wanted])


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, including non-persistent buffers, each under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def move_to_meta(model: nn.Module) -> dict[str, Tensor]:
    """Replace each tensor of a model with a meta tensor of the same shape; return the original tensors, keyed by name."""
    originals = {name: tensor for name, tensor in named_tensors(model).items() if not tensor.is_meta}
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not tensor.is_meta:
                    if id(tensor) not in replaced:
                        replaced[id(tensor)] = _meta_like(tensor)
                    tensors[name] = replaced[id(tensor)]  # type: ignore[assignment]  # a parameter for a parameter
    return originals


def make_contiguous(model: nn.Module) -> list[str]:
    """Replace parameters on the meta device that have another memory format, such as channels last; return their names."""
    names = [name for name, parameter in model.named_parameters() if not parameter.is_contiguous()]
    replaced: dict[int, Tensor] = {}
    for module in model.modules() if names else ():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_contiguous():
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = _meta_like(parameter, torch.contiguous_format)
                module._parameters[name] = replaced[id(parameter)]  # type: ignore[assignment]  # a parameter
    return names


def _meta_like(tensor: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", memory_format=memory_format)
    if not isinstance(tensor, nn.Parameter):
        return empty
    parameter = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))
    return parameter


def require_same_model(model: nn.Module) -> None:
    """Require that all ranks have built the same model. Collective.

    Raises:
        PlacementError: on every rank, if names, shapes, dtypes or ``requires_grad`` differ.
    """
    own = {
        name: (tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
        for name, tensor in named_tensors(model).items()
    }
    by_rank = all_gather_object(own)
    for rank, there in enumerate(by_rank):
        differing = [name for name in {**by_rank[0], **there} if by_rank[0].get(name) != there.get(name)]
        if differing:
            name = differing[0]
            raise PlacementError(
                f"The model differs between ranks in {len(differing)} tensors: {name!r} is {_shown(by_rank[0].get(name))} on "
                f"rank 0 and {_shown(there.get(name))} on rank {rank}. Build the same model on every rank."
            )


def _shown(properties: tuple[tuple[int, ...], str, bool] | None) -> str:
    if properties is None:
        return "missing"
    shape, dtype, is_trainable = properties
    return f"{dtype} of shape {list(shape)}{'' if is_trainable else ', frozen'}"
