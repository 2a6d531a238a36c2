"""Options shared by the commands that run a configuration, and how they change it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.config import Config, parse_overrides
from stratagem.config.reading.data_languages import DATA_SUFFIXES
from stratagem.config.redact import remember_secrets
from stratagem.errors import LaunchError
from stratagem.registry.strategy_names import full_strategy_name, strategy_name
from stratagem.utils.imports import drop_working_directory

__all__ = ["RunOptions", "read_config", "read_file", "with_strategy"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The command-line options that select a configuration, change it, and choose where it runs.

    Raises:
        LaunchError: if ``nproc``, ``launcher`` and ``max_restarts`` conflict.
    """

    config: Path
    overrides: tuple[str, ...] = ()
    work_dir: Path | None = None
    launcher: str | None = None
    strategy: str | None = None
    nproc: int | None = None
    max_restarts: int = 0

    def __post_init__(self) -> None:
        if self.max_restarts and self.nproc is None:
            raise LaunchError(
                f"--max-restarts {self.max_restarts} requires --nproc N, which starts the ranks. If torchrun starts them, use "
                "its own --max-restarts."
            )
        if self.max_restarts and self.launcher == "ray":
            raise LaunchError(
                "--max-restarts cannot be combined with --launcher ray: only ranks on this machine can be restarted. Omit "
                "--max-restarts, and after a failure run the command again with --resume."
            )
        if self.nproc is not None and self.launcher not in (None, "pytorch", "ray"):
            raise LaunchError(
                f"--nproc {self.nproc} cannot be combined with --launcher {self.launcher!r}, because --nproc can only start "
                "processes on this machine (--launcher pytorch) or on a Ray cluster (--launcher ray). Omit one of the options."
            )


def read_file(path: Path) -> Config:
    """Read a configuration file. For a data file (not Python), also stop importing from the working directory.

    Raises:
        ConfigError: or a subclass, if it cannot be read.
    """
    if path.suffix in DATA_SUFFIXES:
        drop_working_directory()
    return Config.fromfile(path)


def read_config(options: RunOptions) -> Config:
    """Read the configuration and apply the options of the command line.

    Raises:
        ConfigError: or a subclass, if the file cannot be read or a value cannot be set.
    """
    config = read_file(options.config)
    config.merge_from_dict(parse_overrides(options.overrides))
    # Error messages from here on mask the secrets.
    remember_secrets(config.to_dict())
    if options.work_dir is not None:
        config.merge_from_dict({"work_dir": str(options.work_dir)}, source="--work-dir")
    elif config.get("work_dir") is None:
        config["work_dir"] = f"work_dirs/{options.config.stem}"
    if options.launcher is not None:
        config.merge_from_dict({"launcher": options.launcher}, source="--launcher")
    if options.strategy is not None:
        config["strategy"] = with_strategy(config.get("strategy"), strategy_name(options.strategy))
    return config


def with_strategy(section: object, class_name: str) -> dict[str, object]:
    """Return the strategy section for a class; keep the options unless they belong to a different class."""
    if isinstance(section, dict) and full_strategy_name(str(section.get("type", class_name))) == class_name:
        return {**section, "type": class_name}
    return {"type": class_name}
