"""Collect the records of all ranks after a timeout, and compare them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from stratagem.distributed.health.flight_record import RankRecord, read_rank_record
from stratagem.distributed.health.hang_analysis import describe_hang, describe_wait
from stratagem.distributed.health.rank_monitor import RankMonitor

__all__ = ["HangReport", "report_hang", "report_wait"]

# The seconds to wait for the record of a rank that responds, for one that does not, and for the result of the comparison.
_RECORD_S, _SILENT_RECORD_S, _RESULT_S = 40.0, 1.0, 90.0
# The seconds to wait until the other ranks have read the result, because the store may end together with this process.
_NEWS_S: Final = 1.5
_LAST_S: Final = 6.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class HangReport:
    """Which collective is incomplete, and which rank did not join it.

    Attributes:
        sentences: the result of the comparison; the first sentence is a summary.
        records: the records that were compared, on the rank that compared them; empty on the others.
    """

    sentences: Sequence[str]
    records: Mapping[int, RankRecord]

    def details(self) -> str:
        """Return the sentences, and the stack and the last collectives of each rank, as text."""
        lines = [*self.sentences]
        for rank, record in sorted(self.records.items()):
            lines += [
                "",
                f"Rank {rank}, main thread (most recent call last):",
                *(f"  {frame}" for frame in record.stack),
            ]
            lines += [f"Rank {rank}, process groups:"]
            lines += [
                f"  {name}: {description}, ranks {list(ranks)}" for name, (description, ranks) in record.groups.items()
            ]
            lines += [f"Rank {rank}, collectives (most recent last):"]
            lines += [
                f"  group {call.group}, number {call.number}: {call.function} {call.shape}"
                f" [{'finished' if call.finished else 'waiting'}] {call.place}"
                for call in record.collectives
            ]
        return "\n".join(lines) + "\n"


def report_hang(monitor: RankMonitor, error: BaseException | None = None) -> HangReport | None:
    """Return the report of a hang; None if it is not available in time.

    All ranks that can call it do so after one has reported a timeout. The first of them collects the records of the others.

    Args:
        monitor: the monitor of this rank.
        error: the error with which the main thread has left a collective; None if it may still be blocked.
    """
    compares = monitor.claim("hang/claimed")
    # The monitors of ranks that know of the failure send no more heartbeats.
    responding = monitor.responding_ranks() if compares else []
    record = read_rank_record(monitor.rank, monitor.size, error)
    monitor.publish(_record_key(monitor.rank), record.as_json())
    if not compares:
        result = monitor.wait_for("hang/result", _RESULT_S)
        monitor.publish(f"hang/read/{monitor.rank}", "")
        if monitor.rank == 0:  # The store may end together with this process.
            monitor.wait_for("hang/done", _LAST_S)
        return None if result is None else HangReport(sentences=json.loads(result), records={})
    records = {monitor.rank: record, **_collect(monitor, responding)}
    try:
        sentences = describe_hang(records)
    except Exception as failure:  # noqa: BLE001  # The timeout itself must still be reported.
        sentences = [f"the collectives of the ranks could not be compared ({type(failure).__name__}: {failure})"]
    monitor.publish("hang/result", json.dumps(sentences))
    for rank in records:
        if rank != monitor.rank:
            monitor.wait_for(f"hang/read/{rank}", _NEWS_S)
    monitor.publish("hang/done", "")
    return HangReport(sentences=sentences, records=records)


def report_wait(monitor: RankMonitor, error: BaseException | None = None) -> str:
    """Return a sentence about the collective in which this rank waits; empty if there is none.

    Args:
        monitor: the monitor of this rank.
        error: the error with which the main thread has left a collective; None if it may still be blocked.
    """
    return describe_wait(read_rank_record(monitor.rank, monitor.size, error, stacks=False))


def _collect(monitor: RankMonitor, responding: Collection[int]) -> dict[int, RankRecord]:
    """Return the records of the other ranks, without ranks that do not respond."""
    found = {}
    for rank in range(monitor.size):
        if rank != monitor.rank:
            text = monitor.wait_for(_record_key(rank), _RECORD_S if rank in responding else _SILENT_RECORD_S)
            if text is not None:
                found[rank] = RankRecord.from_json(text)
    return found


def _record_key(rank: int) -> str:
    return f"hang/record/{rank}"
