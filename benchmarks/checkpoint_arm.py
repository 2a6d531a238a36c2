"""Load a checkpoint and make the first update, when ``checkpoint.py`` requests it. It is started by ``checkpoint.py``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from peak import Peak, own_bytes
from safetensors import safe_open
from torch import Tensor, nn

from stratagem.strategies import SingleDeviceStrategy

__all__ = ["JOBS", "METHODS"]

WIDTH: Final = 1024
_READ_BYTES: Final = 8 << 20
JOBS: Final = {"resume": "weights and AdamW state", "load_from": "weights only, update with SGD"}
METHODS: Final = ("read", "read into tensors", "stratagem")


def make_model(parameters: int) -> nn.Module:
    """Return a model with the shapes of a transformer: some large matrices and many vectors."""
    size = 2 * 4 * WIDTH**2
    blocks = [
        nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
        for _ in range(max(1, parameters // size))
    ]
    return nn.Sequential(*blocks)


def optimizer_options(job: str) -> dict[str, Any]:
    """Return the options of the optimizer, which are the same for all methods."""
    return (
        {"type": "AdamW", "lr": 1e-4, "fused": True} if job == "resume" else {"type": "SGD", "lr": 1e-4, "fused": True}
    )


def make_strategy(job: str, model: nn.Module, folder: Path) -> SingleDeviceStrategy:
    """Return a strategy that has prepared the model."""
    strategy = SingleDeviceStrategy(
        work_dir=folder / "work", env_kwargs={"launcher": "none"}, log_kwargs={"log_level": "ERROR"}
    )
    strategy.prepare(model, optim_wrapper={"optimizer": optimizer_options(job)})
    return strategy


def make_optimizer(job: str, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the hand-written methods."""
    options = optimizer_options(job)
    kind: Any = getattr(torch.optim, options.pop("type"))
    optimizer: torch.optim.Optimizer = kind(model.parameters(), **options)
    return optimizer


def loss_of(model: nn.Module) -> Tensor:
    """Return a loss, which depends on all parameters."""
    loss: Tensor = model(torch.ones(1, WIDTH)).square().mean()
    return loss


def update(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make one update."""
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def files_of(checkpoint: Path, job: str) -> list[Path]:
    """Return the files that a job reads."""
    return sorted(file for file in checkpoint.iterdir() if job == "resume" or file.name != "optimizer.safetensors")


def hand_buffer(job: str, checkpoint: Path, model: nn.Module) -> Callable[[], None]:
    """Return a function that reads all files to one buffer and makes an update; the optimizer creates its state."""
    optimizer = make_optimizer(job, model)
    buffer = memoryview(bytearray(_READ_BYTES))

    def work() -> None:
        for path in files_of(checkpoint, job):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        update(model, optimizer)

    return work


def hand_tensors(job: str, checkpoint: Path, model: nn.Module) -> Callable[[], None]:
    """Return a function that reads the parameters in place and the moments to new tensors, and makes an update."""
    optimizer = make_optimizer(job, model)
    parameters = dict(model.named_parameters())

    def fill(path: Path, tensor_of: Callable[[str], Tensor]) -> None:
        with path.open("rb", buffering=0) as file:
            for name, start in starts[path].items():
                tensor = tensor_of(name)
                view = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
                file.seek(start)
                while view:
                    view = view[file.readinto(view) :]

    def moment(name: str) -> Tensor:
        _, parameter, key = name.split("/")
        slot = torch.empty_like(parameters[parameter]) if key != "step" else torch.empty(())
        optimizer.state[parameters[parameter]][key] = slot
        return slot

    def work() -> None:
        fill(weights, parameters.__getitem__)
        if job == "resume":
            fill(moments, moment)
        update(model, optimizer)

    weights, moments = checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors"
    starts = {path: starts_of(path) for path in (weights, *([moments] if job == "resume" else []))}
    return work


def starts_of(path: Path) -> dict[str, int]:
    """Return the offsets of all tensors in a safetensors file, in the order of the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    with safe_open(path, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
        sizes = {name: torch.Size(part.get_shape()).numel() * 4 for name, part in slices.items()}
    starts, start = {}, 8 + length
    for name, size in sizes.items():
        starts[name] = start
        start += size
    return starts


def stratagem(job: str, checkpoint: Path, model: nn.Module) -> Callable[[], None]:
    """Return a function that resumes or loads the weights, verifying all digests, and makes an update."""
    strategy = make_strategy(job, model, checkpoint.parent)

    def work() -> None:
        if job == "resume":
            strategy.resume(checkpoint)
        else:
            strategy.load_checkpoint(checkpoint)
        strategy.optim_wrapper.update_params(loss_of(strategy.model))

    return work


def save(job: str, parameters: int, checkpoint: Path) -> None:
    """Save the checkpoint after one update."""
    strategy = make_strategy(job, make_model(parameters), checkpoint.parent)
    strategy.optim_wrapper.update_params(loss_of(strategy.model))
    strategy.save_checkpoint(checkpoint, save_optimizer=job == "resume")


def main() -> None:
    """Prepare, wait for a line on the standard input, work, and print the results of :func:`measure`."""
    method, job, parameters, checkpoint, figure = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = Path(checkpoint)
    if method == "save":
        save(job, int(parameters), path)
        print(0, 0, flush=True)
        os._exit(0)
    methods = {"read": hand_buffer, "read into tensors": hand_tensors, "stratagem": stratagem}
    work = methods[method](job, path, make_model(int(parameters)))
    print("ready", flush=True)
    sys.stdin.readline()
    print(*measure(work, figure), flush=True)
    os._exit(0)


def measure(work: Callable[[], None], figure: str) -> tuple[float, float]:
    """Return the seconds that ``work`` takes and its CPU time; or twice its peak memory in addition to that before it."""
    if figure == "memory":
        before = own_bytes()
        with Peak() as peak:
            work()
        return peak.most - before, peak.most - before
    begin, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - cpu


if __name__ == "__main__":
    main()
