"""What the report of a hang says about given records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from stratagem.distributed.health.flight_record import Collective, RankRecord, _describe_place, _Frame
from stratagem.distributed.health.hang_analysis import describe_hang, describe_wait
from stratagem.distributed.health.hang_report import HangReport

WORLD = {"0": ("default_pg", (0, 1, 2, 3))}


def call(number: int, **changes: Any) -> Collective:
    """Return a finished all-reduce."""
    values = {"group": "0", "kind": "all_reduce", "function": "all_reduce", "shape": "float32[4]", "finished": True}
    return Collective(**{**values, "number": number, "order": number, "place": f"train.py:{number} in step", **changes})


def record(rank: int, calls: Sequence[Collective], groups: Any = WORLD) -> RankRecord:
    """Return a record of a rank whose main thread is at a fixed position."""
    return RankRecord(rank=rank, place="data.py:7 in load", stack=[], groups=groups, collectives=calls)


def describe(*records: RankRecord) -> list[str]:
    """Return the description of a hang of these ranks."""
    return describe_hang({each.rank: each for each in records})


def test_the_rank_that_did_not_join_is_named() -> None:
    """The summary names the missing rank and where the others wait; then follows what the missing rank is doing."""
    waiting = [call(1), call(2, finished=False)]
    assert describe(record(0, waiting), record(1, waiting), record(2, [call(1)]), record(3, waiting)) == [
        (
            "rank 2 did not join all_reduce number 2 of the default group with float32[4], in which ranks 0-1, 3 wait at "
            "train.py:2 in step"
        ),
        (
            "Rank 2 is at data.py:7 in load. It last called all_reduce number 1 of the default group with float32[4] at "
            "train.py:1 in step."
        ),
    ]


def test_the_first_collective_that_a_rank_did_not_join_is_reported() -> None:
    """If the error of a later asynchronous collective is raised first, the report names the earlier one."""
    waiting = [call(1), call(2), call(3, finished=False)]
    summary = describe(record(0, waiting), record(1, [call(1)]))[0]
    assert summary.startswith("ranks 1-3 did not join all_reduce number 2 of the default group")


@pytest.mark.parametrize(
    ("changes", "called"),
    [
        ({"kind": "barrier", "function": "barrier", "shape": ""}, "rank 1 called barrier at"),
        ({"shape": "float32[6]"}, "rank 1 called all_reduce with float32[6] at"),
    ],
)
def test_different_collectives_are_listed_by_rank(changes: dict[str, Any], called: str) -> None:
    """Ranks that call different operations or pass different shapes under the same number are listed."""
    summary = describe(record(0, [call(2, finished=False)]), record(1, [call(2, finished=False, **changes)]))[0]
    assert summary == (
        "the ranks called different collectives as number 2 of the default group: rank 0 called all_reduce with float32[4] "
        f"at train.py:2 in step, but {called} train.py:2 in step"
    )


def test_tensors_of_operations_with_one_sender_may_differ() -> None:
    """Only the root of a scatter passes inputs, so different shapes are not a difference."""
    values = {"kind": "scatter", "function": "scatter", "finished": False}
    summary = describe(record(0, [call(2, **values)]), record(1, [call(2, **{**values, "shape": ""})]))[0]
    assert "different" not in summary


def test_the_first_call_from_different_places_is_named() -> None:
    """A rank that skips a collective joins the next one under the same number, which is where the places first differ."""
    ahead = [call(1), call(2, place="train.py:3 in step")]
    text = describe(record(0, [call(1), call(2), call(3, finished=False)]), record(1, ahead))
    assert (
        "They first called from different places as number 2: rank 0 at train.py:2 in step; rank 1 at train.py:3 in step."
        in text
    )


def test_ranks_that_wait_because_of_others_are_listed_separately() -> None:
    """The missing rank of the group that the program uses first is named, and ranks in other groups wait because of it."""
    pair, other = ("tp", (2, 3)), ("dp", (1, 3))
    groups = {"1": pair, "2": other}
    text = describe(
        record(1, [call(1, group="2"), call(2, group="2", order=9, finished=False)], groups),
        record(2, [call(1, group="1"), call(2, group="1", order=8, finished=False)], groups),
        record(3, [call(1, group="1"), call(1, group="2")], groups),
    )
    assert text[0].startswith("rank 3 did not join all_reduce number 2 of group 'tp' (ranks 2-3)")
    assert text[-1] == "Because of this, rank 1 waits in other collectives."


def test_ranks_that_wait_for_each_other_are_listed() -> None:
    """If every missing rank waits in another group, both collectives are named."""
    groups = {"0": ("default_pg", (0, 1)), "1": ("mine", (0, 1))}
    one = record(0, [call(1, finished=False)], groups)
    two = record(1, [call(1, group="1", finished=False)], groups)
    assert describe(one, two)[0] == (
        "the ranks wait for each other in different collectives: rank 0 in all_reduce number 1 of the default group with "
        "float32[4]; rank 1 in all_reduce number 1 of group 'mine' (ranks 0-1) with float32[4]"
    )


def test_a_collective_that_all_ranks_have_joined_points_to_the_network() -> None:
    """If no rank is missing, the report does not blame one."""
    groups = {"0": ("default_pg", (0, 1))}
    text = describe(record(0, [call(1, finished=False)], groups), record(1, [call(1, finished=False)], groups))
    assert text[0].startswith("all ranks have called all_reduce number 1 of the default group")
    assert text[1] == "Check the network and the devices."


def test_ranks_without_a_record_are_not_said_to_be_missing() -> None:
    """A rank that sends no record did not respond; what it called is unknown."""
    groups = {"0": ("default_pg", (0, 1))}
    assert describe(record(0, [call(1, finished=False)], groups)) == [
        (
            "rank 0 waits at train.py:1 in step in all_reduce number 1 of the default group with float32[4], and rank 1 did not "
            "respond"
        )
    ]


def test_without_a_waiting_rank_the_positions_are_listed() -> None:
    """If the flight recorder is disabled, the report lists where each rank is."""
    assert describe(record(0, []), record(1, [])) == [
        "no rank waited in a collective",
        "Rank 0 is at data.py:7 in load, and has not called any collective.",
        "Rank 1 is at data.py:7 in load, and has not called any collective.",
    ]
    assert describe_wait(record(0, [])) == ""


def test_a_record_survives_the_store() -> None:
    """A record is written to the store as text and read back unchanged."""
    before = record(1, [call(1), call(2, finished=False)])
    assert RankRecord.from_json(before.as_json().encode()) == before


def test_the_details_list_all_ranks() -> None:
    """The file has the sentences, and the stack, the groups and the collectives of each rank."""
    one = RankRecord(rank=0, place="", stack=["a.py:1 in f"], groups=WORLD, collectives=[call(2, finished=False)])
    assert HangReport(sentences=["rank 1 is late"], records={0: one}).details() == (
        "rank 1 is late\n\nRank 0, main thread (most recent call last):\n  a.py:1 in f\nRank 0, process groups:\n"
        "  0: default_pg, ranks [0, 1, 2, 3]\nRank 0, collectives (most recent last):\n"
        "  group 0, number 2: all_reduce float32[4] [waiting] train.py:2 in step\n"
    )


def test_the_place_is_in_the_code_of_the_user() -> None:
    """Frames of torch and the standard library are skipped; below a library, the call from the user's code is added."""
    torch_frame = _Frame(pytest.importorskip("torch").__file__, 3, "all_reduce")
    user = _Frame("/home/me/model.py", 12, "forward")
    library = _Frame(str(describe_hang.__code__.co_filename).replace("distributed/health", "train"), 5, "step")
    outermost = _Frame("/home/me/main.py", 1, "<module>")
    assert _describe_place([torch_frame, user, outermost]) == "/home/me/model.py:12 in forward"
    assert _describe_place([torch_frame, library, outermost]) == (
        "stratagem/train/hang_analysis.py:5 in step, called from /home/me/main.py:1 in <module>"
    )
    assert _describe_place([]) == ""
