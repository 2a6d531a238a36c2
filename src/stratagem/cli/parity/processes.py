"""Train the variants with several processes, by running this program once for each strategy, and show the progress."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from stratagem.cli.options import RunOptions
from stratagem.cli.parity.variants import ParitySettings, Variant
from stratagem.cli.progress_line import ProgressLine
from stratagem.errors import ParityError

__all__ = ["read_settings", "train_in_processes"]

_POLL_S: Final = 0.2
_SETTINGS: Final = "settings.json"


def train_in_processes(
    options: RunOptions, settings: ParitySettings, folder: Path, variants: Sequence[Variant], progress: ProgressLine
) -> None:
    """Train variants of one strategy in several processes, which share one process group, by running ``parity --record``.

    Raises:
        ParityError: with its error output, if the command fails.
    """
    strategy = variants[0].strategy
    (folder / _SETTINGS).write_text(json.dumps(asdict(replace(settings, strategies=(strategy,)))), encoding="utf-8")
    words = [sys.executable, "-m", "stratagem", "parity", str(options.config), "--record", str(folder)]
    words += ["--nproc", str(settings.nproc)]
    words += [word for override in options.overrides for word in ("--set", override)]
    with (folder / "errors.txt").open("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)  # noqa: S603 -- this program
        try:
            _wait(process, folder, variants, progress)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        errors.seek(0)
        report = errors.read().strip()
    if process.returncode:
        name = strategy.removesuffix("Strategy")
        raise ParityError(f"Training in {settings.nproc} processes with {name} failed:\n{report}")


def _wait(process: subprocess.Popen[bytes], folder: Path, variants: Sequence[Variant], progress: ProgressLine) -> None:
    """Wait for the command, and show each variant when its folder appears."""
    waiting = list(variants)
    while process.poll() is None:
        while waiting and (folder / waiting[0].key).exists():
            progress.start(waiting.pop(0).name)
        time.sleep(_POLL_S)
    for variant in waiting:
        if (folder / variant.key).exists():
            progress.start(variant.name)


def read_settings(folder: Path) -> ParitySettings:
    """Return the settings that :func:`train_in_processes` wrote."""
    saved: dict[str, Any] = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    return ParitySettings(**values)
