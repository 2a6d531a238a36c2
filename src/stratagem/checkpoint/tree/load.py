"""Load a state dict into a model and report keys that do not match."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stratagem.checkpoint.tree.flatten import module_versions, with_versions
from stratagem.checkpoint.tree.key_prefix_hint import suggest_prefix
from stratagem.checkpoint.tree.names import matches_any, possible_names, revise_names, unwrapped_name
from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState
from stratagem.errors import CheckpointMismatchError
from stratagem.tensors.dtensor import is_sharded, shard_like
from stratagem.utils import canonical_names, with_canonical_keys
from stratagem.utils.printable import printable_name
from stratagem.utils.torch_private import load_hook_modules

__all__ = ["DEFAULT_REVISE_KEYS", "LoadReport", "match_state", "load_state_dict", "weights_to_cpu"]

DEFAULT_REVISE_KEYS: tuple[tuple[str, str], ...] = ((r"^module\.", ""),)
_SHOWN = 10
_SHARDING = "torch.distributed.fsdp."
# A key, its shape in the checkpoint, and its shape in the model.
ShapeMismatches = tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The result of matching the keys of a checkpoint and a model; ``shape_mismatches`` holds (key, saved shape, model shape)."""

    matched: int
    total: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shape_mismatches: ShapeMismatches = ()

    @property
    def exact(self) -> bool:
        """Whether all keys of the checkpoint and the model match."""
        return not (self.missing or self.unexpected or self.shape_mismatches)

    def describe(self) -> str:
        """Return the differences as lines of text, with the first keys of each kind of difference."""
        lines = ["The model and loaded state dict do not match exactly:"]
        lines.append(f"  {self.matched} of the model's {self.total} keys were found.")
        if self.missing:
            lines.append(f"  {len(self.missing)} missing from the checkpoint: {_shorten_list(self.missing)}")
        if self.unexpected:
            lines.append(f"  {len(self.unexpected)} unexpected in the checkpoint: {_shorten_list(self.unexpected)}")
        if self.shape_mismatches:
            shapes = [f"{key} (saved {list(saved)}, model {list(own)})" for key, saved, own in self.shape_mismatches]
            lines.append(f"  {len(self.shape_mismatches)} with a different shape: {_shorten_list(shapes)}")
        return "\n".join(lines)


def _shorten_list(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable_name, names[:_SHOWN]))
    return f"{shown}, ... ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else shown


def load_state_dict(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    strict: bool = False,
    revise_keys: Sequence[tuple[str, str]] = DEFAULT_REVISE_KEYS,
    allow_missing: Sequence[str] = (),
) -> LoadReport:
    """Load ``state`` into the unwrapped ``model``.

    Keys are first rewritten by ``revise_keys``. If the model does not have a rewritten key, prefixes added by wrappers are
    removed from it. Tensors with a different shape are skipped and reported. With ``strict``, keys that fully match one of
    the patterns in ``allow_missing`` may be missing from ``state``.

    Raises:
        CheckpointMismatchError: if no key matches, two keys are mapped to the same name, a value should be a tensor but
            is not, or, with ``strict``, there is any difference. In that case the model is unchanged.
    """
    canonical = canonical_names(model)
    own_state = model.state_dict()
    # Match keys by canonical name. Load them by the model's own names, which may include those of inner wrappers.
    own_names = {canonical(key): key for key in own_state}
    own = with_canonical_keys(own_state, model)
    matched, shape_mismatches = _match(state, own, revise_keys)
    _require_equal_ties(model, matched, canonical)
    incoming = with_versions(
        {own_names.get(name, name): _as_placed(value, own.get(name)) for name, value in matched.items()},
        _own_versions(own_state, _model_versions(state, own, revise_keys), canonical),
    )
    if _may_rename_keys(model):
        return _load_or_restore(
            model, incoming, own_state, shape_mismatches, canonical, strict=strict, allow_missing=allow_missing
        )
    report = _report(matched, own, shape_mismatches)
    _check_report(report, strict=strict, allow_missing=allow_missing)
    model.load_state_dict(incoming, strict=False)
    return report


def match_state(
    model: nn.Module,
    own: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    strict: bool,
    revise_keys: Sequence[tuple[str, str]],
    allow_missing: Sequence[str],
) -> tuple[LoadReport, dict[str, Any]]:
    """Return a report on how ``state`` matches, and its values keyed by the model's names, without loading them.

    Args:
        model: the model that the state belongs to.
        own: the model's state dict, in which each tensor has its global shape.
        state: the state dict from the checkpoint.
        strict: see :func:`load_state_dict`.
        revise_keys: see :func:`load_state_dict`.
        allow_missing: see :func:`load_state_dict`.

    Raises:
        CheckpointMismatchError: as for :func:`load_state_dict`, and if modules rename keys while they load.
    """
    if _may_rename_keys(model):
        raise CheckpointMismatchError(
            f"Modules of {type(model).__name__} rename keys while loading (in a pre-hook of load_state_dict), but this "
            "strategy loads weights without calling these hooks. Rewrite the keys with revise_keys, or convert the "
            "checkpoint with another strategy."
        )
    canonical = canonical_names(model)
    own_names = {canonical(key): key for key in own}
    by_name = {canonical(key): value for key, value in own.items()}
    matched, shape_mismatches = _match(state, by_name, revise_keys, types=(Tensor, ShardedTensorState))
    _require_equal_ties(model, matched, canonical)
    report = _report(matched, by_name, shape_mismatches)
    _check_report(report, strict=strict, allow_missing=allow_missing)
    return report, {own_names.get(name, name): value for name, value in matched.items()}


def _require_equal_ties(model: nn.Module, matched: Mapping[str, Any], canonical: Callable[[str], str]) -> None:
    """Require that all values for the names of a shared parameter are equal, since only one of them can be loaded.

    Raises:
        CheckpointMismatchError: if two differ.
    """
    names: dict[int, list[str]] = {}
    for own_name, parameter in model.named_parameters(remove_duplicate=False):
        name = canonical(own_name)
        if isinstance(matched.get(name), Tensor):
            names.setdefault(id(parameter), []).append(name)
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    for key, (first, *others) in names.items():
        for other in others:
            if not _equal_in(parameters[key].dtype, matched[first], matched[other]):
                raise CheckpointMismatchError(
                    f"{first!r} and {other!r} share one parameter in the model, but the checkpoint has different values for "
                    f"them. Untie them in the model, or ignore one of them, for example with "
                    f"revise_keys=[(r'^{re.escape(other)}$', 'ignored.{other}')]."
                )


def _equal_in(dtype: torch.dtype, first: Tensor, second: Tensor) -> bool:
    if first is second or first.shape != second.shape:
        return first is second
    same_memory = first.data_ptr() == second.data_ptr() and first.stride() == second.stride()
    if same_memory and first.device.type != "meta":
        return True
    return torch.allclose(first.to(dtype), second.to(dtype), rtol=0.0, atol=0.0, equal_nan=True)


def _match(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    revise_keys: Sequence[tuple[str, str]],
    types: tuple[type, ...] = (Tensor,),
) -> tuple[dict[str, Any], ShapeMismatches]:
    """Return the values by model key, without values of a different shape, and a list of the omitted values."""
    names = _model_names(state, own, revise_keys)
    _check_types(state, names, own, types)
    shape_mismatches = tuple(
        (name, tuple(state[key].shape), tuple(own[name].shape))
        for key, name in names.items()
        if _has_other_shape(state[key], own.get(name))
    )
    mismatched = {name for name, _, _ in shape_mismatches}
    return {name: state[key] for key, name in names.items() if name not in mismatched}, shape_mismatches


def _report(matched: Mapping[str, Any], own: Mapping[str, Any], shape_mismatches: ShapeMismatches) -> LoadReport:
    mismatched = {name for name, _, _ in shape_mismatches}
    return LoadReport(
        matched=sum(name in own for name in matched),
        total=len(own),
        missing=_without_counters(key for key in own if key not in matched and key not in mismatched),
        unexpected=tuple(name for name in matched if name not in own),
        shape_mismatches=shape_mismatches,
    )


def _load_or_restore(
    model: nn.Module,
    incoming: Mapping[str, Any],
    own: Mapping[str, Any],
    shape_mismatches: ShapeMismatches,
    canonical: Callable[[str], str],
    *,
    strict: bool,
    allow_missing: Sequence[str],
) -> LoadReport:
    """Load into a model whose modules rename keys while loading. Restore its state if the result is rejected."""
    before = {key: _backup(value) for key, value in own.items() if isinstance(value, Tensor) and not is_lazy(value)}
    before = with_versions(before, module_versions(own))
    mismatched = {name for name, _, _ in shape_mismatches}
    try:
        missing, unexpected = model.load_state_dict(incoming, strict=False)
        missing = [canonical(key) for key in missing if canonical(key) not in mismatched]
        report = LoadReport(
            matched=len(own) - len(missing) - len(mismatched),
            total=len(own),
            missing=_without_counters(missing),
            unexpected=tuple(map(canonical, unexpected)),
            shape_mismatches=shape_mismatches,
        )
        _check_report(report, strict=strict, allow_missing=allow_missing)
    except RuntimeError as error:
        model.load_state_dict(before, strict=False)
        if isinstance(error, CheckpointMismatchError):
            raise
        raise CheckpointMismatchError(f"The checkpoint does not match the model: {error}") from error
    return report


def _backup(value: Tensor) -> Tensor:
    """Return a copy in CPU memory, since the device may not have memory for a second model; of a shard, a copy on its device."""
    return value.clone() if is_sharded(value) else value.detach().to("cpu", copy=True)


def _check_report(report: LoadReport, *, strict: bool, allow_missing: Sequence[str]) -> None:
    if report.total and report.matched == 0:
        raise CheckpointMismatchError(
            f"No key of the checkpoint matches the model. {report.describe()}\n  "
            f"{suggest_prefix(report.unexpected, report.missing) or 'Is it a checkpoint of a different model?'} Use "
            "revise_keys to rewrite prefixes."
        )
    rejected = replace(report, missing=tuple(name for name in report.missing if not matches_any(name, allow_missing)))
    if strict and not rejected.exact:
        hint = suggest_prefix(report.unexpected, report.missing)
        raise CheckpointMismatchError("\n  ".join([report.describe(), hint] if hint else [report.describe()]))


def _model_names(keys: Iterable[str], own: Collection[str], revise_keys: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Map each checkpoint key to its name in the model; keys that the model lacks map to their revised name.

    Raises:
        CheckpointMismatchError: if two keys get the same name.
    """
    names: dict[str, str] = {}
    keys_of: dict[str, str] = {}
    for key, revised in revise_names(keys, revise_keys).items():
        name = names[key] = _find_name(key, revised, own)
        if name in keys_of:
            raise CheckpointMismatchError(
                f"The checkpoint's keys {keys_of[name]!r} and {key!r} both map to {name!r}. Rewrite one with revise_keys."
            )
        keys_of[name] = key
    return names


def _find_name(key: str, revised: str, own: Collection[str]) -> str:
    if revised in own:
        return revised
    # If the model has a submodule named "module", revise_keys may have removed more than the prefix of a wrapper.
    wrapped = key if unwrapped_name(key) == unwrapped_name(revised) else revised
    return next((name for name in (wrapped, *possible_names(wrapped)) if name in own), revised)


def _model_versions(
    state: Mapping[str, Any], own: Mapping[str, Any], revise_keys: Sequence[tuple[str, str]]
) -> dict[str, Any] | None:
    """Return the module versions in ``state``, keyed by the model's module names."""
    versions = module_versions(state)
    if versions is None:
        return None
    # Rewrite the name of a key inside the module: "module.conv._" becomes "conv._".
    known = {_key_inside(name) for name in module_versions(own) or {}}
    revised = revise_names((_key_inside(name) for name in versions), revise_keys)
    names = {key.rpartition(".")[0]: _find_name(key, name, known).rpartition(".")[0] for key, name in revised.items()}
    return {names[name]: version for name, version in versions.items()}


def _own_versions(
    own: Mapping[str, Any], versions: Mapping[str, Any] | None, canonical: Callable[[str], str]
) -> dict[str, Any] | None:
    """Return the module versions keyed by the module names that a wrapped model has; a wrapper has its module's version."""
    if versions is None:
        return None
    own_names = {module: canonical(module) for module in module_versions(own) or {}}
    known = {module: versions[name] for module, name in own_names.items() if name in versions}
    return {**versions, **known}


def _key_inside(module: str) -> str:
    return f"{module}._" if module else "_"


def _check_types(
    state: Mapping[str, Any], names: Mapping[str, str], own: Mapping[str, Any], types: tuple[type, ...]
) -> None:
    for key, name in names.items():
        if isinstance(own.get(name), Tensor) and not isinstance(state[key], types):
            raise CheckpointMismatchError(
                f"The checkpoint's {key!r} is a {type(state[key]).__name__}, but the model has a tensor there."
            )


def _has_other_shape(value: Any, own: Any) -> bool:
    if not isinstance(value, Tensor | ShardedTensorState) or not isinstance(own, Tensor) or is_lazy(own):
        return False
    return value.shape != own.shape


def _as_placed(value: Any, own: Any) -> Any:
    """Return the tensor, sharded like the model's tensor. If that is sharded, only this rank's part is read."""
    return shard_like(value, own) if isinstance(value, Tensor) and isinstance(own, Tensor) else value


def _without_counters(missing: Iterable[str]) -> tuple[str, ...]:
    """Ignore missing BatchNorm counters, which old checkpoints lack. They start at 0 and do not affect the output."""
    return tuple(key for key in missing if not key.endswith("num_batches_tracked"))


def _may_rename_keys(model: nn.Module) -> bool:
    """Return whether modules may rename keys while loading, so that mismatches are only known afterwards."""
    # torch's FSDP hooks do not rename keys.
    return any(not name.startswith(_SHARDING) for name in load_hook_modules(model))


def weights_to_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with all tensors detached and on the CPU; tensors that are already there are not copied."""
    cpu = {key: _to_cpu(value) for key, value in state.items()}
    return with_versions(cpu, module_versions(state))


def _to_cpu(value: Any) -> Any:
    if isinstance(value, ShardedTensorState):
        return value.to_cpu()
    return value.detach().cpu() if isinstance(value, Tensor) else value
