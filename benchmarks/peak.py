"""The most memory of its own that a process has."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import final

__all__ = ["Peak", "own_bytes"]


@final
class Peak:
    """The most memory of its own that this process has while a block runs, in bytes, looked at every 2 ms."""

    def __enter__(self) -> Peak:
        self.most = own_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.most = max(self.most, own_bytes())


def own_bytes() -> int:
    """Return the bytes in memory that are no mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))
