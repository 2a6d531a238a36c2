"""The seeded bugs, the part of the step in which each arises, and the changes of the configuration that inject them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from stratagem import Config

__all__ = ["BUGS", "CONFIGS", "MODELS", "Bug", "config_with"]

_HERE: Final = Path(__file__).parent
#: The models into which bugs are injected.
MODELS: Final = ("cnn", "gpt", "gru")
CONFIGS: Final[Mapping[str, Path]] = {name: _HERE / "configs" / f"{name}_config.py" for name in (*MODELS, "gpt_muon")}
_HOOK: Final = f"{__package__}.injection.SeededBug"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """A bug that changes the numbers of a training without an error.

    Attributes:
        name: a description for tables.
        part: the part of the step in which it arises.
        resumed: whether it shows when a run is resumed, rather than in several processes.
        accumulates: whether it requires gradient accumulation.
        everywhere: whether it also affects the reference, so that it can only be found because nothing moves.
        changes: changes of the configuration apart from the hook that injects the bug.
    """

    name: str
    part: str
    resumed: bool = False
    accumulates: bool = False
    everywhere: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)


BUGS: Final[Mapping[str, Bug]] = {
    "no_reduction": Bug(name="missing all-reduce", part="reduction"),
    "scaled_by_world": Bug(name="gradients scaled by the world size", part="reduction"),
    "norm_twice": Bug(name="norm counted twice", part="clip"),
    "local_norm": Bug(name="clipped by a local norm", part="clip"),
    "last_dropped": Bug(name="last micro-batch dropped", part="backward", accumulates=True),
    "zero_rate": Bug(name="learning rate 0", part="schedule", everywhere=True),
    "frozen_layer": Bug(name="frozen layer", part="backward"),
    "other_data": Bug(
        name="one rank with other data",
        part="data",
        changes={"train_dataloader.sampler": {"type": f"{__package__}.injection.RankOrder", "seed": 3}},
    ),
    "late_average": Bug(name="average one step late", part="average"),
    "schedule_twice": Bug(name="schedule stepped twice", part="schedule"),
    "wrong_generator": Bug(name="wrong generator after resuming", part="forward", resumed=True),
}


def config_with(
    model: str, bug: str | None = None, *, relative: float = 0.0, changes: Mapping[str, Any] | None = None
) -> Config:
    """Return the configuration of a model with changes and, unless it is None, with a bug.

    Args:
        model: a key of :data:`CONFIGS`.
        bug: a key of :data:`BUGS`, or ``"relative_error"``.
        relative: the size of the bug ``relative_error``.
        changes: values by dotted path.
    """
    config = Config.fromfile(CONFIGS[model])
    config.merge_from_dict(dict(changes or {}))
    if bug is None:
        return config
    hooks: list[dict[str, Any]] = []
    seeded = BUGS.get(bug)
    if seeded is not None:
        config.merge_from_dict(dict(seeded.changes))
        hooks += [{"type": f"{__package__}.injection.AddDropout"}] if seeded.resumed else []
        if seeded.accumulates:
            config.merge_from_dict({"optim_wrapper.accumulative_counts": 2})
    hooks.append({"type": _HOOK, "bug": bug, "relative": relative})
    config["custom_hooks"] = [*config["custom_hooks"], *hooks]
    return config
