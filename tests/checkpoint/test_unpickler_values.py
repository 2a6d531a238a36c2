"""Values in files of torch's zip format, read without executing code."""

from __future__ import annotations

import collections
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stratagem.checkpoint import SingleFileFormat
from stratagem.errors import CheckpointDamagedError, CheckpointError
from tests.checkpoint.pickles import Raw, call, storage, write


def round_trip(value: Any, path: Path, **kwargs: Any) -> Any:
    """Save a value with torch and load it with Stratagem."""
    torch.save({"state_dict": {"anchor": torch.ones(1)}, "value": value}, path / "a.pth", **kwargs)
    return SingleFileFormat().load(path / "a.pth", parts={"value"})["value"]


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_are_restored(tmp_path: Path, dtype: torch.dtype) -> None:
    """Dtype, shape and every bit of a tensor are restored."""
    tensor = torch.arange(48, dtype=torch.uint8).view(dtype) if dtype != torch.bool else torch.tensor([True, False])
    read = round_trip(tensor, tmp_path)
    assert read.dtype == dtype
    assert read.shape == tensor.shape
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_views_share_their_memory(tmp_path: Path) -> None:
    """Views, empty and zero-dimensional tensors are restored, and shared memory stays shared."""
    whole = torch.arange(12.0).reshape(3, 4)
    views = [whole, whole.t(), whole[1:, ::2], whole[0].expand(5, 4), whole[0, 0], torch.empty(0, 3)]
    read = round_trip(views, tmp_path)
    for before, after in zip(views, read, strict=True):
        assert after.stride() == before.stride()
        assert torch.equal(after, before)
    read[0].fill_(7)
    assert read[1].eq(7).all()
    assert read[4].item() == 7


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_special_tensors_are_restored(tmp_path: Path) -> None:
    """Sparse and meta tensors are restored, and parameters become tensors."""
    coo = torch.sparse_coo_tensor([[0, 2], [1, 0]], [3.0, 4.0], (3, 2), check_invariants=True)
    csr = torch.sparse_csr_tensor([0, 1, 2], [1, 0], [5.0, 6.0], (2, 2), check_invariants=True)
    annotated = torch.ones(2)
    annotated.note = "x"  # type: ignore[attr-defined]
    values = [coo, csr, torch.empty(2, 3, device="meta"), nn.Parameter(torch.ones(2)), annotated]
    read = round_trip(values, tmp_path)
    assert torch.equal(read[0].to_dense(), coo.to_dense())
    assert torch.equal(read[1].to_dense(), csr.to_dense())
    assert read[2].is_meta
    assert read[2].shape == (2, 3)
    assert type(read[3]) is torch.Tensor
    assert not read[3].requires_grad
    assert read[4].tolist() == [1, 1]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_restored(tmp_path: Path, protocol: int) -> None:
    """Numbers, strings, bytes and containers are restored, for every protocol that torch writes."""
    value = {
        "numbers": [0, 255, 65536, -1, 1 << 100, 2.5, math.inf, True, None, 1j],
        "text": ["", "ä" * 300, "\ud800"],
        "bytes": [b"", b"\xff" * 300],
        3: (1, (2, ())),
        "sets": [{1, 2}, frozenset({"a"}), set()],
        "torch": [torch.float16, torch.Size([1, 2]), torch.device("cpu")],
    }
    read = round_trip(value, tmp_path, pickle_protocol=protocol)
    assert read == value
    assert [type(item) for item in read["numbers"]] == [type(item) for item in value["numbers"]]


@pytest.mark.parametrize("protocol", [2, 5])
def test_numpy_values_are_restored(tmp_path: Path, protocol: int) -> None:
    """NumPy arrays keep their dtype and byte order; NumPy scalars become Python numbers."""
    arrays = [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["ab", "c"]),
        np.array(3, dtype=np.int8),
        np.zeros((0, 2)),
        np.array([True]),
    ]
    read = round_trip(
        {"arrays": arrays, "numbers": [np.float32(1.5), np.int64(-3), np.bool_(1)]}, tmp_path, pickle_protocol=protocol
    )
    for before, after in zip(arrays, read["arrays"], strict=True):
        assert after.dtype == before.dtype
        assert np.array_equal(after, before)
    assert read["numbers"] == [1.5, -3, True]
    assert [type(number) for number in read["numbers"]] == [float, int, bool]


def test_dict_types_are_restored(tmp_path: Path) -> None:
    """An OrderedDict keeps its order and module versions; Counter and defaultdict become dicts."""
    state = nn.BatchNorm1d(2).state_dict()
    value = [state, collections.Counter(a=2), collections.defaultdict(list, b=[1])]
    read = round_trip(value, tmp_path)
    assert list(read[0]) == list(state)
    assert read[0]._metadata == state._metadata
    assert read[1:] == [{"a": 2}, {"b": [1]}]
    assert [type(item) for item in read[1:]] == [dict, dict]


Z = torch.tensor([1 + 2j, -3j, 0j])
Q = torch.tensor([[1 + 2j, 3 - 4j], [5j, 6 + 0j]], dtype=torch.complex128)
LAZY = {
    "conjugate": Z.conj(),
    "imaginary part of a conjugate": Z.conj().imag,
    "conjugate and negative": torch._neg_view(Z.conj()),
    "negative of complex numbers": torch._neg_view(Z),
    "adjoint": Q.mH,
    "slice of an adjoint": Q.mH[1:, ::2],
    "expanded": Z[0].conj().expand(4, 2),
    "empty": torch.empty(0, 3, dtype=torch.complex64).conj(),
    "zero-dimensional": Z[0].conj(),
    "parameter": nn.Parameter(Z).detach().conj(),
    "parameter from a conjugate": nn.Parameter(Z.conj()),
    "negative integers": torch._neg_view(torch.arange(3)),
    "negative bfloat16": torch._neg_view(torch.tensor([0.0, 1.5]).to(torch.bfloat16)),
}


@pytest.mark.parametrize("tensor", LAZY.values(), ids=LAZY)
def test_lazy_conjugates_and_negatives_are_resolved(tmp_path: Path, tensor: torch.Tensor) -> None:
    """A tensor saved with a conjugate or negative flag has the values that torch reads."""
    torch.save({"state_dict": {"w": tensor}}, tmp_path / "a.pth")
    reference = torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"]["w"].detach()
    read = SingleFileFormat().load(tmp_path / "a.pth")["state_dict"]["w"]
    assert read.dtype == reference.dtype
    assert read.shape == reference.shape
    assert not read.is_conj()
    assert not read.is_neg()
    assert bits(read) == bits(reference)


def bits(tensor: torch.Tensor) -> bytes:
    """Return the elements of a tensor as bytes in row-major order."""
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1)).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("tensor", [LAZY["conjugate"], LAZY["imaginary part of a conjugate"]], ids=["conj", "neg"])
def test_a_file_is_written_without_lazy_flags(tmp_path: Path, tensor: torch.Tensor) -> None:
    """A `.pth` file contains the actual values, so that readers without these flags get the same result."""
    SingleFileFormat().save({"state_dict": {"w": tensor, "more": [{"w": tensor}]}}, tmp_path / "a.pth")
    written = torch.load(tmp_path / "a.pth", weights_only=True)["state_dict"]
    for read in (written["w"], written["more"][0]["w"]):
        assert not read.is_conj()
        assert not read.is_neg()
        assert bits(read) == bits(tensor)


@pytest.mark.parametrize("tensor", [LAZY["conjugate"], LAZY["imaginary part of a conjugate"]], ids=["conj", "neg"])
def test_lazy_values_of_a_sparse_tensor_are_resolved(tmp_path: Path, tensor: torch.Tensor) -> None:
    """The values of a sparse tensor may be lazily conjugated or negated, too."""
    sparse = torch.sparse_coo_tensor([[0, 1, 2]], tensor, (3,), check_invariants=True)
    assert torch.equal(round_trip(sparse, tmp_path).to_dense(), sparse.to_dense())


def with_metadata(metadata: Any, kind: str = "torch.ComplexFloatStorage") -> Raw:
    """Return a tensor of two complex numbers with this metadata."""
    memory = storage("0", 2, kind)
    return call(
        "torch._utils._rebuild_tensor_v2", memory, 0, (2,), (1,), False, call("collections.OrderedDict"), metadata
    )


def test_unknown_metadata_is_rejected(tmp_path: Path) -> None:
    """A tensor with unknown metadata is rejected, and the metadata is not ignored."""
    path = write(tmp_path / "a.pth", {"state_dict": {"w": with_metadata({"scaled": True})}}, {"0": bytes(16)})
    with pytest.raises(CheckpointError, match="state_dict/w is a tensor with unsupported metadata \\(scaled"):
        SingleFileFormat().load(path)


@pytest.mark.parametrize(
    "tensor",
    [with_metadata({"conj": 1}), with_metadata([True]), with_metadata({"conj": True}, "torch.DoubleStorage")],
    ids=["a number as flag", "a list", "a conjugate of real numbers"],
)
def test_malformed_metadata_is_damage(tmp_path: Path, tensor: Raw) -> None:
    """Metadata that torch cannot have written is reported as damage."""
    path = write(tmp_path / "a.pth", {"state_dict": {"w": tensor}}, {"0": bytes(16)})
    with pytest.raises(CheckpointDamagedError, match="state_dict/w is not a valid"):
        SingleFileFormat().load(path)


def test_quantized_tensors_are_rejected(tmp_path: Path) -> None:
    """A quantized tensor is rejected, because its values need a scale."""
    torch.save({"state_dict": {"w": FakeQuantized()}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"state_dict/w is an object of type torch\._utils\._rebuild_qtensor"):
        SingleFileFormat().load(tmp_path / "a.pth")


class FakeQuantized:
    """Pickled like a quantized tensor, which torch deprecates creating."""

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_qtensor, (
            torch.ones(2),
            0,
            (2,),
            (1,),
            (torch.per_tensor_affine, 0.5, 0),
            False,
            {},
        )


def test_arrays_of_other_classes_are_rejected(tmp_path: Path) -> None:
    """An array of a subclass is rejected, because its values may differ from its memory."""
    with pytest.raises(CheckpointError, match=r"value is an array of the class numpy\.\S*matrix"):
        round_trip(np.ones((1, 2)).view(np.matrix), tmp_path)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@pytest.mark.slow
@given(value=PLAIN, protocol=st.sampled_from([2, 3, 4, 5]))
def test_any_plain_value_is_restored(tmp_path_factory: pytest.TempPathFactory, value: Any, protocol: int) -> None:
    """Any plain value is restored."""
    assert round_trip(value, tmp_path_factory.getbasetemp(), pickle_protocol=protocol) == value


def test_only_requested_values_are_read(tmp_path: Path) -> None:
    """Storages of unrequested parts are not read, so damage in them has no effect."""
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"w": torch.zeros(10)}, "optimizer": {"m": torch.full((1000,), 3.25)}}, path)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(torch.full((4,), 3.25).numpy().data)) + 1000] ^= 1
    path.write_bytes(data)
    assert SingleFileFormat().load(path, parts={"state_dict"}, verify=False)["state_dict"]["w"].sum() == 0
    with pytest.raises(CheckpointDamagedError, match="a/data/1 is corrupted: the checksum does not match"):
        SingleFileFormat().load(path, verify=False)
    with pytest.raises(CheckpointDamagedError, match="a/data/1 is corrupted: the checksum does not match"):
        SingleFileFormat().verify(path)


@pytest.mark.slow
def test_every_changed_bit_of_a_tensor_is_detected(tmp_path: Path) -> None:
    """A flipped bit in a tensor is always detected, although torch ignores the checksums of its files."""
    path = tmp_path / "a.pth"
    tensor = torch.full((16,), 3.25)
    torch.save({"state_dict": {"w": tensor}}, path)
    data = path.read_bytes()
    begin = data.index(bytes(tensor.numpy().data))
    for offset in range(begin, begin + 64):
        changed = bytearray(data)
        changed[offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        assert not torch.load(path, weights_only=True)["state_dict"]["w"].equal(tensor)
        with pytest.raises(CheckpointDamagedError, match="checksum"):
            SingleFileFormat().load(path)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    """Files that torch wrote without checksums can be read."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"w": torch.ones(3)}}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert SingleFileFormat().load(tmp_path / "a.pth")["state_dict"]["w"].tolist() == [1, 1, 1]


def test_other_zip_files_are_reported(tmp_path: Path) -> None:
    """Other zip files, TorchScript programs and files with another byte order are reported as such."""
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", b"nothing")
    with pytest.raises(CheckpointError, match="not contain exactly one data.pkl"):
        SingleFileFormat().load(path)
    with pytest.raises(CheckpointError, match=r"TorchScript.*torch\.jit\.load"):
        SingleFileFormat().load(write(path, {}, extra={"constants.pkl": b""}))
    with pytest.raises(CheckpointError, match="big-endian"):
        SingleFileFormat().load(write(path, {}, extra={"byteorder": b"big"}))
