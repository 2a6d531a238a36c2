"""The entry point: run a command, and turn errors into one clear message and an exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from stratagem.cli.app import app
from stratagem.cli.launch.child_status import claim_telling, restart_notice
from stratagem.errors import RankFailedError, StratagemError
from stratagem.utils import mask_text

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 where all went well, 2 for what the user can mend, 1 for a failure."""
    words = spell_out_resume(list(sys.argv[1:] if arguments is None else arguments))
    try:
        app(words, prog_name="stratagem")
    except Exception as error:  # noqa: BLE001 -- the outermost place: every error becomes a message here
        _tell(error, whole="--traceback" in words)
        raise SystemExit(getattr(error, "exit_status", 1)) from None


def spell_out_resume(words: list[str]) -> list[str]:
    """Give ``--resume`` the value ``auto`` where none follows it: typer has no options whose value may be left out."""
    spelled: list[str] = []
    for word, following in zip(words, [*words, None][1:], strict=True):
        bare = word == "--resume" and (following is None or following.startswith("-") or _is_config(following))
        spelled += ["--resume=auto"] if bare else [word]
    return spelled


def _is_config(word: str) -> bool:
    """Tell whether a word names a configuration, so that `train --resume CONFIG` means what it looks like."""
    return word.endswith((".py", ".yaml", ".yml", ".json", ".toml"))


def _tell(error: Exception, *, whole: bool) -> None:
    if whole:
        print(mask_text("".join(traceback.format_exception(error))), end="", file=sys.stderr)  # noqa: T201 -- the command line
    rank = os.environ.get("RANK")
    who = "stratagem" if rank is None else f"stratagem (rank {rank})"
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, StratagemError):
        message = f"{who}: error: {error}{notes}"
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if whole else f"\n  at {frame.filename}:{frame.lineno} in {frame.name}; --traceback shows all of it."
        message = f"{who}: {type(error).__name__}: {error}{notes}{where}"
    message = mask_text(message)
    if isinstance(error, RankFailedError) or claim_telling(message, getattr(error, "exit_status", 1)):
        notice = restart_notice()
        print(message if notice is None else f"{message}\n{notice}", file=sys.stderr)  # noqa: T201 -- the command line
