"""Figures as files and as parts of a page."""

import io
import re
from pathlib import Path

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from truestep.errors import TruestepError
from truestep.files import write_whole
from truestep.lab.panels import PAPER

__all__ = ["inline_svg", "png", "write_file"]

PNG_DOTS_PER_INCH = 200


def png(figure: Figure, dots_per_inch: int = PNG_DOTS_PER_INCH) -> bytes:
    """The figure as a PNG file's content; it keeps its layout from then on."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch)
    # The layout stays as it is; finding it again for the page would take most of the time.
    figure.set_layout_engine("none")
    return buffer.getvalue()


def inline_svg(name: str, figure: Figure) -> Markup:
    """The figure as SVG that takes its colours from the page, light or dark.

    Args:
        name: Is put in front of the names inside, which must be unique in a page.
        figure: The figure; each of its colours becomes a variable, #aabbcc --c-aabbcc.
    """
    buffer = io.StringIO()
    # The salt makes the names inside the same at every writing of the same figure.
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(PAPER, "none")
    # Names must be unique in a page of several figures.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub("#([0-9a-f]{6})", r"var(--c-\1)", svg)
    svg = re.sub(
        r'^<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1
    )
    return Markup(svg)  # noqa: S704 - matplotlib escapes what it writes


def write_file(path: Path, content: bytes) -> None:
    """Writes a file that is whole or not there.

    Raises:
        TruestepError: It can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise TruestepError(
            f"Can't write {path}: {error.strerror}. Every result is in the store; make space or "
            "choose another folder, then give the same command again."
        ) from error
