"""How many process groups runs create, with which timeouts, and which collectives an iteration takes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from stratagem import Runner
from stratagem.distributed import AsyncMaxReduce, RankGroup, World
from stratagem.distributed import cpu_groups as groups
from stratagem.distributed.shared_groups import forget_shared_groups
from stratagem.model import BaseModel
from stratagem.parallel.fsdp.mesh import Layout, Meshes
from stratagem.train import Hook
from stratagem.utils.torch_private import default_store, flight_record
from tests.support.ranks import Ranks

_COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "gather", "gather_object", "barrier",
)  # fmt: skip


class Model(BaseModel):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor, mode: str = "tensor") -> Any:
        outputs = self.layer(inputs)
        return {"loss": outputs.square().mean()} if mode == "loss" else outputs


class Counter(Hook):
    """Counts the collectives between the end of the second iteration and the end of the last but one."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._counting = False
        for name in _COLLECTIVES:
            setattr(torch_dist, name, self._counted(name, getattr(torch_dist, name)))

    def _counted(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._counting:
                self.calls.append(name)
            return function(*args, **kwargs)

        counted.original = function  # type: ignore[attr-defined]
        return counted

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._counting = 2 <= run.iter + 1 < 9

    def restore(self) -> None:
        """Remove the counting."""
        for name in _COLLECTIVES:
            setattr(torch_dist, name, getattr(torch_dist, name).original)


def groups_of_run(folder: str, *, interval: int, asynchronous: bool) -> tuple[list[timedelta | None], list[str], int]:
    """Train under DDP; return the timeouts of new groups, the collectives of iterations, and the number of groups left."""
    created: list[timedelta | None] = []
    new_group = torch_dist.new_group

    def recorded(*args: Any, **kwargs: Any) -> Any:
        created.append(kwargs.get("timeout"))
        return new_group(*args, **kwargs)

    torch_dist.new_group = recorded
    counter = Counter()
    before = len(torch_dist.distributed_c10d._world.pg_map)
    try:
        checkpoint = {"by_epoch": False, "interval": interval, "async_save": asynchronous}
        runner = Runner(
            model=Model(),
            work_dir=folder,
            strategy={"type": "DDPStrategy"},
            train_dataloader={"dataset": list(torch.randn(40, 4)), "batch_size": 2},
            train_cfg={"by_epoch": False, "max_iters": 10},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
            default_hooks={"checkpoint": checkpoint, "logger": {"interval": 100}},
            custom_hooks=[counter],
            log_level="ERROR",
        )
        runner.train()
        runner.close()
    finally:
        counter.restore()
        torch_dist.new_group = new_group
    return created, counter.calls, len(torch_dist.distributed_c10d._world.pg_map) - before


@pytest.mark.slow
def test_a_run_creates_one_group_for_asynchronous_saves_and_destroys_it(ranks: Ranks, tmp_path: Path) -> None:
    """The writer threads of asynchronous saves share a group, which has the timeout of the run and is destroyed at the end."""
    timeout = ranks.run(timeout_of_default_group)[0]
    for created, _, left in ranks.run(groups_of_run, str(tmp_path), interval=5, asynchronous=True):
        assert created == [timeout]
        assert left == 0


@pytest.mark.slow
def test_iterations_under_ddp_take_no_collectives_besides_those_of_the_gradients(ranks: Ranks, tmp_path: Path) -> None:
    """Between log lines and saves, neither signals nor timers nor hooks communicate, and they need no groups."""
    for created, calls, _ in ranks.run(groups_of_run, str(tmp_path), interval=100, asynchronous=False):
        assert calls == []
        assert created == []


def groups_after_runs(folder: str, strategy: dict[str, Any]) -> list[int]:
    """Train three times with a strategy; return the number of process groups after each run."""
    counts = []
    for number in range(3):
        runner = Runner(
            model=Model(),
            work_dir=f"{folder}/{number}",
            strategy=strategy,
            train_dataloader={"dataset": list(torch.randn(8, 4)), "batch_size": 2},
            train_cfg={"by_epoch": False, "max_iters": 2},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
            log_level="ERROR",
        )
        runner.train()
        runner.close()
        counts.append(len(torch_dist.distributed_c10d._world.pg_map))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"replicate": 2}, {"tp": 2, "tp_plan": {"layer": "colwise_gather"}}],
    ids=["shards", "replicas", "tensor parallelism"],
)
def test_runs_in_a_loop_share_the_groups_of_their_device_mesh(
    ranks: Ranks, tmp_path: Path, options: dict[str, Any]
) -> None:
    """K folds or a sweep in one program do not accumulate groups, each of which has threads and buffers."""
    for first, second, third in ranks.run(groups_after_runs, str(tmp_path), {"type": "FSDPStrategy", **options}):
        assert first == second == third


def timeout_of_default_group() -> timedelta:
    """Return the timeout with which the ranks created the default group."""
    timeout: timedelta = default_store().timeout
    return timeout


def shared_group() -> list[Any]:
    """Use two reductions in a default group that seems to support only CUDA; return their group and the results."""
    supported, groups.served_devices = groups.served_devices, lambda *_: {"cuda"}
    try:
        reductions = [AsyncMaxReduce(), AsyncMaxReduce()]
        for number, reduction in enumerate(reductions):
            reduction.start(number + torch_dist.get_rank())
        same = reductions[0]._group is reductions[1]._group and reductions[0]._group is not None
        return [same, *(reduction.wait() for reduction in reductions)]
    finally:
        cpu = groups.shared_cpu_group()
        assert cpu is not None
        groups.destroy_group(cpu)
        forget_shared_groups()
        groups.served_devices = supported


@pytest.mark.slow
def test_all_reductions_share_one_cpu_group(ranks: Ranks) -> None:
    """If the default group supports only accelerators, all reductions on the CPU share a single additional group."""
    assert ranks.run(shared_group) == [[True, 1, 2]] * 2


def closed_twice() -> int:
    """Create and close a dedicated group; return how many groups are left."""
    before = len(torch_dist.distributed_c10d._world.pg_map)
    dedicated = RankGroup.of().dedicated_group()
    dedicated.run_all(torch_dist.get_rank)
    dedicated.close()
    return len(torch_dist.distributed_c10d._world.pg_map) - before


@pytest.mark.slow
def test_a_dedicated_group_is_destroyed(ranks: Ranks) -> None:
    """Closing a dedicated group removes it from torch's groups; the default group remains."""
    assert ranks.run(closed_twice) == [0, 0]
    assert ranks.run(torch_dist.get_world_size) == [2, 2]


def timeouts_of_mesh() -> list[int]:
    """Return the timeouts in milliseconds of collectives in the groups of a mesh."""
    rank = torch_dist.get_rank()
    meshes = Meshes.make(Layout(replicate=1, shard=1, tp=2), World(launcher="pytorch", rank=rank, size=2))
    for mesh in (meshes.shard, meshes.tp):
        torch_dist.all_reduce(torch.ones(1), group=mesh.get_group())
    return [entry["timeout_ms"] for entry in flight_record(stacks=False)[-2:]]


@pytest.mark.slow
def test_the_groups_of_a_mesh_have_the_timeout_of_the_run(ranks: Ranks) -> None:
    """A hang in a subgroup of HSDP or tensor parallelism is reported after the configured timeout, not after 30 minutes."""
    milliseconds = round(ranks.run(timeout_of_default_group)[0].total_seconds() * 1000)
    assert ranks.run(timeouts_of_mesh) == [[milliseconds] * 2] * 2
