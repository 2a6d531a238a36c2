"""Create the files of a new project."""

from __future__ import annotations

import csv
import io
import random
import shlex
from importlib import resources
from pathlib import Path
from typing import Final

from stratagem.cli.output import echo
from stratagem.errors import ConfigValueError
from stratagem.utils import did_you_mean

__all__ = ["KINDS", "init"]

# For each kind of project, the metric that its test checks, and the number of epochs.
KINDS: Final = {"image": ("accuracy", 4), "text": ("accuracy", 3), "table": ("r2score", 15)}
_TEMPLATES: Final = resources.files("stratagem.cli.init") / "templates"
_SUFFIX: Final = ".txt"
_ROWS: Final = 500


def init(kind: str, folder: Path) -> None:
    """Create a project in a folder that does not exist or is empty, and print the commands to try.

    Raises:
        ConfigValueError: if the kind is unknown, or the folder contains files.
    """
    if kind not in KINDS:
        raise ConfigValueError(f"init: unknown kind of data {kind!r}. {did_you_mean(kind, KINDS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigValueError(
            f"init: {folder} already exists and is not empty. Choose a new folder; nothing was written."
        )
    files = _files(kind, folder.resolve().name)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    echo(f"Created {', '.join(sorted(files))} in {folder}. Try:")
    for command in (
        f"cd {shlex.quote(str(folder))}",
        "stratagem train config.py",
        f"stratagem test config.py {_last_checkpoint(kind)}",
        "python -m pytest test_project.py",
    ):
        echo(f"  {command}")


def _last_checkpoint(kind: str) -> str:
    return f"work_dirs/{kind}/epoch_{KINDS[kind][1]}"


def _files(kind: str, name: str) -> dict[str, str]:
    """Return the contents of the files of a project by name."""
    values = {
        "<NAME>": name,
        "<KIND>": kind,
        "<METRIC>": KINDS[kind][0],
        "<EPOCHS>": str(KINDS[kind][1]),
        "<CHECKPOINT>": _last_checkpoint(kind),
    }
    found: dict[str, str] = {}
    for folder in (_TEMPLATES / "common", _TEMPLATES / kind):
        for template in folder.iterdir():
            text = template.read_text(encoding="utf-8")
            for marker, value in values.items():
                text = text.replace(marker, value)
            found[template.name.removesuffix(_SUFFIX)] = text
    if kind == "table":
        found["data.csv"] = _houses()
    return found


def _houses() -> str:
    """Return a CSV file of houses whose price depends on the other columns."""
    generator = random.Random(0)
    factors = {"center": 1.6, "harbor": 1.3, "north": 1.0, "south": 0.8}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["area", "rooms", "age", "district", "price"])
    for _ in range(_ROWS):
        area, age, district = generator.randint(30, 200), generator.randint(0, 80), generator.choice(sorted(factors))
        rooms = max(1, area // 30 + generator.randint(-1, 1))
        price = 2000 * area * factors[district] * (1 - 0.005 * age) + 5000 * rooms + generator.gauss(0, 10000)
        writer.writerow([area, rooms, age, district, round(price)])
    return out.getvalue()
