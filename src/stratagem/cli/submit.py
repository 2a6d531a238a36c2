"""Implement ``stratagem submit``: write a SLURM batch script whose job saves before its time limit and then resumes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import final

from stratagem.cli.options import RunOptions, read_config
from stratagem.cli.output import echo
from stratagem.config import parse_overrides
from stratagem.config.keys import parse_path
from stratagem.config.redact import redacted
from stratagem.config_schema import require_valid
from stratagem.errors import ConfigValueError, LaunchError
from stratagem.storage import write_atomic

__all__ = ["Allocation", "batch_script", "submit"]

# The time formats that sbatch accepts: https://slurm.schedmd.com/sbatch.html#OPT_time.
_TIME = re.compile(
    r"(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?|(?P<hours>\d+):(?P<min>\d+):(?P<sec>\d+)"
    r"|(?P<minutes>\d+)(?::(?P<seconds>\d+))?"
)
# An option that is safe to write into a #SBATCH line without quoting.
_WORD = re.compile(r"[\w.,:@%+=/\[\]*-]+")
_SUBMIT_TIMEOUT_S = 60.0

_SCRIPT = """\
#!/bin/bash
{directives}

# SLURM sends USR1 to this shell {save_before_s} s before the time limit, and on preemption if the site is configured so.
# The shell then sends TERM to the ranks. They save a checkpoint and exit with status 143, and the job is requeued.
requeue=no
trap 'requeue=yes; scancel --quiet --signal=TERM "$SLURM_JOB_ID"' USR1
# SLURM also sends a TERM for the whole job to the ranks. This shell ignores it and waits for their exit status.
trap : TERM
{exports}
srun {command} &
step=$!
wait "$step"; status=$?
# A signal interrupts `wait` before the step has finished.
while kill -0 "$step" 2>/dev/null; do wait "$step"; status=$?; done
if [ "$requeue" = yes ] && [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The resources that a job requests from SLURM.

    Attributes:
        nodes: the number of nodes.
        gpus_per_node: the number of accelerators per node; 0 for the CPU.
        time: the time limit in one of SLURM's formats, such as ``"12:00:00"`` or ``"2-00"``.
        tasks_per_node: the number of ranks per node; one per accelerator if None.
        cpus_per_task: the number of CPU cores per rank.
        partition: the partition.
        account: the account.
        save_before_s: the number of seconds before the time limit at which the ranks save.
        extra_options: additional options of ``sbatch``, such as ``"--constraint=a100"``.

    Raises:
        ConfigValueError: if ``time`` has an invalid format or is not longer than ``save_before_s``, or if an extra option
            does not start with ``--``.
    """

    nodes: int
    gpus_per_node: int
    time: str
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    save_before_s: int = 120
    extra_options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seconds = seconds_of(self.time)
        if seconds <= self.save_before_s:
            raise ConfigValueError(
                f"--time {self.time} is {seconds} s, but the ranks start saving {self.save_before_s} s before the time limit. "
                "Increase --time, or reduce --save-before."
            )
        for option in self.extra_options:
            if not option.startswith("--"):
                raise ConfigValueError(f"--sbatch {option}: expected an option of sbatch, as in --sbatch=--qos=long.")

    @property
    def ranks_per_node(self) -> int:
        """The number of ranks per node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


def seconds_of(time: str) -> int:
    """Convert a SLURM time limit to seconds.

    Raises:
        ConfigValueError: if ``time`` is not in one of SLURM's formats.
    """
    match = _TIME.fullmatch(time.strip())
    if match is None:
        raise ConfigValueError(
            f"--time {time}: expected minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or "
            "days-hours:minutes:seconds."
        )
    units = {
        "days": 86_400,
        "h": 3600,
        "hours": 3600,
        "m": 60,
        "min": 60,
        "minutes": 60,
        "s": 1,
        "sec": 1,
        "seconds": 1,
    }
    return sum(unit * int(match[name] or 0) for name, unit in units.items())


def submit(options: RunOptions, allocation: Allocation, *, out: Path | None, now: bool, show: bool) -> None:
    """Check the configuration, and write the batch script that trains it.

    Args:
        options: the configuration.
        allocation: the resources of the job.
        out: the path of the script; if None, it is written to the run's folder.
        now: whether to submit the script.
        show: whether to only print the script.

    Raises:
        ConfigError: or a subclass, if the configuration is invalid, or if ``--set`` contains a secret.
        LaunchError: if ``sbatch`` is not installed or rejects the script.
    """
    config = read_config(options)
    require_valid(config)
    work_dir = Path(config["work_dir"]).absolute()
    _refuse_secrets(options.overrides)
    script = batch_script(options, allocation, work_dir)
    if show:
        echo(script, nl=False)
        return
    file = out or work_dir / f"{options.config.stem}.sbatch"
    file.parent.mkdir(parents=True, exist_ok=True)
    # SLURM does not create the directory for its log file.
    work_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(file, script)
    echo(f"Wrote {file}")
    echo(_sbatch(file) if now else f"Submit it with: {shlex.join(['sbatch', str(file)])}")


def _refuse_secrets(overrides: tuple[str, ...]) -> None:
    """Refuse to write a secret from the command line to a file.

    Raises:
        ConfigValueError: if a value of ``--set`` contains a secret. The message contains only the key.
    """
    for key, value in parse_overrides(overrides).items():
        if redacted(value, parse_path(key)) != value:
            raise ConfigValueError(
                f"--set {key}=...: the value is or contains a secret, which would be written into the batch script. Put "
                "{{ $NAME }} into the configuration, and set the environment variable NAME for the job."
            )


def batch_script(options: RunOptions, allocation: Allocation, work_dir: Path) -> str:
    """Return the batch script of a training run.

    Raises:
        ConfigValueError: if an option contains characters that are not allowed in the script.
    """
    requested = {
        "job-name": options.config.stem,
        "nodes": allocation.nodes,
        "ntasks-per-node": allocation.ranks_per_node,
        "gpus-per-node": allocation.gpus_per_node or None,
        "cpus-per-task": allocation.cpus_per_task,
        "time": allocation.time,
        "partition": allocation.partition,
        "account": allocation.account,
        "chdir": Path.cwd(),
        "output": work_dir / "slurm-%j.out",
        # A requeued job appends to its log.
        "open-mode": "append",
        "signal": f"B:USR1@{allocation.save_before_s}",
    }
    lines = [f"--{name}={value}" for name, value in requested.items() if value is not None]
    lines += ["--requeue", *allocation.extra_options]
    for line in lines:
        if not _WORD.fullmatch(line):
            raise ConfigValueError(f"{line!r} is not allowed in a batch script: remove spaces and special characters.")
    # Since SLURM 22.05, srun does not inherit --cpus-per-task from the job.
    exports = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n" if allocation.cpus_per_task else ""
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in lines),
        save_before_s=allocation.save_before_s,
        exports=exports,
        command=shlex.join(_train_command(options, work_dir)),
    )


def _train_command(options: RunOptions, work_dir: Path) -> list[str]:
    words = [sys.executable, "-m", "stratagem", "train", str(options.config.absolute())]
    for override in options.overrides:
        words += ["--set", override]
    words += ["--work-dir", str(work_dir), "--launcher", "slurm"]
    if options.strategy is not None:
        words += ["--strategy", options.strategy]
    return [*words, "--resume"]


def _sbatch(file: Path) -> str:
    program = shutil.which("sbatch")
    if program is None:
        raise LaunchError(f"--now: sbatch is not installed on this machine. Submit {file} on a SLURM login node.")
    done = subprocess.run(  # noqa: S603 -- a fixed command from PATH
        [program, str(file)], capture_output=True, text=True, timeout=_SUBMIT_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise LaunchError(f"sbatch rejected {file}: {done.stderr.strip()}")
    return done.stdout.strip()
