"""Compute activations anew in the backward pass instead of keeping them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.parallel.fsdp.wrap_policy import select_modules
from stratagem.utils.imports import import_object
from stratagem.utils.names import did_you_mean, refuse_unknown

__all__ = ["checkpoint_activations"]

_KEYS: Final = ("policy", "save_ops", "preserve_rng_state")
_WHAT: Final = "activation_checkpointing"
# Their results take long to compute for the memory that they take.
_COSTLY: Final = (
    "mm",
    "bmm",
    "addmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
)


def checkpoint_activations(model: nn.Module, options: Any, default_policy: Any) -> list[str]:
    """Make modules inside of ``model`` keep only their inputs; returns their names.

    Args:
        model: is changed; its names stay as they are.
        options: True for the modules that ``default_policy`` chooses; a policy of
            :func:`~stratagem.parallel.fsdp.wrap_policy.select_modules`; or a mapping with ``policy`` and

            - ``save_ops``: results of these operators are kept all the same: names such as ``"mm"``, or ``"costly"`` for
              matrix products and attention;
            - ``preserve_rng_state``: whether dropout draws the same again (True).
        default_policy: the policy by which the model is wrapped.

    Raises:
        ConfigKeyError: if an option is unknown.
        ConfigValueError: if the policy chooses nothing, or there is no such operator.
    """
    if options is None or options is False:
        return []
    arguments = dict(options) if isinstance(options, Mapping) and set(options) & set(_KEYS) else {"policy": options}
    refuse_unknown(arguments, _KEYS, _WHAT)
    policy = arguments.get("policy", True)
    chosen = select_modules(model, default_policy if policy is True else policy, _WHAT)
    if not chosen:
        raise ConfigValueError(f"{_WHAT}: nothing is wrapped, so there is nothing to checkpoint. Give it a policy.")
    contexts: dict[str, Any] = {}
    if arguments.get("save_ops") is not None:
        contexts["context_fn"] = functools.partial(
            create_selective_checkpoint_contexts, _keeping(_operators(arguments["save_ops"]))
        )
    checkpoint = import_object("torch.distributed._composable.checkpoint_activation:checkpoint")
    for module in dict.fromkeys(chosen.values()):
        checkpoint(module, preserve_rng_state=bool(arguments.get("preserve_rng_state", True)), **contexts)
    return list(chosen)


def _operators(save_ops: str | Iterable[str]) -> frozenset[Any]:
    if save_ops == "costly":
        save_ops = [name for name in _COSTLY if hasattr(torch.ops.aten, name)]
    if isinstance(save_ops, str) or not isinstance(save_ops, Iterable):
        raise ConfigTypeError(f"{_WHAT}: save_ops is {save_ops!r}; a list of names of operators, or 'costly', is due.")
    found = []
    for name in save_ops:
        packet = getattr(torch.ops.aten, name.removeprefix("aten."), None) if isinstance(name, str) else None
        if packet is None:
            raise ConfigValueError(f"{_WHAT}: there is no operator {name!r}. {did_you_mean(str(name), _COSTLY)}")
        found += [getattr(packet, overload) for overload in packet.overloads()]
    return frozenset(found)


def _keeping(operators: frozenset[Any]) -> Callable[..., CheckpointPolicy]:
    def policy(_: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in operators else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
