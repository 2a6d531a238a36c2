"""Stop a rank in another collective each time, and check that the report names the collective, the ranks and the lines.

``make hangs`` runs all cases; ``python tests/support/hang_sweep.py CASE ...`` runs some of them.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, NoReturn, final

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stratagem.dist import World, all_gather_object, all_reduce, close_dist, init_dist
from stratagem.parallel.fsdp.mesh import Layout, Meshes
from stratagem.train.run.rank_guard import RankGuard
from stratagem.utils.processes import is_stopped

TIMEOUT_S: Final = 8.0
_DEADLINE_S: Final = 90.0


def hang() -> NoReturn:
    """Never return."""
    while True:
        time.sleep(0.1)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A function in which ranks do not call the same collectives.

    In the source of the function, the line that ends with ``# waits`` is where ranks wait, and the one that ends with
    ``# stuck`` is where another rank is.

    Attributes:
        function: the function, which all ranks call with their rank.
        size: the number of ranks.
        reported: regular expressions of which the report must contain each.
    """

    function: Callable[[int], object]
    size: int
    reported: Sequence[str]

    def expected(self) -> list[str]:
        """Return all regular expressions, including those of the lines."""
        source, first = inspect.getsourcelines(self.function)
        marked = [first + i for i, line in enumerate(source) if line.rstrip().endswith(("# waits", "# stuck"))]
        return [*self.reported, *(rf"hang_sweep\.py:{line} in " for line in marked)]


CASES: dict[str, Case] = {}


def case(size: int, *reported: str) -> Callable[[Callable[[int], object]], Callable[[int], object]]:
    """Add a function to the cases."""

    def add(function: Callable[[int], object]) -> Callable[[int], object]:
        CASES[function.__name__] = Case(function=function, size=size, reported=reported)
        return function

    return add


def ones(*shape: int) -> Tensor:
    """Return a tensor of ones."""
    return torch.ones(*(shape or (4,)))


# ---- one rank does not arrive -------------------------------------------------------------------------------------


@case(2, r"rank 1 did not join barrier number \d+ of the default group, in which rank 0 waits at ")
def barrier(rank: int) -> None:
    if rank == 1:
        hang()  # stuck
    dist.barrier()  # waits


@case(2, r"rank 0 did not join broadcast number \d+ of the default group with float32\[4\], in which rank 1 waits")
def broadcast_without_its_source(rank: int) -> None:
    if rank == 0:
        hang()  # stuck
    dist.broadcast(ones(), 0)  # waits


@case(
    3, r"rank 2 did not join all_gather_object number \d+ of the default group with int64\[1\]", r"ranks 0-1 wait at "
)
def objects(rank: int) -> None:
    if rank == 2:
        hang()  # stuck
    all_gather_object({"rank": rank})  # waits


@case(3, r"rank 0 did not join all_reduce number \d+ of the default group with float64\[2, 3\]", r"ranks 1-2 wait at ")
def rank_0_is_missing(rank: int) -> None:
    if rank == 0:
        hang()  # stuck
    all_reduce(torch.ones(2, 3, dtype=torch.float64))  # waits


@case(4, r"ranks 1-2 did not join all_reduce number \d+", r"ranks 0, 3 wait at ")
def two_ranks_are_missing(rank: int) -> None:
    if rank in (1, 2):
        hang()  # stuck
    all_reduce(ones())  # waits


@case(2, r"rank 1 did not join reduce number \d+ of the default group with float32\[4\]")
def reduce(rank: int) -> None:
    if rank == 1:
        hang()  # stuck
    dist.reduce(ones(), 0)  # waits


@case(2, r"rank 0 did not join scatter number \d+ of the default group")
def scatter(rank: int) -> None:
    if rank == 0:
        hang()  # stuck
    dist.scatter(ones(), None, 0)  # waits


@case(2, r"rank 1 did not join gather number \d+ of the default group with float32\[4\]")
def gather(rank: int) -> None:
    if rank == 1:
        hang()  # stuck
    dist.gather(ones(), [ones(), ones()])  # waits


@case(2, r"rank 1 did not join all_to_all_single number \d+ of the default group with float32\[4\]")
def all_to_all(rank: int) -> None:
    if rank == 1:
        hang()  # stuck
    dist.all_to_all_single(ones(), ones())  # waits


@case(2, r"rank 1 did not join reduce_scatter_single number \d+ of the default group with float32\[4\]")
def reduce_scatter(rank: int) -> None:
    if rank == 1:
        hang()  # stuck
    dist.reduce_scatter_single(ones(2), ones())  # waits


@case(2, r"rank 1 did not join all_reduce number \d+ of the default group with float32\[4\]")
def asynchronous(rank: int) -> None:
    if rank == 1:
        hang()  # stuck
    work = dist.all_reduce(ones(), async_op=True)  # waits
    work.wait()


@case(3, r"rank 1 did not join all_reduce number \d+ of the default group", r"Rank 1 is at ")
def not_even_its_data(rank: int) -> None:
    for _ in range(3):
        if rank == 1:
            multiprocessing.Queue().get()  # stuck
        all_reduce(ones())  # waits


@case(
    2, r"rank 0 waits at .* in all_reduce number \d+ of the default group with float32\[4\], and rank 1 did not respond"
)
def a_stopped_process(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    all_reduce(ones())  # waits


# ---- the layers and strategies of a training ----------------------------------------------------------------------


class SyncedNorm(nn.Module):
    """A normalization with the mean of all ranks, like SyncBatchNorm."""

    def forward(self, inputs: Tensor) -> Tensor:
        mean = inputs.detach().mean(0)
        if dist.get_rank() == 1 and stops:
            hang()
        dist.all_reduce(mean)
        return inputs - mean / dist.get_world_size()


stops: list[bool] = []


def network() -> nn.Sequential:
    """Return a model with two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@case(
    2,
    r"rank 1 did not join all_reduce number \d+ of the default group with float32\[4\]",
    "hang_sweep.py:.* in forward",
)
def forward_of_a_synced_norm(rank: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), SyncedNorm(), nn.Linear(4, 2))
    replica = DistributedDataParallel(model)
    for i in range(3):
        if i == 2:
            stops.append(True)
        replica(ones(3, 4)).sum().backward()


def hang_in_backward(rank: int, tensor: Tensor) -> None:
    """Never return from the gradient of a tensor on one rank."""

    def stop(gradient: Tensor) -> Tensor:
        return hang() if dist.get_rank() == rank else gradient

    tensor.register_hook(stop)


@case(2, r"rank 1 did not join all_reduce number \d+ of the default group with float32\[30\]")
def gradients_under_ddp(rank: int) -> None:
    replica = DistributedDataParallel(network())
    replica(ones(3, 4)).sum().backward()
    output = replica(ones(3, 4))
    hang_in_backward(1, output)
    output.sum().backward()  # waits


@case(2, r"rank 1 did not join (all_gather_into_tensor|all_gather_single|_allgather_base|all_gather) number \d+ of ")
def parameters_under_fsdp(rank: int) -> None:
    model = network()
    fully_shard(model)
    model(ones(3, 4)).sum().backward()
    if rank == 1:
        hang()  # stuck
    model(ones(3, 4))  # waits


@case(2, r"rank 1 did not join reduce_scatter\w* number \d+ of ")
def gradients_under_fsdp(rank: int) -> None:
    model = network()
    fully_shard(model)
    output = model(ones(3, 4))
    hang_in_backward(1, output)
    output.sum().backward()  # waits


@case(
    4,
    r"rank 3 did not join reduce_scatter\w* number \d+ of group 'mesh_shard' \(ranks 2-3\)",
    "ranks? 0(-1)? waits? in other",
)
def gradients_under_hsdp(rank: int) -> None:
    model = network()
    fully_shard(
        model,
        mesh=Meshes.make(
            Layout(replicate=2, shard=2, tp=1), World(launcher="pytorch", rank=rank, local_rank=rank, size=4)
        ).shard,
    )
    output = model(ones(3, 4))
    hang_in_backward(3, output)
    output.sum().backward()  # waits


@case(
    4,
    r"rank 2 did not join all_reduce number \d+ of group 'mesh_tp' \(ranks 2-3\) with float32\[4\], in which rank 3 waits",
)
def a_tensor_parallel_group(rank: int) -> None:
    meshes = Meshes.make(
        Layout(replicate=1, shard=2, tp=2), World(launcher="pytorch", rank=rank, local_rank=rank, size=4)
    )
    for i in range(3):
        if rank == 2 and i == 2:
            hang()  # stuck
        dist.all_reduce(ones(), group=meshes.tp.get_group())  # waits
        dist.all_reduce(ones(), group=meshes.shard.get_group())


# ---- ranks call different collectives -----------------------------------------------------------------------------


@case(
    3,
    r"different collectives as number \d+ of the default group: ranks 0, 2 called all_reduce with .*, but rank 1 called barrier",
)
def another_collective(rank: int) -> None:
    if rank == 1:
        dist.barrier()  # stuck
    all_reduce(ones())  # waits


@case(
    3,
    r"different collectives as number \d+ of the default group: ranks 0, 2 called all_reduce .*, but rank 1 called broadcast ",
    r"They first called from different places as number \d+: ranks 0, 2 at .*; rank 1 at ",
)
def a_skipped_collective(rank: int) -> None:
    for i in range(4):
        if not (rank == 1 and i == 2):
            all_reduce(ones())  # waits
        all_reduce(ones())
    dist.broadcast(ones(), 0)  # stuck


@case(
    2,
    r"wait for each other in different collectives: rank 0 in all_reduce number 1 of .*; rank 1 in barrier number \d+ of ",
)
def another_group(rank: int) -> None:
    group = dist.new_group([0, 1])
    if rank == 0:
        dist.all_reduce(ones(), group=group)  # waits
    dist.barrier()  # stuck


@case(
    3,
    r"ranks 0, 2 called all_reduce with float32\[6\] at .*, but rank 1 called all_reduce with float32\[4\]|rank 1 exited",
)
def a_larger_tensor(rank: int) -> None:
    # Depending on which message arrives first, Gloo ends the process of rank 1, or the other ranks time out.
    all_reduce(ones(4 if rank == 1 else 6))  # waits


@case(2, r"because rank 1 exited: .* This rank waited in all_reduce number \d+ of the default group with float32\[6\]")
def a_tensor_that_gloo_aborts(rank: int) -> None:
    all_reduce(ones(4 if rank == 1 else 6))  # waits


# ---- the sweep ----------------------------------------------------------------------------------------------------


def _run_rank(name: str, rank: int, port: int, folder: str) -> None:
    size = CASES[name].size
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    output = os.open(f"{folder}/output_rank{rank}.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    init_dist("pytorch", timeout=TIMEOUT_S)
    with RankGuard(lambda: 0, folder).monitored():
        CASES[name].function(rank)
    close_dist()


def run(name: str) -> tuple[str, list[str]]:
    """Run a case; return the output of all ranks, and the expressions that it does not contain."""
    context: Any = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory(prefix="stratagem-hang-") as folder,
        socket.create_server(("127.0.0.1", 0)) as free,
    ):
        port = free.getsockname()[1]
        free.close()
        processes = [
            context.Process(target=_run_rank, args=(name, rank, port, folder)) for rank in range(CASES[name].size)
        ]
        for process in processes:
            process.start()
        _wait(processes)
        output = "\n".join(path.read_text() for path in sorted(Path(folder).glob("output_rank*.txt")))
        details = Path(folder, "hang.txt")
        output += f"\n--- hang.txt\n{details.read_text()}" if details.exists() else ""
    return output, [each for each in CASES[name].expected() if not re.search(each, output)]


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Wait until all processes have ended; kill one that is stopped when all others have, as a launcher does."""
    end = time.monotonic() + _DEADLINE_S
    while time.monotonic() < end:
        alive = [process for process in processes if process.is_alive()]
        if all(process.pid is not None and is_stopped(process.pid) for process in alive):
            break
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.join()


def main() -> int:
    """Run the named cases, or all; return 1 if a report is incomplete."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or list(CASES)
    failed = 0
    for name in names:
        begin = time.monotonic()
        output, lacking = run(name)
        console.print(f"{'ok' if not lacking else 'FAILED':7}{name} ({time.monotonic() - begin:.1f} s)")
        failed += bool(lacking)
        if lacking or "--verbose" in sys.argv:
            console.print("\n".join([*(f"    not reported: {each}" for each in lacking), output]))
    console.print(
        f"{len(names) - failed} of {len(names)} hangs were reported with the collective, the ranks and the lines"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
