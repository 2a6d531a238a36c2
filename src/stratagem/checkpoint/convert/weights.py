"""Load the weights of a checkpoint that an export contains."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from stratagem.checkpoint.api import get_model_state
from stratagem.checkpoint.convert.convert import open_checkpoint
from stratagem.checkpoint.frozen_weights import omitted_digests, require_omitted_weights
from stratagem.checkpoint.tree.evaluated import evaluated_weights, has_averaged_weights
from stratagem.checkpoint.tree.load import load_state_dict

__all__ = ["load_exported_weights"]


def load_exported_weights(model: nn.Module, source: str | Path, *, raw: bool) -> bool:
    """Load the weights of a checkpoint strictly; return whether they are the averaged weights.

    Args:
        model: the model, whose weights are replaced.
        source: the checkpoint, a path or a URL, saved under any strategy.
        raw: whether to load the trained weights even if the run averaged its weights.

    Raises:
        CheckpointError: if the checkpoint does not match the model, or omits frozen weights that have other values in it.
    """
    with open_checkpoint(source) as tree:
        state = get_model_state(tree, source)
        require_omitted_weights(model, tree, source)
        allowed = [re.escape(name) for name in omitted_digests(tree)]
        averaged = has_averaged_weights(tree) and not raw
        load_state_dict(
            model, evaluated_weights(tree, state) if averaged else state, strict=True, allow_missing=allowed
        )
    return averaged
