"""Implement ``stratagem config``: print, compare and check configurations without building anything."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

import typer
from rich.console import Console
from rich.syntax import Syntax

from stratagem.checkpoint.convert.convert import open_checkpoint
from stratagem.cli.options import RunOptions, read_file
from stratagem.cli.output import echo, print_json
from stratagem.config import Config, changed_paths, parse_overrides
from stratagem.config import explain as explain_value
from stratagem.config import show as text_of
from stratagem.config.compare import saved_text
from stratagem.config.explain import described_changes
from stratagem.config.port_files import port_files, verify, write_file, write_files
from stratagem.config.reading.data_languages import DATA_SUFFIXES
from stratagem.config.redact import remember_secrets
from stratagem.config_schema import check_run, require_valid
from stratagem.errors import CheckpointError, ConfigError, ConfigFileError, ConfigValueError
from stratagem.utils import did_you_mean, mask_text
from stratagem.utils.printable import escape_controls

__all__ = ["check", "diff", "explain", "port", "show"]

_SUFFIXES = {"python": ".py", "yaml": ".yaml", "json": ".json", "toml": ".toml"}


def show(options: RunOptions, form: str) -> None:
    """Print the merged configuration as Python, YAML, JSON or TOML, with syntax highlighting on a terminal.

    Raises:
        ConfigValueError: if ``form`` is unknown.
    """
    if form not in _SUFFIXES:
        raise ConfigValueError(f"--as {form}: unknown format. {did_you_mean(form, _SUFFIXES)}")
    _print(text_of(_read(options), _SUFFIXES[form], mark_unsupported=form == "python"), form)


def explain(options: RunOptions, path: str, *, as_json: bool = False) -> None:
    """Print each file and line that set a value."""
    config = _read(options)
    if as_json:
        print_json({"path": path, "changes": described_changes(config, path)})
        return
    echo(explain_value(config, path))


def diff(first: Path, second: Path, *, as_json: bool = False) -> None:
    """Print the differences between two configurations; as JSON, the two values of each path that differs."""
    if as_json:
        changed = changed_paths("\n".join(_text(first)), "\n".join(_text(second)))
        print_json({path: {"first": was, "second": now} for path, (was, now) in changed.items()})
        return
    lines = difflib.unified_diff(_text(first), _text(second), str(first), str(second), lineterm="")
    found = "\n".join(lines)
    _print(found, "diff") if found else echo("No differences.")


def _text(path: Path) -> list[str]:
    """Return the lines of a merged configuration, of a file or in a checkpoint. The one in a checkpoint is not executed.

    Raises:
        CheckpointError: if the checkpoint contains no configuration.
    """
    if path.is_file() and path.suffix in {*DATA_SUFFIXES, ".py"}:
        return Config.fromfile(path).pretty_text.splitlines()
    with open_checkpoint(path) as tree:
        meta = tree.get("meta")
        saved = meta.get("cfg") if isinstance(meta, Mapping) else None
    if not isinstance(saved, str) or not saved:
        raise CheckpointError(f"{path} contains no configuration (meta has no 'cfg').")
    return mask_text(saved_text(saved)).splitlines()


def check(options: RunOptions, *, as_json: bool = False) -> None:
    """Check that every key and argument of a configuration is known.

    Raises:
        ConfigKeyError: with all problems, if there are any.
        typer.Exit: with the exit status of a configuration error, if the problems are printed as JSON.
    """
    config = _read(options)
    if as_json:
        problems = check_run(config)
        print_json(
            [
                {"path": each.path, "where": None if each.origin is None else str(each.origin), "message": each.message}
                for each in problems
            ]
        )
        if problems:
            raise typer.Exit(ConfigError.exit_status)
        return
    require_valid(config)
    echo(f"{options.config}: all keys and arguments are valid.")


def port(path: Path, out: Path | None) -> None:
    """Print or write the configuration that MMEngine's one becomes, and print what must be changed by hand to stderr.

    Raises:
        ConfigFileError: if a file cannot be read or written.
        ConfigParsingError: if the file is not a valid Python configuration.
        ConfigValueError: if the configuration has bases, and ``out`` is a file or contains the original.
    """
    if path.suffix != ".py":
        raise ConfigFileError(f"{path} is not a Python file. Only Python configurations can be rewritten.")
    files = port_files(path)
    first, bases = files[0], files[1:]
    notes = [note for each in files for note in each.ported.notes]
    if out is None:
        echo(first.ported.text.rstrip("\n"))
        if bases:
            names = ", ".join(str(each.place) for each in bases)
            notes = [
                *first.ported.notes,
                f"{path}: its bases were not rewritten: {names}. Write all into a folder: --out FOLDER.",
            ]
    elif out.suffix != ".py" or out.is_dir():
        written = write_files(files, out)
        echo("\n".join(map(str, written)))
        notes += verify(path, written[0])
    elif bases:
        raise ConfigValueError(
            f"{path} has {len(bases)} bases, which are rewritten as well. Write all files into a folder: "
            f"--out {out.with_suffix('')}"
        )
    else:
        write_file(out, first.ported.text)
    for note in notes:
        typer.echo(escape_controls(note), err=True)


def _read(options: RunOptions) -> Config:
    config = read_file(options.config)
    if options.overrides:
        config.merge_from_dict(parse_overrides(options.overrides))
    remember_secrets(config.to_dict())
    return config


def _print(text: str, language: str) -> None:
    console, text = Console(), escape_controls(text)
    if console.is_terminal:
        console.print(Syntax(text, language, background_color="default", word_wrap=True))
    else:
        echo(text)
