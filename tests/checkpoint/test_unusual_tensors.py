"""Tensors with dtypes and layouts that safetensors lacks are stored, or rejected by name before a run trains."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stratagem import Runner
from stratagem.checkpoint import BackgroundSaver, CheckpointLoader, save_checkpoint
from stratagem.checkpoint.convert.convert import convert_checkpoint, open_checkpoint
from stratagem.distributed import SINGLE_PROCESS
from stratagem.errors import CheckpointError
from tests.train.toys import QUIET_HOOKS, Toy, settings

with warnings.catch_warnings():
    # Torch warns that their support is experimental or deprecated.
    warnings.simplefilter("ignore")
    COMPLEX32 = torch.tensor([1 + 2j], dtype=torch.complex32)
    QUANTIZED = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    CSR = torch.eye(3).to_sparse_csr()
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
BYTES = torch.tensor([1, 2, 127, 255], dtype=torch.uint8)
UNUSUAL: dict[str, Tensor] = {
    "complex128": torch.tensor([[1 + 2j], [3 - 4j]], dtype=torch.complex128),
    "complex128 scalar": torch.tensor(1 + 2j, dtype=torch.complex128),
    "complex128 conjugate": torch.tensor([1 + 2j], dtype=torch.complex128).conj(),
    "complex128 transposed": torch.randn(2, 3, dtype=torch.complex128).T,
    "complex128 empty": torch.empty(0, 2, dtype=torch.complex128),
    "complex32": COMPLEX32,
    "float8_e8m0fnu": BYTES.view(torch.float8_e8m0fnu),
    "float4_e2m1fn_x2": BYTES.view(torch.float4_e2m1fn_x2),
}
each_tensor = pytest.mark.parametrize("tensor", UNUSUAL.values(), ids=UNUSUAL)


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether dtype, shape and all bytes are equal."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.is_complex():
        return torch.equal(torch.view_as_real(one.resolve_conj()), torch.view_as_real(other))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@each_tensor
@pytest.mark.parametrize("name", ["c", "c.pth"])
def test_dtypes_that_safetensors_lacks_are_restored(tensor: Tensor, name: str, tmp_path: Path) -> None:
    """A directory and a ``.pth`` file restore the dtype and every byte."""
    save_checkpoint({"state_dict": {"w": tensor, "v": torch.ones(3)}}, tmp_path / name)
    state = CheckpointLoader.load_checkpoint(tmp_path / name)["state_dict"]
    assert same(tensor, state["w"])
    assert same(torch.ones(3), state["v"])


@each_tensor
def test_dtypes_that_safetensors_lacks_are_converted(tensor: Tensor, tmp_path: Path) -> None:
    """Conversion to DCP and back restores the tensors; conversion to safetensors files for other tools is rejected."""
    save_checkpoint({"state_dict": {"w": tensor}}, tmp_path / "c")
    convert_checkpoint(tmp_path / "c", tmp_path / "dcp", "dcp")
    with open_checkpoint(tmp_path / "dcp") as tree:
        assert same(tensor, tree["state_dict"]["w"])
    with pytest.raises(CheckpointError, match=f"state_dict/w has dtype {tensor.dtype}, which safetensors cannot store"):
        convert_checkpoint(tmp_path / "c", tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["c", "c.pth"])
def test_a_meta_tensor_is_rejected_by_name(name: str, tmp_path: Path) -> None:
    """A tensor without values is rejected with its name, in both formats."""
    with pytest.raises(CheckpointError, match="state_dict/w is a tensor on the meta device"):
        save_checkpoint({"state_dict": {"w": torch.empty(2, device="meta")}}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sparse", [torch.eye(3).to_sparse(), CSR], ids=["coo", "csr"])
def test_a_sparse_tensor_is_saved_in_a_single_file(sparse: Tensor, tmp_path: Path) -> None:
    """A ``.pth`` file restores sparse tensors, also if it is written in the background."""
    tree = {"state_dict": {"w": sparse, "v": torch.ones(3)}}
    save_checkpoint(tree, tmp_path / "c.pth")
    saver = BackgroundSaver(logging.getLogger())
    saver.save(tree, tmp_path / "b.pth", SINGLE_PROCESS)
    saver.wait()
    saver.close()
    for name in ("c.pth", "b.pth"):
        state = CheckpointLoader.load_checkpoint(tmp_path / name)["state_dict"]
        assert state["w"].layout == sparse.layout
        assert torch.equal(state["w"].to_dense(), torch.eye(3))
        assert torch.equal(state["v"], torch.ones(3))


class WithBuffer(Toy):
    """The toy with an additional buffer."""

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("extra", buffer)


def run_with(buffer: Tensor, folder: Path, **changes: Any) -> Runner:
    """Return a run of two epochs that saves after each."""
    saving = {**QUIET_HOOKS, "checkpoint": {"interval": 1, **changes}}
    return Runner(
        **settings(model=WithBuffer(buffer), work_dir=folder, default_hooks=saving, train_cfg={"max_epochs": 1})
    )


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse_coo"),
        (lambda: torch.empty(2, dtype=torch.uint1), "uint1"),
        (lambda: QUANTIZED, "quantized"),
        (lambda: NESTED, "nested"),
    ],
    ids=["sparse", "uint1", "quantized", "nested"],
)
def test_a_tensor_that_cannot_be_saved_is_rejected_before_training(
    make: Callable[[], Tensor], kind: str, tmp_path: Path
) -> None:
    """The error names the buffer before the first iteration, not at the first save after hours."""
    runner = run_with(make(), tmp_path)
    with pytest.raises(CheckpointError, match=rf"state_dict/inner\.extra is a tensor .*{kind}"):
        runner.train()
    assert runner.run.iter == 0
    runner.close()


@pytest.mark.slow
def test_a_run_with_a_complex128_buffer_resumes(tmp_path: Path) -> None:
    """A resumed run restores the buffer."""
    with_buffer = run_with(UNUSUAL["complex128"], tmp_path)
    with_buffer.train()
    with_buffer.close()
    saved = CheckpointLoader.load_checkpoint(tmp_path / "epoch_1")["state_dict"]["inner.extra"]
    assert same(UNUSUAL["complex128"], saved)
