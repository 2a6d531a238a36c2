"""Run a program of an MMEngine code base unchanged, with ``mmengine`` referring to this package."""

from __future__ import annotations

import builtins
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from stratagem.compat.mmengine import alias
from stratagem.errors import ConfigFileError, ConfigValueError

__all__ = ["run_program"]

_USAGE = "Write `stratagem run-mmengine SCRIPT ARGS...` or `stratagem run-mmengine -m MODULE ARGS...`."


def run_program(words: Sequence[str]) -> None:
    """Run a script or module as ``python SCRIPT ARGS...`` or ``python -m MODULE ARGS...`` would.

    Its processes and those that they start import this package as ``mmengine``, because ``PYTHONPATH`` starts with a folder that
    contains such a package. An error of the program is printed as Python prints it, and exits with status 1.

    Args:
        words: the script or ``-m`` and a module, and the arguments.

    Raises:
        ConfigValueError: if there is no script, or no module after ``-m``, or a word before them is an option.
        ConfigFileError: if the script cannot be read.
    """
    alias.extend_python_path()
    is_module = bool(words) and words[0] == "-m"
    words = words[1:] if is_module else words
    if not words or words[0].startswith("-"):
        what = f"{words[0]!r} is not a {'module' if is_module else 'script'}" if words else "There is nothing to run"
        raise ConfigValueError(f"{what}. {_USAGE}")
    target, *arguments = words
    code = None if is_module else _compile(target)
    sys.argv[:] = [target, *arguments]
    # The first entry is the folder of the command, or the working directory.
    sys.path[0] = os.fspath(Path.cwd() if is_module else Path(target).resolve().parent)
    try:
        if code is None:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            exec(code, _new_main(target).__dict__)  # noqa: S102 -- the program that the user wants to run
    except Exception as error:  # noqa: BLE001 -- report any error as Python does
        _print_error(error)
        raise SystemExit(1) from None


def _compile(script: str) -> CodeType:
    path = Path(script)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigFileError(f"The script {script} cannot be read: {error.strerror}. {_USAGE}") from error
    return compile(source, script, "exec", dont_inherit=True)


def _new_main(script: str) -> ModuleType:
    """Make a new module ``__main__``, which stays in place until the process ends."""
    module = ModuleType("__main__")
    module.__dict__.update(__file__=script, __builtins__=builtins, __spec__=None, __cached__=None)
    sys.modules["__main__"] = module
    return module


def _print_error(error: Exception) -> None:
    """Print an error without the frames of this module and of :mod:`runpy`."""
    frames: TracebackType | None = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        frames = frames.tb_next
    traceback.print_exception(error.with_traceback(frames))
