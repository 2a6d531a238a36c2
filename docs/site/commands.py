"""The page of all commands and their options, from the command line application."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from docs.site.entry import Entry, Page
from stratagem.cli.app import app

__all__ = ["commands", "commands_page"]


def commands() -> Iterator[tuple[str, Any]]:
    """Yield each command with its full name, such as ``stratagem ckpt ls``."""
    yield from _below("stratagem", typer.main.get_command(app))


def _below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    for part, inner in sorted(getattr(command, "commands", {}).items()):
        if inner.hidden:
            continue
        if hasattr(inner, "commands"):
            yield from _below(f"{name} {part}", inner)
        else:
            yield f"{name} {part}", inner


def commands_page() -> Page:
    """Return the page."""
    every = list(commands())
    lines = [
        "# Commands",
        "",
        "Every command has the options `--help`, which prints this description, and `--traceback`, which shows the full "
        "traceback of an error. `stratagem --version` prints the version.",
        "",
        "| command | |",
        "|---|---|",
    ]
    lines += [f"| [`{name}`](#{name.replace(' ', '-')}) | {_paragraphs(command)[0]} |" for name, command in every]
    entries: list[Entry] = []
    for name, command in every:
        lines += ["", *_described(name, command)]
        entries.append(Entry(name, "commands"))
        entries += [
            Entry(f"{name} {option}", "commands")
            for each in command.params
            for option in _options(each)
            if not each.hidden
        ]
    return Page("commands", "Commands", "\n".join(lines), tuple(entries))


def _described(name: str, command: Any) -> Iterator[str]:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [
        each
        for each in command.params
        if each.param_type_name == "option" and "--traceback" not in each.opts and not each.hidden
    ]
    usage = " ".join(_argument(each) for each in arguments)
    yield f"## {name}"
    yield ""
    yield f"```\n{name} {usage}{' [OPTIONS]' if options else ''}\n```"
    yield ""
    for paragraph in _paragraphs(command):
        yield paragraph
        yield ""
    if arguments:
        yield from ("| argument | |", "|---|---|")
        yield from (f"| `{each.metavar or each.name.upper()}` | {_cell(each)} |" for each in arguments)
        yield ""
    if options:
        yield from ("| option | |", "|---|---|")
        yield from (f"| {_option(each)} | {_cell(each)} |" for each in options)
        yield ""


def _paragraphs(command: Any) -> list[str]:
    text = inspect.cleandoc(command.help or "")
    return [" ".join(part.split()).replace("|", "\\|").replace("<", "\\<") for part in text.split("\n\n")]


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return f"{name}" if argument.required else f"[{name.strip('[]')}]"


def _options(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []


def _option(option: Any) -> str:
    value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    return ", ".join(f"`{name}{value}`".replace("|", "\\|") for name in _options(option))


def _cell(parameter: Any) -> str:
    text = (parameter.help or "").replace("|", "\\|").replace("<", "\\<")
    default = parameter.default
    shows = (
        not getattr(parameter, "is_flag", False)
        and "Default" not in text
        and default not in (None, (), [])
        and not callable(default)
    )
    return f"{text} Default: `{default}`." if shows else text
