"""Translate the options of MMEngine's ``FSDPStrategy``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.utils import did_you_mean

__all__ = ["from_model_wrapper", "state_of"]

_TYPES: Final = ("MMFullyShardedDataParallel", "FullyShardedDataParallel")
_SAME: Final = {"mixed_precision": "mixed_precision", "ignored_modules": "ignored", "ignored_parameters": "ignored"}
_SHARDING: Final = {"FULL_SHARD": None, "SHARD_GRAD_OP": False}
# MMEngine options that cannot be changed in this FSDPStrategy, each with the only value that is accepted.
_ALWAYS: Final = {
    "use_orig_params": True,
    "backward_prefetch": "BACKWARD_PRE",
    "sync_module_states": True,
    "limit_all_gathers": True,
    "forward_prefetch": False,
}
_REPLACED: Final = {
    "process_group": "device meshes are configured with replicate=... and tp=...",
    "device_mesh": "device meshes are configured with replicate=... and tp=...",
    "param_init_fn": "the model initializes its own weights; see initial_weights=...",
    "device_id": "each process uses the device of its local rank",
    **{name: f"FSDPStrategy always uses {name}={value!r}" for name, value in _ALWAYS.items()},
}
_POLICIES: Final[Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "size_based_auto_wrap_policy": lambda options: {"min_params": int(options.get("min_num_params", 100_000_000))},
    "transformer_auto_wrap_policy": lambda options: {"classes": sorted(options["transformer_layer_cls"], key=str)},
    "ModuleWrapPolicy": lambda options: {"classes": sorted(options["module_classes"], key=str)},
}
_KNOWN: Final = ("auto_wrap_policy", "sharding_strategy", "cpu_offload", *_SAME, *_ALWAYS)


def from_model_wrapper(model_wrapper: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` updated with the options in ``model_wrapper``, which use MMEngine's names.

    Raises:
        ConfigTypeError: if ``model_wrapper`` is not a mapping.
        ConfigKeyError: if an option has no equivalent; the message names the alternative.
        ConfigValueError: if a value has no equivalent, or an option is specified under both names.
    """
    if not isinstance(model_wrapper, Mapping):
        raise ConfigTypeError(
            f"model_wrapper must be a mapping of MMFullyShardedDataParallel options, or omitted, got {model_wrapper!r}."
        )
    translated: dict[str, Any] = {}
    for name, value in model_wrapper.items():
        translated.update(_translate(name, value))
    for name in translated:
        if options[name] not in (None, False, ()):
            raise ConfigValueError(
                f"model_wrapper and {name}={options[name]!r} specify the same option. Specify only {name}."
            )
    return {**options, **translated}


def _translate(name: str, value: Any) -> dict[str, Any]:
    if name == "type":
        if value not in _TYPES:
            raise ConfigValueError(f"model_wrapper: unknown type={value!r}. {did_you_mean(str(value), _TYPES)}")
        return {}
    if name in _ALWAYS and value in (_ALWAYS[name], None):
        return {}
    if name in _REPLACED:
        raise ConfigKeyError(f"model_wrapper: {name}={value!r} is not supported: {_REPLACED[name]}. Omit it.")
    if name in _SAME:
        return {_SAME[name]: value}
    if name == "cpu_offload":
        return {"cpu_offload": value if isinstance(value, bool) else bool((value or {}).get("offload_params", False))}
    if name == "sharding_strategy":
        return {"reshard_after_forward": _reshard(value)}
    if name == "auto_wrap_policy":
        return {"wrap_policy": _policy(value)}
    raise ConfigKeyError(f"model_wrapper: unknown option {name!r}. {did_you_mean(name, _KNOWN)}")


def _reshard(strategy: Any) -> bool | None:
    if strategy not in _SHARDING:
        instead = {
            "HYBRID_SHARD": "FSDPStrategy(replicate=<number of replicas>)",
            "_HYBRID_SHARD_ZERO2": "FSDPStrategy(replicate=<number of replicas>, reshard_after_forward=False)",
            "NO_SHARD": "DDPStrategy",
        }.get(str(strategy), "reshard_after_forward")
        raise ConfigValueError(f"model_wrapper: sharding_strategy={strategy!r} is not supported. Use {instead}.")
    return _SHARDING[strategy]


def _policy(policy: Any) -> Any:
    if isinstance(policy, str):
        policy = {"type": policy}
    if isinstance(policy, Mapping) and str(policy.get("type", "")).rpartition(".")[2] in _POLICIES:
        return _POLICIES[str(policy["type"]).rpartition(".")[2]](policy)
    return policy


def state_of(state: str | None, state_dict_cfg: str | Mapping[str, Any] | None) -> str:
    """Return the checkpoint format from ``state`` or MMEngine's ``state_dict_cfg``; ``"sharded"`` by default.

    Raises:
        ConfigTypeError: if ``state_dict_cfg`` is neither a name nor a mapping.
        ConfigValueError: if both are specified, or the format is unknown.
    """
    if state_dict_cfg is None:
        return state or "sharded"
    if state is not None:
        raise ConfigValueError("state_dict_cfg is MMEngine's name for state. Specify only state.")
    if isinstance(state_dict_cfg, Mapping):
        kind = state_dict_cfg.get("state_dict_type", "LOCAL_STATE_DICT")
        others = set(state_dict_cfg) - {"state_dict_type"}
        if others:
            raise ConfigValueError(
                f"state_dict_cfg: {', '.join(sorted(others))} configure torch's older FSDP, which is not used here. Use "
                "state='sharded' or state='full' instead."
            )
    elif isinstance(state_dict_cfg, str):
        kind = state_dict_cfg
    else:
        raise ConfigTypeError(
            f"state_dict_cfg must be a name or a mapping, got {state_dict_cfg!r}. Use state='sharded' or state='full' instead."
        )
    states = {"local": "sharded", "sharded": "sharded", "full": "full"}
    name = str(kind).rpartition(".")[2].lower().removesuffix("_state_dict")
    if name not in states:
        raise ConfigValueError(f"state_dict_cfg: unknown type {kind!r}. Use state='sharded' or state='full' instead.")
    return states[name]
