"""Importing Stratagem loads few modules, so that scripts and the command line start quickly."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Libraries that only some runs need, imported on first use.
FOR_SOME_RUNS = (
    "torchmetrics",
    "torchvision",
    "typer",
    "deepspeed",
    "tensorboard",
    "wandb",
    "transformers",
    "torch.distributed.elastic",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
)


def loaded_by(statement: str, baseline: str = "pass") -> set[str]:
    """Return the modules that a statement imports in a new interpreter, without those of ``baseline``."""
    code = f"import sys; {baseline}; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_is_lightweight() -> None:
    """``import stratagem`` only imports itself and some of the standard library: no torch, NumPy or other package."""
    loaded = loaded_by("import stratagem")
    assert {name for name in loaded if name.startswith("stratagem")} == {"stratagem", "stratagem._version"}
    installed = {name.partition(".")[0] for name in loaded} - {"stratagem"} - sys.stdlib_module_names
    assert installed == set()


@pytest.mark.slow
def test_public_names_load_no_library_that_only_some_runs_need() -> None:
    """Importing all public names does not import libraries for metrics, the command line, launchers or sharding."""
    everything = "import stratagem; [getattr(stratagem, name) for name in stratagem.__all__]"
    loaded = loaded_by(everything, baseline="import torch")
    assert "stratagem.runner" in loaded
    assert sorted(module for module in FOR_SOME_RUNS if module in loaded) == []


def test_reading_a_configuration_does_not_need_torch() -> None:
    """Reading configurations does not import torch."""
    assert "torch" not in loaded_by("from stratagem import Config")


def test_the_command_line_prints_its_first_line_before_importing_torch() -> None:
    """The command line, which prints a line and then imports a command, loads neither torch nor NumPy itself."""
    loaded = loaded_by("import stratagem.cli.main")
    assert "stratagem.cli.app" in loaded
    assert sorted({"torch", "numpy"} & loaded) == []
    # About 300 today; torch alone has 1,000.
    assert len(loaded) < 450


@pytest.mark.slow
def test_checking_an_optimizer_does_not_import_the_compiler() -> None:
    """``config check`` builds optimizers to check their arguments, and torch would import its compiler for the first one."""
    build = "try_optim_wrapper({'optimizer': {'type': 'SGD', 'lr': 0.1}})"
    loaded = loaded_by(f"from stratagem.strategies.setup.trial import try_optim_wrapper; {build}")
    assert "torch.optim.sgd" in loaded
    assert "torch._dynamo" not in loaded
