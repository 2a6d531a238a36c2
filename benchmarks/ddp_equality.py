"""Compare the training of two DDP ranks with that of a single process.

The example ``examples/mnist`` is trained for one epoch, without the layers that draw random numbers, because each rank draws
different ones. The single process uses batches of 32 samples; the two ranks use 16 of the same samples each. Losses can only
differ by rounding errors, because float32 sums are computed in a different order and training accumulates the differences. The
same runs in float64 show how much of the difference is due to rounding.

The command prints the first ten losses, the last one and the largest difference. It exits with 1 if the float64 runs differ by
more than 1e-9 or if the weights of the ranks are not bitwise identical: ``python benchmarks/ddp_equality.py``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from stratagem import Config, Runner
from stratagem.dist import all_gather_object, infer_launcher
from stratagem.model import unwrap_model
from stratagem.train import Hook

EXAMPLE = Path(__file__).parent.parent / "examples" / "mnist" / "config.py"
RANDOM_LAYERS = {"RandomAffine", "Dropout"}
GLOBAL_BATCH = 32
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LIMIT = 1e-9


@final
class ToDefault(nn.Module):
    """Convert images to the default floating-point dtype, in which the layers are built."""

    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.get_default_dtype())


@final
class Losses(Hook):
    """Records the loss of each iteration."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.values.append(float(outputs["loss"]))


def train(work_dir: str, ranks: int) -> dict[str, Any]:
    """Train the example for one epoch; return the mean losses, the weights, and a hash of the weights of each rank."""
    cfg = Config.fromfile(EXAMPLE).to_dict()
    layers = [layer for layer in cfg["model"]["network"] if layer["type"] not in RANDOM_LAYERS]
    losses = Losses()
    runner = Runner(
        model={**cfg["model"], "network": [{"type": ToDefault}, *layers]},
        train_dataloader={**cfg["train_dataloader"], "batch_size": GLOBAL_BATCH // ranks},
        train_cfg={"by_epoch": True, "max_epochs": 1},
        optim_wrapper=cfg["optim_wrapper"],
        param_scheduler=cfg["param_scheduler"],
        default_hooks={"logger": None, "checkpoint": None},
        custom_hooks=[losses],
        randomness=cfg["randomness"],
        work_dir=work_dir,
        log_level="WARNING",
    )
    state = unwrap_model(runner.train()).state_dict()
    each = all_gather_object((losses.values, digest(state)))
    runner.close()
    return {
        "losses": [sum(values) / ranks for values in zip(*(values for values, _ in each), strict=True)],
        "digests": [hashed for _, hashed in each],
        "state": state,
    }


def digest(state: Mapping[str, Tensor]) -> str:
    """Return a hash of all bytes of the weights."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()


def train_in_each_dtype(work_dir: str, ranks: int) -> dict[str, dict[str, Any]]:
    """Train in float32 and in float64."""
    torch.set_num_threads(1)
    results = {}
    for name, dtype in DTYPES.items():
        torch.set_default_dtype(dtype)
        results[name] = train(work_dir, ranks)
    return results


def show(alone: Mapping[str, Any], together: Mapping[str, Any]) -> bool:
    """Print the comparison; return whether the runs are equal."""
    print("iteration   one process   two ranks     difference (float32)")
    one, two = alone["float32"]["losses"], together["float32"]["losses"]
    for iteration in (*range(10), len(one) - 1):
        print(
            f"{iteration + 1:>9}   {one[iteration]:.9f}   {two[iteration]:.9f}   {two[iteration] - one[iteration]:+.1e}"
        )
    largest = {}
    for name in DTYPES:
        one, two = alone[name], together[name]
        largest[name] = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
        weights = max(float((one["state"][key] - two["state"][key]).abs().max()) for key in one["state"])
        print(
            f"{name}: {len(one['losses'])} iterations, largest difference of a loss {largest[name]:.1e}, "
            f"of a weight {weights:.1e}; ranks bitwise identical: {len(set(two['digests'])) == 1}"
        )
    identical = all(len(set(result["digests"])) == 1 for result in together.values())
    return identical and largest["float64"] <= LIMIT


def main() -> int:
    """Train in this process and on two ranks, and compare the results; in a process started by a launcher, only train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", help="the file to which rank 0 writes its result", default=None)
    write = parser.parse_args().write
    if infer_launcher() != "none":
        result = train_in_each_dtype(str(Path(write).parent), ranks=int(os.environ["WORLD_SIZE"]))
        if os.environ["RANK"] == "0":
            torch.save(result, write)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/two.pt"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run([*launch, __file__, "--write", file], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return 0 if show(train_in_each_dtype(folder, ranks=1), torch.load(file, weights_only=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
