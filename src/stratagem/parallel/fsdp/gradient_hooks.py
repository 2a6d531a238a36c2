"""Keep or refuse hooks on the gradients of parameters, which FSDP replaces with shards."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from stratagem.errors import PlacementError
from stratagem.parallel.gradient_hooks import refuse_gradient_hooks
from stratagem.tensors.dtensor import is_sharded
from stratagem.utils.names import some_names
from stratagem.utils.torch_private import copy_gradient_hooks, gradient_hooks

__all__ = ["keep_gradient_hooks", "require_no_gradient_hooks"]

_INSTEAD = (
    "FSDP replaces parameters with shards, whose gradients it computes itself, so torch never calls such a hook. Use "
    "register_post_accumulate_grad_hook, which is called with the reduced gradient of the shard, or keep the parameter whole "
    "by listing it in ignored."
)


def require_no_gradient_hooks(model: nn.Module, whole: Mapping[str, nn.Parameter]) -> None:
    """Require that no parameter that will be sharded has a hook from ``register_hook``.

    Args:
        model: the model, before it is sharded.
        whole: the parameters that will not be sharded.

    Raises:
        PlacementError: if one has such a hook.
    """
    names = [name for name, each in model.named_parameters() if name not in whole and gradient_hooks(each)[0]]
    if names:
        raise PlacementError(f"register_hook was called on {some_names(names)}. {_INSTEAD}")


def keep_gradient_hooks(before: Mapping[str, nn.Parameter], model: nn.Module, logger: logging.Logger) -> None:
    """Add the hooks of the original parameters to the placed ones, and refuse ``register_hook`` of sharded ones.

    Args:
        before: the original parameters.
        model: the placed model.
        logger: logs which hooks are called with shards.
    """
    on_shards = []
    for name, parameter in model.named_parameters():
        original = before.get(name)
        if original is not None and original is not parameter and any(gradient_hooks(original)):
            copy_gradient_hooks(original, parameter)
            on_shards += [name] if is_sharded(parameter) else []
        if is_sharded(parameter):
            refuse_gradient_hooks({name: parameter}, ["register_hook"], _INSTEAD)
    if on_shards:
        logger.info(
            "The hooks from register_post_accumulate_grad_hook on %s are called with the shard of this rank, after the "
            "gradients of an accumulation window were reduced.", some_names(on_shards),
        )  # fmt: skip
