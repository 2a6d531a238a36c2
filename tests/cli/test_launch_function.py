"""``stratagem.launch`` calls a function as several ranks."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import stratagem
from stratagem.cli.launch import functions
from stratagem.cli.launch.processes import RankExitError
from stratagem.dist import get_rank, init_dist
from stratagem.errors import ConfigTypeError, LaunchedRankError, LaunchError, MissingDependencyError
from tests.support.ranks import scripts_environment


class OwnError(Exception):
    """An exception that can be pickled."""


def sum_of_ranks(offset: int, *, factor: int = 1) -> tuple[int, int, str]:
    """Add the ranks with a collective; return the rank, the sum, and the address at which the ranks met."""
    init_dist("pytorch")
    import torch

    value = torch.tensor(get_rank() + offset)
    dist.all_reduce(value)
    return get_rank(), int(value) * factor, os.environ["MASTER_ADDR"]


def fail_on_rank_1() -> None:
    """Raise on rank 1, while rank 0 waits."""
    if os.environ["RANK"] == "0":
        time.sleep(60)
    raise OwnError("the numbers do not add up")


@pytest.mark.slow
def test_each_rank_returns_its_result() -> None:
    """Arguments reach all ranks, which are connected over loopback; the environment and signal handlers are as before."""
    environ, handlers = dict(os.environ), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert stratagem.launch(sum_of_ranks, 10, nproc=2, factor=3) == [(0, 63, "127.0.0.1"), (1, 63, "127.0.0.1")]
    assert dict(os.environ) == environ
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.slow
def test_an_exception_of_a_rank_is_raised_with_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    """The error has the rank, the traceback up to the failing line, and the exception as its cause; nothing else is printed."""
    begin = time.monotonic()
    with pytest.raises(
        LaunchedRankError, match=r"Rank 1 of 2 raised OwnError: the numbers do not add up\.\n"
    ) as raised:
        stratagem.launch(fail_on_rank_1, nproc=2)
    assert "test_launch_function.py" in str(raised.value)
    assert "in fail_on_rank_1" in str(raised.value)
    assert isinstance(raised.value.__cause__, OwnError)
    # Rank 0 was stopped instead of being waited for.
    assert time.monotonic() - begin < 50
    assert capfd.readouterr() == ("", "")


def test_a_killed_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a rank was killed, the error names it and its signal, although another rank failed because of that."""

    def run_ranks(nproc: int, arguments: tuple[str, ...], *, max_restarts: int) -> None:
        error = {"time": 1.0, "type": "RuntimeError", "message": "Connection closed", "traceback": ""}
        functions.error_file(Path(arguments[-1]), 0).write_text(json.dumps({**error, "reports_another_rank": False}))
        raise RankExitError("rank 1 of 2 was killed by SIGKILL", 137, has_reported=False)

    monkeypatch.setattr(functions, "run_ranks", run_ranks)
    expected = "Rank 1 of 2 was killed by SIGKILL. Rank 0 raised RuntimeError: Connection closed"
    with pytest.raises(LaunchedRankError, match=re.escape(expected)):
        stratagem.launch(fail_on_rank_1, nproc=2)


def test_restarts_are_passed_to_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher restarts the ranks as often as requested, and the results of the last attempt are returned."""
    restarts: list[int] = []

    def run_ranks(nproc: int, arguments: tuple[str, ...], *, max_restarts: int) -> None:
        restarts.append(max_restarts)
        for rank in range(nproc):
            functions.result_file(Path(arguments[-1]), rank).write_bytes(pickle.dumps(rank * 10))

    monkeypatch.setattr(functions, "run_ranks", run_ranks)
    assert stratagem.launch(print, nproc=2, max_restarts=3) == [0, 10]
    assert restarts == [3]


SCRIPT = """
import os, sys, time
import stratagem


class Answer:
    def __init__(self, rank):
        self.rank = rank


def answer(delay):
    print("started", flush=True)
    time.sleep(delay)
    return Answer(int(os.environ["RANK"]))


if __name__ == "__main__":
    print([type(each).__name__ + str(each.rank) for each in stratagem.launch(answer, float(sys.argv[1]), nproc=2)])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A script that launches its own functions."""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    return file


def run(script: Path, *arguments: str, interrupt: bool = False) -> tuple[int, str]:
    """Run a script; return its exit status and output. Optionally interrupt it once its ranks have started."""
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=scripts_environment(),
        cwd=script.parent,
    )
    printed = ""
    if interrupt:
        while printed.count("started") < 2:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    return process.returncode, printed + output


@pytest.mark.slow
def test_a_script_launches_its_own_functions(script: Path) -> None:
    """Functions and classes of the main module need no package: the ranks import the script."""
    status, output = run(script, "0")
    assert status == 0, output
    assert "['Answer0', 'Answer1']" in output


def test_launches_cannot_be_nested(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch in a rank is rejected, and the error mentions the guard that a script may lack."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(LaunchError, match=r"launcher \(pytorch\) has started as rank 1.*if __name__ == '__main__'"):
        stratagem.launch(print, nproc=2)


@pytest.mark.slow
def test_ctrl_c_stops_the_ranks(script: Path) -> None:
    """After SIGINT, the ranks are shut down, and the caller gets a KeyboardInterrupt."""
    begin = time.monotonic()
    status, output = run(script, "100", interrupt=True)
    assert output.rstrip().endswith("KeyboardInterrupt"), output
    assert status in (130, -signal.SIGINT)
    assert time.monotonic() - begin < 90


def test_a_function_that_cannot_be_imported_needs_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cloudpickle, a nested function is rejected with the package to install and the alternative."""

    def missing(name: str, **_: Any) -> Any:
        raise MissingDependencyError(name)

    monkeypatch.setattr(functions, "import_module", missing)
    with pytest.raises(
        MissingDependencyError,
        match=r"<lambda> requires .*cloudpickle.*pip install stratagem\[notebook\].*top level of a module",
    ):
        stratagem.launch(lambda: None, nproc=2)
    exec("def cell(): pass", sys.modules["__main__"].__dict__)
    cell = sys.modules["__main__"].__dict__.pop("cell")
    monkeypatch.setattr(sys.modules["__main__"], "cell", cell, raising=False)
    with pytest.raises(MissingDependencyError, match="defined in a notebook or an interactive session"):
        functions.dump(cell, allow_main=False)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((3,), {"nproc": 2}, "expected a function, got 3"),
        ((print,), {"nproc": 0}, "nproc must be an integer >= 1, got 0"),
        ((print,), {"nproc": True}, "nproc must be an integer >= 1, got True"),
        ((print,), {"nproc": 2, "max_restarts": -1}, "max_restarts must be an integer >= 0, got -1"),
    ],
)
def test_wrong_arguments_are_rejected(arguments: tuple[Any, ...], options: dict[str, Any], text: str) -> None:
    """Invalid arguments raise an error before any process starts."""
    with pytest.raises(ConfigTypeError, match=text):
        stratagem.launch(*arguments, **options)


def test_other_threads_cannot_launch() -> None:
    """Only the main thread receives signals, so other threads are rejected."""
    errors: list[LaunchError] = []

    def call() -> None:
        with pytest.raises(LaunchError, match="thread 'second', but only the main thread") as raised:
            stratagem.launch(print, nproc=2)
        errors.append(raised.value)

    thread = threading.Thread(target=call, name="second")
    thread.start()
    thread.join()
    assert len(errors) == 1
