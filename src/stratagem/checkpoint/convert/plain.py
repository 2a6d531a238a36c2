"""Write the weights of the user's own module as a plain state dict, without the names of the modules around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from stratagem.checkpoint.api import get_model_state
from stratagem.checkpoint.convert.convert import open_checkpoint
from stratagem.checkpoint.errors import save_error
from stratagem.checkpoint.formats.choice import SINGLE_FILES
from stratagem.checkpoint.frozen_weights import omitted_digests
from stratagem.checkpoint.tree.evaluated import evaluated_weights, has_averaged_weights
from stratagem.checkpoint.tree.names import possible_names
from stratagem.errors import CheckpointError
from stratagem.storage import atomic_file
from stratagem.utils import absolute, did_you_mean

__all__ = ["PlainStateDict", "export_state_dict"]

# The names of the user's module in SupervisedModel and ModelWithLoss, and of their other modules.
_NETWORK: Final = "network"
_OTHERS: Final = ("loss", "data_preprocessor")
# The module that stands for the whole model.
_WHOLE: Final = "."


@final
@dataclass(frozen=True, slots=True)
class PlainStateDict:
    """What :func:`export_state_dict` wrote.

    Attributes:
        module: the name of the module in the trained model; "." for the whole model.
        keys: the number of keys.
        left_out: the keys of the checkpoint's weights that belong to other modules.
        averaged: whether the weights are the averaged weights.
        omitted: the number of frozen parameters that the checkpoint itself omits.
    """

    module: str
    keys: int
    left_out: list[str]
    averaged: bool
    omitted: int


def export_state_dict(
    source: str | Path, target: str | Path, *, module: str | None = None, raw: bool = False
) -> PlainStateDict:
    """Write the weights of a module, for ``module.load_state_dict(torch.load(target, weights_only=True))``.

    Args:
        source: the checkpoint to read, a path or a URL, saved under any strategy.
        target: the file to write (.pth or .pt); it must not exist.
        module: the name of the module in the trained model, or "." for the whole model. By default, ``network`` if all weights
            belong to it, except those of ``loss`` and ``data_preprocessor``, and otherwise the whole model.
        raw: whether to write the trained weights even if the run averaged its weights.

    Raises:
        CheckpointError: if ``target`` exists or has another suffix, or the checkpoint has no weights of ``module``.
    """
    path = absolute(target)
    if path.suffix not in SINGLE_FILES:
        raise CheckpointError(f"A state dict is one file, but {target} does not end in {' or '.join(SINGLE_FILES)}.")
    if path.exists():
        raise CheckpointError(f"{path} already exists. Choose a different target, or remove it first.")
    with open_checkpoint(source) as tree:
        averaged = has_averaged_weights(tree) and not raw
        state = get_model_state(tree, source)
        weights = _unwrapped(evaluated_weights(tree, state) if averaged else state)
        chosen = _default(weights) if module is None else module
        kept = weights if chosen == _WHOLE else _below(weights, chosen)
        try:
            with atomic_file(path) as temporary:
                torch.save(_copied(kept), temporary)
                _require_readable(temporary, path)
        except OSError as error:
            raise save_error(path, error) from error
        left_out = [] if chosen == _WHOLE else [key for key in weights if not key.startswith(f"{chosen}.")]
        return PlainStateDict(chosen, len(kept), left_out, averaged, len(omitted_digests(tree)))


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the names of compilers and other wrappers, which checkpoints of other tools may contain."""
    names = {key: next(possible_names(key)) for key in state}
    return (
        {names[key]: value for key, value in state.items()} if len(set(names.values())) == len(names) else dict(state)
    )


def _default(weights: Mapping[str, Any]) -> str:
    parts = {key.partition(".")[0] for key in weights}
    return _NETWORK if _NETWORK in parts and parts <= {_NETWORK, *_OTHERS} and _NETWORK not in weights else _WHOLE


def _below(weights: Mapping[str, Any], module: str) -> dict[str, Any]:
    found = {key.removeprefix(f"{module}."): value for key, value in weights.items() if key.startswith(f"{module}.")}
    if not found:
        modules = {key.rpartition(".")[0] for key in weights} - {""}
        modules |= {name.partition(".")[0] for name in modules}
        raise CheckpointError(
            f"The checkpoint has no weights of the module {module!r}. {did_you_mean(module, sorted(modules))}"
        )
    return found


def _copied(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Copy views, since ``torch.save`` writes the whole storage of a tensor. Tied weights stay tied."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    result: dict[str, Any] = {}
    for name, value in weights.items():
        result[name] = value
        if isinstance(value, Tensor):
            place = (value.data_ptr() or id(value), value.dtype, tuple(value.shape), value.stride())
            if place not in copies:
                copies[place] = value.detach().clone()
            result[name] = copies[place]
    return result


def _require_readable(file: Path, target: Path) -> None:
    try:
        torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # torch raises several types
        raise CheckpointError(
            f"torch.load(weights_only=True) rejects the state dict, so {target} was not written. A module stores an object other "
            f"than tensors and plain values (get_extra_state). Select another module with --module. {error}"
        ) from error
