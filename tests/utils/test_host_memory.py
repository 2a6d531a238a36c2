"""The host memory of a process and of its container."""

from __future__ import annotations

from pathlib import Path

from stratagem.utils.host_memory import host_memory

STATUS = "Name:\tpython\nVmPeak:\t  9999 kB\nVmHWM:\t    3072 kB\nVmRSS:\t    2048 kB\n"


def files(folder: Path, **contents: str) -> None:
    """Write files to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_memory_of_a_process_is_read_in_bytes(tmp_path: Path) -> None:
    """The proc file system counts in KiB: 2048 kB are resident, 3072 kB at the peak; there is no limit."""
    files(tmp_path / "proc" / "self", status=STATUS, cgroup="0::/\n")
    found = host_memory(str(tmp_path / "proc"), str(tmp_path / "cgroup"))
    assert (found.resident, found.peak, found.limit, found.used_share) == (2 << 20, 3 << 20, None, None)


def test_the_limit_of_a_container_excludes_the_page_cache(tmp_path: Path) -> None:
    """Of 900 used bytes, 100 can be reclaimed, so 80 % of the limit of 1000 are used. The inner group has no limit."""
    files(tmp_path / "proc" / "self", status=STATUS, cgroup="0::/job/step\n")
    files(tmp_path / "cgroup" / "job" / "step", memory__max="max\n", memory__current="500\n")
    files(
        tmp_path / "cgroup" / "job",
        memory__max="1000\n", memory__current="900\n", memory__stat="anon 700\ninactive_file 100\n",
    )  # fmt: skip
    found = host_memory(str(tmp_path / "proc"), str(tmp_path / "cgroup"))
    assert (found.limit, found.used, found.used_share) == (1000, 800, 0.8)


def test_the_limit_of_a_container_with_the_path_of_the_host_is_found_at_the_root(tmp_path: Path) -> None:
    """In version 1, the path in the container may not exist; the statistics include those of subgroups."""
    files(tmp_path / "proc" / "self", status=STATUS, cgroup="5:cpu:/x\n4:memory:/docker/0123\n")
    files(
        tmp_path / "cgroup" / "memory",
        memory__limit_in_bytes="1000\n",
        memory__usage_in_bytes="600\n",
        memory__stat="inactive_file 1\ntotal_inactive_file 200\n",
    )
    found = host_memory(str(tmp_path / "proc"), str(tmp_path / "cgroup"))
    assert (found.limit, found.used) == (1000, 400)


def test_a_system_without_proc_has_the_peak_of_the_resource_usage(tmp_path: Path) -> None:
    """The current memory is unknown there."""
    found = host_memory(str(tmp_path), str(tmp_path))
    assert found.resident is None
    assert found.peak is None or found.peak > 1 << 20
