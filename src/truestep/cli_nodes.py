"""`truestep nodes` and `truestep compress`: parses, calls, prints."""

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from truestep.errors import TruestepError
from truestep.files import write_whole
from truestep.terminal import Debug, Json, check_folder, lab_installed, print_json

__all__ = ["add_commands"]

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A Python file with `model` and `loader`, or an exported program (.pt2).",
        show_default=False,
        exists=True,
        dir_okay=False,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Inputs instead of the file's loader: .npy, .pt, or a Python file with `loader`.",
        exists=True,
        dir_okay=False,
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Rows of --data at a time; 256 by default.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


def add_commands(app: typer.Typer) -> None:
    """Adds the two commands.

    Args:
        app: The command line.
    """

    @app.command()
    def nodes(
        model: Model,
        *,
        data: Data = None,
        batch_size: BatchSize = None,
        figure: Annotated[
            Path | None, typer.Option(metavar="FILE", help="Draw a heat map, .png or .svg.")
        ] = None,
        as_json: Json = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Find the dummy nodes of a saved model: units that data never or always switch on.

        The model is put in evaluation mode. Constant units and multiples of other units are found
        too.
        """
        del debug  # main() looks for it
        with lab_installed():
            from truestep.lab import node_report  # noqa: PLC0415 - torch takes seconds

            if figure is not None:
                _check_file(figure, ("png", "svg"), "--figure")
                _check_other(figure, (model, data), "--figure")
            _check_batch_size(batch_size, data)
            saved = _load(model, data, batch_size, as_json=as_json)
            found = _find(saved, quiet=quiet)
            if as_json:
                print_json(found.to_dict())
            else:
                _print_nodes(found)
            if figure is not None:
                drawn, content = node_report.heat_map(node_report.unit_frame(found)), io.BytesIO()
                drawn.savefig(content, format=figure.suffix.removeprefix("."), dpi=150)
                _write(figure, content, "--figure")

    @app.command()
    def compress(
        model: Model,
        *,
        out: Annotated[
            Path,
            typer.Option(
                metavar="FILE",
                help="The small model: .pt for a Python file's, .pt2 for an exported program.",
            ),
        ],
        data: Data = None,
        batch_size: BatchSize = None,
        as_json: Json = False,
        quiet: Quiet = False,
        debug: Debug = False,
    ) -> None:
        """Take the redundant units out of a saved model, with the same output on the data.

        FILE is what `truestep.shrink_to(model, torch.load(FILE))` takes, with a model built by the
        same code; of an exported program it is one again.
        """
        del debug  # main() looks for it
        with lab_installed():
            from truestep.lab.node_report import compression_tables  # noqa: PLC0415

            _check_file(out, ("pt", "pt2"), "--out")
            _check_other(out, (model, data), "--out")
            _check_batch_size(batch_size, data)
            saved = _load(model, data, batch_size, as_json=as_json)
            if (out.suffix == ".pt2") != saved.exported:
                wanted = ".pt2" if saved.exported else ".pt"
                raise typer.BadParameter(
                    f"{out} should end in {wanted} for this model", param_hint="--out"
                )
            report = _compress(saved, out, quiet=quiet)
            if as_json:
                print_json(report.to_dict() | {"file": str(out)})
                return
            console = Console()
            for table in compression_tables(report):
                console.print(table, "", sep="\n")
            console.print(
                f"Largest difference of outputs: {report.difference:.3g}, at outputs up to "
                f"{report.largest:.3g}, on {report.compared:,} samples.\nSaved: {out}",
                highlight=False,
                soft_wrap=True,
            )


def _check_file(path: Path, kinds: tuple[str, ...], option: str) -> None:
    """Raises a usage error for a file that could not be written when the work is done."""
    if path.suffix.removeprefix(".") not in kinds:
        raise typer.BadParameter(
            f"{path} should end in {' or '.join(f'.{kind}' for kind in kinds)}", param_hint=option
        )
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent}; make it", param_hint=option)
    check_folder(path.parent, option)


def _check_other(path: Path, read: Iterable[Path | None], option: str) -> None:
    """Raises a usage error for a file that is one of those that the command reads."""
    for file in read:
        if file is not None and path.exists() and path.samefile(file):
            raise typer.BadParameter(
                f"{path} would overwrite {file}, which the command reads; give another name",
                param_hint=option,
            )


def _check_batch_size(batch_size: int | None, data: Path | None) -> None:
    """Raises a usage error for a batch size where a file's own loader makes the batches."""
    if batch_size is not None and (data is None or data.suffix == ".py"):
        raise typer.BadParameter(
            "the batches are those of `loader`, and only inputs of --data FILE, .npy or .pt, are cut "
            "into others; leave --batch-size out",
            param_hint="--batch-size",
        )


def _write(path: Path, content: io.BytesIO, option: str) -> None:
    """Writes a file that is whole or, with an error that names it, as it was."""
    try:
        write_whole(path, content.getbuffer())
    except OSError as error:
        raise TruestepError(
            f"Can't write {path}: {error.strerror}. What was there is left as it was. Make space, or give "
            f"{option} another folder, and give the command again."
        ) from error


def _load(model: Path, data: Path | None, batch_size: int | None, *, as_json: bool) -> Any:
    from truestep.lab.saved_models import check_first_batch, load_saved  # noqa: PLC0415

    # What a user's own code prints must not end up in the JSON.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        try:
            saved = load_saved(model, data, batch_size)
        except TruestepError as error:
            raise typer.BadParameter(str(error)) from error
        check_first_batch(saved, model if data is None else data)
    return saved


def _find(saved: Any, *, quiet: bool) -> Any:
    from truestep import find_dummy_nodes  # noqa: PLC0415

    loader = _Shown(saved.loader, "looking at units", quiet=quiet)
    return find_dummy_nodes(saved.model, loader, forward=saved.forward)


def _print_nodes(found: Any) -> None:
    from truestep.lab.node_report import node_table  # noqa: PLC0415

    console = Console()
    console.print(node_table(found))
    console.print()
    if found.layers:
        bound = max(layer.bound() for layer in found.layers)
        console.print(
            f"{found.samples:,} samples. A unit that none of them turned on may still be turned on by "
            f"others: by at most {bound:.2g} of them, at 95 % confidence.",
            highlight=False,
        )
    for line in found.skipped:
        console.print(f"Not looked at: {line}.", highlight=False)


def _compress(saved: Any, out: Path, *, quiet: bool) -> Any:
    import torch  # noqa: PLC0415

    from truestep import compress, find_dummy_nodes  # noqa: PLC0415

    loader = _Shown(saved.loader, "looking at units", quiet=quiet)
    found = find_dummy_nodes(saved.model, loader, forward=saved.forward)
    loader.title = "comparing outputs"
    example = next(iter(saved.loader))
    small, report = compress(saved.model, found, example)
    # In memory first: on a full disk torch's own writer fails with an error that is no OSError.
    content = io.BytesIO()
    if saved.exported:
        inputs = example[0] if isinstance(example, list | tuple) else example
        shapes = ({0: torch.export.Dim.AUTO},) if saved.free else None
        torch.export.save(torch.export.export(small, (inputs,), dynamic_shapes=shapes), content)
    else:
        torch.save(report.checkpoint(small), content)
    _write(out, content, "--out")
    return report


class _Shown:
    """Batches with a progress bar each time they are gone through."""

    def __init__(self, loader: Iterable[Any], title: str, *, quiet: bool) -> None:
        self.title = title
        self._loader, self._quiet = loader, quiet

    def __iter__(self) -> Iterator[Any]:
        from rich.progress import track  # noqa: PLC0415

        total = len(self._loader) if isinstance(self._loader, Sized) else None
        console = Console(stderr=True)
        yield from track(
            self._loader,
            self.title,
            total=total,
            console=console,
            disable=self._quiet or not console.is_terminal,
            transient=True,
        )
