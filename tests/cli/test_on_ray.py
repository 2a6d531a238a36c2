"""Assigning ranks to Ray actors."""

from __future__ import annotations

from stratagem.cli.launch.on_ray import rank_environments
from stratagem.cli.launch.ray_actor import ActorLocation
from stratagem.dist import infer_launcher, read_launch


def test_ranks_of_a_host_are_consecutive() -> None:
    """Ranks of a host are consecutive, rank 0 is on the host of the first actor, and local sizes are set."""
    locations = [ActorLocation("b", "10.0.0.2"), ActorLocation("a", "10.0.0.1"), ActorLocation("b", "10.0.0.2")]
    launches = [read_launch("ray", environ) for environ in rank_environments(locations, "j")]
    assert [launch.rank for launch in launches] == [0, 2, 1]
    assert [launch.local_rank for launch in launches] == [0, 0, 1]
    assert [launch.local_size for launch in launches] == [2, 1, 2]
    assert {launch.master_addr for launch in launches} == {"10.0.0.2"}
    assert {(launch.size, launch.job, launch.master_port) for launch in launches} == {(3, "Ray job j", None)}


def test_a_single_host_uses_loopback() -> None:
    """On a single host, the rendezvous uses the loopback interface."""
    environs = rank_environments([ActorLocation("a", "10.0.0.1")] * 2, "j")
    assert all(read_launch("ray", environ).on_one_host for environ in environs)
    assert {environ["MASTER_ADDR"] for environ in environs} == {"127.0.0.1"}


def test_ray_is_inferred_as_the_launcher() -> None:
    """Ray is inferred as the launcher, although some of torchrun's variables are set."""
    (environ,) = rank_environments([ActorLocation("a", "10.0.0.1")], "j")
    assert infer_launcher(environ) == "ray"
