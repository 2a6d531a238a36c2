"""Checkpoints without frozen parameters: which ones can be omitted, and whether a model has the omitted values."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, Final, final

from torch import Tensor, nn

from stratagem.distributed import SINGLE_PROCESS, RankGroup, all_gather_object
from stratagem.errors import CheckpointMismatchError
from stratagem.tensors.dtensor import full_tensor, is_sharded, to_local
from stratagem.trace.values import digest_of
from stratagem.utils import canonical_names, mask_text
from stratagem.utils.names import some_names

__all__ = ["OMITTED", "FrozenWeights", "omitted_digests", "require_omitted_weights"]

# The entry in `meta` of a checkpoint with the digests of the parameters that it omits, by name.
OMITTED: Final = "omitted_frozen"


def omitted_digests(checkpoint: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the digests of the frozen parameters that a checkpoint omits, by name; empty if it contains all parameters."""
    found = (checkpoint.get("meta") or {}).get(OMITTED)
    return found if isinstance(found, Mapping) else {}


def require_omitted_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    filename: str | os.PathLike[str],
    rank_group: RankGroup = SINGLE_PROCESS,
) -> None:
    """Require that a model has the values of the frozen parameters that a checkpoint omits. Collective.

    Raises:
        CheckpointMismatchError: if a value differs, or the model does not have a parameter.
    """
    saved = omitted_digests(checkpoint)
    if not saved:
        return
    own = {name: each for name, each in _named(model).items() if name in saved}
    digests = _digests(own, rank_group)
    different = [name for name in saved if digests.get(name) != saved[name]]
    if different:
        raise CheckpointMismatchError(
            f"{mask_text(os.fspath(filename))} omits {len(saved)} frozen parameters (save_frozen=False), and {len(different)} of "
            f"them have other values in this model than in the model that was saved: {some_names(different)}. Build the model "
            "with the same initial weights as when the checkpoint was saved: from the same files, or with the same seed."
        )


@final
class FrozenWeights:
    """Finds the parameters that a checkpoint can omit, because they have been frozen and unchanged since the model was built.

    Args:
        model: the unwrapped model, with its initial or pretrained weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._versions = {name: _version(each) for name, each in _named(model).items() if not each.requires_grad}
        self._digests: dict[str, str] = {}

    def find_omittable(
        self, model: nn.Module, unfrozen: Collection[nn.Parameter], rank_group: RankGroup
    ) -> dict[str, str]:
        """Return the digests of the parameters to omit, by name. Collective. Digests are computed once per parameter.

        Args:
            model: the unwrapped model.
            unfrozen: parameters that have been trainable for a while.
            rank_group: all ranks.
        """
        changed = {id(each) for each in unfrozen}
        named = _named(model)
        own = [
            name
            for name, version in self._versions.items()
            if not named[name].requires_grad and id(named[name]) not in changed and _version(named[name]) == version
        ]
        # A value may have changed on some ranks only.
        common = set.intersection(*map(set, all_gather_object(own)))
        names = [name for name in own if name in common]
        self._digests |= _digests({name: named[name] for name in names if name not in self._digests}, rank_group)
        return {name: self._digests[name] for name in names}


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters under the names that checkpoints use, tied ones under each of their names."""
    canonical = canonical_names(model)
    return {canonical(name): each for name, each in model.named_parameters(remove_duplicate=False)}


def _version(parameter: Tensor) -> tuple[int, int]:
    """Return a number that changes if the values of a parameter are changed in place, also in its local shard."""
    return parameter._version, to_local(parameter)._version


def _digests(parameters: Mapping[str, Tensor], rank_group: RankGroup) -> dict[str, str]:
    """Return the digests of whole parameters, which are gathered one at a time. Collective."""
    found: dict[str, str] = {}
    for name, parameter in parameters.items():
        whole = full_tensor(parameter.detach()) if is_sharded(parameter) else parameter.detach()
        if rank_group.is_rank0:
            found[name] = f"{str(whole.dtype).removeprefix('torch.')}{list(whole.shape)}:{digest_of(whole.cpu())}"
    return rank_group.run_on_rank0(lambda: found)
