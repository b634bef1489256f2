"""The command line: parses, calls, prints."""

import contextlib
import io
import os
import shlex
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from truestep.errors import TruestepError

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:
    # The entry point imports this module, so this is the only place that can still say it.
    sys.exit(f"truestep: {missing.name} is not installed. Run in the clone: pip install '.[lab]'")

from truestep.cli_nodes import add_commands
from truestep.cli_paper import paper_app
from truestep.terminal import (
    DataDir,
    Debug,
    Json,
    complain,
    lab_installed,
    print_json,
    telling_of_compiling,
)

__all__ = ["app", "main"]

INTERRUPTED = 130
# Commands that keep what is done, so that the same command goes on after any interruption.
KEEPING = (["race"], ["paper", "run"], ["data", "get"])
KEPT = " What is done is kept: the same command goes on."

app = typer.Typer(
    name="truestep",
    help="Optimizer steps of the right size: compare optimizers on your own task.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="Data sets: where they are, checksums, licences.")
app.add_typer(data_app, name="data")
app.add_typer(paper_app, name="paper")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 a run failed, 2 wrong usage, 130 interrupted.

    Args:
        arguments: Without the program's name; by default those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _print_what_can_be()
    try:
        code = app(arguments or ["--help"], standalone_mode=False, obj=arguments)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has seen enough; without this, python complains at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        reason = _reason(error, arguments)
        if reason is None:
            raise
        code = complain(reason, getattr(error, "exit_code", 1))
    # Some versions of typer turn the exception into this code.
    if code == INTERRUPTED:
        complain(f"interrupted.{KEPT if _keeps(arguments) else ''}")
    sys.exit(code)


@app.command()
def race(
    context: typer.Context,
    positional: Annotated[
        str | None,
        typer.Argument(metavar="TASK", help="The same as --task.", show_default=False),
    ] = None,
    *,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Name of a built-in task, or a Python file with task = Task(...); digits by "
            "default.",
        ),
    ] = None,
    optimizers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Such as sgd,adam,asgd+dasgd,my.module:MyOptimizer; the task's by default.",
        ),
    ] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBERS",
            help="Learning rates of all optimizers, 0.1,0.3, or of one, adam=0.001,0.003; five for "
            "each by default.",
        ),
    ] = None,
    batch_size: Annotated[
        list[str] | None,
        typer.Option(metavar="NUMBERS", help="Such as 64,256; the task's by default."),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="How many runs of each.")] = 3,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Passes over the data; the task's by default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for results; truestep-race/TASK by default."),
    ] = None,
    data_dir: DataDir = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes, or threads of the ensemble; as many as processors by default.",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="torch: one training after the other; ensemble: compiled loops, equal to rounding, "
            "for networks of linear layers; auto: the ensemble for what it can train.",
        ),
    ] = "auto",
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    debug: Debug = False,
) -> int:
    """Compare optimizers on a task, each at its own best learning rate.

    Learning rates are chosen on validation data; the chosen ones are then measured on test data.
    DIR gets results.db, report.html and the figures. After an interruption of any kind the same
    command goes on where it stopped.
    """
    if positional is not None and task not in {None, positional}:
        raise typer.BadParameter(f"{positional} and {task} are two tasks", param_hint="--task")
    learning_rates = _learning_rates(lr)
    batch_sizes = tuple(_number(item, int, "--batch-size") for item in _items(batch_size))
    with lab_installed():
        from truestep.lab import race as lab  # noqa: PLC0415 - torch takes seconds
        from truestep.lab.plan import Settings  # noqa: PLC0415
        from truestep.lab.report import table  # noqa: PLC0415

    settings = Settings(
        task=positional or task or "digits",
        optimizers=tuple(_items(optimizers)),
        learning_rates=learning_rates,
        batch_sizes=batch_sizes,
        seeds=seeds,
        epochs=epochs,
        out=out,
        data_dir=data_dir,
        jobs=jobs,
        engine=engine,
    )
    command = shlex.join(["truestep", *context.obj])
    progress = Console(stderr=True, quiet=quiet)
    # What a user's own code prints must not end up in the JSON.
    with (
        contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext(),
        telling_of_compiling(progress),
    ):
        outcome = lab.race(settings, progress, command)
    failures = lab.describe_failures(outcome.failures)
    report = outcome.folder / "report.html"
    if as_json:
        print_json(outcome.data | {"folder": str(outcome.folder), "failures": failures})
    else:
        console = Console()
        console.print(table(outcome.table))
        console.print(f"Report: {report}", highlight=False, soft_wrap=True)
    for line in failures:
        complain(line)
    if debug and outcome.failures:
        complain(outcome.failures[0].trace)
    return 1 if failures else 0


@app.command()
def doctor(*, as_json: Json = False, debug: Debug = False) -> int:
    """Show what is installed and which code runs here, and check counts against the oracle."""
    del debug  # main() looks for it
    from rich.table import Table  # noqa: PLC0415

    from truestep import doctor as examine  # noqa: PLC0415 - torch takes seconds

    with telling_of_compiling(Console(stderr=True)):
        checks = examine.self_check()
    wrong = [check for check in checks if check.difference]
    parts = {
        "installed": examine.installed_packages(),
        "in use": examine.paths_in_use(),
        "self-check": {
            check.name: f"off by {check.difference}" if check.difference else "equals the oracle"
            for check in checks
        },
    }
    if as_json:
        print_json(parts | {"right": not wrong})
    else:
        for title, rows in parts.items():
            table = Table(title, "", box=None, title_justify="left", padding=(0, 2, 0, 0))
            for name, value in rows.items():
                table.add_row(name, value)
            Console().print(table, "", sep="\n")
    if wrong:
        return complain(
            "counts are wrong on this machine. Report the output of truestep doctor --json"
        )
    return 0


@data_app.command("list")
def data_list(data_dir: DataDir = None, as_json: Json = False, debug: Debug = False) -> None:
    """List the data sets, where they are on this machine, and their licences."""
    del debug  # main() looks for it
    with lab_installed():
        from rich.table import Table  # noqa: PLC0415

        from truestep.lab.datasets import data_table  # noqa: PLC0415

    rows = data_table(data_dir)
    if as_json:
        print_json(rows)
        return
    columns = ("name", "train", "test", "checksum", "licence", "where")
    table = Table(*columns, box=None)
    table.columns[0].no_wrap = True
    table.columns[-1].overflow = "fold"
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in `truestep data list`.")],
    data_dir: DataDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Download a data set, unless it is here, and check it."""
    del debug  # main() looks for it
    with lab_installed():
        from truestep.lab.datasets import find_dataset, get  # noqa: PLC0415

    try:
        find_dataset(name)
    except TruestepError as error:
        raise typer.BadParameter(str(error)) from error
    folder = get(name, data_dir)
    if as_json:
        print_json({"name": name, "folder": str(folder)})
    else:
        Console().print(str(folder), highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=False)
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=lambda asked: asked and _print_version()),
    ] = False,
) -> None:
    del show_version


def _print_what_can_be() -> None:
    """Lets a question mark stand for what an output that is not UTF-8 lacks: no reason to lose a race."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _print_version() -> None:
    Console().print(f"truestep {version('truestep')}", highlight=False)
    raise typer.Exit


def _items(values: list[str] | None) -> list[str]:
    """The parts of options that were repeated or hold commas."""
    return [item.strip() for value in values or () for item in value.split(",")]


def _learning_rates(values: list[str] | None) -> dict[str, tuple[float, ...]]:
    """Options such as "0.1,0.3" and "adam=0.001,0.003"; the former under the key ""."""
    grids: dict[str, tuple[float, ...]] = {}
    for value in values or ():
        name, equals, numbers = value.rpartition("=")
        if equals and not name.strip():
            raise typer.BadParameter(f"{value!r} names no optimizer", param_hint="--lr")
        found = tuple(_number(item, float, "--lr") for item in _items([numbers]))
        grids[name.strip()] = grids.get(name.strip(), ()) + found
    return grids


def _number(text: str, kind: type[Any], option: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise typer.BadParameter(f"{text!r} is not {wanted}", param_hint=option) from None


def _keeps(arguments: list[str]) -> bool:
    """Whether a command that was cut short has kept what it had done."""
    return any(arguments[: len(command)] == command for command in KEEPING)


def _reason(error: Exception, arguments: list[str]) -> str | None:
    """One line for the errors that users can do something about."""
    if isinstance(error, TruestepError):
        return str(error)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        way_out = KEPT if _keeps(arguments) else " Mend that, then give the command again."
        return f"{error.strerror or error}{where}.{way_out}"
    # What typer raises for wrong options derives from click's classes, which are in click or, in
    # newer versions, in a private module of typer.
    if hasattr(error, "format_message"):
        path = getattr(getattr(error, "ctx", None), "command_path", "truestep")
        return f"{error.format_message().rstrip('.')}. See: {path} --help"
    return None


add_commands(app)
