"""What a plan assumes about devices, links and storage, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.planning.clusters import ClusterOptions, clusters_of


def test_every_assumption_is_listed() -> None:
    """With only a device, links, utilization, storage and failures are assumed, each with the option that replaces it."""
    (cluster,) = clusters_of(ClusterOptions(devices=["h100-80g"]))
    text = " ".join(cluster.assumptions)
    for option in ("--across-link", "--adapters", "--inside-link", "--utilization", "--storage", "--mtbf"):
        assert option in text
    assert "nodes with h100-80g have 8 network adapters infiniband-ndr" in text
    assert cluster.topology is not None
    assert (cluster.topology.inside.name, cluster.topology.adapters) == ("nvlink4", 8)


def test_what_is_given_is_not_assumed() -> None:
    """Given values are used, and nothing but the efficiency of links is assumed."""
    (cluster,) = clusters_of(
        ClusterOptions(
            devices=["l4"], gpus_per_node=4, inside_link="pcie4", across_link="100Gb/s", adapters=2, utilization=0.3,
            storage=5e9, mtbf=1e7,
        )
    )  # fmt: skip
    assert [each for each in cluster.assumptions if "collectives reach 80 %" not in each] == []
    assert cluster.topology is not None
    # Two adapters with 12.5 GB/s, of which collectives reach 80 %.
    assert cluster.topology.node_bandwidth == pytest.approx(20e9)


def test_devices_on_pci_express_share_a_network_adapter() -> None:
    """Nodes without NVLink usually have one adapter."""
    (cluster,) = clusters_of(ClusterOptions(devices=["a10g"]))
    assert cluster.topology is not None
    assert cluster.topology.adapters == 1


def test_a_device_that_is_not_in_the_table() -> None:
    """With only the memory, sizes are compared and times are unknown."""
    (cluster,) = clusters_of(ClusterOptions(memory=48 * 2**30))
    assert (cluster.memory, cluster.device, cluster.topology) == (48 * 2**30, None, None)
    with pytest.raises(ConfigKeyError, match=r"'b100' is not in the table.*--memory 80GiB"):
        clusters_of(ClusterOptions(devices=["b100"]))


def test_the_memory_of_the_cpu_can_be_given() -> None:
    """The table has no memory for the CPU, so --memory does not conflict with it."""
    (cluster,) = clusters_of(ClusterOptions(devices=["cpu"], memory=16 * 2**30))
    assert cluster.memory == 16 * 2**30
    (unknown,) = clusters_of(ClusterOptions(devices=["cpu"]))
    assert unknown.memory is None
    assert any("--memory" in each for each in unknown.assumptions)


def test_conflicting_options_are_refused() -> None:
    """No option is ignored: each conflict names both options."""
    with pytest.raises(ConfigValueError, match="--device l4 and --memory 80.0 GiB conflict"):
        clusters_of(ClusterOptions(devices=["l4"], memory=80 * 2**30))
    with pytest.raises(ConfigValueError, match=r"--utilization 40 is not a part"):
        clusters_of(ClusterOptions(devices=["l4"], utilization=40))
    with pytest.raises(ConfigValueError, match=r"--utilization 0\.4 requires --device"):
        clusters_of(ClusterOptions(memory=2**30, utilization=0.4))
    with pytest.raises(ConfigValueError, match="--tf32 requires --device"):
        clusters_of(ClusterOptions(memory=2**30, tf32=True))
    with pytest.raises(ConfigValueError, match="--inside-link and --across-link cannot"):
        clusters_of(ClusterOptions(devices=["l4"], links=Path("links.json"), inside_link="pcie4"))
    with pytest.raises(ConfigValueError, match="--adapters 4 has no effect"):
        clusters_of(ClusterOptions(memory=2**30, adapters=4))
    with pytest.raises(ConfigValueError, match="--inside-link and --across-link must be given together"):
        clusters_of(ClusterOptions(memory=2**30, inside_link="pcie4"))


def test_measured_links_replace_the_table(tmp_path: Path) -> None:
    """The link inside nodes was measured and is used; the network was not, so that of the table is assumed."""
    file = tmp_path / "links.json"
    inside = {"bytes_per_second": 3e11, "latency": 1e-5, "ranks": 8, "backend": "nccl", "device": "cuda"}
    file.write_text(
        json.dumps({"inside": inside, "across": None, "ranks_per_node": 8, "storage": {"bytes_per_second": 7e8}})
    )
    (cluster,) = clusters_of(ClusterOptions(devices=["a100-40g"], links=file))
    assert cluster.topology is not None
    assert cluster.topology.inside_bandwidth == 3e11
    assert cluster.topology.across.name == "infiniband-hdr"
    assert cluster.storage == 7e8
    assert not any("--inside-link" in each for each in cluster.assumptions)


def test_links_that_were_measured_with_other_nodes_are_refused(tmp_path: Path) -> None:
    """The network of nodes with two ranks says nothing about nodes with eight."""
    file = tmp_path / "links.json"
    across = {"bytes_per_second": 3e9, "latency": 1e-5, "ranks": 4, "backend": "nccl", "device": "cuda"}
    file.write_text(json.dumps({"inside": None, "across": across, "ranks_per_node": 2, "storage": None}))
    with pytest.raises(ConfigValueError, match=r"between nodes with 2 ranks, but --gpus-per-node is 8"):
        clusters_of(ClusterOptions(devices=["a100-40g"], links=file))
