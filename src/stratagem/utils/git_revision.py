"""Find the Git revision of the working directory."""

from __future__ import annotations

import shutil
import subprocess

__all__ = ["git_revision"]

_TIMEOUT_S = 5.0
# The configuration of a repository can name a program to run.
_OPTIONS = ("-c", "core.fsmonitor=false")


def git_revision() -> str | None:
    """Return the commit of the working directory, followed by ``(modified)`` if tracked files have changed.

    The commit is followed by ``(perhaps modified)`` if it takes too long to find changes.

    Returns:
        None if the directory is not in a repository with a commit, or Git is not available.
    """
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    if changes is None:
        return f"{commit} (perhaps modified)"
    return f"{commit} (modified)" if changes else commit


def _git(*arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 -- fixed commands
            [git, *_OPTIONS, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
