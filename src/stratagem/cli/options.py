"""What the commands that run a configuration have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.config import Config, parse_overrides
from stratagem.config.reading.data_languages import DATA_SUFFIXES
from stratagem.config.redact import remember_secrets
from stratagem.errors import ConfigValueError, LaunchError
from stratagem.registry import STRATEGIES
from stratagem.utils import did_you_mean
from stratagem.utils.imports import drop_working_directory

__all__ = ["RunOptions", "read_config", "read_file", "strategy_name", "with_strategy"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options that say which configuration runs, where and how."""

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
                f"--max-restarts {self.max_restarts} is for the ranks that --nproc starts; give --nproc N too. torchrun, which "
                "starts ranks by itself, has an option of that name."
            )
        if self.max_restarts and self.launcher == "ray":
            raise LaunchError(
                "--max-restarts starts ranks of this machine again, and --launcher ray starts them on a cluster. Leave it out, "
                "and have Ray's job run the command again: it goes on from the last checkpoint with --resume."
            )
        if self.nproc is not None and self.launcher not in (None, "pytorch", "ray"):
            raise LaunchError(
                f"--nproc {self.nproc} starts processes by torchrun's launcher or by Ray, but --launcher says "
                f"{self.launcher!r}. Leave one of them out."
            )


def read_file(path: Path) -> Config:
    """Read a configuration. For one that is data, this process no longer imports anything from the working directory.

    Raises:
        ConfigError: or a subclass, if it cannot be read.
    """
    if path.suffix in DATA_SUFFIXES:
        drop_working_directory()
    return Config.fromfile(path)


def read_config(options: RunOptions) -> Config:
    """Read the configuration and lay the command line's values over it.

    Raises:
        ConfigError: in one of its kinds, if it cannot be read or a value cannot be set.
    """
    config = read_file(options.config)
    config.merge_from_dict(parse_overrides(options.overrides))
    # For the errors from here on.
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


def with_strategy(section: object, kind: str) -> dict[str, object]:
    """Return the section of a strategy: options stay where they are for the same one, or for none that is named."""
    if isinstance(section, dict) and section.get("type", kind) == kind:
        return {**section, "type": kind}
    return {"type": kind}


def strategy_name(name: str) -> str:
    """Return the class of a strategy that is named short (``fsdp``) or in full.

    Raises:
        ConfigValueError: if there is none.
    """
    known = STRATEGIES.names()
    short = {kind.removesuffix("Strategy").removesuffix("Device").lower(): kind for kind in known}
    kind = name if name in known else short.get(name.lower())
    if kind is None:
        raise ConfigValueError(f"--strategy {name}: there is no such strategy. {did_you_mean(name, [*short, *known])}")
    return kind
