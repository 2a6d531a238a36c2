"""Links of the table, given by the user and measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stratagem.errors import ConfigFileError, ConfigKeyError, ConfigValueError
from stratagem.hardware import find_link, read_measured_links


def test_the_bandwidth_of_a_link_is_that_of_one_direction() -> None:
    """NVLink 4 is sold with 900 GB/s for both directions, and NDR InfiniBand with 400 Gb/s for one."""
    assert find_link("nvlink4").bytes_per_second == 450e9
    assert find_link("infiniband-ndr").bytes_per_second == 50e9


def test_a_bandwidth_can_be_given_instead_of_a_name() -> None:
    """400 Gb/s are 50 GB/s."""
    assert find_link("400Gb/s").bytes_per_second == 50e9
    assert find_link("12.5GB/s").bytes_per_second == 12.5e9


def test_an_unknown_link_is_refused() -> None:
    """The message has the closest name and the form of a bandwidth."""
    with pytest.raises(ConfigKeyError, match=r"Did you mean 'nvlink4'.*400Gb/s or 25GB/s"):
        find_link("nvlnk4")
    with pytest.raises(ConfigValueError, match="'400' is not a bandwidth"):
        find_link("400")


def measurement(**changes: object) -> dict[str, object]:
    """Return the content of a file of stratagem doctor with a node of two ranks."""
    inside = {"bytes_per_second": 2e11, "latency": 2e-5, "ranks": 2, "backend": "nccl", "device": "cuda"}
    return {"inside": inside, "across": None, "ranks_per_node": 2, "storage": {"bytes_per_second": 1e9}, **changes}


def test_measurements_replace_the_table(tmp_path: Path) -> None:
    """A level that was not measured is None."""
    file = tmp_path / "doctor.json"
    file.write_text(json.dumps(measurement()))
    measured = read_measured_links(file)
    assert measured.inside is not None
    assert measured.inside.bytes_per_second == 2e11
    assert measured.inside.is_measured
    assert measured.across is None
    assert measured.storage == 1e9


def test_a_file_with_something_else_is_refused(tmp_path: Path) -> None:
    """The message has the file and the command that writes it."""
    file = tmp_path / "doctor.json"
    with pytest.raises(ConfigFileError, match=r"doctor\.json cannot be read.*stratagem doctor --record"):
        read_measured_links(file)
    for content in ("[]", "{", json.dumps(measurement(storage={"bytes_per_second": 0}))):
        file.write_text(content)
        with pytest.raises(ConfigValueError, match=r"Expected the file that stratagem doctor --record"):
            read_measured_links(file)
