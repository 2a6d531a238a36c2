"""Put a model's saved state into a model, and say what did not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stratagem.checkpoint.names import bare_name, revise
from stratagem.errors import CheckpointMismatchError

__all__ = ["DEFAULT_REVISE_KEYS", "LoadReport", "load_state_dict", "weights_to_cpu"]

DEFAULT_REVISE_KEYS: tuple[tuple[str, str], ...] = ((r"^module\.", ""),)
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """How a saved state and a model fit together; ``reshaped`` holds (key, saved shape, the model's shape)."""

    matched: int
    total: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every key of both sides was used."""
        return not (self.missing or self.unexpected or self.reshaped)

    def describe(self) -> str:
        """Return the differences as lines of text, the first few of each kind."""
        lines = ["The model and loaded state dict do not match exactly:"]
        lines.append(f"  {self.matched} of the model's {self.total} keys were found.")
        if self.missing:
            lines.append(f"  {len(self.missing)} missing in the checkpoint: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"  {len(self.unexpected)} unexpected in the checkpoint: {_some(self.unexpected)}")
        if self.reshaped:
            shapes = [f"{key} (saved {list(saved)}, here {list(own)})" for key, saved, own in self.reshaped]
            lines.append(f"  {len(self.reshaped)} of another shape: {_some(shapes)}")
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
) -> LoadReport:
    """Load ``state`` into the bare ``model``.

    Keys are first rewritten by ``revise_keys``; those that the model does not know even then lose the parts that
    wrappers add. A tensor of another shape is left out and reported.

    Raises:
        CheckpointMismatchError: if no key of the checkpoint belongs to the model, or, with ``strict``, if anything
            differs. The model is unchanged then.
    """
    own = model.state_dict()
    renamed: dict[str, Any] = {}
    for key, name in revise(state, revise_keys).items():
        renamed[name if name in own else _closest(name, own)] = state[key]
    reshaped = tuple(
        (key, tuple(value.shape), tuple(own[key].shape))
        for key, value in renamed.items()
        if isinstance(value, Tensor) and isinstance(own.get(key), Tensor) and value.shape != own[key].shape
    )
    differing = {key for key, _, _ in reshaped}
    report = LoadReport(
        matched=sum(key in own for key in renamed) - len(differing),
        total=len(own),
        missing=tuple(key for key in own if key not in renamed and not key.endswith("num_batches_tracked")),
        unexpected=tuple(key for key in renamed if key not in own),
        reshaped=reshaped,
    )
    if own and report.matched == 0 and not _renames_itself(model):
        raise CheckpointMismatchError(
            f"No key of the checkpoint belongs to this model. {report.describe()}\n"
            "  Is it a checkpoint of another model? Differing prefixes can be rewritten with revise_keys."
        )
    if strict and not report.exact:
        raise CheckpointMismatchError(report.describe())
    model.load_state_dict({key: value for key, value in renamed.items() if key not in differing}, strict=False)
    return report


def _closest(name: str, own: Mapping[str, Any]) -> str:
    bare = bare_name(name)
    return bare if bare in own else name


def _renames_itself(model: nn.Module) -> bool:
    """Tell whether modules change the keys while loading, so that only loading shows what fits."""
    return any(module._load_state_dict_pre_hooks for module in model.modules())


def weights_to_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with every tensor on the CPU, detached; those that are there already are not copied."""
    return {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
