"""What importing Stratagem loads: little, so that scripts and the command line start at once."""

from __future__ import annotations

import subprocess
import sys

# Libraries that only some runs need; each is loaded by name when it is first used.
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
    """Return the modules that a statement loads in a fresh interpreter, beyond those of ``baseline``."""
    code = f"import sys; {baseline}; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    """``import stratagem`` loads itself and a bit of the standard library: no torch, no numpy, nothing installed."""
    loaded = loaded_by("import stratagem")
    assert {name for name in loaded if name.startswith("stratagem")} == {"stratagem", "stratagem._version"}
    installed = {name.partition(".")[0] for name in loaded} - {"stratagem"} - sys.stdlib_module_names
    assert installed == set()


def test_public_names_load_no_library_that_only_some_runs_need() -> None:
    """Metrics, the command line's library, launchers and sharding are loaded when a run first uses them."""
    everything = "import stratagem; [getattr(stratagem, name) for name in stratagem.__all__]"
    loaded = loaded_by(everything, baseline="import torch")
    assert "stratagem.runner" in loaded
    assert sorted(module for module in FOR_SOME_RUNS if module in loaded) == []


def test_reading_a_configuration_does_not_need_torch() -> None:
    """A program that only reads or changes configurations does not wait for torch."""
    assert "torch" not in loaded_by("from stratagem import Config")
