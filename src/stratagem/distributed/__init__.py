"""Distributed processes: launch environments, rendezvous, collectives and failure detection."""

from stratagem.distributed.agreement import EventAgreement
from stratagem.distributed.async_reduce import AsyncMaxReduce
from stratagem.distributed.check_agreement import CheckAgreement
from stratagem.distributed.collectives import (
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    gather,
    get_backend,
    get_dist_info,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
    master_only,
    start_sum,
    sync_random_seed,
)
from stratagem.distributed.health.hang_report import HangReport, report_hang, report_wait
from stratagem.distributed.health.process_identity import ProcessIdentity
from stratagem.distributed.health.rank_monitor import Failure, RankMonitor
from stratagem.distributed.means import mean_by_name
from stratagem.distributed.objects import (
    all_gather_object,
    broadcast_object,
    broadcast_object_list,
    collect_results,
    gather_object,
)
from stratagem.distributed.rank_group import SINGLE_PROCESS, RankGroup
from stratagem.distributed.rendezvous.launch import (
    LAUNCHERS,
    RAY_JOB_VARIABLE,
    Launch,
    check_launcher,
    describe_incomplete_launch_env,
    describe_launcher,
    infer_launcher,
    read_launch,
)
from stratagem.distributed.rendezvous.process_group import check_dist_arguments, close_dist, init_dist
from stratagem.distributed.stop_agreement import StopAgreement, StopRequest
from stratagem.distributed.world import World, current_device, pick_device

__all__ = [
    "SINGLE_PROCESS",
    "RankGroup",
    "LAUNCHERS",
    "AsyncMaxReduce",
    "CheckAgreement",
    "EventAgreement",
    "Failure",
    "HangReport",
    "RAY_JOB_VARIABLE",
    "Launch",
    "ProcessIdentity",
    "RankMonitor",
    "StopAgreement",
    "StopRequest",
    "World",
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_object_list",
    "check_dist_arguments",
    "check_launcher",
    "close_dist",
    "collect_results",
    "describe_incomplete_launch_env",
    "describe_launcher",
    "gather",
    "gather_object",
    "get_backend",
    "get_dist_info",
    "get_rank",
    "get_world_size",
    "infer_launcher",
    "init_dist",
    "is_distributed",
    "is_main_process",
    "master_only",
    "mean_by_name",
    "current_device",
    "pick_device",
    "read_launch",
    "report_hang",
    "report_wait",
    "start_sum",
    "sync_random_seed",
]
