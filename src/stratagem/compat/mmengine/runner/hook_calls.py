"""The part of the runner that registers and calls hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from stratagem.compat.mmengine.hooks import Hook
from stratagem.compat.mmengine.hooks.hook import SHARED_METHOD_OF
from stratagem.compat.mmengine.registry import HOOKS
from stratagem.compat.mmengine.runner.priority import Priority, get_priority
from stratagem.compat.mmengine.runner.session import RunSession

__all__ = ["HookCalls"]

_DEFAULT_HOOKS: dict[str, dict[str, Any]] = {
    "runtime_info": {"type": "RuntimeInfoHook"},
    "timer": {"type": "IterTimerHook"},
    "sampler_seed": {"type": "DistSamplerSeedHook"},
    "logger": {"type": "LoggerHook"},
    "param_scheduler": {"type": "ParamSchedulerHook"},
    "checkpoint": {"type": "CheckpointHook", "interval": 1},
}


@cache
def _overrides(kind: type, stage: str) -> bool:
    """Return whether a class of hooks overrides the method of a stage or the method that it shares with other stages."""
    if not issubclass(kind, Hook):
        return True
    shared = SHARED_METHOD_OF.get(stage)
    return any(getattr(kind, name, None) is not getattr(Hook, name, None) for name in (stage, shared) if name)


class HookCalls:
    """Registers hooks and calls them in order of priority."""

    _hooks: list[Hook]
    _session: RunSession

    @property
    def hooks(self) -> list[Hook]:
        """The hooks in the order in which they are called."""
        return self._hooks

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call a method of all hooks that have it, with this runner and the given arguments.

        Raises:
            TypeError: if a hook does not accept the arguments; the message contains the hook.
        """
        session, outer = self._session, self._session.active_method
        shared = SHARED_METHOD_OF.get(fn_name)
        for hook in self._hooks:
            # Most hooks act at few stages; the methods of the base class do nothing.
            kind: Any = hook.__class__
            if not (_overrides(kind, fn_name) or fn_name in hook.__dict__ or shared in hook.__dict__):
                continue
            method = getattr(hook, fn_name, None)
            if method is None:
                continue
            session.active_method = method
            try:
                method(self, **kwargs)
            except TypeError as error:
                raise TypeError(f"{error} in {hook}") from error
            finally:
                session.active_method = outer
        session.after_hooks(fn_name)

    def register_hook(self, hook: Hook | dict[str, Any], priority: str | int | Priority | None = None) -> None:
        """Register a hook, after all hooks with the same or a higher priority.

        Args:
            hook: the hook or its configuration, which may contain ``priority``.
            priority: the priority; by default that of the configuration or of the hook.

        Raises:
            TypeError: if ``hook`` is neither a hook nor a dict.
        """
        if not isinstance(hook, Hook | Mapping):
            raise TypeError(f"hook should be an instance of Hook or dict, but got {hook!r}")
        if isinstance(hook, Mapping):
            cfg = dict(hook)
            configured = cfg.pop("priority", None)
            built = HOOKS.build(cfg)
            priority = configured if priority is None else priority
        else:
            built = hook
        if priority is not None:
            built.priority = priority
        own = get_priority(built.priority)
        later = (index for index, each in enumerate(self._hooks) if get_priority(each.priority) > own)
        self._hooks.insert(next(later, len(self._hooks)), built)

    def register_default_hooks(self, hooks: Mapping[str, Any] | None = None) -> None:
        """Register the default hooks, with changes; None removes a hook.

        Raises:
            AssertionError: if None is given for an unknown name.
        """
        chosen: dict[str, Any] = dict(_DEFAULT_HOOKS)
        for name, hook in (hooks or {}).items():
            if hook is not None:
                chosen[name] = hook
            elif name in chosen:
                del chosen[name]
            else:
                raise AssertionError(
                    f"default_hooks: {name}=None removes no hook. The names are {', '.join(_DEFAULT_HOOKS)}."
                )
        for hook in chosen.values():
            self.register_hook(hook)

    def register_custom_hooks(self, hooks: Sequence[Hook | dict[str, Any]]) -> None:
        """Register several hooks."""
        for hook in hooks:
            self.register_hook(hook)

    def register_hooks(
        self,
        default_hooks: Mapping[str, Any] | None = None,
        custom_hooks: Sequence[Hook | dict[str, Any]] | None = None,
    ) -> None:
        """Register the default hooks and the custom hooks."""
        self.register_default_hooks(default_hooks)
        self.register_custom_hooks(custom_hooks or ())

    def get_hooks_info(self) -> str:
        """Return the names and priorities of the hooks of each stage."""
        names: dict[Any, str] = {each.value: each.name for each in Priority}
        stages: dict[str, list[str]] = {}
        for hook in self._hooks:
            value = get_priority(hook.priority)
            line = f"({names.get(value, str(value)):<12}) {type(hook).__name__:<35}"
            for stage in hook.get_triggered_stages():
                stages.setdefault(stage, []).append(line)
        ordered = [stage for stage in Hook.stages if stage in stages]
        return "\n".join("\n".join([f"{stage}:", *stages[stage], " -------------------- "]) for stage in ordered)
