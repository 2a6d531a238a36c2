"""Stand-ins for ColossalAI's tensor-parallel layers: shards of linear layers, which note what the real ones send."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, final

from torch import Tensor, nn
from torch.nn import functional

from stratagem.errors import ConfigValueError, PlacementError
from stratagem.parallel.wrap_policy import matches_name
from stratagem.utils import did_you_mean

__all__ = ["shard_linear_layers"]

# Is called with the bytes of an all-reduce in the tensor-parallel group.
Note = Callable[[int], None]
_STYLES: Final = ("colwise", "rowwise")


@final
class _Columns(nn.Linear):
    """Has some of the outputs; the gradient of the input is summed over the ranks."""

    note: Note

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- the name in torch
        if input.requires_grad:
            input.register_hook(self._sum)
        return super().forward(input)

    def _sum(self, gradient: Tensor) -> None:
        self.note(gradient.nbytes)


@final
class _Rows(nn.Linear):
    """Reads some of the inputs; the outputs are summed over the ranks before the bias is added."""

    note: Note

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- the name in torch
        output = functional.linear(input, self.weight)
        self.note(output.nbytes)
        return output if self.bias is None else output + self.bias


def shard_linear_layers(model: nn.Module, ranks: int, note: Note) -> None:
    """Replace the linear layers of the attribute ``tp_plan`` of a model by their shards on the meta device.

    Raises:
        ConfigValueError: if a pattern of the plan matches no module.
        PlacementError: if a layer cannot be sharded, or the model has no ``tp_plan``.
    """
    plan: Mapping[str, str] | None = getattr(model, "tp_plan", None)
    if not plan:
        raise PlacementError(
            f"plugin: tp_size={ranks} is planned for the layers in the attribute 'tp_plan' of the model, and "
            f"{type(model).__name__} has none. Define it, such as {{'blocks.*.up': 'colwise', 'blocks.*.down': 'rowwise'}}, or "
            "plan FSDPStrategy(tp=...)."
        )
    named = dict(model.named_modules())
    for pattern, style in plan.items():
        found = [name for name in named if matches_name(name, pattern)]
        if not found:
            raise ConfigValueError(f"tp_plan: no module matches {pattern!r}. {did_you_mean(pattern, named)}")
        for name in found:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _shard(name, named[name], style, ranks, note))


def _shard(name: str, layer: nn.Module, style: str, ranks: int, note: Note) -> nn.Module:
    if style not in _STYLES or not isinstance(layer, nn.Linear):
        raise PlacementError(
            f"tp_plan: {name} is a {type(layer).__name__} with style {style!r}, but ColossalAI's linear layers only support "
            "'colwise' and 'rowwise'. Use FSDPStrategy(tp=...), or set custom_policy."
        )
    size = layer.out_features if style == "colwise" else layer.in_features
    if size % ranks:
        raise PlacementError(
            f"tp_plan: {name} has {size} {'outputs' if style == 'colwise' else 'inputs'}, which tp_size={ranks} does not divide."
        )
    kind = _Columns if style == "colwise" else _Rows
    shape = (size // ranks, layer.in_features) if style == "colwise" else (layer.out_features, size // ranks)
    made = kind(shape[1], shape[0], bias=layer.bias is not None, device="meta", dtype=layer.weight.dtype)
    made.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None:
        made.bias.requires_grad_(layer.bias.requires_grad)
    made.note = note
    return made.train(layer.training)
