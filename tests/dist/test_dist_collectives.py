"""Collectives: nothing in one process, the same values everywhere on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

from ranks import Ranks
from stratagem import dist
from stratagem.errors import ConfigTypeError, ConfigValueError, LaunchError

OPS = ("sum", "mean", "product", "min", "max", "band", "bor", "bxor")


def test_one_process_is_rank_0_of_1() -> None:
    """Without a group the facts are those of a single process."""
    assert not dist.is_distributed()
    assert dist.get_dist_info() == (0, 1)
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, None)
    assert dist.is_main_process()


@pytest.mark.parametrize("op", OPS)
def test_reducing_over_one_process_changes_nothing(op: str) -> None:
    """The reduction of one value is that value."""
    data = torch.tensor([1.5, -2.0])
    dist.all_reduce(data, op)
    assert data.tolist() == [1.5, -2.0]


def test_gathering_from_one_process_gives_its_value() -> None:
    """Lists have one item, in both forms."""
    data = torch.tensor([3])
    assert [part.tolist() for part in dist.all_gather(data)] == [[3]]
    assert [part.tolist() for part in dist.gather(data)] == [[3]]
    assert dist.all_gather_object("x") == ["x"]
    assert dist.gather_object("x") == ["x"]


def test_broadcasting_in_one_process_changes_nothing() -> None:
    """There is nobody else's value."""
    data, items = torch.tensor([3]), ["a", 1]
    dist.broadcast(data)
    dist.broadcast_object_list(items)
    dist.barrier()
    assert (data.tolist(), items, dist.broadcast_object("x")) == ([3], ["a", 1], "x")


def test_results_of_one_process_are_cut_to_the_size() -> None:
    """What a sampler added at the end is no result."""
    assert dist.collect_results([0, 1, 2, 0], 3) == [0, 1, 2]


def test_an_unknown_operation_is_answered_with_the_nearest() -> None:
    """A typo is refused, in one process too."""
    with pytest.raises(ConfigValueError, match=r"op='maen'.*Did you mean 'mean'"):
        dist.all_reduce(torch.ones(1), "maen")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_the_mean_of_integers_is_refused(dtype: torch.dtype) -> None:
    """It is no integer; rounding it silently would be wrong, in one process too."""
    with pytest.raises(ConfigTypeError, match=rf"{dtype}.*convert to float"):
        dist.all_reduce(torch.ones(2).to(dtype), "mean")


@pytest.mark.parametrize("rank", [-1, 1])
def test_a_rank_outside_of_the_world_is_refused(rank: int) -> None:
    """The error says which ranks there are, in one process too."""
    message = f"Rank {rank} does not exist: the world has 1 process"
    for collective in (dist.broadcast, dist.gather):
        with pytest.raises(LaunchError, match=message):
            collective(torch.ones(1), rank)
    with pytest.raises(LaunchError, match=message):
        dist.broadcast_object_list([1], rank)
    with pytest.raises(LaunchError, match=message):
        dist.gather_object(1, rank)


def test_seeds_drawn_twice_differ_and_leave_the_generator_alone() -> None:
    """A seed comes from the operating system, not from a generator that was seeded."""
    before = torch.get_rng_state()
    assert dist.sync_random_seed() != dist.sync_random_seed()
    assert torch.equal(torch.get_rng_state(), before)


def reduced(op: str, values: list[list[Any]]) -> Any:
    """Reduce this rank's values."""
    data = torch.tensor(values[dist.get_rank()])
    dist.all_reduce(data, op)
    return data.tolist()


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("sum", [4.0, 1.0]),
        ("mean", [2.0, 0.5]),
        ("product", [3.0, -6.0]),
        ("min", [1.0, -2.0]),
        ("max", [3.0, 3.0]),
    ],
)
def test_reductions(ranks: Ranks, op: str, expected: list[float]) -> None:
    """Both ranks get the reduction of both values, in place."""
    assert ranks.run(reduced, op, [[1.0, -2.0], [3.0, 3.0]]) == [expected, expected]


@pytest.mark.parametrize(("op", "expected"), [("band", 0b1000), ("bor", 0b1110), ("bxor", 0b0110)])
def test_reductions_of_bits(ranks: Ranks, op: str, expected: int) -> None:
    """Bits are combined one by one: 1100 and 1010."""
    assert ranks.run(reduced, op, [[0b1100], [0b1010]]) == [[expected], [expected]]


def gathered() -> dict[str, Any]:
    """Gather this rank's number in every form."""
    rank = dist.get_rank()
    data = torch.tensor([rank * 10])
    return {
        "all_gather": [part.item() for part in dist.all_gather(data)],
        "gather": [part.item() for part in dist.gather(data, 1)],
        "all_gather_object": dist.all_gather_object({"rank": rank}),
        "gather_object": dist.gather_object(str(rank), 1),
    }


def test_gathering(ranks: Ranks) -> None:
    """Everybody, or the one who asked, gets all values in order of rank; the others an empty list, or None."""
    everybody = {"all_gather": [0, 10], "all_gather_object": [{"rank": 0}, {"rank": 1}]}
    assert ranks.run(gathered) == [
        {**everybody, "gather": [], "gather_object": None},
        {**everybody, "gather": [0, 10], "gather_object": ["0", "1"]},
    ]


def lazy_tensors() -> tuple[Any, ...]:
    """Gather, reduce and broadcast a lazy conjugate, and gather a lazy negative."""
    z = torch.tensor([complex(1, 2 + dist.get_rank())])
    gathered = [part.tolist() for part in dist.all_gather(z.conj())]
    negative = [part.tolist() for part in dist.all_gather(z.conj().imag)]
    summed, sent = z.clone().conj(), z.clone().conj()
    dist.all_reduce(summed)
    dist.broadcast(sent, 1)
    return gathered, negative, summed.tolist(), sent.tolist()


def test_lazy_conjugates_are_exchanged_by_value(ranks: Ranks) -> None:
    """A tensor that is conjugated or negated when it is read arrives with its values, not those of its memory."""
    expected = ([[1 - 2j], [1 - 3j]], [[-2.0], [-3.0]], [2 - 5j], [1 - 3j])
    assert ranks.run(lazy_tensors) == [expected, expected]


def broadcasted() -> dict[str, Any]:
    """Broadcast from rank 1 in every form."""
    rank = dist.get_rank()
    data = torch.tensor([rank, rank + 10])
    dist.broadcast(data, 1)
    items = [rank, f"of {rank}"]
    dist.broadcast_object_list(items, 1)
    return {"tensor": data.tolist(), "list": items, "object": dist.broadcast_object({"rank": rank}, 1)}


def test_broadcasting(ranks: Ranks) -> None:
    """Every rank ends with the values of the one that was named."""
    expected = {"tensor": [1, 11], "list": [1, "of 1"], "object": {"rank": 1}}
    assert ranks.run(broadcasted) == [expected, expected]


def broadcasted_views() -> tuple[Any, ...]:
    """Broadcast and reduce tensors that are not contiguous, or parameters."""
    rank = dist.get_rank()
    matrix = torch.full((2, 3), float(rank))
    dist.broadcast(matrix.t()[1:], 1)
    weight = torch.nn.Parameter(torch.full((2,), float(rank)))
    storage = weight.data_ptr()
    dist.all_reduce(weight, "sum")
    column = torch.arange(4.0).reshape(2, 2)[:, 0]
    parts = dist.all_gather(column + rank)
    same = weight.data_ptr() == storage and weight.requires_grad and weight.is_leaf
    return matrix.tolist(), weight.tolist(), same, [part.tolist() for part in parts], str(weight.device)


def test_tensors_stay_where_they_are(ranks: Ranks) -> None:
    """Views that are not contiguous are written through, parameters stay parameters with their storage and device."""
    parts = [[0.0, 2.0], [1.0, 3.0]]
    assert ranks.run(broadcasted_views) == [
        ([[0.0, 1.0, 1.0]] * 2, [1.0, 1.0], True, parts, "cpu"),
        ([[1.0, 1.0, 1.0]] * 2, [1.0, 1.0], True, parts, "cpu"),
    ]


def collected(of_rank: list[list[int]], size: int) -> list[int] | None:
    """Collect what this rank has."""
    return dist.collect_results(of_rank[dist.get_rank()], size)


@pytest.mark.parametrize(
    ("of_rank", "size", "expected"),
    [
        ([[0, 2, 4], [1, 3, 0]], 5, [0, 1, 2, 3, 4]),
        ([[0, 2, 4], [1, 3]], 5, [0, 1, 2, 3, 4]),
        ([[0], []], 1, [0]),
    ],
)
def test_results_come_in_the_order_of_the_samples(
    ranks: Ranks, of_rank: list[list[int]], size: int, expected: list[int]
) -> None:
    """Samples were dealt in turn; what fills up the last rank is cut, and ranks may have different numbers."""
    assert ranks.run(collected, of_rank, size) == [expected, None]


def test_a_result_of_none_is_a_result(ranks: Ranks) -> None:
    """A model may return None for a sample; it keeps its place."""
    assert ranks.run(collected, [[None, 2], [1, None]], 4) == [[None, 1, 2, None], None]


@dist.master_only
def named(name: str) -> str:
    """Return the name."""
    return name


def test_master_only(ranks: Ranks) -> None:
    """Such a function runs on rank 0, and gives None on the others; it keeps its name."""
    assert ranks.run(named, "x") == ["x", None]
    assert named("y") == "y"
    assert named.__name__ == "named"


def test_ranks_draw_the_same_seed(ranks: Ranks) -> None:
    """Rank 0 draws, all take it."""
    one, other = ranks.run(dist.sync_random_seed)
    assert one == other


def facts() -> tuple[Any, ...]:
    """Return what this rank knows of the group."""
    return dist.get_dist_info(), dist.get_backend(), dist.is_main_process()


def test_the_facts_of_a_group(ranks: Ranks) -> None:
    """Each rank knows itself and how many there are."""
    assert ranks.run(facts) == [((0, 2), "gloo", True), ((1, 2), "gloo", False)]


def refused() -> str:
    """Ask for a rank that is not there."""
    with pytest.raises(LaunchError) as raised:
        dist.broadcast(torch.ones(1), 2)
    return str(raised.value)


def test_a_rank_beyond_the_last_is_refused_everywhere(ranks: Ranks) -> None:
    """No rank waits for one that does not exist."""
    assert ranks.run(refused) == ["Rank 2 does not exist: the world has 2 process(es), ranks 0 to 1."] * 2


def within_one_rank() -> list[Any]:
    """Reduce in a group of this rank alone."""
    groups = [torch_dist.new_group([rank]) for rank in range(2)]
    data = torch.tensor([float(dist.get_rank() + 1)])
    group = groups[dist.get_rank()]
    dist.all_reduce(data, "sum", group)
    dist.broadcast(data, 0, group)
    return [data.item(), dist.get_dist_info(group), len(dist.all_gather(data, group))]


def test_ranks_are_counted_within_the_group(ranks: Ranks) -> None:
    """In a group of its own, rank 1 is rank 0 of 1."""
    assert ranks.run(within_one_rank) == [[1.0, (0, 1), 1], [2.0, (0, 1), 1]]
