"""Run MMEngine's own tests on MMEngine and on Stratagem, and report by folder what passes.

The tests come from the source distribution of the maintained fork ``onedl-mmengine``, and are not part of this project. Only
tests that pass on MMEngine in this environment count. Each of them must pass on Stratagem or be an entry of
``upstream_exceptions.toml`` with the reason; the exit code is 1 otherwise, or if an entry passes::

    python tests/openmmlab/upstream.py WORK_DIR [--folders test_hooks test_runner] [--write docs/migrate/mmengine.md]

``WORK_DIR`` keeps the downloaded tests, the results on MMEngine, which are computed once, and the last results on Stratagem.
``--write`` replaces the table of a page by the results of all folders in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

RELEASE = "onedl-mmengine==0.10.12"
# What the layer covers, on the CPU. The other folders need GPUs or test functions of the test suite itself.
FOLDERS = (
    "test_analysis",
    "test_config",
    "test_data",
    "test_dataset",
    "test_device",
    "test_dist",
    "test_evaluator",
    "test_fileio",
    "test_hooks",
    "test_hub",
    "test_infer",
    "test_logging",
    "test_model",
    "test_optim",
    "test_registry",
    "test_runner",
    "test_strategies",
    "test_structures",
    "test_testing",
    "test_utils",
    "test_visualizer",
)
STARTUP = Path(__file__).with_name("startup")
EXCEPTIONS = Path(__file__).with_name("upstream_exceptions.toml")
BEGIN, END = "<!-- upstream tests: begin -->", "<!-- upstream tests: end -->"
SECONDS_PER_TEST = 60
_ON_MMENGINE = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
_ON_STRATAGEM = f"import stratagem.compat.mmengine; {_ON_MMENGINE}"

Outcomes = Mapping[str, str]
"""``passed``, ``skipped`` or the first line of the error, by test, as in ``test_hooks/test_hook.py::TestHook::test_x``."""


def download(work_dir: Path) -> tuple[Path, Path]:
    """Return the folder with the tests and the folder with the MMEngine that they belong to, which are downloaded once."""
    source, reference, tests = (work_dir / name for name in ("sdist", "reference", "tests"))
    if not tests.exists():
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "download", *options, "--no-binary", ":all:", "--dest", str(source), RELEASE], check=True)
        (archive,) = source.glob("*.tar.gz")
        subprocess.run([*pip, "install", *options, "--target", str(reference), str(archive)], check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(source, filter="data")
        (extracted,) = source.glob("*/tests")
        # The tests must not be next to the package, which Python would find before the installed one.
        shutil.move(extracted, tests)
    return tests, reference


def run_folder(folder: str, tests: Path, scratch: Path, program: str, path: Sequence[Path]) -> Outcomes:
    """Run the tests of one folder in a copy, and return the outcomes."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(tests, scratch / "tests")
    report = scratch / "report.xml"
    options = [
        "-q",
        "--no-header",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        f"--rootdir={scratch / 'tests'}",
    ]
    options += [
        f"--timeout={SECONDS_PER_TEST}",
        f"--basetemp={scratch / 'tmp'}",
        f"--junitxml={report}",
        "-o",
        "junit_family=xunit1",
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(STARTUP), *map(str, path), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", program, *options, f"tests/{folder}"]
    with (scratch / "log").open("w") as log:
        subprocess.run(command, cwd=scratch, env=environment, stdout=log, stderr=log, check=False, timeout=1800)
    return _read_report(report)


def _read_report(report: Path) -> Outcomes:
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        file, name = case.get("file"), case.get("name")
        # The class name starts with the module's dotted path.
        module = (file or "").removesuffix(".py").replace("/", ".")
        group = (case.get("classname") or "").removeprefix(module).strip(".")
        test = "::".join(part for part in (file, group, name) if part)
        problem = next(
            (case.find(kind) for kind in ("failure", "error", "skipped") if case.find(kind) is not None), None
        )
        if problem is None:
            outcomes[test] = "passed"
        elif problem.tag == "skipped":
            outcomes[test] = "skipped"
        else:
            outcomes[test] = (problem.get("message") or "failed").splitlines()[0]
    return outcomes


@dataclass(frozen=True)
class FolderResult:
    """The tests of a folder that pass on MMEngine, by what happens on Stratagem."""

    folder: str
    passed: tuple[str, ...]
    excepted: tuple[str, ...]
    unexplained: Mapping[str, str]
    stale: tuple[str, ...]
    """Entries of the list of exceptions that pass."""

    @property
    def on_mmengine(self) -> int:
        """Return the number of tests that pass on MMEngine."""
        return len(self.passed) + len(self.excepted) + len(self.unexplained)


def compare(folder: str, mmengine: Outcomes, stratagem: Outcomes, exceptions: Mapping[str, str]) -> FolderResult:
    """Sort the tests that pass on MMEngine by what happens on Stratagem."""
    relevant = [test for test, outcome in mmengine.items() if outcome == "passed"]
    passed = tuple(test for test in relevant if stratagem.get(test) == "passed")
    failed = {test: stratagem.get(test, "not collected") for test in relevant if test not in passed}
    return FolderResult(
        folder,
        passed,
        tuple(test for test in failed if test in exceptions),
        {test: error for test, error in failed.items() if test not in exceptions},
        tuple(test for test in passed if test in exceptions),
    )


def read_exceptions(file: Path = EXCEPTIONS) -> dict[str, str]:
    """Return the reason of each exception, by test."""
    return tomllib.loads(file.read_text()) if file.exists() else {}


def check_folder(folder: str, work_dir: Path) -> FolderResult:
    """Run the tests of a folder on both engines; on MMEngine only if there is no result yet."""
    tests, reference = download(work_dir)
    if not _stored(work_dir, "mmengine", folder).exists():
        outcomes = run_folder(folder, tests, work_dir / "runs" / "mmengine" / folder, _ON_MMENGINE, [reference])
        _store(outcomes, _stored(work_dir, "mmengine", folder))
    outcomes = run_folder(folder, tests, work_dir / "runs" / "stratagem" / folder, _ON_STRATAGEM, [])
    _store(outcomes, _stored(work_dir, "stratagem", folder))
    return stored_result(folder, work_dir)


def _stored(work_dir: Path, engine: str, folder: str) -> Path:
    return work_dir / f"on_{engine}" / f"{folder}.json"


def _store(outcomes: Outcomes, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(outcomes, indent=1))


def stored_result(folder: str, work_dir: Path) -> FolderResult:
    """Return the last result of a folder."""
    mmengine, stratagem = (json.loads(_stored(work_dir, e, folder).read_text()) for e in ("mmengine", "stratagem"))
    return compare(folder, mmengine, stratagem, read_exceptions())


def table(results: Sequence[FolderResult]) -> str:
    """Return the results as a Markdown table."""
    rows = ["| folder | pass on MMEngine | pass on Stratagem | exceptions | unexplained |", "|---|---|---|---|---|"]
    cells = [(r.folder, r.on_mmengine, len(r.passed), len(r.excepted), len(r.unexplained)) for r in results]
    total = ("all", *(sum(row[column] for row in cells) for column in range(1, 5)))
    return "\n".join(rows + ["| " + " | ".join(map(str, row)) + " |" for row in (*cells, total)])


def write_table(page: Path, results: Sequence[FolderResult]) -> None:
    """Replace the table between the two comments in a page."""
    text = page.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    page.write_text(f"{before}\n{table(results)}\n{after}")


def main() -> int:
    """Run the folders and print the table and the unexplained failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", type=Path)
    parser.add_argument("--folders", nargs="+", default=FOLDERS, choices=FOLDERS)
    parser.add_argument("--write", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    work_dir = arguments.work_dir.absolute()
    results = [check_folder(folder, work_dir) for folder in arguments.folders]
    for result in results:
        for test, error in result.unexplained.items():
            print(f"{test}: {error[:200]}")
        for test in result.stale:
            print(f"{test}: passes; remove it from {EXCEPTIONS.name}")
    print(table(results))
    if arguments.write:
        complete = [folder for folder in FOLDERS if _stored(work_dir, "stratagem", folder).exists()]
        write_table(arguments.write, [stored_result(folder, work_dir) for folder in complete])
    return int(any(result.unexplained or result.stale for result in results))


if __name__ == "__main__":
    sys.exit(main())
