"""Collectives in one process and on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

from stratagem import dist
from stratagem.errors import ConfigTypeError, ConfigValueError, LaunchError
from tests.support.ranks import Ranks

OPS = ("sum", "mean", "product", "min", "max", "band", "bor", "bxor")


def test_one_process_is_rank_0_of_1() -> None:
    """Without a process group, the rank is 0 and the world size is 1."""
    assert not dist.is_distributed()
    assert dist.get_dist_info() == (0, 1)
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, None)
    assert dist.is_main_process()


@pytest.mark.parametrize("op", OPS)
def test_reducing_over_one_process_changes_nothing(op: str) -> None:
    """Reducing over one process does not change the tensor."""
    data = torch.tensor([1.5, -2.0])
    dist.all_reduce(data, op)
    assert data.tolist() == [1.5, -2.0]


def test_gathering_in_one_process_returns_one_item() -> None:
    """In one process, gathering returns a list with a single item."""
    data = torch.tensor([3])
    assert [part.tolist() for part in dist.all_gather(data)] == [[3]]
    assert [part.tolist() for part in dist.gather(data)] == [[3]]
    assert dist.all_gather_object("x") == ["x"]
    assert dist.gather_object("x") == ["x"]


def test_broadcasting_in_one_process_changes_nothing() -> None:
    """In one process, broadcasting does not change the values."""
    data, items = torch.tensor([3]), ["a", 1]
    dist.broadcast(data)
    dist.broadcast_object_list(items)
    dist.barrier()
    assert (data.tolist(), items, dist.broadcast_object("x")) == ([3], ["a", 1], "x")


def test_results_of_one_process_are_truncated_to_the_size() -> None:
    """Results beyond the given size, which a sampler added as padding, are removed."""
    assert dist.collect_results([0, 1, 2, 0], 3) == [0, 1, 2]


def test_an_unknown_operation_suggests_the_closest_name() -> None:
    """A misspelled operation raises an error with the closest name, even in one process."""
    with pytest.raises(ConfigValueError, match=r"op='maen'.*Did you mean 'mean'"):
        dist.all_reduce(torch.ones(1), "maen")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_the_mean_of_integers_is_rejected(dtype: torch.dtype) -> None:
    """The mean of integers raises an error, because the result would have to be rounded."""
    with pytest.raises(ConfigTypeError, match=rf"{dtype}.*convert to float"):
        dist.all_reduce(torch.ones(2).to(dtype), "mean")


@pytest.mark.parametrize("rank", [-1, 1])
def test_a_rank_outside_the_world_is_rejected(rank: int) -> None:
    """A rank outside the world raises an error that states the world size, even in one process."""
    message = f"Rank {rank} does not exist. The world size is 1"
    for collective in (dist.broadcast, dist.gather):
        with pytest.raises(LaunchError, match=message):
            collective(torch.ones(1), rank)
    with pytest.raises(LaunchError, match=message):
        dist.broadcast_object_list([1], rank)
    with pytest.raises(LaunchError, match=message):
        dist.gather_object(1, rank)


def test_random_seeds_do_not_depend_on_the_generators() -> None:
    """Random seeds come from the operating system and do not advance the generators."""
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
    """A reduction is stored in place on both ranks."""
    assert ranks.run(reduced, op, [[1.0, -2.0], [3.0, 3.0]]) == [expected, expected]


@pytest.mark.parametrize(("op", "expected"), [("band", 0b1000), ("bor", 0b1110), ("bxor", 0b0110)])
def test_reductions_of_bits(ranks: Ranks, op: str, expected: int) -> None:
    """Bitwise reductions combine the bits of 1100 and 1010."""
    assert ranks.run(reduced, op, [[0b1100], [0b1010]]) == [[expected], [expected]]


def gathered() -> dict[str, Any]:
    """Gather this rank's number with every function."""
    rank = dist.get_rank()
    data = torch.tensor([rank * 10])
    return {
        "all_gather": [part.item() for part in dist.all_gather(data)],
        "gather": [part.item() for part in dist.gather(data, 1)],
        "all_gather_object": dist.all_gather_object({"rank": rank}),
        "gather_object": dist.gather_object(str(rank), 1),
    }


def test_gathering(ranks: Ranks) -> None:
    """All ranks, or the destination rank, receive all values in order of rank; others receive an empty list or None."""
    everybody = {"all_gather": [0, 10], "all_gather_object": [{"rank": 0}, {"rank": 1}]}
    assert ranks.run(gathered) == [
        {**everybody, "gather": [], "gather_object": None},
        {**everybody, "gather": [0, 10], "gather_object": ["0", "1"]},
    ]


def lazy_tensors() -> tuple[Any, ...]:
    """Gather, reduce and broadcast a lazily conjugated tensor, and gather a lazily negated one."""
    z = torch.tensor([complex(1, 2 + dist.get_rank())])
    gathered = [part.tolist() for part in dist.all_gather(z.conj())]
    negative = [part.tolist() for part in dist.all_gather(z.conj().imag)]
    summed, sent = z.clone().conj(), z.clone().conj()
    dist.all_reduce(summed)
    dist.broadcast(sent, 1)
    return gathered, negative, summed.tolist(), sent.tolist()


def test_lazily_conjugated_tensors_are_communicated_by_value(ranks: Ranks) -> None:
    """Lazily conjugated or negated tensors are communicated by value, not by the contents of their storage."""
    expected = ([[1 - 2j], [1 - 3j]], [[-2.0], [-3.0]], [2 - 5j], [1 - 3j])
    assert ranks.run(lazy_tensors) == [expected, expected]


def broadcasted() -> dict[str, Any]:
    """Broadcast from rank 1 with every function."""
    rank = dist.get_rank()
    data = torch.tensor([rank, rank + 10])
    dist.broadcast(data, 1)
    items = [rank, f"of {rank}"]
    dist.broadcast_object_list(items, 1)
    return {"tensor": data.tolist(), "list": items, "object": dist.broadcast_object({"rank": rank}, 1)}


def test_broadcasting(ranks: Ranks) -> None:
    """All ranks receive the values of the source rank."""
    expected = {"tensor": [1, 11], "list": [1, "of 1"], "object": {"rank": 1}}
    assert ranks.run(broadcasted) == [expected, expected]


def broadcasted_views() -> tuple[Any, ...]:
    """Broadcast and reduce parameters and tensors that are not contiguous."""
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


def test_tensors_keep_their_storage(ranks: Ranks) -> None:
    """Non-contiguous views are updated in place, and parameters keep their storage and device."""
    parts = [[0.0, 2.0], [1.0, 3.0]]
    assert ranks.run(broadcasted_views) == [
        ([[0.0, 1.0, 1.0]] * 2, [1.0, 1.0], True, parts, "cpu"),
        ([[1.0, 1.0, 1.0]] * 2, [1.0, 1.0], True, parts, "cpu"),
    ]


def collected(of_rank: list[list[int]], size: int) -> list[int] | None:
    """Collect the results of this rank."""
    return dist.collect_results(of_rank[dist.get_rank()], size)


@pytest.mark.parametrize(
    ("of_rank", "size", "expected"),
    [
        ([[0, 2, 4], [1, 3, 0]], 5, [0, 1, 2, 3, 4]),
        ([[0, 2, 4], [1, 3]], 5, [0, 1, 2, 3, 4]),
        ([[0], []], 1, [0]),
    ],
)
def test_results_are_in_the_order_of_the_samples(
    ranks: Ranks, of_rank: list[list[int]], size: int, expected: list[int]
) -> None:
    """Results are in the order of the samples, without padding, even if ranks have different numbers of them."""
    assert ranks.run(collected, of_rank, size) == [expected, None]


def test_a_result_may_be_none(ranks: Ranks) -> None:
    """A result may be None and keeps its position."""
    assert ranks.run(collected, [[None, 2], [1, None]], 4) == [[None, 1, 2, None], None]


@dist.master_only
def named(name: str) -> str:
    """Return the name."""
    return name


def test_master_only(ranks: Ranks) -> None:
    """A ``master_only`` function runs on rank 0 and returns None on the others."""
    assert ranks.run(named, "x") == ["x", None]
    assert named("y") == "y"
    assert named.__name__ == "named"


def test_all_ranks_get_the_same_seed(ranks: Ranks) -> None:
    """Rank 0 generates the seed and broadcasts it."""
    one, other = ranks.run(dist.sync_random_seed)
    assert one == other


def facts() -> tuple[Any, ...]:
    """Return this rank's information about the group."""
    return dist.get_dist_info(), dist.get_backend(), dist.is_main_process()


def test_group_information(ranks: Ranks) -> None:
    """Each rank returns its own rank and the world size."""
    assert ranks.run(facts) == [((0, 2), "gloo", True), ((1, 2), "gloo", False)]


def rejected() -> str:
    """Broadcast from a rank that does not exist."""
    with pytest.raises(LaunchError) as raised:
        dist.broadcast(torch.ones(1), 2)
    return str(raised.value)


def test_a_rank_beyond_the_last_is_rejected_on_all_ranks(ranks: Ranks) -> None:
    """A rank that does not exist raises an error on all ranks, so none of them waits."""
    assert ranks.run(rejected) == ["Rank 2 does not exist. The world size is 2, so valid ranks are 0 to 1."] * 2


def within_one_rank() -> list[Any]:
    """Reduce in a group that only contains this rank."""
    groups = [torch_dist.new_group([rank]) for rank in range(2)]
    data = torch.tensor([float(dist.get_rank() + 1)])
    group = groups[dist.get_rank()]
    dist.all_reduce(data, "sum", group)
    dist.broadcast(data, 0, group)
    return [data.item(), dist.get_dist_info(group), len(dist.all_gather(data, group))]


def test_ranks_are_relative_to_the_group(ranks: Ranks) -> None:
    """In a group that only contains rank 1, its rank is 0 and the world size is 1."""
    assert ranks.run(within_one_rank) == [[1.0, (0, 1), 1], [2.0, (0, 1), 1]]
