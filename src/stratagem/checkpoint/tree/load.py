"""Put a model's saved state into a model, and say what did not fit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stratagem.checkpoint.tree.flatten import module_versions, with_versions
from stratagem.checkpoint.tree.key_prefix_hint import suggest_prefix
from stratagem.checkpoint.tree.names import matches_any, possible_names, revise, unwrapped_name
from stratagem.checkpoint.tree.sharded_tensor_state import ShardedTensorState
from stratagem.errors import CheckpointMismatchError
from stratagem.tensors.dtensor import placed_like

__all__ = ["DEFAULT_REVISE_KEYS", "LoadReport", "match_state", "load_state_dict", "weights_to_cpu"]

DEFAULT_REVISE_KEYS: tuple[tuple[str, str], ...] = ((r"^module\.", ""),)
_SHOWN = 10
_SHARDING = "torch.distributed.fsdp."
# (key, saved shape, the model's shape)
Reshaped = tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """How a saved state and a model fit together; ``shape_mismatches`` holds (key, saved shape, the model's shape)."""

    matched: int
    total: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shape_mismatches: Reshaped = ()

    @property
    def exact(self) -> bool:
        """Whether every key of both sides was used."""
        return not (self.missing or self.unexpected or self.shape_mismatches)

    def describe(self) -> str:
        """Return the differences as lines of text, the first few of each kind."""
        lines = ["The model and loaded state dict do not match exactly:"]
        lines.append(f"  {self.matched} of the model's {self.total} keys were found.")
        if self.missing:
            lines.append(f"  {len(self.missing)} missing in the checkpoint: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"  {len(self.unexpected)} unexpected in the checkpoint: {_some(self.unexpected)}")
        if self.shape_mismatches:
            shapes = [f"{key} (saved {list(saved)}, here {list(own)})" for key, saved, own in self.shape_mismatches]
            lines.append(f"  {len(self.shape_mismatches)} of another shape: {_some(shapes)}")
        return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, ... ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else shown


def load_state_dict(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    strict: bool = False,
    revise_keys: Sequence[tuple[str, str]] = DEFAULT_REVISE_KEYS,
    allow_missing: Sequence[str] = (),
) -> LoadReport:
    """Load ``state`` into the bare ``model``.

    Keys are first rewritten by ``revise_keys``; those that the model does not know even then lose the parts that
    wrappers add. A tensor of another shape is left out and reported. With ``strict``, the state may lack the model's
    entries whose names one of the patterns ``allow_missing`` matches in whole.

    Raises:
        CheckpointMismatchError: if no key of the checkpoint belongs to the model, if two keys stand for the same or
            something else than a tensor stands for one, or, with ``strict``, if anything differs. The model is
            unchanged then.
    """
    own = model.state_dict()
    fitting, shape_mismatches = _fitting(state, own, revise_keys)
    incoming = with_versions(
        {name: _as_placed(value, own.get(name)) for name, value in fitting.items()},
        _versions_here(state, own, revise_keys),
    )
    if _renames_itself(model):
        return _load_and_see(model, incoming, own, shape_mismatches, strict=strict, allow_missing=allow_missing)
    report = _report(fitting, own, shape_mismatches)
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
    """Return how ``state`` fits, and its values under the model's names, for those who put them into place themselves.

    Args:
        model: whose state it is.
        own: its state dict, in which each tensor has the shape that it has as a whole.
        state: as in :func:`load_state_dict`, like all else.
        strict: see there.
        revise_keys: see there.
        allow_missing: see there.

    Raises:
        CheckpointMismatchError: as there, and if modules change the keys while they load.
    """
    if _renames_itself(model):
        raise CheckpointMismatchError(
            f"Modules of {type(model).__name__} change the keys of a checkpoint while they load it (a pre-hook of "
            "load_state_dict), and what this strategy trains is not loaded by modules. Rewrite the keys with revise_keys, or "
            "convert the checkpoint under another strategy."
        )
    fitting, shape_mismatches = _fitting(state, own, revise_keys, kinds=(Tensor, ShardedTensorState))
    report = _report(fitting, own, shape_mismatches)
    _check_report(report, strict=strict, allow_missing=allow_missing)
    return report, fitting


def _fitting(
    state: Mapping[str, Any],
    own: Mapping[str, Any],
    revise_keys: Sequence[tuple[str, str]],
    kinds: tuple[type, ...] = (Tensor,),
) -> tuple[dict[str, Any], Reshaped]:
    """Return the values by their names here, without those of another shape, which come second."""
    names = _names_here(state, own, revise_keys)
    _check_kinds(state, names, own, kinds)
    shape_mismatches = tuple(
        (name, tuple(state[key].shape), tuple(own[name].shape))
        for key, name in names.items()
        if _differs(state[key], own.get(name))
    )
    differing = {name for name, _, _ in shape_mismatches}
    return {name: state[key] for key, name in names.items() if name not in differing}, shape_mismatches


def _report(fitting: Mapping[str, Any], own: Mapping[str, Any], shape_mismatches: Reshaped) -> LoadReport:
    differing = {name for name, _, _ in shape_mismatches}
    return LoadReport(
        matched=sum(name in own for name in fitting),
        total=len(own),
        missing=_without_counters(key for key in own if key not in fitting and key not in differing),
        unexpected=tuple(name for name in fitting if name not in own),
        shape_mismatches=shape_mismatches,
    )


def _load_and_see(
    model: nn.Module,
    incoming: Mapping[str, Any],
    own: Mapping[str, Any],
    shape_mismatches: Reshaped,
    *,
    strict: bool,
    allow_missing: Sequence[str],
) -> LoadReport:
    """Load into a model whose modules change the keys meanwhile; what fits is known only then, so undo it if refused."""
    before = {key: value.clone() for key, value in own.items() if isinstance(value, Tensor) and not is_lazy(value)}
    before = with_versions(before, module_versions(own))
    differing = {name for name, _, _ in shape_mismatches}
    try:
        missing, unexpected = model.load_state_dict(incoming, strict=False)
        missing = [key for key in missing if key not in differing]
        report = LoadReport(
            matched=len(own) - len(missing) - len(differing),
            total=len(own),
            missing=_without_counters(missing),
            unexpected=tuple(unexpected),
            shape_mismatches=shape_mismatches,
        )
        _check_report(report, strict=strict, allow_missing=allow_missing)
    except RuntimeError as error:
        model.load_state_dict(before, strict=False)
        if isinstance(error, CheckpointMismatchError):
            raise
        raise CheckpointMismatchError(f"The checkpoint does not fit the model: {error}") from error
    return report


def _check_report(report: LoadReport, *, strict: bool, allow_missing: Sequence[str]) -> None:
    if report.total and report.matched == 0:
        raise CheckpointMismatchError(
            f"No key of the checkpoint belongs to this model. {report.describe()}\n"
            f"  {suggest_prefix(report.unexpected, report.missing) or 'Is it a checkpoint of another model?'} "
            "Differing prefixes can be rewritten with revise_keys."
        )
    refused = replace(report, missing=tuple(name for name in report.missing if not matches_any(name, allow_missing)))
    if strict and not refused.exact:
        hint = suggest_prefix(report.unexpected, report.missing)
        raise CheckpointMismatchError("\n  ".join([report.describe(), hint] if hint else [report.describe()]))


def _names_here(keys: Iterable[str], own: Collection[str], revise_keys: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return what each key is called in the model, or would be.

    Raises:
        CheckpointMismatchError: if two keys become the same.
    """
    names: dict[str, str] = {}
    keys_of: dict[str, str] = {}
    for key, revised in revise(keys, revise_keys).items():
        name = names[key] = _closest(key, revised, own)
        if name in keys_of:
            raise CheckpointMismatchError(
                f"The checkpoint's {keys_of[name]!r} and {key!r} both stand for {name!r}. Rewrite one with revise_keys."
            )
        keys_of[name] = key
    return names


def _closest(key: str, revised: str, own: Collection[str]) -> str:
    if revised in own:
        return revised
    # A model may have a part of its own called "module": then rewriting took more away than a wrapper.
    wrapped = key if unwrapped_name(key) == unwrapped_name(revised) else revised
    return next((name for name in (wrapped, *possible_names(wrapped)) if name in own), revised)


def _versions_here(
    state: Mapping[str, Any], own: Mapping[str, Any], revise_keys: Sequence[tuple[str, str]]
) -> dict[str, Any] | None:
    """Return the versions of modules that ``state`` carries, under the names of the modules here."""
    versions = module_versions(state)
    if versions is None:
        return None
    # What is renamed is the name of something inside of the module: "module.conv._" becomes "conv._".
    here = {_inside(name) for name in module_versions(own) or {}}
    revised = revise((_inside(name) for name in versions), revise_keys)
    names = {key.rpartition(".")[0]: _closest(key, name, here).rpartition(".")[0] for key, name in revised.items()}
    return {names[name]: version for name, version in versions.items()}


def _inside(module: str) -> str:
    return f"{module}._" if module else "_"


def _check_kinds(
    state: Mapping[str, Any], names: Mapping[str, str], own: Mapping[str, Any], kinds: tuple[type, ...]
) -> None:
    for key, name in names.items():
        if isinstance(own.get(name), Tensor) and not isinstance(state[key], kinds):
            raise CheckpointMismatchError(
                f"The checkpoint's {key!r} is a {type(state[key]).__name__}, where the model has a tensor."
            )


def _differs(value: Any, own: Any) -> bool:
    if not isinstance(value, Tensor | ShardedTensorState) or not isinstance(own, Tensor) or is_lazy(own):
        return False
    return value.shape != own.shape


def _as_placed(value: Any, own: Any) -> Any:
    """Return a tensor as the model has its own: of one that is spread over ranks only this rank's part is read."""
    return placed_like(value, own) if isinstance(value, Tensor) and isinstance(own, Tensor) else value


def _without_counters(missing: Iterable[str]) -> tuple[str, ...]:
    """Leave out what BatchNorm counts and old checkpoints lack: it begins anew and changes no output."""
    return tuple(key for key in missing if not key.endswith("num_batches_tracked"))


def _renames_itself(model: nn.Module) -> bool:
    """Tell whether modules change the keys while loading, so that only loading shows what fits."""
    hooks: list[Any] = [hook for module in model.modules() for hook in module._load_state_dict_pre_hooks.values()]
    # Those of torch's sharding free what was gathered, and leave keys alone.
    return any(not str(getattr(hook.hook, "__module__", "")).startswith(_SHARDING) for hook in hooks)


def weights_to_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with every tensor on the CPU, detached; those that are there already are not copied."""
    cpu = {key: _to_cpu(value) for key, value in state.items()}
    return with_versions(cpu, module_versions(state))


def _to_cpu(value: Any) -> Any:
    if isinstance(value, ShardedTensorState):
        return value.on_cpu()
    return value.detach().cpu() if isinstance(value, Tensor) else value
