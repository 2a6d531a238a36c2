"""The names that MMEngine's ``FSDPStrategy`` has for the options of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.utils import did_you_mean

__all__ = ["from_model_wrapper", "state_of"]

_TYPES: Final = ("MMFullyShardedDataParallel", "FullyShardedDataParallel")
_SAME: Final = {"mixed_precision": "mixed_precision", "ignored_modules": "ignored", "ignored_parameters": "ignored"}
_SHARDING: Final = {"FULL_SHARD": None, "SHARD_GRAD_OP": False}
# What every sharded model does here, where the value is this.
_ALWAYS: Final = {
    "use_orig_params": True,
    "backward_prefetch": "BACKWARD_PRE",
    "sync_module_states": True,
    "limit_all_gathers": True,
    "forward_prefetch": False,
}
_REPLACED: Final = {
    "process_group": "replicate=... and tp=... lay the ranks out",
    "device_mesh": "replicate=... and tp=... lay the ranks out",
    "param_init_fn": "initial weights are those of the model itself, see initial_weights=...",
    "device_id": "the device is that of the local rank",
    **{name: f"{name}={value!r} is what FSDPStrategy always does" for name, value in _ALWAYS.items()},
}
_POLICIES: Final[Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "size_based_auto_wrap_policy": lambda options: {"min_params": int(options.get("min_num_params", 100_000_000))},
    "transformer_auto_wrap_policy": lambda options: {"classes": sorted(options["transformer_layer_cls"], key=str)},
    "ModuleWrapPolicy": lambda options: {"classes": sorted(options["module_classes"], key=str)},
}
_KNOWN: Final = ("auto_wrap_policy", "sharding_strategy", "cpu_offload", *_SAME, *_ALWAYS)


def from_model_wrapper(model_wrapper: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` with what ``model_wrapper`` says under MMEngine's names.

    Raises:
        ConfigTypeError: if it is no mapping.
        ConfigKeyError: for an option that has no equal here; the message says what to use instead.
        ConfigValueError: for a value that has none, or an option that is given under both names.
    """
    if not isinstance(model_wrapper, Mapping):
        raise ConfigTypeError(
            f"model_wrapper is {model_wrapper!r}; leave it out, or give the options of MMFullyShardedDataParallel as a mapping."
        )
    said: dict[str, Any] = {}
    for name, value in model_wrapper.items():
        said.update(_translate(name, value))
    for name in said:
        if options[name] not in (None, False, ()):
            raise ConfigValueError(f"model_wrapper and {name}={options[name]!r} say the same thing. Give {name} alone.")
    return {**options, **said}


def _translate(name: str, value: Any) -> dict[str, Any]:
    if name == "type":
        if value not in _TYPES:
            raise ConfigValueError(f"model_wrapper: type={value!r} is not known. {did_you_mean(str(value), _TYPES)}")
        return {}
    if name in _ALWAYS and value in (_ALWAYS[name], None):
        return {}
    if name in _REPLACED:
        raise ConfigKeyError(f"model_wrapper: {name}={value!r} has no equal: {_REPLACED[name]}. Leave it out.")
    if name in _SAME:
        return {_SAME[name]: value}
    if name == "cpu_offload":
        return {"cpu_offload": value if isinstance(value, bool) else bool((value or {}).get("offload_params", False))}
    if name == "sharding_strategy":
        return {"reshard_after_forward": _reshard(value)}
    if name == "auto_wrap_policy":
        return {"wrap_policy": _policy(value)}
    raise ConfigKeyError(f"model_wrapper: {name!r} is not known. {did_you_mean(name, _KNOWN)}")


def _reshard(strategy: Any) -> bool | None:
    if strategy not in _SHARDING:
        instead = {
            "HYBRID_SHARD": "FSDPStrategy(replicate=<number of replicas>)",
            "_HYBRID_SHARD_ZERO2": "FSDPStrategy(replicate=<number of replicas>, reshard_after_forward=False)",
            "NO_SHARD": "DDPStrategy",
        }.get(str(strategy), "reshard_after_forward")
        raise ConfigValueError(f"model_wrapper: sharding_strategy={strategy!r} is {instead} here.")
    return _SHARDING[strategy]


def _policy(policy: Any) -> Any:
    if isinstance(policy, str):
        policy = {"type": policy}
    if isinstance(policy, Mapping) and str(policy.get("type", "")).rpartition(".")[2] in _POLICIES:
        return _POLICIES[str(policy["type"]).rpartition(".")[2]](policy)
    return policy


def state_of(state: str | None, state_dict_cfg: str | Mapping[str, Any] | None) -> str:
    """Return the form of checkpoints from ``state``, or MMEngine's ``state_dict_cfg``; sharded where neither is given.

    Raises:
        ConfigTypeError: if ``state_dict_cfg`` is something else than a name or a mapping.
        ConfigValueError: if both are given, or there is no such form.
    """
    if state_dict_cfg is None:
        return state or "sharded"
    if state is not None:
        raise ConfigValueError("state_dict_cfg is MMEngine's name for state. Give state alone.")
    if isinstance(state_dict_cfg, Mapping):
        kind = state_dict_cfg.get("state_dict_type", "LOCAL_STATE_DICT")
        others = set(state_dict_cfg) - {"state_dict_type"}
        if others:
            raise ConfigValueError(
                f"state_dict_cfg: {', '.join(sorted(others))} configure torch's older FSDP, which is not used here. Give "
                "state='sharded' or state='full' in its place."
            )
    elif isinstance(state_dict_cfg, str):
        kind = state_dict_cfg
    else:
        raise ConfigTypeError(
            f"state_dict_cfg is {state_dict_cfg!r}. Give state='sharded' or state='full' in its place."
        )
    states = {"local": "sharded", "sharded": "sharded", "full": "full"}
    name = str(kind).rpartition(".")[2].lower().removesuffix("_state_dict")
    if name not in states:
        raise ConfigValueError(
            f"state_dict_cfg: {kind!r} is not known. Give state='sharded' or state='full' in its place."
        )
    return states[name]
