"""Two GPUs with NCCL: equality with one GPU, time-outs, and ranks that exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor

from stratagem.dist import all_gather_object, all_reduce, get_rank
from stratagem.distributed.world import pick_device
from tests.gpu.devices import ON_CPU, require_gpus, require_torch
from tests.support.ranks import Ranks
from tests.support.sharded_runs import resumed, stopped, trained

# Twelve iterations in float32, with sums in another order; see tests/strategies/test_fsdp_equality.py for the CPU.
TOLERANCE = 3e-4
HALF = 6
ROOT = Path(__file__).parents[2]


def lenient(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function without turning warnings into errors; return its result with all tensors on the CPU."""
    warnings.simplefilter("default")
    return on_cpu(function(*args, **kwargs))


def on_cpu(value: Any) -> Any:
    """Return a value with all tensors on the CPU."""
    if isinstance(value, Mapping):
        return {name: on_cpu(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [on_cpu(part) for part in value]
    return value.cpu() if isinstance(value, Tensor) else value


def facts() -> tuple[str, str, float]:
    """Return the backend for the tensors of this rank's device, the device, and a sum over both ranks."""
    device = pick_device(int(os.environ["LOCAL_RANK"]))
    value = torch.full((3,), float(get_rank() + 1), device=device)
    all_reduce(value, "sum")
    group: Any = torch_dist.group.WORLD
    backend = str(group._get_backend(device).name()).lower()
    gathered = all_gather_object(get_rank())
    assert gathered == [0, 1]
    return backend, str(device), value[0].item()


def test_each_rank_has_its_gpu_and_nccl(two_gpus: Ranks) -> None:
    """Rank 0 uses the first GPU and rank 1 the second one, collectives use NCCL, and objects are exchanged as well."""
    expected = [("gloo", "cpu"), ("gloo", "cpu")] if ON_CPU else [("nccl", "cuda:0"), ("nccl", "cuda:1")]
    assert two_gpus.run(facts) == [(*each, 3.0) for each in expected]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one process on one device."""
    if not ON_CPU and not torch.cuda.is_available():
        return {}  # The tests that use them are skipped.
    torch.manual_seed(0)
    found: dict[str, Any] = on_cpu(trained("single", str(tmp_path_factory.mktemp("single"))))
    return found


def largest_difference(these: Mapping[str, Tensor], those: Mapping[str, Tensor]) -> float:
    """Return the largest difference between tensors with the same names."""
    assert these.keys() == those.keys()
    return max((tensor - those[name]).abs().max().item() for name, tensor in these.items())


@pytest.mark.parametrize("placement", ["DDP x2", "FSDP x2", "TP x2"])
def test_two_gpus_train_like_one(two_gpus: Ranks, alone: dict[str, Any], tmp_path: Path, placement: str) -> None:
    """Initial weights have the same bits; losses, norms, weights and moments after twelve iterations are nearly equal."""
    if placement != "DDP x2":
        require_torch(2, 13)
    both = two_gpus.run_within(180, lenient, trained, placement, str(tmp_path))
    means = [sum(losses) / 2 for losses in zip(both[0]["losses"], both[1]["losses"], strict=True)]
    for rank in both:
        assert all(torch.equal(rank["first"][name], alone["first"][name]) for name in alone["first"])
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-3)
        assert largest_difference(rank["last"], alone["last"]) < TOLERANCE
        assert largest_difference(rank["moments"], alone["moments"]) < TOLERANCE
    assert means == pytest.approx(alone["losses"], abs=TOLERANCE)


def in_two_parts(placement: str, folder: str, other: str) -> dict[str, Any]:
    """Train the first half with a placement, and resume with another one."""
    stopped(placement, f"{folder}/one", f"{folder}/at", HALF)
    return resumed(other, f"{folder}/two", f"{folder}/at", HALF)


@pytest.mark.parametrize(("first", "second"), [("FSDP x2", "FSDP x2"), ("DDP x2", "FSDP x2")])
def test_a_checkpoint_of_two_gpus_resumes(
    two_gpus: Ranks, alone: dict[str, Any], tmp_path: Path, first: str, second: str
) -> None:
    """A run that is resumed in the middle, also with another placement, ends with the weights of one GPU."""
    require_torch(2, 13)
    both = two_gpus.run_within(180, lenient, in_two_parts, first, str(tmp_path), second)
    for rank in both:
        assert largest_difference(rank["last"], alone["last"]) < TOLERANCE


def start(tmp_path: Path, how: str, *options: str) -> tuple[int, str, float]:
    """Train with ``stratagem train --nproc 2`` until rank 1 fails; return the exit code, the output and the seconds."""
    parts = ROOT / "tests" / "cli"
    command = [
        *(sys.executable, "-m", "stratagem", "train", str(parts / "toy_config.py"), "--nproc", "2"),
        *("--set", "train_cfg.max_epochs=12", "--set", "train_cfg.val_interval=120", "--work-dir", "run"),
        *("--set", f"custom_hooks=[{{'type': 'FailOnce', 'how': '{how}', 'rank': 1}}]", *options),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(parts)]), "NO_COLOR": "1"}
    began = time.monotonic()
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout, time.monotonic() - began


@pytest.fixture
def _two_devices() -> None:
    """Skip the test unless two ranks can have a GPU each. tests/cli has the same tests for the CPU."""
    require_gpus(2)


@pytest.mark.usefixtures("_two_devices")
def test_a_rank_that_hangs_times_out(tmp_path: Path) -> None:
    """With a time-out of 10 s, the run ends with an error on all ranks although one of them waits forever."""
    status, output, seconds = start(tmp_path, "hang", "--set", "env_cfg.dist_cfg.timeout=10")
    # Either the error of a collective, or the watchdog of NCCL, which ends the process (SIGABRT).
    assert status != 0, output
    assert seconds < 180
    assert "timeout of NCCL's watchdog" in output or "rank 1: 6 iterations completed" in output, output
    stacks = [path.read_text() for path in tmp_path.glob("run/*/stacks_rank1.txt")]
    assert any("toy_parts.py" in text for text in stacks), output


@pytest.mark.usefixtures("_two_devices")
def test_a_killed_rank_ends_the_run(tmp_path: Path) -> None:
    """If one rank is killed, the other one does not wait for the time-out of NCCL, and the message names the rank."""
    status, output, seconds = start(tmp_path, "SIGKILL")
    assert status == 128 + signal.SIGKILL, output
    assert seconds < 120
    assert output.splitlines()[-1] == "stratagem: rank 1 of 2 was killed by SIGKILL."
