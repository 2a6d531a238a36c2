"""The entry point of the command line: run a command, and report an error as one message and an exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from stratagem.cli.app import app
from stratagem.cli.launch.child_status import claim_error_report, restart_notice
from stratagem.errors import RankFailedError, StratagemError
from stratagem.utils import mask_text
from stratagem.utils.printable import escape_controls

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with status 0 on success, 2 for errors that the user can correct, or 1 for other failures.

    Args:
        arguments: the command line without the program name; ``sys.argv[1:]`` if None.
    """
    words = spell_out_resume(list(sys.argv[1:] if arguments is None else arguments))
    try:
        app(words, prog_name="stratagem")
    except Exception as error:  # noqa: BLE001 -- the outermost level, where every error becomes a message
        _report_error(error, with_traceback="--traceback" in words)
        raise SystemExit(getattr(error, "exit_status", 1)) from None


def spell_out_resume(words: list[str]) -> list[str]:
    """Replace ``--resume`` without a path with ``--resume=auto``, because typer has no options with an optional value.

    ``parity`` has an option ``--resume`` without a value, and the arguments of ``run-mmengine`` are those of another program.
    """
    if words[:1] in (["parity"], ["run-mmengine"]):
        return words
    spelled: list[str] = []
    for word, following in zip(words, [*words, None][1:], strict=True):
        bare = word == "--resume" and (following is None or following.startswith("-") or _is_config(following))
        spelled += ["--resume=auto"] if bare else [word]
    return spelled


def _is_config(word: str) -> bool:
    """Return whether a word is a configuration file, so that ``train --resume CONFIG`` does not take it as the checkpoint."""
    return word.endswith((".py", ".yaml", ".yml", ".json", ".toml"))


def _report_error(error: Exception, *, with_traceback: bool) -> None:
    if with_traceback:
        print(escape_controls(mask_text("".join(traceback.format_exception(error)))), end="", file=sys.stderr)  # noqa: T201 -- the command line
    rank = os.environ.get("RANK")
    who = "stratagem" if rank is None else f"stratagem (rank {rank})"
    notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, StratagemError):
        message = f"{who}: error: {error}{notes}"
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"\n  at {frame.filename}:{frame.lineno} in {frame.name}. Use --traceback to show the full traceback."
        where = "" if with_traceback else where
        message = f"{who}: {type(error).__name__}: {error}{notes}{where}"
    message = escape_controls(mask_text(message))
    if isinstance(error, RankFailedError) or claim_error_report(message, getattr(error, "exit_status", 1)):
        notice = restart_notice()
        print(message if notice is None else f"{message}\n{notice}", file=sys.stderr)  # noqa: T201 -- the command line
