"""The page of environment variables lists all of them, and no others."""

from __future__ import annotations

import ast
import re

import pytest

from docs.site.stage import ROOT

# Names with underscores, and the others that are known.
_NAME = re.compile(r"[A-Z][A-Za-z0-9]*(_[A-Za-z0-9]+)+|RANK|PATH")
_KEY_OF = re.compile(r"\b(environ|environment variable)", re.IGNORECASE)
# Constants that look like variables: names of Python constants in __all__, and arguments of sysconf.
_OTHERS = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"}
# The compatibility layer has its own pages.
_EXCLUDED = "compat"


def is_variable(name: str, exported: set[str]) -> bool:
    return (
        _NAME.fullmatch(name) is not None
        and name.split("_", maxsplit=1)[0].isupper()
        and name not in _OTHERS | exported
    )


def read_variables() -> set[str]:
    """Return the string constants that look like environment variables, in the files that use the environment."""
    found: set[str] = set()
    for path in (ROOT / "src" / "stratagem").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if _EXCLUDED in path.parts or not (_KEY_OF.search(text) or "VARIABLE" in text):
            continue
        tree = ast.parse(text)
        constants = {
            each.value for each in ast.walk(tree) if isinstance(each, ast.Constant) and type(each.value) is str
        }
        bound = {each.id for each in ast.walk(tree) if isinstance(each, ast.Name)}
        bound |= {alias.name for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) for alias in each.names}
        # A prefix and several endings.
        for each in ast.walk(tree):
            if isinstance(each, ast.JoinedStr) and ast.unparse(each).startswith(("f'TORCHELASTIC_", 'f"TORCHELASTIC_')):
                constants -= {"MAX_RESTARTS", "RESTART_COUNT"}
                constants |= {"TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT"}
        found |= {name for name in constants if is_variable(name, bound)}
    return found


def documented_variables() -> set[str]:
    """Return the names in code on the page."""
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    return {name for name in re.findall(r"`([^`\s]+)`", text) if is_variable(name, set())}


@pytest.mark.slow
def test_every_environment_variable_is_documented() -> None:
    """A variable that the package reads or sets is on the page, and the page lists no variable that it does not use."""
    read, documented = read_variables(), documented_variables()
    assert len(read) > 50
    assert read - documented == set()
    assert documented - read - {"XDG_CACHE_HOME"} == set()
