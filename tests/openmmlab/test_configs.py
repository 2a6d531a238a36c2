"""The configurations of mmpretrain, mmdetection, mmsegmentation and their forks, on Stratagem and on MMEngine."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import stratagem.compat.mmengine  # noqa: F401 -- makes mmengine refer to it
from stratagem.compat.mmengine.config import Config
from stratagem.compat.mmengine.config.acceptance import require_accepted
from stratagem.errors import ConfigKeyError
from tests.openmmlab.config_corpus import digests, digests_on_mmengine, fork_files, installed_files

pytestmark = [pytest.mark.openmmlab, pytest.mark.timeout(1800)]

# Usual typos of usual keys.
TYPOS = (
    "train_dataloder",
    "optim_wraper",
    "parm_scheduler",
    "val_evalutor",
    "default_hook",
    "custom_hook",
    "work_dirs",
    "load_form",
    "resum",
    "randomnes",
    "test_cgf",
    "visualiser",
    "log_procesor",
    "env_cfgs",
    "default_scop",
)


def load(path: Path) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Some files are deprecated.
        return Config.fromfile(path, import_custom_modules=False)


def compare(files: Mapping[str, list[Path]], title: str) -> None:
    """Compare all files, print a table and fail if a file differs or a runnable one is refused."""
    paths = [path for each in files.values() for path in each]
    expected = digests_on_mmengine(paths)
    acceptance: dict[str, str] = {}

    def values(path: Path) -> dict[str, Any]:
        cfg = load(path)
        acceptance[str(path)] = _acceptance(cfg)
        return cfg.to_dict()

    actual = digests(paths, values)
    rows, wrong = Counter[tuple[str, str]](), []
    for package, each in files.items():
        for path in map(str, each):
            if isinstance(expected[path], str):
                rows[package, "not loaded by MMEngine"] += 1
            elif actual[path] == expected[path]:
                rows[package, "equal"] += 1
            else:
                wrong.append(f"{path}: {_difference(expected[path], actual[path])}")
            outcome = acceptance.get(path, "not loaded")
            if outcome not in ("accepted", "not runnable", "not loaded"):
                wrong.append(f"{path}: {outcome}")
                outcome = "refused"
            rows[package, outcome] += 1
    print(f"\n{title}")
    for (package, what), number in sorted(rows.items()):
        print(f"  {package}: {number} {what}")
    assert wrong == []


def _difference(expected: object, actual: object) -> str:
    if not isinstance(expected, Mapping) or not isinstance(actual, Mapping):
        return str(actual)
    keys = [key for key in {**expected, **actual} if expected.get(key) != actual.get(key)]
    return f"other values for {', '.join(keys)}"


def _acceptance(cfg: Config) -> str:
    """Return ``"accepted"``, ``"not runnable"`` or the error of a configuration that is refused."""
    if "model" not in cfg or "default_scope" not in cfg:
        return "not runnable"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            require_accepted(cfg)
    except ConfigKeyError as error:
        return f"refused: {error}"
    return "accepted"


def test_every_tenth_configuration_has_the_values_of_mmengine() -> None:
    """A tenth of the configurations of the installed packages load with equal values and are accepted."""
    compare({name: files[::10] for name, files in installed_files().items()}, "every tenth configuration")


@pytest.mark.slow
def test_every_configuration_has_the_values_of_mmengine() -> None:
    """All configurations of the packages and of their forks load with equal values; the runnable ones are accepted."""
    compare({**installed_files(), **fork_files(Path(sys.prefix) / "forks")}, "all configurations")


@pytest.mark.parametrize("name", TYPOS)
def test_a_typo_in_a_configuration_of_a_package_is_refused(tmp_path: Path, name: str) -> None:
    """A misspelled key is an error with its line under the scope of another project, unused or used."""
    base = next(path for path in installed_files()["mmpretrain"] if path.name == "resnet18_8xb16_cifar10.py")
    for use in ("", f"used = {name}\nnum_epochs = used\n"):
        path = tmp_path / "run.py"
        path.write_text(f"_base_ = {str(base)!r}\n{name} = dict()\n{use}")
        cfg = load(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ConfigKeyError, match=rf"run.py:2: unknown key '{name}'. Did you mean"):
                require_accepted(cfg)
