"""``stratagem run-mmengine`` runs a program as Python would, with ``mmengine`` referring to the layer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """\
import subprocess, sys
import beside
import mmengine


class Item:
    pass


def in_worker(item):
    return mmengine.__name__, isinstance(item, Item)


if __name__ == "__main__":
    print(sys.argv, sys.path[0], __file__, mmengine.__name__)
    code = "import mmengine; print(mmengine.__name__)"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(in_worker, [Item()]))
"""


RUNTIME = """\
from mmengine.hooks import LoggerHook

default_hooks = dict(logger=dict(type=LoggerHook, interval=2))
randomness = dict(seed=7)
"""

NEW_STYLE = """\
from mmengine.config import read_base

with read_base():
    from .runtime import *

from mmengine.dataset import DefaultSampler
from mmengine.optim import OptimWrapper
from torch.optim import SGD

custom_imports = dict(imports=["parts"], allow_failed_imports=False)
model = dict(type="Linear4")
train_dataloader = dict(
    dataset=dict(type="Rows"), batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=True))
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1))
stratagem = dict(data_order="mmengine")
"""

PARTS = """\
import torch
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS


@MODELS.register_module()
class Linear4(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return {"loss": self.linear(torch.stack(inputs)).square().mean()}


@DATASETS.register_module()
class Rows(torch.utils.data.Dataset):
    metainfo = {}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"inputs": torch.full((4,), index / 8)}
"""

TRAIN = """\
import sys
from mmengine.config import Config
from mmengine.runner import Runner

config = Config.fromfile(sys.argv[1])
config.work_dir = sys.argv[2]
Runner.from_cfg(config).train()
"""


def run_mmengine(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "stratagem", "run-mmengine", *words],
        check=False,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the folder ``tools``, which has the script and a module next to it."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "tools" / "beside.py").write_text("", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_script_its_subprocesses_and_its_workers_use_the_layer(folder: Path) -> None:
    """The script has the arguments, the first folder of the path and the main module that Python gives it."""
    done = run_mmengine("tools/script.py", "--help", "--resume", "x", cwd=folder)
    layer = "stratagem.compat.mmengine"
    arguments = ["tools/script.py", "--help", "--resume", "x"]
    assert done.stdout.split("\n") == [
        f"{arguments} {folder / 'tools'} tools/script.py {layer}",
        layer,
        "",
        f"[('{layer}', True)]",
        "",
    ], done.stderr


@pytest.mark.slow
def test_an_installed_mmengine_is_not_imported_by_subprocesses(folder: Path) -> None:
    """The folder of the layer comes before those in which packages are installed."""
    installed = folder / "installed"
    installed.mkdir()
    (installed / "mmengine.py").write_text("raise SystemExit('the real MMEngine')", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "stratagem", "run-mmengine", "tools/script.py"],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(installed)])},
    )
    assert done.stdout.count("stratagem.compat.mmengine") == 3, done.stderr


@pytest.mark.slow
def test_a_pure_python_configuration_with_custom_imports_trains(tmp_path: Path) -> None:
    """Bases, imported types, modules next to the file, and the options of the layer work; lines have MMEngine's fields."""
    for name, text in {"runtime": RUNTIME, "run": NEW_STYLE, "parts": PARTS, "train": TRAIN}.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    done = run_mmengine("train.py", "run.py", "work_dir", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fields = r"lr: 1.0000e-01  eta: 0:00:0\d  time: \d\.\d{4}  data_time: \d\.\d{4}  loss: \d\.\d{4}"
    lines = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if "Epoch(train)" in line]
    assert [re.search(r"Epoch\(train\) (.*?)  ", line).group(1) for line in lines] == ["[1][2/4]", "[1][4/4]"]  # type: ignore[union-attr]
    assert all(re.search(fields, line) for line in lines), lines
    assert (tmp_path / "work_dir/epoch_1.pth").exists()


@pytest.mark.slow
def test_a_module_is_run_from_the_working_directory(folder: Path) -> None:
    """``-m`` works as in ``python -m``, and passes options on to the module."""
    (folder / "package").mkdir()
    (folder / "package" / "tool.py").write_text(
        "import sys, mmengine\nprint(__name__, sys.argv[1:], sys.path[0])\n", encoding="utf-8"
    )
    done = run_mmengine("-m", "package.tool", "-h", cwd=folder)
    assert done.stdout == f"__main__ ['-h'] {folder}\n", done.stderr


@pytest.mark.slow
def test_an_error_of_the_script_is_printed_as_python_prints_it(folder: Path) -> None:
    """The traceback starts in the script, and the exit status is 1."""
    (folder / "fails.py").write_text("def f():\n    raise KeyError('x')\n\nf()\n", encoding="utf-8")
    done = run_mmengine("fails.py", cwd=folder)
    plain = subprocess.run([sys.executable, "fails.py"], check=False, cwd=folder, capture_output=True, text=True)
    assert done.returncode == plain.returncode == 1
    assert [line.strip() for line in done.stderr.splitlines() if "^" not in line] == [
        line.strip().replace(f"{folder}{os.sep}", "") for line in plain.stderr.splitlines() if "^" not in line
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.py"], "The script missing.py cannot be read: No such file or directory."),
        (["--nproc", "2"], "'--nproc' is not a script."),
        (["-m"], "There is nothing to run."),
    ],
    ids=["missing", "option", "no module"],
)
def test_what_cannot_be_run_is_refused(words: list[str], message: str, folder: Path) -> None:
    """The message states how to write the command."""
    done = run_mmengine(*words, cwd=folder)
    assert done.returncode == 2
    assert message in done.stderr
    assert "stratagem run-mmengine SCRIPT ARGS..." in done.stderr
