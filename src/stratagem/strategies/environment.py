"""Set up the process in which a strategy works: launcher, devices, seeds and limits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, final

import torch

from stratagem.dist import (
    World,
    broadcast_object,
    close_dist,
    get_dist_info,
    infer_launcher,
    init_dist,
    is_distributed,
    pick_device,
    sync_random_seed,
)
from stratagem.errors import ConfigTypeError
from stratagem.utils import refuse_unknown, set_multi_processing, set_random_seed

if sys.platform != "win32":
    import resource

__all__ = ["Environment", "set_up_environment"]

_KEYS = ("launcher", "cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit", "randomness")
_RANDOMNESS_KEYS = ("seed", "diff_rank_seed", "deterministic")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What was set up, and how to undo it.

    ``randomness`` holds the settings with the seed that is in use; ``notices`` are sentences for the log.
    """

    world: World
    randomness: Mapping[str, Any]
    notices: tuple[str, ...] = ()
    seed_given: bool = False
    _undo: tuple[Callable[[], None], ...] = field(default=(), repr=False)

    def close(self) -> None:
        """Give back what was set for the process, and end the process group if it was made here. Idempotent."""
        for undo in reversed(self._undo):
            undo()


def set_up_environment(env_kwargs: Mapping[str, Any]) -> Environment:
    """Set the process up from ``env_kwargs`` (see the strategy's documentation for the keys).

    Collective where a launcher started several processes.

    Raises:
        ConfigKeyError: if a key is unknown.
        LaunchError: if the launcher named did not start this process, or the ranks do not meet.
    """
    refuse_unknown(env_kwargs, _KEYS, "env_kwargs")
    launcher = env_kwargs.get("launcher") or infer_launcher()
    randomness = _mapping(env_kwargs, "randomness")
    refuse_unknown(randomness, _RANDOMNESS_KEYS, "randomness")
    settings = set_multi_processing(**_mapping(env_kwargs, "mp_cfg"), distributed=launcher != "none")
    undo: list[Callable[[], None]] = [settings.close]
    if env_kwargs.get("cudnn_benchmark", False):
        undo.append(_benchmark_cudnn())
    made_group = launcher != "none" and not is_distributed()
    launch = init_dist(launcher, **_mapping(env_kwargs, "dist_cfg"))
    if made_group:
        undo.append(close_dist)
    rank, size = get_dist_info()
    timestamp = broadcast_object(time.strftime("%Y%m%d_%H%M%S"))
    _raise_open_files(env_kwargs.get("resource_limit", 4096))
    given = randomness.get("seed")
    seed = sync_random_seed() if given is None else given
    world = World(
        launcher=launcher,
        rank=rank,
        local_rank=launch.local_rank,
        size=size,
        device=pick_device(launch.local_rank),
        timestamp=timestamp,
        seed=seed,
    )
    set_random_seed(
        seed,
        deterministic=randomness.get("deterministic", False),
        diff_rank_seed=randomness.get("diff_rank_seed", False),
        rank=rank,
    )
    return Environment(
        world=world,
        randomness=MappingProxyType({**randomness, "seed": seed}),
        notices=settings.notices,
        seed_given=given is not None,
        _undo=tuple(undo),
    )


def _mapping(env_kwargs: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a copy of a part of the settings; None stands for none."""
    value = env_kwargs.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigTypeError(f"env_kwargs: {key} is {value!r}; a mapping is due.")
    return dict(value)


def _benchmark_cudnn() -> Callable[[], None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True

    def restore() -> None:
        torch.backends.cudnn.benchmark = before

    return restore


def _raise_open_files(limit: int) -> None:
    """Raise the soft limit of open files: data workers and many shards need more than the usual 1,024."""
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(limit, soft), hard), hard))
