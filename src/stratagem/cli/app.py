"""Declare the commands and their options. Implementations are imported only when a command runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from stratagem._version import __version__
from stratagem.cli.arguments import ConfigFile, Launcher, Nproc, Out, Overrides, Strategy, WorkDir
from stratagem.cli.ckpt.app import ckpt_app
from stratagem.cli.config_app import config_app
from stratagem.cli.export_app import export
from stratagem.cli.find_app import find_app
from stratagem.cli.init_app import init
from stratagem.cli.lazy_command import Traceback, lazy_command
from stratagem.cli.options import RunOptions
from stratagem.cli.output import AsJson, echo
from stratagem.cli.report_app import report
from stratagem.cli.runs.app import runs_app, watch
from stratagem.cli.speed_app import profile, summary

__all__ = ["app"]

app = typer.Typer(
    name="stratagem",
    help="Train PyTorch models from configurations, from one CPU to many nodes.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The ranks of processes that a launcher started.
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def _print_version(value: bool) -> None:
    if value:
        echo(f"stratagem {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train PyTorch models from configurations, from one CPU to many nodes."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    work_dir: WorkDir = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[PATH]",
            help="Resume from a checkpoint. Without PATH, resume from the latest checkpoint of the run, if any.",
        ),
    ] = None,
    load_from: Annotated[
        str | None, typer.Option(metavar="PATH", help="Initialize the model with the weights of a checkpoint.")
    ] = None,
    nproc: Nproc = None,
    max_restarts: Annotated[
        int,
        typer.Option(metavar="K", min=0, help="With --nproc: if a rank fails, restart all ranks, at most K times."),
    ] = 0,
    launcher: Launcher = None,
    strategy: Strategy = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Try training, validation, saves, test and loading for a few iterations. Leaves no files.",
        ),
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Train the model of CONFIG.

    Ctrl-C saves a checkpoint and exits; --resume continues from it. A second Ctrl-C exits immediately.
    """
    options = RunOptions(
        config=config,
        overrides=tuple(overrides or ()),
        work_dir=work_dir,
        launcher=launcher,
        strategy=strategy,
        nproc=nproc,
        max_restarts=max_restarts,
    )
    if all(os.environ.get(variable, "0") == "0" for variable in _RANK_VARIABLES):
        # Importing torch and the model's code takes seconds.
        typer.echo(f"stratagem {__version__}: loading {config}", err=True)
    lazy_command("stratagem.cli.train:train")(options, resume=resume, load_from=load_from, dry_run=dry_run)


@app.command()
def test(
    config: ConfigFile,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="The checkpoint to evaluate.")],
    overrides: Overrides = None,
    work_dir: WorkDir = None,
    nproc: Nproc = None,
    launcher: Launcher = None,
    strategy: Strategy = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Evaluate CHECKPOINT on the test data of CONFIG."""
    options = RunOptions(
        config=config,
        overrides=tuple(overrides or ()),
        work_dir=work_dir,
        launcher=launcher,
        strategy=strategy,
        nproc=nproc,
    )
    lazy_command("stratagem.cli.test:test")(options, checkpoint=checkpoint, as_json=as_json)


@app.command()
def predict(
    config: ConfigFile,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="The checkpoint whose weights are used.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The file for the results: .jsonl, .csv, .npz or .pt. Default: JSON lines on stdout."
        ),
    ] = None,
    work_dir: WorkDir = None,
    nproc: Nproc = None,
    launcher: Launcher = None,
    strategy: Strategy = None,
    traceback: Traceback = False,
) -> None:
    """Predict the samples of predict_dataloader, or of test_dataloader, with the weights of CHECKPOINT.

    The results are in the order of the data.
    """
    options = RunOptions(
        config=config,
        overrides=tuple(overrides or ()),
        work_dir=work_dir,
        launcher=launcher,
        strategy=strategy,
        nproc=nproc,
    )
    lazy_command("stratagem.cli.predict:predict")(options, checkpoint=checkpoint, out=out)


@app.command()
def sample(
    config: ConfigFile,
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="The checkpoint, or a run folder, whose latest checkpoint is used."),
    ],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.")],
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The number of tokens to generate.")] = 300,
    temperature: Annotated[
        float,
        typer.Option(metavar="T", min=0.0, help="The sampling temperature. 0 always chooses the most likely token."),
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(metavar="K", min=0, help="Sample from the K most likely tokens. 0 samples from all.")
    ] = 0,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="The random seed.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Use the trained weights instead of the averaged weights.")
    ] = False,
    overrides: Overrides = None,
    traceback: Traceback = False,
) -> None:
    """Generate text with the model of CHECKPOINT.

    The model of CONFIG must have a generate() method, and `tokenizer` must name a class with encode() and decode().
    Writes no files.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()))
    request = lazy_command("stratagem.cli.sample:Request")(
        prompt=prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    lazy_command("stratagem.cli.sample:sample")(options, request, checkpoint=checkpoint, raw=raw)


@app.command()
def schedule(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    nproc: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Plot the schedules for a run with N processes, without starting any."),
    ] = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Plot the schedules of CONFIG without training.

    Plots the learning rate of each optimizer, and momentum and weight decay if a schedule changes them. Writes no files
    except FILE.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()), nproc=nproc)
    lazy_command("stratagem.cli.schedule:schedule")(options, out=out, as_json=as_json)


@app.command()
def parity(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="CONFIG | A.json B.json",
            help="The configuration whose variants are compared, or two traces that stratagem.trace.record wrote.",
        ),
    ],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(metavar="K", min=2, help="The number of optimizer steps.")] = 6,
    nproc: Annotated[int, typer.Option(metavar="N", min=1, help="The number of processes that share a batch.")] = 2,
    strategies: Annotated[
        str,
        typer.Option(
            "--strategy", metavar="NAMES", help="The strategies to run in N processes: ddp,fsdp,deepspeed,colossalai."
        ),
    ] = "ddp",
    optimizers: Annotated[
        str | None,
        typer.Option(
            "--optimizer",
            metavar="NAMES",
            help="Repeat the comparison with each of these optimizers, as in SGD,AdamW, with the configured learning rate and "
            "weight decay.",
        ),
    ] = None,
    dtypes: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="NAMES", help="Repeat the comparison in each of these dtypes: float32,bfloat16,float16."
        ),
    ] = None,
    accumulate: Annotated[
        str | None,
        typer.Option(
            metavar="COUNTS", help="The numbers of micro-batches per step to compare with, as in 2,4. Default: N."
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(metavar="COUNTS", help="The numbers of data workers to compare with, as in 0,2."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also compile the model, with compile of CONFIG if it is set.")
    ] = False,
    resumed: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Also stop each variant halfway and resume it.")
    ] = True,
    eval_layers: Annotated[
        bool, typer.Option("--eval-layers", help="Put dropout and batch normalization into evaluation mode.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="The largest relative difference that is attributed to rounding. Default: derived from the rounding errors.",
        ),
    ] = None,
    zero_gradients: Annotated[
        str | None,
        typer.Option(
            "--zero-grad",
            metavar="REGEX",
            help="Parameters whose gradients may be zero in all steps, such as unused ones.",
        ),
    ] = None,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")] = False,
    record: Annotated[Path | None, typer.Option(hidden=True)] = None,
    traceback: Traceback = False,
) -> None:
    """Find out whether several ways to train CONFIG give the same numbers, or where two traces first differ.

    Trains for a few steps in a single process, then repeats the same steps: in float64, unchanged, stopped and resumed,
    with gradient accumulation, and in N processes. All variants process the same samples in each step. Compares samples,
    losses, gradient norms, every gradient, parameter, buffer and average, and learning rates, and prints the first
    difference, its size and the part of the step in which it arises: data, forward, backward, reduction, clip, schedule,
    update or average. Writes no files except FILE.

    Exits with status 0 if all variants are equal up to rounding; 1 if one is different, if no parameter moves, if a
    gradient is zero in all steps, or if samples repeat within an epoch; and 2 if variants cannot be compared.
    """
    options = RunOptions(config=files[0], overrides=tuple(overrides or ()))
    variants = "stratagem.cli.parity.variants"
    numbers = lazy_command(f"{variants}:parse_numbers")
    settings = lazy_command(f"{variants}:ParitySettings")(
        steps=steps,
        nproc=nproc,
        eval_layers=eval_layers,
        tolerance=tolerance,
        strategies=lazy_command(f"{variants}:parse_strategies")(strategies),
        optimizers=lazy_command(f"{variants}:parse_names")(optimizers),
        dtypes=lazy_command(f"{variants}:parse_dtypes")(dtypes),
        accumulate=None if accumulate is None else numbers("--accumulate", accumulate, least=1),
        workers=numbers("--workers", workers, least=0),
        compiled=compiled,
        resumed=resumed,
    )
    lazy_command("stratagem.cli.parity.command:parity")(
        files, options, settings, record=record, as_json=as_json, out=out, zero_gradients=zero_gradients
    )


app.command()(summary)
app.command()(watch)
app.command()(profile)
app.command()(init)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    world: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="The numbers of ranks, as in 8,64,512. Default: the ranks of one node."),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(metavar="G", min=1, help="The number of ranks on a node.")] = 8,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="The devices to compare, as in h100-80g,a100-40g. See docs/plan.md."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The memory of a device that is not in the table, as in 80GiB.")
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option("--strategy", metavar="NAME,...", help="The strategies to compare. Default: that of CONFIG."),
    ] = None,
    every_strategy: Annotated[bool, typer.Option("--all", help="Compare all strategies.")] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="TENSORS",
            help="The batch of a rank instead of the first one of the data, as in tokens=int64[8,1024].",
        ),
    ] = None,
    utilization: Annotated[
        float | None,
        typer.Option(metavar="X", help="The part of the dense peak rate that training reaches. Default: 0.4."),
    ] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="Compute products of float32 matrices in TF32.")] = False,
    inside_link: Annotated[
        str | None,
        typer.Option(
            metavar="LINK",
            help="The link between the devices of a node, as in nvlink4 or 400Gb/s. Default: that of DEVICE.",
        ),
    ] = None,
    across_link: Annotated[
        str | None,
        typer.Option(
            metavar="LINK", help="The link of a network adapter, as in infiniband-ndr. Default: that of DEVICE."
        ),
    ] = None,
    adapters: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Network adapters per node. Default: one per device, or one if devices use PCI Express.",
        ),
    ] = None,
    links: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use the links that stratagem doctor --record FILE measured.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="RATE", help="The rate at which all ranks together write a checkpoint. Default: 2GB/s."),
    ] = None,
    mtbf: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="The mean time between failures of one device. Default: 50000h."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write everything to one HTML file.")
    ] = None,
    out: Out = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with sizes in bytes and times in seconds.")
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Estimate the memory, communication and time of training CONFIG, without a GPU.

    Simulates a step of each strategy as one of N ranks, with tensors that have no memory. Shows what fits a device, what is
    sent, how long a step takes, how often to save, and what to try. Writes no files except FILE.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()))
    settings = lazy_command("stratagem.cli.plan.command:PlanSettings")(
        world=world,
        gpus_per_node=gpus_per_node,
        device=device,
        memory=memory,
        strategies=strategies,
        every_strategy=every_strategy,
        batch=batch,
        inside_link=inside_link,
        across_link=across_link,
        adapters=adapters,
        links=links,
        utilization=utilization,
        tf32=tf32,
        storage=storage,
        mtbf=mtbf,
    )
    lazy_command("stratagem.cli.plan.command:plan")(options, settings, as_json=as_json, html=html, out=out)


@app.command()
def submit(
    config: ConfigFile,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="The number of nodes.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(metavar="G", min=0, help="Accelerators per node, with one rank each. 0 trains on the CPU.")
    ] = 0,
    time: Annotated[str, typer.Option(metavar="T", help="The time limit, such as 12:00:00 or 2-00.")] = "1:00:00",
    overrides: Overrides = None,
    work_dir: WorkDir = None,
    strategy: Strategy = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ranks per node. Default: one per accelerator.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU cores per rank.")] = None,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="The SLURM partition.")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="The SLURM account.")] = None,
    save_before: Annotated[
        int,
        typer.Option(metavar="SECONDS", min=1, help="Save and requeue the job this long before the time limit."),
    ] = 120,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="An additional option of sbatch, as in --sbatch=--qos=long."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The path of the script. Default: in the folder of the run.")
    ] = None,
    now: Annotated[bool, typer.Option("--now", help="Also submit the script.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the script instead of writing it.")] = False,
    traceback: Traceback = False,
) -> None:
    """Write a SLURM batch script that trains CONFIG.

    Before the time limit or a preemption, the job saves a checkpoint and is requeued. The requeued job resumes from
    this checkpoint.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()), work_dir=work_dir, strategy=strategy)
    allocation = lazy_command("stratagem.cli.submit:Allocation")(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        time=time,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        partition=partition,
        account=account,
        save_before_s=save_before,
        extra_options=tuple(sbatch or ()),
    )
    lazy_command("stratagem.cli.submit:submit")(options, allocation, out=out, now=now, show=show)


@app.command(
    "run-mmengine",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run_mmengine(
    program: Annotated[
        list[str], typer.Argument(metavar="SCRIPT|-m MODULE [ARGS]...", help="The program and its arguments.")
    ],
) -> None:
    """Run a program that uses MMEngine with Stratagem instead, unchanged.

    Processes that the program starts use Stratagem, too: stratagem run-mmengine -m torch.distributed.run --nproc-per-node 2
    tools/train.py CONFIG --launcher pytorch
    """
    lazy_command("stratagem.compat.mmengine.program:run_program")(program)


@app.command()
def env(as_json: AsJson = False, traceback: Traceback = False) -> None:
    """Print versions and hardware for bug reports."""
    lazy_command("stratagem.cli.env:print_environment")(as_json=as_json)


@app.command()
def doctor(
    work_dir: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The folder that runs will write to. Default: work_dirs.", show_default=False),
    ] = Path("work_dirs"),
    nproc: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="The number of ranks that run an all-reduce, at most one for each GPU."),
    ] = 2,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measure links and storage, and save the results for stratagem plan --links."
        ),
    ] = None,
    as_json: AsJson = False,
    traceback: Traceback = False,
) -> None:
    """Check whether this machine is ready for training.

    Prints a table with advice on how to fix problems. Under srun, mpirun or torchrun, the command checks the ranks of
    that launch on all hosts instead of starting its own. Exits with status 1 if there is a problem.
    """
    lazy_command("stratagem.cli.doctor.command:doctor")(work_dir, nproc=nproc, as_json=as_json, record=record)


app.add_typer(ckpt_app, name="ckpt")
app.add_typer(runs_app, name="runs")
app.command()(export)
app.command()(report)
app.add_typer(find_app, name="find")
app.add_typer(config_app, name="config")
