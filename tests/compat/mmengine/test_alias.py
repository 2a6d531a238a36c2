"""``import stratagem.compat.mmengine`` makes ``mmengine`` refer to the layer, also in spawned processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FIRST_LINE = "import stratagem.compat.mmengine\n"


def run(source: str, folder: Path, name: str = "script.py") -> subprocess.CompletedProcess[str]:
    """Run a script in a new process."""
    (folder / name).write_text(source, encoding="utf-8")
    return subprocess.run([sys.executable, name], check=False, cwd=folder, capture_output=True, text=True, timeout=120)


def test_modules_of_mmengine_are_modules_of_the_layer(tmp_path: Path) -> None:
    """Both names of a module give the same module, whose own name and specification stay unchanged."""
    source = FIRST_LINE + (
        "import mmengine, mmengine.version\n"
        "from mmengine.version import version_info\n"
        "import stratagem.compat.mmengine.version as own\n"
        "assert mmengine is stratagem.compat.mmengine and mmengine.version is own\n"
        "print(own.__name__, own.__spec__.name, version_info)\n"
    )
    done = run(source, tmp_path)
    assert done.stdout == "stratagem.compat.mmengine.version stratagem.compat.mmengine.version (0, 10, 7)\n", (
        done.stderr
    )


@pytest.mark.slow
def test_loaded_submodules_have_both_names(tmp_path: Path) -> None:
    """Otherwise a finder that comes first, such as pytest's, loads a second copy of a module that it rewrites."""
    source = FIRST_LINE + (
        "import sys, mmengine.utils\n"
        "print(sys.modules['mmengine.utils.misc'] is sys.modules['stratagem.compat.mmengine.utils.misc'])\n"
    )
    done = run(source, tmp_path)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.slow
def test_spawned_workers_import_the_layer(tmp_path: Path) -> None:
    """A spawned worker imports the main script, and so ``mmengine``, before anything of Stratagem."""
    source = (
        "import sys\n"
        "if __name__ == '__main__':\n"
        "    import stratagem.compat.mmengine\n"
        "import mmengine.version\n"
        "def name(_): return mmengine.version.__name__\n"
        "if __name__ == '__main__':\n"
        "    import multiprocessing\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(name, [0]))\n"
    )
    done = run(source, tmp_path)
    assert done.stdout == "['stratagem.compat.mmengine.version']\n", done.stderr


def test_a_module_that_the_layer_lacks_is_not_found(tmp_path: Path) -> None:
    """The error has the name that the user wrote."""
    done = run(FIRST_LINE + "import mmengine.no_such_module\n", tmp_path)
    assert "ModuleNotFoundError: No module named 'mmengine.no_such_module'" in done.stderr


def test_importing_the_layer_after_mmengine_is_refused(tmp_path: Path) -> None:
    """Classes of both would be mixed otherwise."""
    (tmp_path / "mmengine.py").write_text("", encoding="utf-8")
    done = run("import mmengine\n" + FIRST_LINE, tmp_path)
    assert "stratagem.compat.mmengine was imported after mmengine" in done.stderr


@pytest.mark.slow
def test_importing_stratagem_does_not_import_the_layer(tmp_path: Path) -> None:
    """A program that does not use the layer does not pay for it, and keeps the real MMEngine."""
    done = run(
        "import sys, stratagem\nfrom stratagem import Runner\n"
        "print([name for name in sys.modules if name.startswith('stratagem.compat')])\n",
        tmp_path,
    )
    assert done.stdout == "[]\n", done.stderr
