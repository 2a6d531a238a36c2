"""A strategy sets up the process, names the run, and restores everything when it is closed."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stratagem.dist import World, init_dist, is_distributed
from stratagem.errors import (
    ConfigError,
    ConfigKeyError,
    ConfigTypeError,
    ConfigValueError,
    LaunchError,
    PlacementError,
    WorkDirError,
)
from stratagem.strategies import BaseStrategy, DDPStrategy, SingleDeviceStrategy
from stratagem.strategies.setup import environment
from tests.support.ranks import Ranks
from tests.support.small_runs import Lines, make

UNLIMITED = environment.resource.RLIM_INFINITY if environment._HAS_RESOURCE else -1
needs_resource = pytest.mark.skipif(not environment._HAS_RESOURCE, reason="Windows has no limits on resources")

Make = Callable[..., BaseStrategy]


@pytest.fixture
def no_start_method() -> Iterator[None]:
    """A process whose start method is undetermined, as in a new one; another test may have started a process."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(None, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_without_a_launcher_there_is_one_process(single: Make) -> None:
    """Without a launcher, the world size is 1."""
    strategy = single()
    assert (strategy.launcher, strategy.distributed, strategy.rank, strategy.world_size) == ("none", False, 0, 1)
    assert isinstance(strategy.world, World)


def test_a_stray_world_size_is_ignored(single: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE alone, which container platforms set, does not start a distributed run."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    strategy = single()
    assert (strategy.launcher, strategy.world_size) == ("none", 1)
    assert not is_distributed()


def test_a_wrong_launcher_is_rejected(single: Make) -> None:
    """The error for a launcher that did not start the process lists the missing variables."""
    with pytest.raises(LaunchError, match="launcher='pytorch', but this process was not started by it: RANK"):
        single(env={"launcher": "pytorch"})


def test_ddp_without_a_launcher_is_rejected(tmp_path: Path) -> None:
    """The error contains the commands to start several processes."""
    with pytest.raises(LaunchError, match="`stratagem train CONFIG --nproc N`"):
        DDPStrategy(work_dir=tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"env_kwargs": {"randomnes": {}}}, "env_kwargs: 'randomnes' is not known. Did you mean 'randomness'"),
        ({"env_kwargs": {"randomness": {"sed": 1}}}, "randomness: 'sed' is not known. Did you mean 'seed'"),
        ({"env_kwargs": {"mp_cfg": {"opencv_threads": 1}}}, "mp_cfg: 'opencv_threads' .* 'opencv_num_threads'"),
        ({"env_kwargs": {"dist_cfg": {"time_out": 1}}}, "dist_cfg: 'time_out' is not known. Did you mean 'timeout'"),
        ({"log_kwargs": {"loglevel": "INFO"}}, "log_kwargs: 'loglevel' is not known. Did you mean 'log_level'"),
        ({"auto_scale_lr": {"base_batchsize": 1}}, "auto_scale_lr: 'base_batchsize' .* 'base_batch_size'"),
    ],
)
def test_an_unknown_key_suggests_the_closest_name(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    """An unknown key raises an error with the closest name."""
    with pytest.raises(ConfigKeyError, match=message):
        SingleDeviceStrategy(work_dir=tmp_path, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"env_kwargs": {"randomness": 3}}, "env_kwargs: randomness must be a mapping, got 3"),
        ({"env_kwargs": {"randomness": {"seed": "3"}}}, "seed must be an integer or None, got '3'"),
        ({"auto_scale_lr": True}, "auto_scale_lr must be a mapping .* got True"),
    ],
)
def test_a_setting_of_the_wrong_type_is_rejected(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    """The error for a setting of the wrong type shows the value and the expected type."""
    with pytest.raises(ConfigTypeError, match=message):
        SingleDeviceStrategy(work_dir=tmp_path, **kwargs)


def test_none_means_no_settings(single: Make) -> None:
    """``mp_cfg``, ``dist_cfg`` and ``randomness`` may be None."""
    strategy = single(seed=None, env={"mp_cfg": None, "dist_cfg": None, "randomness": None})
    assert 0 <= strategy.seed < 2**31
    assert strategy.randomness == {"seed": strategy.seed}


# ---- cuDNN, threads, files -----------------------------------------------------------------------------------------


def test_the_autotuner_is_enabled_and_restored(single: Make) -> None:
    """``cudnn_benchmark`` is active until the strategy is closed."""
    strategy = single(env={"cudnn_benchmark": True})
    assert torch.backends.cudnn.benchmark
    strategy.close()
    assert not torch.backends.cudnn.benchmark


def test_deterministic_disables_the_autotuner(single: Make) -> None:
    """``deterministic=True`` disables the cuDNN autotuner, and ``close`` restores both."""
    before = torch.backends.cudnn.deterministic
    with pytest.warns(UserWarning, match="disabled because deterministic=True"):
        strategy = single(env={"cudnn_benchmark": True, "randomness": {"seed": 0, "deterministic": True}})
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic
    assert torch.are_deterministic_algorithms_enabled()
    strategy.close()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic is before


def test_deterministic_configures_cublas_before_cuda_is_initialized(
    single: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``CUBLAS_WORKSPACE_CONFIG`` is set before the process group selects a device, and restored by ``close``."""
    seen = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(
        environment,
        "init_dist",
        lambda **options: [seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")), init_dist(**options)][1],
    )
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    strategy = single(env={"randomness": {"seed": 0, "deterministic": True}})
    assert seen == [":4096:8"]
    assert "deterministic=True: set CUBLAS_WORKSPACE_CONFIG=:4096:8 until the run ends." in strategy._env.notices
    strategy.close()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_the_precision_of_float32_is_set_and_restored(single: Make) -> None:
    """``float32_matmul_precision`` and ``cudnn_allow_tf32`` are active until the strategy is closed."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert before == ("highest", True)
    strategy = single(env={"float32_matmul_precision": "high", "cudnn_allow_tf32": False})
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", False)
    strategy.close()
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"float32_matmul_precision": "tf32"}, "unknown float32_matmul_precision='tf32'"),
        ({"cudnn_allow_tf32": "yes"}, "cudnn_allow_tf32 must be True, False or None, got 'yes'"),
    ],
)
def test_unknown_float32_precisions_are_rejected(single: Make, env: dict[str, Any], message: str) -> None:
    """Any other value of the two options raises an error that shows it."""
    with pytest.raises(ConfigError, match=message):
        single(env=env)


@pytest.mark.usefixtures("no_start_method")
def test_the_start_method_is_set_and_restored(single: Make) -> None:
    """The start method in ``mp_cfg`` is active until the strategy is closed."""
    assert multiprocessing.get_start_method(allow_none=True) is None
    strategy = single(env={"mp_cfg": {"mp_start_method": "spawn"}})
    assert multiprocessing.get_start_method() == "spawn"
    strategy.close()
    assert multiprocessing.get_start_method(allow_none=True) is None


def test_one_process_keeps_its_threads(single: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thread variables are only set for distributed runs."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    single()
    assert "OMP_NUM_THREADS" not in os.environ


@needs_resource
@pytest.mark.parametrize(
    ("asked", "soft", "hard", "expected"),
    [
        (4096, 1024, 8192, 4096),
        (4096, 1024, 2048, 2048),
        (512, 1024, 8192, 1024),
        (4096, 1024, UNLIMITED, 4096),
    ],
)
def test_the_limit_of_open_files_is_raised(
    single: Make, monkeypatch: pytest.MonkeyPatch, asked: int, soft: int, hard: int, expected: int
) -> None:
    """The soft limit is set to min(max(resource_limit, soft), hard) and restored."""
    limits = [(soft, hard)]
    monkeypatch.setattr(environment.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(environment.resource, "setrlimit", lambda _, pair: limits.append(pair))
    strategy = single(env={"resource_limit": asked})
    assert limits[1:] == [(expected, hard)]
    strategy.close()
    assert limits[-1] == (soft, hard)


@needs_resource
def test_an_unlimited_number_of_open_files_is_kept(single: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unlimited number of open files, which may be represented by -1, is not lowered."""
    monkeypatch.setattr(environment.resource, "getrlimit", lambda _: (UNLIMITED, UNLIMITED))
    monkeypatch.setattr(environment.resource, "setrlimit", lambda _, pair: pytest.fail(f"set to {pair}"))
    single()


@pytest.mark.parametrize("limit", [None, "4096", -1, True])
def test_an_invalid_limit_is_rejected(single: Make, limit: object) -> None:
    """The error for an invalid limit shows it."""
    with pytest.raises(ConfigValueError, match="resource_limit must be"):
        single(env={"resource_limit": limit})


# ---- seeds ---------------------------------------------------------------------------------------------------------


def test_the_seed_seeds_all_generators(single: Make) -> None:
    """The seed is used for Python, NumPy and torch."""
    strategy = single(seed=7)
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert drawn == (random.random(), np.random.rand(), torch.rand(()).item())
    assert strategy.seed == 7
    assert strategy.randomness["seed"] == 7


def test_without_a_seed_each_run_generates_one(single: Make) -> None:
    """Without a seed, each run generates a different one."""
    assert single(seed=None).seed != single(seed=None).seed


def test_the_given_settings_are_not_modified(single: Make) -> None:
    """``env_kwargs`` are not modified, even if a seed is generated."""
    env = {"randomness": {"seed": None}, "mp_cfg": {"opencv_num_threads": 0}, "dist_cfg": {"timeout": 5}}
    single(env=env)
    assert env == {"randomness": {"seed": None}, "mp_cfg": {"opencv_num_threads": 0}, "dist_cfg": {"timeout": 5}}


def test_randomness_is_given_as_a_copy(single: Make) -> None:
    """The ``randomness`` property returns a copy."""
    strategy = single(seed=3)
    strategy.randomness["seed"] = 9
    assert strategy.randomness["seed"] == 3


# ---- names and folders ---------------------------------------------------------------------------------------------


def test_the_names_of_a_run(single: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """work_dir is absolute, log_dir is a subfolder named after the time, and the experiment name ends with the time."""
    monkeypatch.chdir(tmp_path)
    strategy = single(Path("runs/a"), experiment_name="digits")
    assert re.fullmatch(r"\d{8}_\d{6}", strategy.timestamp)
    assert strategy.work_dir == str(tmp_path / "runs" / "a")
    assert strategy.log_dir == str(tmp_path / "runs" / "a" / strategy.timestamp)
    assert Path(strategy.log_dir).is_dir()
    assert strategy.experiment_name == f"digits_{strategy.timestamp}"


def test_a_run_without_a_name_is_named_after_its_time(single: Make) -> None:
    """The default experiment name is the timestamp."""
    strategy = single()
    assert strategy.experiment_name == strategy.timestamp


def test_the_log_file_is_named_after_the_time(single: Make) -> None:
    """The logger has the experiment's name and appends to <log_dir>/<timestamp>.log."""
    strategy = single(experiment_name="digits")
    strategy.logger.info("hello")
    file = Path(strategy.log_dir) / f"{strategy.timestamp}.log"
    assert strategy.logger.name == strategy.experiment_name
    assert file.read_text().count("hello") == 1
    again = strategy.build_logger()
    again.info("again")
    again.close()
    assert [word in file.read_text() for word in ("hello", "again")] == [True, True]


def test_the_logger_uses_log_kwargs(single: Make, tmp_path: Path) -> None:
    """``log_kwargs`` set the level, the file, its mode and the name."""
    file = tmp_path / "own.log"
    file.write_text("old\n")
    strategy = single(log_kwargs={"log_level": "ERROR", "log_file": str(file), "file_mode": "w", "name": "mine"})
    strategy.logger.warning("quiet")
    strategy.logger.error("loud")
    assert strategy.logger.name == "mine"
    assert "quiet" not in file.read_text()
    assert "old" not in file.read_text()
    assert "loud" in file.read_text()


@pytest.mark.parametrize(
    "name",
    [
        *("work_dir", "log_dir", "experiment_name", "timestamp", "launcher", "distributed"),
        *("rank", "world_size", "seed", "randomness", "world"),
    ],
)
def test_properties_are_read_only(single: Make, name: str) -> None:
    """Properties such as rank cannot be assigned."""
    with pytest.raises(AttributeError):
        setattr(single(), name, None)


def test_a_work_dir_below_a_file_is_rejected(tmp_path: Path) -> None:
    """The error for a work_dir below a file contains the path and the reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkDirError, match=r"work_dir: .*file/run cannot be created: Not a directory"):
        SingleDeviceStrategy(work_dir=tmp_path / "file" / "run")


# ---- the end -------------------------------------------------------------------------------------------------------


def test_close_is_idempotent(single: Make) -> None:
    """A second ``close`` does not change settings that were made after the first."""
    strategy = single(env={"cudnn_benchmark": True})
    strategy.close()
    torch.backends.cudnn.benchmark = True
    strategy.close()
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False


@pytest.mark.usefixtures("no_start_method")
def test_a_failed_construction_restores_the_process(tmp_path: Path) -> None:
    """If construction fails, all settings are restored."""
    for bad in ({"env": {"resource_limit": "many"}}, {"log_kwargs": {"log_level": "LOUD"}}, {"seed": -1}):
        with pytest.raises(ConfigValueError):
            make("single", tmp_path, **{**bad, "env": {"cudnn_benchmark": True, **bad.get("env", {})}})
        assert not torch.backends.cudnn.benchmark
        assert multiprocessing.get_start_method(allow_none=True) is None


def test_the_environment_report_of_a_run(single: Make) -> None:
    """``collect_env`` returns one dict for the machine and one for the run."""
    strategy = single(seed=5, env={"resource_limit": 1})
    system, runtime = strategy.collect_env()
    assert system["PyTorch"] == torch.__version__
    assert (runtime["resource_limit"], runtime["seed"]) == (1, 5)
    assert runtime["Distributed launcher"] == "none"
    assert (runtime["Distributed training"], runtime["GPU number"]) == (False, 1)


# ---- two ranks -----------------------------------------------------------------------------------------------------


def facts_of_a_rank(folder: str) -> dict[str, Any]:
    """Return the attributes of a DDPStrategy on this rank, without a seed and with seeds that differ by rank."""
    os.environ.pop("OMP_NUM_THREADS", None)
    strategy = make("ddp", folder, seed=None, experiment_name="two")
    lines = Lines(strategy)
    strategy.logger.info("only rank 0 has a file")
    facts = {
        "world": (strategy.launcher, strategy.distributed, strategy.rank, strategy.world_size),
        "same": (strategy.timestamp, strategy.experiment_name, strategy.log_dir, strategy.seed),
        "drawn": torch.rand(()).item(),
        "file": strategy.logger.log_file is not None,
        "lines": lines.lines,
        "threads": os.environ["OMP_NUM_THREADS"],
    }
    strategy.close()
    facts["after"] = "OMP_NUM_THREADS" in os.environ, is_distributed()
    strategy = make("ddp", folder, env={"randomness": {"seed": 5, "diff_rank_seed": True}})
    facts["different"] = strategy.seed, torch.rand(()).item()
    strategy.close()
    try:
        make("single", folder)
    except PlacementError as error:
        facts["error_message"] = str(error)
    return facts


def test_ranks_agree_on_time_and_seed(ranks: Ranks, tmp_path: Path) -> None:
    """Time and seed are those of rank 0; with diff_rank_seed, the rank is added for the generators only."""
    one, other = ranks.run(facts_of_a_rank, str(tmp_path))
    assert (one["world"], other["world"]) == (("pytorch", True, 0, 2), ("pytorch", True, 1, 2))
    assert one["same"] == other["same"]
    assert one["drawn"] == other["drawn"]
    assert (one["different"][0], other["different"][0]) == (5, 5)
    drawn = [torch.rand((), generator=torch.Generator().manual_seed(seed)).item() for seed in (5, 6)]
    assert [one["different"][1], other["different"][1]] == drawn
    assert (one["file"], other["file"]) == (True, False)
    assert one["threads"] == "1"
    # The strategy did not create the process group, so it keeps it.
    assert one["after"] == (False, True)
    for facts in (one, other):
        assert "used with 2 processes, each of which would train a separate model" in facts["error_message"]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a single process that torchrun started; port 0 means any free port."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_a_group_created_by_the_strategy_is_destroyed(tmp_path: Path, alone: None) -> None:
    """``close`` destroys the process group that the strategy created, and no other."""
    strategy = DDPStrategy(work_dir=tmp_path, env_kwargs={"dist_cfg": {"timeout": 20, "backend": "gloo"}})
    assert is_distributed()
    assert (strategy.launcher, strategy.distributed, strategy.world_size) == ("pytorch", True, 1)
    strategy.close()
    assert not is_distributed()
    other = DDPStrategy(work_dir=tmp_path)
    strategy.close()
    assert is_distributed()
    other.close()
    assert not is_distributed()


def test_an_unknown_ddp_option_is_rejected(tmp_path: Path, alone: None) -> None:
    """An unknown DDP option raises an error with the closest name, and the created process group is destroyed."""
    with pytest.raises(ConfigKeyError, match=r"no option 'static_grph'. Did you mean 'static_graph'"):
        DDPStrategy(work_dir=tmp_path, ddp_kwargs={"static_grph": True})
    with pytest.raises(ConfigValueError, match=r"model_wrapper: unknown type 'seperate'. Did you mean 'separate'"):
        DDPStrategy(work_dir=tmp_path, model_wrapper="seperate")
    with pytest.raises(ConfigTypeError, match="model_wrapper must be .* got 3"):
        DDPStrategy(work_dir=tmp_path, model_wrapper=3)
    assert not is_distributed()
