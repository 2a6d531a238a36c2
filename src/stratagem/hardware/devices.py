"""Devices: memory, dense peak rates and links, from the data sheets of their vendors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, final

from stratagem.errors import ConfigKeyError
from stratagem.utils.names import nearest_names

__all__ = ["DEVICES", "Device", "device_of", "find_device"]

_GIB: Final = 2**30
_TERA: Final = 1e12
_GIGA: Final = 1e9


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device as torch sees it: a GPU, or one of the two dies of a package that torch lists as two devices.

    Attributes:
        name: the name on the command line.
        title: the name of the product.
        memory: approximately the memory in bytes that torch reports (``total_memory``), which is less than the data sheet states,
            because the driver and error correction use some of it. Not from a data sheet, and not measured for most devices.
            None if it depends on the machine.
        peak_flops: the dense peak rates in FLOP/s by type: ``float32`` (without tensor cores, or AMD's matrix cores), ``tf32``,
            ``bfloat16``, ``float16``, each with sums in float32, and ``float8``. A type that the device does not support is
            missing. Vendors also print rates that are twice as high, for matrices with structured sparsity; these are not.
        memory_bandwidth: bytes per second between the device and its memory; None if unknown.
        inside_link: the name of the link to the other devices of a node.
        across_link: the name of the network that nodes with this device typically have. An assumption.
        source: the title of the data sheet.
        torch_names: the names that ``torch.cuda.get_device_name`` returns.
    """

    name: str
    title: str
    memory: int | None
    peak_flops: Mapping[str, float]
    memory_bandwidth: float | None
    inside_link: str
    across_link: str
    source: str
    torch_names: tuple[str, ...] = ()

    def peak_of(self, dtype: str, *, allow_tf32: bool = False) -> float | None:
        """Return the dense peak rate for matrix products of a type in FLOP/s, or None if the device does not support it.

        Args:
            dtype: the name of the type without ``torch.``, such as ``bfloat16`` or ``float8_e4m3fn``.
            allow_tf32: whether products of float32 matrices use TF32, if the device supports it.
        """
        if dtype == "float32" and allow_tf32 and "tf32" in self.peak_flops:
            return self.peak_flops["tf32"]
        return self.peak_flops.get("float8" if dtype.startswith("float8") else dtype)


def _device(
    name: str,
    title: str,
    *,
    gib: float,
    tflops: Mapping[str, float],
    gb_per_s: float,
    links: tuple[str, str],
    source: str,
    torch_names: tuple[str, ...],
) -> Device:
    return Device(
        name=name,
        title=title,
        memory=int(gib * _GIB),
        peak_flops=MappingProxyType({dtype: float(round(rate * _TERA)) for dtype, rate in tflops.items()}),
        memory_bandwidth=gb_per_s * _GIGA,
        inside_link=links[0],
        across_link=links[1],
        source=source,
        torch_names=torch_names,
    )


def _tensor_cores(float32: float, tf32: float, half: float, float8: float | None = None) -> dict[str, float]:
    """Return the rates of a GPU with TF32; bfloat16 and float16 have the same rate on all of them."""
    rates = {"float32": float32, "tf32": tf32, "bfloat16": half, "float16": half}
    return rates if float8 is None else {**rates, "float8": float8}


_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture (white paper), table of H100 SXM5 and H100 PCIe"
_A100 = "NVIDIA A100 Tensor Core GPU (data sheet)"
_V100 = "NVIDIA V100 Tensor Core GPU (data sheet)"
_A100_TFLOPS = _tensor_cores(19.5, 156, 312)
_H100_TFLOPS = _tensor_cores(66.9, 494.7, 989.4, 1978.9)

_ALL = (
    _device(
        "b200-180g", "NVIDIA B200 (HGX)", gib=178.3, tflops=_tensor_cores(75, 1100, 2250, 4500), gb_per_s=7700,
        links=("nvlink5", "infiniband-ndr"), torch_names=("NVIDIA B200",),
        source="NVIDIA Blackwell (data sheet of HGX B200); its tensor core rates are with sparsity and halved here",
    ),
    _device(
        "h200-141g", "NVIDIA H200 SXM", gib=139.7, tflops=_H100_TFLOPS, gb_per_s=4800,
        links=("nvlink4", "infiniband-ndr"), torch_names=("NVIDIA H200",),
        source="NVIDIA H200 Tensor Core GPU (data sheet); rates as H100 SXM5",
    ),
    _device(
        "h100-80g", "NVIDIA H100 SXM5 80 GB", gib=79.1, tflops=_H100_TFLOPS, gb_per_s=3350,
        links=("nvlink4", "infiniband-ndr"), torch_names=("NVIDIA H100 80GB HBM3",), source=_HOPPER,
    ),
    _device(
        "h100-nvl", "NVIDIA H100 NVL 94 GB", gib=93.0, tflops=_tensor_cores(60, 417.5, 835.5, 1670.5), gb_per_s=3900,
        links=("pcie5", "infiniband-ndr"), torch_names=("NVIDIA H100 NVL",),
        source="NVIDIA H100 Tensor Core GPU (data sheet); its tensor core rates are with sparsity and halved here",
    ),
    _device(
        "h100-pcie", "NVIDIA H100 PCIe 80 GB", gib=79.1, tflops=_tensor_cores(51.2, 378, 756, 1513), gb_per_s=2000,
        links=("pcie5", "infiniband-ndr"), torch_names=("NVIDIA H100 PCIe",), source=_HOPPER,
    ),
    _device(
        "a100-80g", "NVIDIA A100 SXM4 80 GB", gib=79.1, tflops=_A100_TFLOPS, gb_per_s=2039,
        links=("nvlink3", "infiniband-hdr"), torch_names=("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"), source=_A100,
    ),
    _device(
        "a100-80g-pcie", "NVIDIA A100 PCIe 80 GB", gib=79.1, tflops=_A100_TFLOPS, gb_per_s=1935,
        links=("pcie4", "infiniband-hdr"), torch_names=("NVIDIA A100 80GB PCIe",), source=_A100,
    ),
    _device(
        "a100-40g", "NVIDIA A100 SXM4 40 GB", gib=39.3, tflops=_A100_TFLOPS, gb_per_s=1555,
        links=("nvlink3", "infiniband-hdr"), torch_names=("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"), source=_A100,
    ),
    _device(
        "l40s", "NVIDIA L40S", gib=44.3, tflops=_tensor_cores(91.6, 183, 362.05, 733), gb_per_s=864,
        links=("pcie4", "ethernet-100"), torch_names=("NVIDIA L40S",), source="NVIDIA L40S GPU (data sheet)",
    ),
    _device(
        "l4", "NVIDIA L4", gib=22.0, tflops=_tensor_cores(30.3, 60, 121, 242.5), gb_per_s=300,
        links=("pcie4", "ethernet-25"), torch_names=("NVIDIA L4",),
        source="NVIDIA L4 Tensor Core GPU (data sheet); its tensor core rates are with sparsity and halved here",
    ),
    _device(
        "a10g", "NVIDIA A10G", gib=21.9, tflops=_tensor_cores(35, 35, 70), gb_per_s=600,
        links=("pcie4", "ethernet-25"), torch_names=("NVIDIA A10G",), source="NVIDIA A10G (data sheet)",
    ),
    _device(
        "a10", "NVIDIA A10", gib=21.9, tflops=_tensor_cores(31.2, 62.5, 125), gb_per_s=600,
        links=("pcie4", "ethernet-25"), torch_names=("NVIDIA A10",), source="NVIDIA A10 Tensor Core GPU (data sheet)",
    ),
    _device(
        "v100-32g", "NVIDIA V100 SXM2 32 GB", gib=31.7, tflops={"float32": 15.7, "float16": 125}, gb_per_s=900,
        links=("nvlink2", "infiniband-edr"), torch_names=("Tesla V100-SXM2-32GB",), source=_V100,
    ),
    _device(
        "v100-16g", "NVIDIA V100 SXM2 16 GB", gib=15.7, tflops={"float32": 15.7, "float16": 125}, gb_per_s=900,
        links=("nvlink2", "infiniband-edr"), torch_names=("Tesla V100-SXM2-16GB",), source=_V100,
    ),
    _device(
        "t4", "NVIDIA T4", gib=14.5, tflops={"float32": 8.1, "float16": 65}, gb_per_s=300,
        links=("pcie3", "ethernet-25"), torch_names=("Tesla T4",), source="NVIDIA T4 Tensor Core GPU (data sheet)",
    ),
    _device(
        "rtx4090", "NVIDIA GeForce RTX 4090", gib=23.5, tflops=_tensor_cores(82.6, 82.6, 165.2, 330.3), gb_per_s=1008,
        links=("pcie4", "ethernet-25"), torch_names=("NVIDIA GeForce RTX 4090",),
        source="NVIDIA Ada GPU Architecture (white paper), appendix A; with sums in float32",
    ),
    _device(
        "rtx3090", "NVIDIA GeForce RTX 3090", gib=23.6, tflops=_tensor_cores(35.6, 35.6, 71), gb_per_s=936,
        links=("pcie4", "ethernet-25"), torch_names=("NVIDIA GeForce RTX 3090",),
        source="NVIDIA Ampere GA102 GPU Architecture (white paper), appendix A; with sums in float32",
    ),
    _device(
        "mi300x", "AMD Instinct MI300X", gib=191.6, tflops=_tensor_cores(163.4, 653.7, 1307.4, 2614.9), gb_per_s=5300,
        links=("infinity-fabric-mi300x", "ethernet-400"), torch_names=("AMD Instinct MI300X",),
        source="AMD Instinct MI300X Accelerator (data sheet)",
    ),
    _device(
        "mi250x", "AMD Instinct MI250X, one of its two dies", gib=63.9,
        tflops={"float32": 47.85, "bfloat16": 191.5, "float16": 191.5}, gb_per_s=1638,
        links=("infinity-fabric-mi250x", "infiniband-hdr"), torch_names=("AMD Instinct MI250X",),
        source="AMD Instinct MI250X Accelerator (data sheet), halved: torch lists its two dies as two devices",
    ),
    Device(
        name="cpu", title="CPU", memory=None, peak_flops=MappingProxyType({}), memory_bandwidth=None,
        inside_link="loopback", across_link="ethernet-25", source="depends on the machine",
    ),
)  # fmt: skip

DEVICES: Final[Mapping[str, Device]] = MappingProxyType({device.name: device for device in _ALL})


def find_device(name: str) -> Device:
    """Return the device with a name, ignoring case.

    Raises:
        ConfigKeyError: if there is none. The message lists similar names and what to do for other devices.
    """
    device = DEVICES.get(name.strip().casefold())
    if device is not None:
        return device
    near = _similar(name)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(DEVICES)}."
    raise ConfigKeyError(
        f"The device {name!r} is not in the table. {hint} For any other device, specify its memory instead, as in "
        "--memory 80GiB; times are then not estimated."
    )


def device_of(torch_name: str) -> Device | None:
    """Return the device that torch calls by a name (``torch.cuda.get_device_name()``), or None if the table has none.

    The name has to be equal, because similar names belong to products with different rates.
    """
    return next((device for device in _ALL if torch_name in device.torch_names), None)


def _similar(name: str) -> list[str]:
    """Return the names of devices of the same product line, such as all sizes of A100 for ``a100``, or similar names."""
    family = name.strip().casefold().replace("_", "-").split("-")[0]
    return [known for known in DEVICES if family and known.startswith(family)] or nearest_names(name, DEVICES)
