"""Train, resume and verify on a simulation of a platform without POSIX modules, signals and calls; run as a script.

The argument is a folder for the files of the run.
"""

from __future__ import annotations

import asyncio  # noqa: F401 -- the standard library chooses modules per platform when it is imported
import multiprocessing.util  # noqa: F401
import os
import signal
import subprocess  # noqa: F401
import sys
import tempfile  # noqa: F401
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

MODULES = ("fcntl", "resource", "termios", "pwd", "grp")
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGALRM", "pthread_sigmask")
CALLS = ("set_blocking", "pwrite", "preadv", "pread", "fork", "O_DIRECTORY", "O_CLOEXEC", "posix_fadvise")


class Missing(MetaPathFinder):
    """Refuses to import the modules of POSIX."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname in MODULES:
            raise ImportError(f"this platform has no {fullname}")


def remove_posix() -> None:
    """Remove what Windows does not have from this process."""
    set_blocking, set_wakeup_fd = os.set_blocking, signal.set_wakeup_fd

    def set_wakeup_fd_like_windows(descriptor: int, **kwargs: bool) -> int:
        # Only POSIX requires a pipe that does not block.
        if descriptor >= 0:
            set_blocking(descriptor, False)
        return set_wakeup_fd(descriptor, **kwargs)

    signal.set_wakeup_fd = set_wakeup_fd_like_windows  # type: ignore[assignment]
    for module, names in ((signal, SIGNALS), (os, CALLS)):
        for name in names:
            with suppress(AttributeError):
                delattr(module, name)
    os.environ["USERNAME"] = "user"  # always set on Windows
    os.supports_fd.discard(os.utime)
    sys.meta_path.insert(0, Missing())
    for module_name in MODULES:
        sys.modules.pop(module_name, None)


def train_and_resume(folder: str) -> None:
    """Read a configuration, train for two iterations with a checkpoint, resume for two more, and verify the checkpoint."""
    import stratagem

    assert all(hasattr(stratagem, name) for name in stratagem.__all__)
    import torch
    from torch import nn

    from stratagem.cli.main import main

    class Toy(stratagem.BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, inputs: torch.Tensor, mode: str = "tensor") -> object:
            outputs = self.layer(inputs)
            return {"loss": outputs.square().mean()} if mode == "loss" else outputs

    configuration = Path(folder).with_name("config.py")
    configuration.write_text('optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1))')
    for iterations in (2, 4):
        runner = stratagem.Runner(
            model=Toy(),
            work_dir=folder,
            resume=iterations == 4,
            train_dataloader=dict(batch_size=2, dataset=list(torch.ones(8, 2)), sampler=dict(type="DefaultSampler")),
            train_cfg=dict(by_epoch=False, max_iters=iterations),
            optim_wrapper=stratagem.Config.fromfile(configuration).optim_wrapper,
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=2, by_epoch=False)),
        )
        runner.train()
        assert runner.run.iter == iterations
        runner.close()
    main(["ckpt", "verify", f"{folder}/iter_4"])


if __name__ == "__main__":
    remove_posix()
    train_and_resume(sys.argv[1])
