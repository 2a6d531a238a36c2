"""Build trackers from configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from stratagem import builtin_entries
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.registry import TRACKERS
from stratagem.train.trackers.tracker import Tracker

__all__ = ["TrackerSpec", "build_trackers", "check_tracker", "check_trackers"]

TrackerSpec = Tracker | Mapping[str, Any] | str
# Options of all trackers.
_COMMON: Final = ("queue_size", "flush_s")


def build_trackers(trackers: Sequence[TrackerSpec] | None) -> dict[str, Tracker]:
    """Build the trackers of a run; return them by name.

    Args:
        trackers: trackers, names of trackers, or configurations.

    Raises:
        ConfigTypeError: if this is not a list of trackers.
        ConfigValueError: if an option is invalid, or two trackers have the same name.
        MissingDependencyError: if a package is not installed.
    """
    _require_list(trackers)
    built: dict[str, Tracker] = {}
    for each in trackers or ():
        name, tracker = _name_of(each), _build(each)
        _require_new(name, built)
        built[name] = tracker
    return built


def check_tracker(tracker: Any) -> None:
    """Build a tracker of this package to check its options. Others are not built, since that may have effects.

    Raises:
        ConfigError: (or a subclass) if building fails.
        MissingDependencyError: if a package is not installed.
    """
    if isinstance(tracker, str):
        tracker = {"type": tracker}
    if isinstance(tracker, Mapping):
        _check_common(tracker)
        target = _target(tracker)
        if getattr(target, "__module__", "").partition(".")[0] == __name__.partition(".")[0]:
            _build(tracker)
    elif not isinstance(tracker, list | tuple):
        _build(tracker)


def check_trackers(trackers: Any) -> None:
    """Check that trackers are a list in which each one occurs once.

    Raises:
        ConfigTypeError: if this is not a list of trackers.
        ConfigValueError: if two trackers have the same name.
    """
    _require_list(trackers)
    names: dict[str, None] = {}
    for each in trackers or ():
        _require_new(_name_of(each), names)
        names[_name_of(each)] = None


def _require_list(trackers: Any) -> None:
    if trackers is not None and (isinstance(trackers, str | Mapping) or not isinstance(trackers, Sequence)):
        raise ConfigTypeError(f"trackers must be a list, got {trackers!r}. Write trackers=[...].")


def _require_new(name: str, known: Mapping[str, object]) -> None:
    if name in known:
        raise ConfigValueError(
            f"trackers: there are two trackers {name!r}, which would write to the same run. Remove one."
        )


def _name_of(tracker: Any) -> str:
    """Return the short name of a tracker of this package, and the name of the class of another one."""
    kind = tracker.get("type") if isinstance(tracker, Mapping) else tracker
    if isinstance(kind, str):
        return kind
    name = getattr(kind, "__name__", type(kind).__name__)
    return next((short for short, target in builtin_entries.TRACKERS.items() if target.endswith(f":{name}")), name)


def _target(tracker: Mapping[str, Any]) -> Any:
    kind = tracker.get("type")
    return TRACKERS.get(kind) if isinstance(kind, str) else kind


def _build(tracker: Any) -> Tracker:
    if isinstance(tracker, str):
        tracker = {"type": tracker}
    if isinstance(tracker, Mapping):
        _check_common(tracker)
        built = TRACKERS.build({key: value for key, value in tracker.items() if key not in _COMMON})
        for option in _COMMON:
            if option in tracker and isinstance(built, Tracker):
                setattr(built, option, tracker[option])
    else:
        built = tracker
    if not isinstance(built, Tracker):
        raise ConfigTypeError(
            f"Expected a subclass of stratagem.train.trackers.Tracker, its name or a mapping with its type, got {tracker!r}."
        )
    return built


def _check_common(tracker: Mapping[str, Any]) -> None:
    size, seconds = tracker.get("queue_size", 1), tracker.get("flush_s", 1)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigValueError(f"trackers: queue_size must be an integer of at least 1, got {size!r}.")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds >= 0:
        raise ConfigValueError(f"trackers: flush_s must be a number of seconds, got {seconds!r}.")
