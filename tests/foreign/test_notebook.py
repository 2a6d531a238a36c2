"""A notebook that trains, starts two processes and shows the progress, executed by a real kernel."""

from __future__ import annotations

import os

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from tests.support.ranks import scripts_environment

pytestmark = pytest.mark.foreign

DEFINE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import stratagem
from stratagem import Runner, SupervisedModel

def data(seed):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(seed))
    return dict(dataset=TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)

def make_runner(folder, strategy=None):
    torch.manual_seed(0)
    return Runner(
        SupervisedModel(nn.Linear(4, 1), nn.MSELoss()), folder, train_dataloader=data(1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.05)), train_cfg=dict(max_epochs=3), strategy=strategy,
        default_hooks=dict(logger=dict(interval=8)), randomness=dict(seed=0),
    )
"""
TRAIN = """
runner = make_runner("single")
runner.train()
runner.close()
"""
LAUNCH = """
def train(folder):
    runner = make_runner(folder, "DDPStrategy")
    runner.train()
    state = runner.strategy.model_state_dict()
    runner.close()
    return runner.run.rank, [value.tolist() for value in state.values()]

results = stratagem.launch(train, "ranks", nproc=2)
assert [rank for rank, _ in results] == [0, 1]
assert results[0][1] == results[1][1]
print("two ranks agree")
"""
FAIL = """
def fail():
    raise ValueError("no such file: cells.csv")

stratagem.launch(fail, nproc=2)
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[nbformat.NotebookNode]:
    """The executed cells."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = new_notebook(cells=[new_code_cell(text) for text in (DEFINE, TRAIN, LAUNCH, FAIL)])
    notebook.cells[-1].metadata["tags"] = ["raises-exception"]
    before = dict(os.environ)
    os.environ.update(scripts_environment(), OMP_NUM_THREADS="1", JUPYTER_PREFER_ENV_PATH="1")
    # The kernel does not capture the output of child processes if it believes that it runs inside of pytest.
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    try:
        NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        ).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    nbformat.write(notebook, folder / "executed.ipynb")
    assert (folder / "executed.ipynb").exists()
    return list(notebook.cells)


def text_of(cell: nbformat.NotebookNode) -> str:
    """Return what a cell printed."""
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_a_training_in_a_notebook_has_one_bar_that_is_updated(cells: list[nbformat.NotebookNode]) -> None:
    """The bar is one output with the state at the end, as HTML and as text; log lines are separate."""
    shown = [output for output in cells[1].outputs if output.output_type == "display_data"]
    assert len(shown) == 1
    assert "48/48" in shown[0].data["text/plain"]
    assert "loss" in shown[0].data["text/plain"]
    assert '<progress value="48" max="48"' in shown[0].data["text/html"]
    assert "Epoch(train) [3][16/16]" in text_of(cells[1])
    assert "\x1b" not in text_of(cells[1])
    assert "\r" not in text_of(cells[1])


def test_a_function_of_a_notebook_runs_in_two_processes(cells: list[nbformat.NotebookNode]) -> None:
    """The ranks train the model that the notebook defines, their log appears in the cell, and the results agree."""
    printed = text_of(cells[2])
    assert "two ranks agree" in printed
    # 64 samples on 2 ranks in batches of 4 are 8 iterations per epoch.
    assert "Epoch(train) [3][8/8]" in printed


def test_an_error_of_a_rank_is_shown_in_the_notebook(cells: list[nbformat.NotebookNode]) -> None:
    """The exception contains the rank and the traceback of the function."""
    (error,) = [output for output in cells[3].outputs if output.output_type == "error"]
    assert error.ename == "LaunchedRankError"
    assert "raised ValueError: no such file: cells.csv" in error.evalue
    assert "in fail" in error.evalue
