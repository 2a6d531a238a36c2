"""``stratagem submit``: a batch script for SLURM that saves before it is stopped, and goes on when it is started again."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import final

import typer

from stratagem.cli.options import RunOptions, read_config
from stratagem.config import parse_overrides, require
from stratagem.config.keys import parse_path
from stratagem.config.redact import redacted
from stratagem.config_schema import SECTIONS
from stratagem.errors import ConfigValueError, LaunchError
from stratagem.storage import write_atomic

__all__ = ["Allocation", "batch_script", "submit"]

# The forms of https://slurm.schedmd.com/sbatch.html#OPT_time.
_TIME = re.compile(
    r"(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?|(?P<hours>\d+):(?P<min>\d+):(?P<sec>\d+)"
    r"|(?P<minutes>\d+)(?::(?P<seconds>\d+))?"
)
# What may stand in a line of a script without being taken for anything else.
_WORD = re.compile(r"[\w.,:@%+=/\[\]*-]+")
_SUBMIT_TIMEOUT_S = 60.0

_SCRIPT = """\
#!/bin/bash
{directives}

# SLURM sends USR1 to this shell {save_before_s} s before the time is over, and on preemption where the site is set so.
# The ranks then get TERM: they save a checkpoint, end with status 143, and the job is put into the queue again.
again=no
trap 'again=yes; scancel --quiet --signal=TERM "$SLURM_JOB_ID"' USR1
# A TERM for the whole job reaches the ranks by itself; this shell stays to hear how they end.
trap : TERM
{exports}
srun {command} &
step=$!
wait "$step"; status=$?
# A signal ends `wait` before the step has ended.
while kill -0 "$step" 2>/dev/null; do wait "$step"; status=$?; done
if [ "$again" = yes ] && [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What a job asks SLURM for. ``time`` is in one of SLURM's forms, such as ``"12:00:00"`` or ``"2-00"``.

    Args:
        tasks_per_node: ranks on each node; one for each of its accelerators where not given.
        save_before_s: how many seconds before the end of ``time`` the ranks are told to save.
        further: options of ``sbatch``, such as ``"--constraint=a100"``.

    Raises:
        ConfigValueError: if a value cannot stand in a batch script, or the time is too short to save in.
    """

    nodes: int
    gpus_per_node: int
    time: str
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    save_before_s: int = 120
    further: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seconds = seconds_of(self.time)
        if seconds <= self.save_before_s:
            raise ConfigValueError(
                f"--time {self.time} is {seconds} s, and the ranks are told to save {self.save_before_s} s before its end. "
                "Ask for more time, or give --save-before."
            )
        for option in self.further:
            if not option.startswith("--"):
                raise ConfigValueError(f"--sbatch {option}: an option of sbatch is due, such as --sbatch=--qos=long.")

    @property
    def ranks_per_node(self) -> int:
        """How many ranks each node runs."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


def seconds_of(time: str) -> int:
    """Return a time limit of SLURM in seconds.

    Raises:
        ConfigValueError: if it has none of SLURM's forms.
    """
    match = _TIME.fullmatch(time.strip())
    if match is None:
        raise ConfigValueError(
            f"--time {time}: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or "
            "days-hours:minutes:seconds are due."
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
    """Check the configuration and write the batch script that trains it; show or submit it if asked to.

    Raises:
        ConfigError: in one of its kinds, if the configuration would be refused when the job starts.
        LaunchError: if ``sbatch`` is not there or refuses the script.
    """
    config = read_config(options)
    require(config, SECTIONS, scope=config.get("default_scope"))
    work_dir = Path(config["work_dir"]).absolute()
    _refuse_secrets(options.overrides)
    script = batch_script(options, allocation, work_dir)
    if show:
        typer.echo(script, nl=False)
        return
    file = out or work_dir / f"{options.config.stem}.sbatch"
    file.parent.mkdir(parents=True, exist_ok=True)
    # SLURM does not make the folder of its log.
    work_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(file, script)
    typer.echo(f"Wrote {file}")
    typer.echo(_sbatch(file) if now else f"Submit it: {shlex.join(['sbatch', str(file)])}")


def _refuse_secrets(overrides: tuple[str, ...]) -> None:
    """Refuse to write a secret of the command line into a file.

    Raises:
        ConfigValueError: if ``--set`` gives one; it names the key.
    """
    for key, value in parse_overrides(overrides).items():
        if redacted(value, parse_path(key)) != value:
            raise ConfigValueError(
                f"--set {key}=...: the value is or contains a secret, which would be written into the batch script. Put "
                "{{ $NAME }} into the configuration, and set the environment variable NAME for the job."
            )


def batch_script(options: RunOptions, allocation: Allocation, work_dir: Path) -> str:
    """Return the batch script of a training.

    Raises:
        ConfigValueError: if a value cannot stand in it.
    """
    asked = {
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
        # A job that was requeued writes on where it stopped.
        "open-mode": "append",
        "signal": f"B:USR1@{allocation.save_before_s}",
    }
    lines = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    lines += ["--requeue", *allocation.further]
    for line in lines:
        if not _WORD.fullmatch(line):
            raise ConfigValueError(
                f"{line!r} cannot stand in a batch script: write it without blanks and special signs."
            )
    # Since SLURM 22.05 steps do not take this from the job.
    exports = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK\n" if allocation.cpus_per_task else ""
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in lines),
        save_before_s=allocation.save_before_s,
        exports=exports,
        command=shlex.join(_train(options, work_dir)),
    )


def _train(options: RunOptions, work_dir: Path) -> list[str]:
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
        raise LaunchError(f"--now: there is no sbatch here. Submit {file} where SLURM is.")
    done = subprocess.run(  # noqa: S603 -- a fixed command, found on the path
        [program, str(file)], capture_output=True, text=True, timeout=_SUBMIT_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        raise LaunchError(f"sbatch refused {file}: {done.stderr.strip()}")
    return done.stdout.strip()
