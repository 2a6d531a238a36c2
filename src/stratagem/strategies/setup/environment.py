"""Set up the process of a strategy: process group, device, seeds and limits."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, final

import torch

from stratagem.distributed import (
    World,
    broadcast_object,
    check_dist_arguments,
    check_launcher,
    close_dist,
    current_device,
    describe_incomplete_launch_env,
    get_dist_info,
    infer_launcher,
    init_dist,
    is_distributed,
    sync_random_seed,
)
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.utils import refuse_unknown, set_multi_processing, set_random_seed
from stratagem.utils.data_rules import refuse_data_arguments
from stratagem.utils.multiprocess import check_multi_processing
from stratagem.utils.names import did_you_mean
from stratagem.utils.seeding import CUBLAS_VARIABLE, check_seed, make_cublas_deterministic

try:
    import resource
except ImportError:  # Windows
    _HAS_RESOURCE = False
else:
    _HAS_RESOURCE = True

__all__ = ["Environment", "check_environment", "set_up_environment"]

_KEYS = (
    "launcher",
    "cudnn_benchmark",
    "cudnn_allow_tf32",
    "float32_matmul_precision",
    "mp_cfg",
    "dist_cfg",
    "resource_limit",
    "randomness",
)
_MATMUL_PRECISIONS: Final = ("highest", "high", "medium")
_RANDOMNESS_KEYS = ("seed", "diff_rank_seed", "deterministic")
_OPEN_FILES = 4096
_MP_KEYS = ("mp_start_method", "opencv_num_threads")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The environment of a process, which can be restored to its previous state.

    Attributes:
        world: the rank, device and seed of this process.
        randomness: the randomness settings, including the seed in use.
        notices: messages for the log.
        seed_given: whether the seed was configured rather than drawn.
    """

    world: World
    randomness: Mapping[str, Any]
    notices: tuple[str, ...] = ()
    seed_given: bool = False
    _undo: ExitStack = field(default_factory=ExitStack, repr=False)

    def close(self) -> None:
        """Restore the previous settings, and destroy the process group if the setup created it. Idempotent."""
        self._undo.close()


def set_up_environment(env_kwargs: Mapping[str, Any]) -> Environment:
    """Set up the process from ``env_kwargs``; see :class:`~stratagem.strategies.BaseStrategy` for the keys.

    Collective if a launcher started several processes.

    Raises:
        ConfigKeyError: if a key is unknown.
        LaunchError: if the specified launcher did not start this process, or the rendezvous fails.
    """
    check_environment(env_kwargs)
    randomness, mp_cfg, dist_cfg = (_mapping(env_kwargs, key) for key in ("randomness", "mp_cfg", "dist_cfg"))
    launcher = env_kwargs.get("launcher") or infer_launcher()
    stray = None if env_kwargs.get("launcher") else describe_incomplete_launch_env()
    with ExitStack() as undo:
        settings = set_multi_processing(**mp_cfg, distributed=launcher != "none")
        undo.callback(settings.close)
        _keep_determinism(undo)
        notices = list(settings.notices)
        if randomness.get("deterministic", False):
            # Before the process group is created, because that initializes CUDA.
            before = os.environ.get(CUBLAS_VARIABLE)
            make_cublas_deterministic()
            if os.environ[CUBLAS_VARIABLE] != before and torch.backends.cuda.is_built():
                notices.append(
                    f"deterministic=True: set {CUBLAS_VARIABLE}={os.environ[CUBLAS_VARIABLE]} until the run ends."
                )
        if env_kwargs.get("cudnn_benchmark", False):
            torch.backends.cudnn.benchmark = True
        _set_float32_precision(env_kwargs, undo)
        made_group = launcher != "none" and not is_distributed()
        launch = init_dist(**{**dist_cfg, "launcher": launcher})
        if made_group:
            undo.callback(close_dist)
        rank, size = get_dist_info()
        timestamp = broadcast_object(time.strftime("%Y%m%d_%H%M%S"))
        _raise_open_files(env_kwargs.get("resource_limit", _OPEN_FILES), undo)
        given = randomness.get("seed")
        seed = sync_random_seed() if given is None else given
        set_random_seed(
            seed,
            deterministic=randomness.get("deterministic", False),
            diff_rank_seed=randomness.get("diff_rank_seed", False),
            rank=rank,
        )
        return Environment(
            world=World(
                launcher=launcher,
                rank=rank,
                local_rank=launch.local_rank,
                size=size,
                device=current_device(),
                timestamp=timestamp,
                seed=seed,
            ),
            randomness=MappingProxyType({**randomness, "seed": seed}),
            notices=tuple(notices) if stray is None else (*notices, stray),
            seed_given=given is not None,
            # From here on, close() restores the settings; up to this point, an exception restores them.
            _undo=undo.pop_all(),
        )


def check_environment(env_kwargs: Mapping[str, Any]) -> None:
    """Check the arguments of :func:`set_up_environment` that do not depend on the launcher, without changing anything.

    Raises:
        ConfigError: (or a subclass) if a key is unknown or a value is invalid.
        LaunchError: if the launcher is unknown.
    """
    refuse_unknown(env_kwargs, _KEYS, "env_kwargs")
    randomness = _mapping(env_kwargs, "randomness", known=_RANDOMNESS_KEYS)
    dist_cfg = _mapping(env_kwargs, "dist_cfg")
    if env_kwargs.get("launcher"):
        check_launcher(env_kwargs["launcher"])
    check_multi_processing(**_mapping(env_kwargs, "mp_cfg", known=_MP_KEYS))
    _check_float32_precision(env_kwargs)
    refuse_data_arguments(init_dist, dist_cfg, "dist_cfg: ")
    check_dist_arguments(**{key: value for key, value in dist_cfg.items() if key not in ("launcher", "init_method")})
    _check_resource_limit(env_kwargs.get("resource_limit", _OPEN_FILES))
    if randomness.get("seed") is not None:
        check_seed(randomness["seed"])


def _mapping(env_kwargs: Mapping[str, Any], key: str, *, known: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a copy of the mapping under ``key``, or an empty dict for None. Reject keys that are not ``known``."""
    value = env_kwargs.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigTypeError(f"env_kwargs: {key} must be a mapping, got {value!r}.")
    if known:
        refuse_unknown(value, known, key)
    return dict(value)


def _keep_determinism(undo: ExitStack) -> None:
    """Register callbacks on ``undo`` that restore the settings changed by ``cudnn_benchmark`` and ``deterministic``."""
    undo.callback(_restore_variable, CUBLAS_VARIABLE, os.environ.get(CUBLAS_VARIABLE))
    cudnn = torch.backends.cudnn
    undo.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
    undo.callback(setattr, cudnn, "deterministic", cudnn.deterministic)
    undo.callback(
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def _restore_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _check_float32_precision(env_kwargs: Mapping[str, Any]) -> None:
    precision, allow = env_kwargs.get("float32_matmul_precision"), env_kwargs.get("cudnn_allow_tf32")
    if precision is not None and precision not in _MATMUL_PRECISIONS:
        raise ConfigValueError(
            f"env_kwargs: unknown float32_matmul_precision={precision!r}. {did_you_mean(str(precision), _MATMUL_PRECISIONS)}"
        )
    if allow is not None and not isinstance(allow, bool):
        raise ConfigTypeError(f"env_kwargs: cudnn_allow_tf32 must be True, False or None, got {allow!r}.")


def _set_float32_precision(env_kwargs: Mapping[str, Any], undo: ExitStack) -> None:
    """Set how float32 matrix multiplications and convolutions are computed, and register callbacks that restore it."""
    precision, allow = env_kwargs.get("float32_matmul_precision"), env_kwargs.get("cudnn_allow_tf32")
    if precision is not None:
        undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision(precision)
    if allow is not None:
        undo.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        torch.backends.cudnn.allow_tf32 = allow


def _check_resource_limit(limit: Any) -> None:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ConfigValueError(
            f"env_kwargs: resource_limit must be the maximum number of open files, an integer >= 0, got {limit!r}."
        )


def _raise_open_files(limit: int, undo: ExitStack) -> None:
    """Raise the soft limit on open files, because data workers and many shards need more than the usual 1,024."""
    if not _HAS_RESOURCE:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = max(limit, soft)
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    undo.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
