"""The commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stratagem._version import __version__
from stratagem.cli.ckpt.app import ckpt_app
from stratagem.cli.lazy_command import Traceback, lazy_command
from stratagem.cli.options import RunOptions
from stratagem.cli.runs_app import runs_app

__all__ = ["app"]

app = typer.Typer(
    name="stratagem",
    help="Train PyTorch models from configurations, from one CPU to many nodes.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A .py, .yaml, .json or .toml configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value: --set optim_wrapper.optimizer.lr=0.01"),
]
WorkDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The folder of the run. By default the configuration's, or work_dirs/<its name>."),
]
Nproc = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Start this many processes: on this machine by torchrun's launcher, or by Ray."
    ),
]
Launcher = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What started the processes: none, pytorch, slurm or mpi; inferred by default. Or ray, to start them.",
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The strategy: single, ddp, fsdp, deepspeed, colossalai, or a class's name."),
]
Out = Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw to this file too; needs stratagem[plot].")]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"stratagem {__version__}")
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
            help="Go on from a checkpoint; without a path from the latest in the folder of the run, if there is one.",
        ),
    ] = None,
    load_from: Annotated[
        str | None, typer.Option(metavar="PATH", help="Begin with the weights of a checkpoint.")
    ] = None,
    nproc: Nproc = None,
    max_restarts: Annotated[
        int,
        typer.Option(metavar="K", min=0, help="With --nproc: start the ranks again, up to K times, when one fails."),
    ] = 0,
    launcher: Launcher = None,
    strategy: Strategy = None,
    traceback: Traceback = False,
) -> None:
    """Train what CONFIG describes.

    Interrupt it with Ctrl-C and it saves a checkpoint; --resume goes on from there. A second Ctrl-C stops at once.
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
    lazy_command("stratagem.cli.train:train")(options, resume=resume, load_from=load_from)


@app.command()
def test(
    config: ConfigFile,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="The checkpoint whose weights are evaluated.")
    ],
    overrides: Overrides = None,
    work_dir: WorkDir = None,
    nproc: Nproc = None,
    launcher: Launcher = None,
    strategy: Strategy = None,
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
    lazy_command("stratagem.cli.test:test")(options, checkpoint=checkpoint)


@app.command()
def sample(
    config: ConfigFile,
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="The checkpoint, or the folder of a run for its latest.")
    ],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to go on with.")],
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="How many tokens to add.")] = 300,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="Below 1 for likelier tokens; 0 for always the likeliest.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(metavar="K", min=0, help="Draw from the K likeliest tokens; 0 draws from all.")
    ] = 0,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Of the random numbers.")] = 0,
    overrides: Overrides = None,
    traceback: Traceback = False,
) -> None:
    """Print how the language model of CONFIG goes on with a text, with the weights of CHECKPOINT.

    Its model has generate(...), and `tokenizer` of CONFIG names a class with encode and decode. Nothing is written.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()))
    request = lazy_command("stratagem.cli.sample:Request")(
        prompt=prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    lazy_command("stratagem.cli.sample:sample")(options, request, checkpoint=checkpoint)


@app.command()
def schedule(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    nproc: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Draw the run that this many processes would train; none is started."),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Draw learning rate, momentum and weight decay over the run of CONFIG, without training.

    The learning rate is drawn always, the others where a schedule changes them. Nothing is written but FILE.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()), nproc=nproc)
    lazy_command("stratagem.cli.schedule:schedule")(options, out=out)


@app.command()
def parity(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(metavar="K", min=2, help="How many steps of the optimizer are trained.")] = 6,
    nproc: Annotated[int, typer.Option(metavar="N", min=1, help="Over how many processes a batch is cut.")] = 2,
    eval_layers: Annotated[
        bool, typer.Option("--eval-layers", help="Train with dropout and batch normalisation in evaluation.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(metavar="X", help="The largest relative difference that is taken for rounding.")
    ] = 1e-4,
    strategies: Annotated[
        str,
        typer.Option("--strategy", metavar="NAMES", help="What trains in N processes: ddp,fsdp,deepspeed,colossalai."),
    ] = "ddp",
    record: Annotated[Path | None, typer.Option(hidden=True)] = None,
    traceback: Traceback = False,
) -> None:
    """Train some steps of CONFIG in ways that should come to the same, and show where two first differ.

    In one process, again, stopped and resumed, with accumulation, in N processes: the same samples in each step. Exits
    with 1 where a difference is not explained. Nothing is written.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()))
    trial = lazy_command("stratagem.cli.parity.variants:Trial")(
        steps=steps,
        nproc=nproc,
        eval_layers=eval_layers,
        tolerance=tolerance,
        strategies=lazy_command("stratagem.cli.parity.variants:strategies_of")(strategies),
    )
    lazy_command("stratagem.cli.parity.command:parity")(options, trial, record=record)


@app.command()
def submit(
    config: ConfigFile,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="On how many nodes it runs.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(metavar="G", min=0, help="Accelerators of each node, with a rank for each; 0 for the CPU.")
    ] = 0,
    time: Annotated[str, typer.Option(metavar="T", help="How long it may run, such as 12:00:00 or 2-00.")] = "1:00:00",
    overrides: Overrides = None,
    work_dir: WorkDir = None,
    strategy: Strategy = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ranks on each node; by default one for each accelerator.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(metavar="N", min=1, help="Cores for each rank.")] = None,
    partition: Annotated[str | None, typer.Option(metavar="NAME", help="SLURM's partition.")] = None,
    account: Annotated[str | None, typer.Option(metavar="NAME", help="The account that pays for it.")] = None,
    save_before: Annotated[
        int,
        typer.Option(metavar="SECONDS", min=1, help="How long before the end of the time it saves and is requeued."),
    ] = 120,
    further: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="A further option of sbatch: --sbatch=--qos=long"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the script goes; by default into the folder of the run.")
    ] = None,
    now: Annotated[bool, typer.Option("--now", help="Submit it, too.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the script, and write and submit nothing.")] = False,
    traceback: Traceback = False,
) -> None:
    """Write a SLURM batch script that trains CONFIG.

    The job saves a checkpoint before its time is over or it is preempted, is requeued, and goes on from there.
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
        further=tuple(further or ()),
    )
    lazy_command("stratagem.cli.submit:submit")(options, allocation, out=out, now=now, show=show)


@app.command()
def env(traceback: Traceback = False) -> None:
    """Print what this machine and its installation are, for bug reports."""
    lazy_command("stratagem.cli.env:print_environment")()


@app.command()
def doctor(
    work_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder that runs would write to.", show_default=False)
    ] = Path("work_dirs"),
    nproc: Annotated[int, typer.Option(metavar="N", min=1, help="How many ranks try an all-reduce.")] = 2,
    traceback: Traceback = False,
) -> None:
    """Examine this machine for training, and say what to do about what is found.

    Started by srun, mpirun or torchrun it examines their ranks instead of two of its own, across hosts. The exit status
    is 1 where there is a problem.
    """
    lazy_command("stratagem.cli.doctor.command:doctor")(work_dir, nproc=nproc)


app.add_typer(ckpt_app, name="ckpt")
app.add_typer(runs_app, name="runs")

find_app = typer.Typer(help="Find a learning rate or a batch size by trying, without a trace.", no_args_is_help=True)
app.add_typer(find_app, name="find")


@find_app.command()
def lr(
    config: ConfigFile,
    overrides: Overrides = None,
    low: Annotated[float, typer.Option("--min", metavar="LR", help="The first learning rate.")] = 1e-7,
    high: Annotated[float, typer.Option("--max", metavar="LR", help="The last learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option(metavar="N", help="Over how many steps of the optimizer it grows.")] = 100,
    loss: Annotated[str, typer.Option(metavar="NAME", help="The loss among what the model logs.")] = "loss",
    optimizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of several optimizers, the one whose rate to find.")
    ] = None,
    out: Out = None,
    nproc: Nproc = None,
    launcher: Launcher = None,
    strategy: Strategy = None,
    traceback: Traceback = False,
) -> None:
    """Train CONFIG for some steps with a growing learning rate, and show how the loss goes.

    It stops where the loss diverges, and suggests rates. Nothing is written but FILE.
    """
    options = RunOptions(
        config=config, overrides=tuple(overrides or ()), launcher=launcher, strategy=strategy, nproc=nproc
    )
    sweep = lazy_command("stratagem.cli.find:Sweep")(low=low, high=high, steps=steps, loss=loss, optimizer=optimizer)
    lazy_command("stratagem.cli.find:learning_rate")(options, sweep, out=out)


@find_app.command()
def batch(
    config: ConfigFile,
    overrides: Overrides = None,
    limit: Annotated[
        int | None,
        typer.Option("--max-batch", metavar="N", min=1, help="The largest to try; 1024 on the CPU by default."),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="How many iterations are timed at once.")] = 3,
    out: Out = None,
    strategy: Strategy = None,
    traceback: Traceback = False,
) -> None:
    """Double the batch of CONFIG until memory is not enough, and show how fast each size trains.

    Nothing is written but FILE. On the CPU memory errors do not come reliably: there it measures up to --max-batch.
    """
    options = RunOptions(config=config, overrides=tuple(overrides or ()), strategy=strategy)
    lazy_command("stratagem.cli.find:batch_size")(options, limit=limit, steps=steps, out=out)


config_app = typer.Typer(help="Look at configurations and check them, without training.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@config_app.command()
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    form: Annotated[str, typer.Option("--as", metavar="FORM", help="python, yaml, json or toml.")] = "python",
    traceback: Traceback = False,
) -> None:
    """Print CONFIG with its bases and overrides merged."""
    lazy_command("stratagem.cli.configs:show")(RunOptions(config=config, overrides=tuple(overrides or ())), form)


@config_app.command()
def explain(
    config: ConfigFile,
    path: Annotated[str, typer.Argument(metavar="A.B.C", help="The dotted path of a value.")],
    overrides: Overrides = None,
    traceback: Traceback = False,
) -> None:
    """Print each file and line that gave or changed a value of CONFIG, in order."""
    lazy_command("stratagem.cli.configs:explain")(RunOptions(config=config, overrides=tuple(overrides or ())), path)


@config_app.command()
def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A configuration, or one that a run kept.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    traceback: Traceback = False,
) -> None:
    """Print what differs between two merged configurations."""
    lazy_command("stratagem.cli.configs:diff")(first, second)


@config_app.command()
def check(config: ConfigFile, overrides: Overrides = None, traceback: Traceback = False) -> None:
    """Check every key and argument of CONFIG as training would, and list all problems."""
    lazy_command("stratagem.cli.configs:check")(RunOptions(config=config, overrides=tuple(overrides or ())))
