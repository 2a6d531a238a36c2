"""Whether and where Python packages are installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from stratagem.errors import ConfigValueError

__all__ = ["call_command", "get_installed_path", "install_package", "is_installed", "package2module"]


def is_installed(package: str) -> bool:
    """Return whether a distribution or a module with this name is installed."""
    try:
        distribution(package)
    except PackageNotFoundError:
        spec = importlib.util.find_spec(package)
        return spec is not None and spec.origin is not None
    return True


def get_installed_path(package: str) -> str:
    """Return the folder of a package, given the name of its distribution or module.

    Raises:
        PackageNotFoundError: if it is not installed.
        RuntimeError: if it is a namespace package, which has no folder.
    """
    try:
        found = distribution(package)
    except PackageNotFoundError:
        module = package
    else:
        module = _top_level(package) or package
        folder = Path(str(found.locate_file(module)))
        if folder.is_dir():
            return str(folder)
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise PackageNotFoundError(package)
    if spec.origin is None:
        raise RuntimeError(f"{package} is a namespace package, which has no folder of its own.")
    return str(Path(spec.origin).parent)


def package2module(package: str) -> str:
    """Return the top-level module of a distribution.

    Raises:
        ValueError: if the distribution is not installed, or does not record its modules.
    """
    try:
        name = _top_level(package)
    except PackageNotFoundError as error:
        raise ConfigValueError(f"The package {package!r} is not installed.") from error
    if name is None:
        raise ConfigValueError(f"The package {package!r} does not record the names of its modules.")
    return name


def call_command(cmd: list[str]) -> None:
    """Run a program.

    Raises:
        subprocess.CalledProcessError: if its exit status is not 0.
    """
    subprocess.check_call(cmd)  # noqa: S603 -- the caller's command


def install_package(package: str) -> None:
    """Install a package with ``pip`` into the environment of this process, unless it is installed."""
    if not is_installed(package):
        call_command([sys.executable, "-m", "pip", "install", package])


def _top_level(package: str) -> str | None:
    text = distribution(package).read_text("top_level.txt")
    return text.split("\n")[0].strip() or None if text else None
