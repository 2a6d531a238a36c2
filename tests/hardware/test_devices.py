"""The table of devices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stratagem.errors import ConfigKeyError
from stratagem.hardware import DEVICES, LINKS, device_of, find_device


def test_the_rates_of_an_h100_are_dense() -> None:
    """The data sheet prints 1,979 TFLOP/s for bfloat16 with sparsity; the table has the 989.4 for dense matrices."""
    device = find_device("H100-80g")
    assert device.peak_of("bfloat16") == 989.4e12
    assert device.peak_of("float8_e4m3fn") == 1978.9e12
    assert device.peak_of("float32") == 66.9e12
    assert device.peak_of("float32", allow_tf32=True) == 494.7e12


def test_a_type_that_a_device_does_not_support_has_no_rate() -> None:
    """A V100 has no bfloat16 and no TF32, an A100 no float8, and float64 is not in the table."""
    assert find_device("v100-16g").peak_of("bfloat16") is None
    assert find_device("v100-16g").peak_of("float32", allow_tf32=True) == 15.7e12
    assert find_device("a100-40g").peak_of("float8_e5m2") is None
    assert find_device("a100-40g").peak_of("float64") is None


def test_a_die_of_an_mi250x_is_a_device() -> None:
    """Torch lists both dies of an MI250X as devices, each with half of its 383 TFLOP/s and of its 128 GB."""
    device = find_device("mi250x")
    assert device.peak_of("bfloat16") == 383e12 / 2
    assert device.memory is not None
    assert device.memory < 64 * 2**30


def test_an_unknown_device_is_refused_with_near_names_and_the_alternative() -> None:
    """``a100`` could be any of three devices, which the message lists together with --memory."""
    with pytest.raises(
        ConfigKeyError, match=r"'a100' is not in the table\. Did you mean a100-80g or a100-80g-pcie or a100-40g\?"
    ):
        find_device("a100")
    with pytest.raises(ConfigKeyError, match="--memory 80GiB"):
        find_device("gaudi3")
    with pytest.raises(ConfigKeyError, match="Did you mean rtx4090"):
        find_device("rtx490")


def test_the_name_that_torch_reports_selects_a_device() -> None:
    """The name has to be equal: a name that is merely similar belongs to a product with different rates."""
    device = device_of("NVIDIA H100 80GB HBM3")
    assert device is not None
    assert device.name == "h100-80g"
    assert device_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert device_of("NVIDIA H20") is None


def test_every_device_has_sources_and_links() -> None:
    """Every device names its data sheet, two links of the table, and less memory than 2^30 bytes times the number in its name."""
    reported = [name for device in DEVICES.values() for name in device.torch_names]
    assert len(reported) == len(set(reported))
    for name, device in DEVICES.items():
        assert name == device.name
        assert device.source
        assert {device.inside_link, device.across_link} <= set(LINKS)
        half = device.peak_flops.get("float16")
        if half is not None:
            # No tensor core has twice the rate for float16 as for bfloat16, which would be a rate with sparsity.
            assert device.peak_flops.get("bfloat16", half) == half
            assert device.peak_flops.get("float8", half) < 2.1 * half
        size = name.rpartition("-")[2] if name.endswith("g") and "-" in name else ""
        if size:
            assert device.memory is not None
            assert device.memory < int(size[:-1]) * 2**30


def test_the_documentation_has_the_table() -> None:
    """docs/plan.md has a row for each device and link, with the values of the tables."""
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    for device in DEVICES.values():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{device.name}` |")]
        assert device.source in line
        assert f"{device.inside_link}, {device.across_link}" in line
        if device.memory is not None:
            assert f"| {device.memory / 2**30:.1f} GiB |" in line
        for rate in device.peak_flops.values():
            assert re.search(rf"\b{rate / 1e12:g}\b", line)
    for link in LINKS.values():
        assert f"| `{link.name}` | {link.bytes_per_second / 1e9:g} | {link.latency * 1e6:g} µs |" in text
