"""The commands `truestep paper ...`."""

import dataclasses
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from truestep.errors import TruestepError
from truestep.files import unwritable
from truestep.terminal import (
    DataDir,
    Debug,
    Json,
    check_folder,
    complain,
    lab_installed,
    print_json,
)

if TYPE_CHECKING:
    from truestep.lab.workers import Failure

__all__ = ["paper_app"]

# Where the repository keeps what has been run, so that a fresh clone has it.
STORE = Path("results/papers/papers.db")

paper_app = typer.Typer(help="The two papers' experiments, and what they say of each claim.")

StoreFile = Annotated[
    Path, typer.Option("--store", metavar="FILE", help="Where finished units are kept.")
]


@paper_app.command("list")
def paper_list(store: StoreFile = STORE, as_json: Json = False, debug: Debug = False) -> None:
    """List the experiments, what they cost, and how much of each is in the store."""
    del debug  # main() looks for it
    with lab_installed():
        from rich.table import Table  # noqa: PLC0415

        from truestep.lab.board import duration  # noqa: PLC0415
        from truestep.lab.paper.overview import overview  # noqa: PLC0415

    rows = overview(store)
    if not store.is_file():
        complain(
            f"there is no store {store}, so that nothing counts as done: name one with --store"
        )
    if as_json:
        print_json(rows)
        return
    table = Table("name", "artefacts", "scale", "done", "one core", box=None)
    table.columns[0].no_wrap = True
    for row in rows:
        for place, scale in enumerate(row["scales"]):
            first = place == 0
            table.add_row(
                row["name"] if first else "",
                row["artefacts"] if first else "",
                scale["scale"],
                f"{scale['done']}/{scale['units']}",
                duration(scale["seconds"]).removeprefix("about "),
            )
    Console().print(table)


@paper_app.command("run")
def paper_run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in `truestep paper list`.")],
    *,
    scale: Annotated[
        str, typer.Option(metavar="SCALE", help="smoke (seconds), small (minutes) or paper.")
    ] = "small",
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Seeds of each cell; the scale's by default.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Change what the paper leaves open, such as start=torch; may be repeated.",
        ),
    ] = None,
    store: StoreFile = STORE,
    data_dir: DataDir = None,
    jobs: Annotated[
        int, typer.Option(metavar="N", help="Processes of one thread each.", min=1)
    ] = max(1, min(2, os.cpu_count() or 1)),
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    debug: Debug = False,
) -> int:
    """Run an experiment: what the store has is not run again.

    After an interruption of any kind the same command goes on where it stopped.
    """
    with lab_installed():
        from truestep.lab.paper.experiments import find_experiment  # noqa: PLC0415
        from truestep.lab.paper.options import changed, parse_options  # noqa: PLC0415
        from truestep.lab.paper.planned import SCALES  # noqa: PLC0415
        from truestep.lab.paper.runner import run  # noqa: PLC0415
        from truestep.lab.paper.store import UnitStore  # noqa: PLC0415
        from truestep.lab.paper.unit import key  # noqa: PLC0415

    if scale not in SCALES:
        raise typer.BadParameter(f"{scale} is none of {', '.join(SCALES)}", param_hint="--scale")
    if seeds is not None and seeds < 1:
        raise typer.BadParameter(f"{seeds} is impossible; give 1 or more", param_hint="--seeds")
    try:
        experiment = find_experiment(name)
        planned = changed(experiment.units(scale, seeds), parse_options(option or []))
    except TruestepError as error:
        raise typer.BadParameter(str(error)) from error
    _check_store(store)
    command = shlex.join(["truestep", *_without_places(context.obj)])
    console = Console(stderr=True, quiet=quiet)
    with UnitStore(store) as units:
        failures = run(
            [item.unit for item in planned],
            units,
            console,
            jobs=jobs,
            data_dir=data_dir,
            command=command,
        )
        done = len(units.keys() & {key(item.unit) for item in planned})
    if as_json:
        print_json({"experiment": name, "scale": scale, "units": done, "store": str(store)})
    else:
        following = f" Next: truestep paper report --store {store}" if done else ""
        Console().print(
            f"{name}: {done} units in {store}.{following}", highlight=False, soft_wrap=True
        )
    for line in _describe(failures):
        complain(line)
    if debug and failures:
        complain(failures[0].trace)
    return 1 if failures else 0


@paper_app.command("report")
def paper_report(
    store: StoreFile = STORE,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; report.html beside the store by default."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the report: figures, tables and the ledger of claims, as HTML and as Markdown."""
    del debug  # main() looks for it
    with lab_installed():
        from truestep.lab.paper.evidence import gather  # noqa: PLC0415
        from truestep.lab.paper.page import write_report  # noqa: PLC0415
        from truestep.lab.paper.store import UnitStore  # noqa: PLC0415

    if not store.is_file():
        raise typer.BadParameter(
            f"there is no store {store}; name another, or make it: truestep paper run "
            f"asgd-synthetic --scale small --store {store}",
            param_hint="--store",
        )
    out = out or store.with_name("report.html")
    check_folder(out.parent, "--out")
    with UnitStore(store) as units:
        evidence = gather(units)
    data = write_report(evidence, out)
    if as_json:
        print_json(data)
        return
    console = Console()
    for row in data["ledger"]:
        scale = f" (scale {row['scale']})" if row["scale"] else ""
        line = f"{row['claim']}  {_verdict(row)}{scale}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"Report: {data['files'][0]}", highlight=False, soft_wrap=True)
    if evidence.unknown:
        complain(
            f"{evidence.unknown} units of the store are in no experiment's plan and are left out: "
            "another version of truestep, or options of no unit that is there, made them"
        )


def _check_store(store: Path) -> None:
    """Raises a usage error for a store that could not keep a unit when it is done."""
    reason = unwritable(store.parent)
    if store.is_dir():
        reason = f"{store} is a folder"
    elif store.exists() and not os.access(store, os.W_OK):
        reason = f"{store} can't be written"
    if reason:
        raise typer.BadParameter(
            f"{reason}; name a file in a folder that can be written", param_hint="--store"
        )


def _verdict(row: dict[str, Any]) -> str:
    """A verdict where no table stands beside it: "only under ..." says under what."""
    holding = [c["under"] for c in row["conditions"] if c["state"] == "holds"]
    return str(row["verdict"]).replace("...", ", ".join(holding))


def _without_places(arguments: list[str]) -> list[str]:
    """The arguments that say what is run, without where this machine keeps things."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument in {"--store", "--data-dir"}:
            next(rest, None)
        elif not argument.startswith(("--store=", "--data-dir=")):
            kept.append(argument)
    return kept


def _describe(failures: Iterable["Failure"]) -> Iterator[str]:
    """One line for each kind and reason: how many units, and which is the first."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for failure in failures:
        groups.setdefault((failure.key.kind, failure.reason), []).append(failure.key)
    shown = ("data", "optimizer", "lr", "batch_size", "seed", "first")
    for (kind, reason), units in groups.items():
        fields = dataclasses.asdict(units[0])
        first = ", ".join(f"{name} {fields[name]}" for name in shown if name in fields)
        more = ", ..." if len(units) > 1 else ""
        number = f"{len(units)} unit{'s' * (len(units) > 1)} of {kind}"
        yield f"{number} failed ({first}{more}): {reason}"
