"""Activation checkpointing: recompute activations in the backward pass instead of storing them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from stratagem.errors import ConfigTypeError, ConfigValueError, PlacementError
from stratagem.model.recomputation import BufferReplay, Contexts
from stratagem.parallel.wrap_policy import check_policy, select_modules
from stratagem.utils.names import did_you_mean, refuse_unknown, some_names
from stratagem.utils.torch_private import checkpoint_module

__all__ = ["checkpoint_activations", "log_checkpointed", "parse_checkpointing", "refuse_compiled"]

_KEYS: Final = ("policy", "save_ops", "preserve_rng_state")
_WHAT: Final = "activation_checkpointing"
# Operators that are expensive to recompute, compared to the memory that their results occupy.
_COSTLY: Final = (
    "mm",
    "bmm",
    "addmm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
)


def checkpoint_activations(model: nn.Module, options: Any, default_policy: Any = None) -> list[str]:
    """Make submodules of ``model`` store only their inputs for the backward pass. Return their names.

    Buffers are updated once per forward pass, and the recomputation uses the values that they had before it.

    Args:
        model: modified in place; the names of its parameters do not change.
        options: True for the modules that ``default_policy`` selects; a policy for
            :func:`~stratagem.parallel.wrap_policy.select_modules`; or a mapping with ``policy`` and

            - ``save_ops``: operators whose results are still stored: names such as ``"mm"``, or ``"costly"`` for
              matrix multiplications and attention;
            - ``preserve_rng_state``: whether dropout draws the same random numbers when it is recomputed (default True).
        default_policy: the policy for True; by default, the items of every ``ModuleList``.

    Raises:
        ConfigKeyError: if an option is unknown.
        ConfigValueError: if the policy selects no module, or an operator does not exist.
    """
    arguments = parse_checkpointing(options)
    if arguments is None:
        return []
    policy = arguments.get("policy", True)
    chosen = select_modules(model, default_policy if policy is True else policy, _WHAT)
    if not chosen:
        raise ConfigValueError(
            f"{_WHAT}={options!r} selects no module of {type(model).__name__}. Name the modules whose activations are computed "
            f"again, as in {_WHAT}=dict(policy=['Block']) with the name of a class."
        )
    selective: Callable[[], Contexts] | None = None
    if arguments.get("save_ops") is not None:
        selective = functools.partial(create_selective_checkpoint_contexts, _saving(_operators(arguments["save_ops"])))
    for module in dict.fromkeys(chosen.values()):
        contexts = BufferReplay(module, selective).contexts if any(True for _ in module.buffers()) else selective
        checkpoint_module(
            module,
            preserve_rng_state=bool(arguments.get("preserve_rng_state", True)),
            **({} if contexts is None else {"context_fn": contexts}),
        )
    return list(chosen)


def refuse_compiled(options: Any, compile_options: Mapping[str, Any] | None) -> None:
    """Require that a whole model with checkpoints is not compiled, because torch's compiler does not trace its hooks.

    Raises:
        PlacementError: if the options request both.
    """
    if compile_options is not None and parse_checkpointing(options) is not None:
        raise PlacementError(
            f"{_WHAT}={options!r} cannot be combined with compile, because torch.compile cannot trace the hooks that compute "
            "activations again: the model would be split at each of them, or the recomputation would differ. Omit one of them, "
            "or call torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) in the forward method of the model, which "
            "the compiler supports."
        )


def log_checkpointed(logger: logging.Logger, names: Sequence[str]) -> None:
    """Log which modules compute their activations again, if there are any."""
    if names:
        logger.info(
            "Activation checkpointing: %d modules store only their inputs and compute their activations again in the backward "
            "pass: %s.", len(names), some_names(names),
        )  # fmt: skip


def parse_checkpointing(options: Any) -> dict[str, Any] | None:
    """Return ``policy``, ``save_ops`` and ``preserve_rng_state`` as specified by the options; None for no checkpointing.

    Raises:
        ConfigKeyError: if an option is unknown.
        ConfigTypeError: if the policy or ``save_ops`` has the wrong type.
        ConfigValueError: if an operator does not exist.
    """
    if options is None or options is False:
        return None
    arguments = dict(options) if isinstance(options, Mapping) and set(options) & set(_KEYS) else {"policy": options}
    refuse_unknown(arguments, _KEYS, _WHAT)
    if arguments.get("policy", True) is not True:
        check_policy(arguments["policy"], _WHAT)
    if arguments.get("save_ops") is not None:
        _operators(arguments["save_ops"])
    return arguments


def _operators(save_ops: str | Iterable[str]) -> frozenset[Any]:
    if save_ops == "costly":
        save_ops = [name for name in _COSTLY if hasattr(torch.ops.aten, name)]
    if isinstance(save_ops, str) or not isinstance(save_ops, Iterable):
        raise ConfigTypeError(f"{_WHAT}: save_ops must be a list of operator names or 'costly', got {save_ops!r}.")
    found = []
    for name in save_ops:
        packet = getattr(torch.ops.aten, name.removeprefix("aten."), None) if isinstance(name, str) else None
        if packet is None:
            raise ConfigValueError(f"{_WHAT}: unknown operator {name!r}. {did_you_mean(str(name), _COSTLY)}")
        found += [getattr(packet, overload) for overload in packet.overloads()]
    return frozenset(found)


def _saving(operators: frozenset[Any]) -> Callable[..., CheckpointPolicy]:
    def policy(_: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in operators else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
