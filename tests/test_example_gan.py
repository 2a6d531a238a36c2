"""The GAN example trains on one device and under DDP."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from stratagem import Config, Runner
from tests.support.ranks import Ranks

EXAMPLE = Path(__file__).parents[1] / "examples" / "gan"


def train(folder: str, name: str = "config.py", **changes: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Train one epoch with few, large batches; return the number of updates of both optimizers, and the weights."""
    config = Config.fromfile(EXAMPLE / name)
    config.merge_from_dict(
        {
            "train_cfg.max_epochs": 1,
            "train_dataloader.batch_size": 500,
            "model.width": 4,
            "work_dir": folder,
            "log_level": "ERROR",
            **changes,
        }
    )
    runner = Runner.from_cfg(config)
    runner.train()
    updates = [wrapper.num_steps_applied for wrapper in runner.strategy.optim_wrapper.values()]
    state = {name: value.clone() for name, value in runner.strategy.model_state_dict().items()}
    runner.close()
    return updates, state


def size_of_png(path: Path) -> tuple[int, int, int]:
    """Verify the checksums of a PNG with one IDAT chunk; return its width, height and number of pixel bytes."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    return *struct.unpack(">II", chunks[b"IHDR"][:8]), len(zlib.decompress(chunks[b"IDAT"]))


@pytest.mark.slow
def test_an_epoch_updates_both_networks_and_saves_images(tmp_path: Path) -> None:
    """4,000 digits in batches of 500 give 8 updates per network, and an 8 x 8 grid of 28 x 28 images is saved."""
    updates, state = train(str(tmp_path))
    assert updates == [8, 8]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert size_of_png(tmp_path / "epoch_1.png") == (224, 224, 224 * 225)


def test_two_ranks_have_equal_weights(ranks: Ranks, tmp_path: Path) -> None:
    """Each rank sees half of the digits, and the gradients of both networks are synchronized."""
    (updates, state), (_, other) = ranks.run(train, str(tmp_path), "config_ddp.py", launcher="pytorch")
    assert updates == [4, 4]
    weights = [name for name in state if "running" not in name]  # running statistics depend on each rank's samples
    assert all(torch.equal(state[name], other[name]) for name in weights)
    assert (tmp_path / "epoch_1.png").is_file()
