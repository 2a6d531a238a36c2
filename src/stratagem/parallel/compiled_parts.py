"""Find the parts of a model that ``torch.compile`` compiled."""

from __future__ import annotations

from torch import nn

from stratagem.utils.torch_private import CALL_ATTRIBUTE

__all__ = ["has_compiled_parts"]

# The attribute of a compiled function that contains the original.
_ORIGINAL = "_torchdynamo_orig_callable"


def has_compiled_parts(model: nn.Module) -> bool:
    """Return whether a module of a model, or a method that is stored on one, is compiled, with any backend."""
    for module in model.modules():
        attributes = vars(module)
        if attributes.get(CALL_ATTRIBUTE) is not None:
            return True
        if any(_ORIGINAL in getattr(value, "__dict__", ()) for value in attributes.values() if callable(value)):
            return True
    return False
