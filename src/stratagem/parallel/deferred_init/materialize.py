"""The initial weights of a sharded model: those of a single process, of which each rank keeps its part."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal, final

import torch
from torch import Tensor, nn

from stratagem.distributed import World, all_gather_object, broadcast, broadcast_object
from stratagem.errors import PlacementError
from stratagem.parallel.deferred_init.recorder import Tape
from stratagem.tensors.dtensor import copy_into, local_box, local_part

__all__ = ["ORIGINS", "InitialWeights", "Origin", "named_tensors", "require_alike", "without_memory"]

Origin = Literal["rank0", "per_rank", "whole"]
ORIGINS: Final[tuple[Origin, ...]] = ("rank0", "per_rank", "whole")

# What is sent at once: enough to be quick, little beside any model that needs sharding.
_PIECE_BYTES: Final = 32 * 2**20


@final
class InitialWeights:
    """Builds a model without memory, and fills its shards with the values that one process would give it.

    Values are made tensor by tensor, in the order in which the model makes them, and with the random numbers of one
    process. So no process ever has the whole model.

    Args:
        world: this process.
        origin: who makes the values: ``"rank0"`` sends them to the others piece by piece; ``"per_rank"`` has every rank
            make all of them and keep its part, which sends nothing and costs each rank the time; ``"whole"`` builds the
            model as it is, whole in each process, for models that look at values while they are built, and sends rank
            0's.
    """

    def __init__(self, world: World, origin: Origin) -> None:
        self._world = world
        self._origin = origin
        self._tape = Tape()
        self._given: dict[str, Tensor] = {}

    @contextmanager
    def making(self) -> Iterator[None]:
        """Build a model, or let one draw its weights, for the length of a block.

        Raises:
            PlacementError: if that needs values of tensors, which are not there.
        """
        if self._origin == "whole":
            yield
            return
        try:
            with self._tape.recording():
                yield
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error).lower():
                raise
            raise PlacementError(
                f"The model cannot be built without memory: {error}\nA sharded model is built on torch's meta device, "
                "where tensors have no values to look at. Use initial_weights='whole', which builds it whole in each "
                "process, if it fits."
            ) from error

    def draw(self, model: nn.Module, init: Callable[[nn.Module], object]) -> None:
        """Let a model draw its weights by ``init``, and modules that were given without memory by themselves."""
        if not any(tensor.is_meta for tensor in model.parameters()):
            init(model)
            return
        with self.making():
            for module in model.modules():
                reset = getattr(module, "reset_parameters", None)
                own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_meta]
                if callable(reset) and not all(map(self._tape.is_written, own)):
                    reset()
            init(model)

    def take(self, model: nn.Module) -> dict[str, Tensor]:
        """Take its memory out of the model, shared tensors staying shared; returns what stands for its tensors, by name."""
        self._given = without_memory(model)
        # Not the tensors themselves: some of them are given memory in their place.
        return {name: tensor.detach() for name, tensor in named_tensors(model).items()}

    def fill(self, model: nn.Module, origins: Mapping[str, Tensor], *, parameters: bool = True) -> None:
        """Give the placed model its values. Collective.

        Args:
            model: has memory for its shards.
            origins: its tensors by name as :meth:`take` returned them.
            parameters: whether parameters are filled too, or buffers alone.

        Raises:
            PlacementError: if nothing in the model gives a tensor its values.
        """
        targets = {
            name: tensor
            for name, tensor in named_tensors(model).items()
            if parameters or not isinstance(tensor, nn.Parameter)
        }
        self._require_written(targets, origins)
        for name in broadcast_object([name for name in targets if name in self._given]):
            _receive(targets[name], self._given.pop(name) if self._world.is_main else None)
        self._given.clear()
        made = {id(tensor): name for name, tensor in origins.items() if name in targets and tensor.is_meta}
        wanted = [origins[name] for name in made.values() if self._tape.is_written(origins[name])]
        if self._origin == "per_rank":
            for tensor, values in self._tape.play(wanted, draws=parameters):
                copy_into(targets[made[id(tensor)]], values)
            return
        names = broadcast_object([made[id(tensor)] for tensor in self._tape.order(wanted, draws=parameters)])
        source = self._tape.play(wanted if self._world.is_main else (), draws=parameters and self._world.is_main)
        for name in names:
            _receive(targets[name], next(source)[1] if self._world.is_main else None)
        # Draws that no tensor needs, but the generator.
        deque(source, maxlen=0)

    def _require_written(self, targets: Mapping[str, Tensor], origins: Mapping[str, Tensor]) -> None:
        empty = [name for name in targets if name not in self._given and not self._tape.is_written(origins[name])]
        empty = broadcast_object(empty)
        if empty:
            raise PlacementError(
                f"Nothing gives {len(empty)} tensors of the model their initial values: {', '.join(empty[:5])}. Fill them "
                "where the model is built or in init_weights(), or load a checkpoint with skip_init_weights=True."
            )


@torch.no_grad()
def _receive(target: Tensor, values: Tensor | None) -> None:
    """Send rank 0's values to every rank, rows at a time; each keeps what is its own. Collective."""
    box = local_box(target)
    own = local_part(target).view(-1) if target.ndim == 0 else local_part(target)
    box = box or (slice(0, 1),)
    shape = tuple(target.shape) or (1,)
    row_bytes = max(1, target.dtype.itemsize * target.numel() // max(1, shape[0]))
    rows = max(1, _PIECE_BYTES // row_bytes)
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        if values is None:
            piece = torch.empty((stop - start, *shape[1:]), dtype=target.dtype)
        else:
            piece = values.reshape(shape)[start:stop].contiguous()
        broadcast(piece)
        first, last = max(start, box[0].start), min(stop, box[0].stop)
        if first < last:
            wanted = (slice(first - start, last - start), *box[1:])
            own[first - box[0].start : last - box[0].start].copy_(piece[wanted])


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, those included that a state dict leaves out, each under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def without_memory(model: nn.Module) -> dict[str, Tensor]:
    """Replace every tensor of a model by one of the same shape without memory; returns those that had some, by name."""
    given = {name: tensor for name, tensor in named_tensors(model).items() if not tensor.is_meta}
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not tensor.is_meta:
                    if id(tensor) not in replaced:
                        replaced[id(tensor)] = _like_without_memory(tensor)
                    tensors[name] = replaced[id(tensor)]  # type: ignore[assignment]  # a parameter for a parameter
    return given


def _like_without_memory(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if not isinstance(tensor, nn.Parameter):
        return empty
    parameter = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))
    return parameter


def require_alike(model: nn.Module) -> None:
    """Refuse a model that is not the same on every rank. Collective.

    Raises:
        PlacementError: on every rank, if names, shapes, types or what learns differ.
    """
    own = {
        name: (tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
        for name, tensor in named_tensors(model).items()
    }
    every = all_gather_object(own)
    for rank, there in enumerate(every):
        differing = [name for name in {**every[0], **there} if every[0].get(name) != there.get(name)]
        if differing:
            name = differing[0]
            raise PlacementError(
                f"The model differs between ranks in {len(differing)} tensors: {name!r} is {_shown(every[0].get(name))} on "
                f"rank 0 and {_shown(there.get(name))} on rank {rank}. Build the same model on every rank."
            )


def _shown(fact: tuple[tuple[int, ...], str, bool] | None) -> str:
    if fact is None:
        return "missing"
    shape, dtype, learns = fact
    return f"{dtype} of shape {list(shape)}{'' if learns else ', frozen'}"
