"""The base class of training and evaluation loops."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["AnyLoop", "BaseLoop"]


class AnyLoop:
    """The base class of all loops, for ``isinstance``, which takes much longer with an abstract class.

    Hooks read properties of the runner that use it several times per iteration.
    """


class BaseLoop(AnyLoop, metaclass=ABCMeta):
    """Base class of loops, which implement :meth:`run`.

    Args:
        runner: the runner.
        dataloader: the data loader or its configuration, which ``runner.build_dataloader`` builds.
    """

    dataloader: DataLoader[Any]

    def __init__(self, runner: Any, dataloader: DataLoader[Any] | Mapping[str, Any]) -> None:
        self._runner = runner
        if isinstance(dataloader, Mapping):
            diff_rank_seed = runner._randomness_cfg.get("diff_rank_seed", False)
            self.dataloader = runner.build_dataloader(dataloader, seed=runner.seed, diff_rank_seed=diff_rank_seed)
        else:
            self.dataloader = dataloader

    @property
    def runner(self) -> Any:
        """The runner."""
        return self._runner

    @abstractmethod
    def run(self) -> Any:
        """Run the loop."""
