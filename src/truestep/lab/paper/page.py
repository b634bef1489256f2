"""The report on both papers: one HTML file that needs nothing else, and the same as Markdown."""

import colorsys
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from truestep.lab.paper.claims import CLAIMS
from truestep.lab.paper.comparison import Cell, Grid
from truestep.lab.paper.evidence import Evidence
from truestep.lab.paper.ledger import Sensitivity, ledger, sensitivity
from truestep.lab.paper.sections import sections
from truestep.lab.paper.verdict import Condition, Finding
from truestep.lab.paper.words import p_value
from truestep.lab.pictures import inline_svg, png, write_file
from truestep.lab.plan import UsageError

__all__ = ["write_report"]

VERDICTS = ("reproduced", "only under ...", "not reproduced", "no verdict", "not run")
MARKDOWN_DOTS_PER_INCH = 110
# A grey has nothing of a hue; on a dark page it is mirrored, while colours are made lighter.
GREY_BELOW = 0.08
LIGHTEST_COLOUR = 0.62


def write_report(evidence: Evidence, out: Path) -> dict[str, Any]:
    """Writes the page, the same as Markdown beside it, and the figures of the latter.

    Args:
        evidence: What there is.
        out: The HTML file; NAME.md and the folder NAME-figures go beside it.

    Returns:
        The ledger and the sensitivity table as plain data, and the files written.

    Raises:
        UsageError: The store has no units.
        TruestepError: A file can't be written.
    """
    if not evidence.records:
        raise UsageError(
            "The store has no finished units of any experiment. Run one first, such as: truestep "
            "paper run asgd-synthetic --scale small"
        )
    findings, changes = ledger(evidence), sensitivity(evidence)
    parts = sections(evidence)
    pictures = {
        drawing.name: png(drawing.figure, MARKDOWN_DOTS_PER_INCH)
        for part in parts
        for drawing in part.drawings
    }
    svgs = {
        drawing.name: inline_svg(drawing.name, drawing.figure)
        for part in parts
        for drawing in part.drawings
    }
    said = {
        "summary": _summary(findings),
        "findings": findings,
        "conditions": _conditions(findings),
        "sensitivity": _sensitivity(changes),
        "sections": parts,
        "origin": _origin(evidence),
    }
    folder = out.with_name(f"{out.stem}-figures")
    page = _template("papers.html").render(svgs=svgs, colours=_colours(svgs.values()), **said)
    markdown = _template("papers.md").render(folder=folder.name, **said)
    for name, content in pictures.items():
        write_file(folder / f"{name}.png", content)
    write_file(out.with_suffix(".md"), f"{markdown.rstrip()}\n".encode())
    # Last, so that a new page never stands beside old figures.
    write_file(out, page.encode())
    return {
        "ledger": [
            {
                "claim": finding.claim.name,
                **{
                    name: getattr(finding, name)
                    for name in ("verdict", "scale", "reason", "ours", "matched")
                },
                "paper": finding.claim.paper,
                "conditions": [
                    {
                        "under": c.under,
                        "state": c.state,
                        "threshold": c.threshold,
                        **asdict(c.effect),
                    }
                    for c in finding.conditions
                ],
            }
            for finding in findings
        ],
        "sensitivity": [asdict(change) | {"changes": change.changes} for change in changes],
        "scales": dict(evidence.scales),
        "files": [str(out), str(out.with_suffix(".md")), str(folder)],
    }


def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("truestep.lab"),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _one_cell
    return environment.get_template(name)


def _one_cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter[str](finding.verdict for finding in findings)
    return ", ".join(f"{counts[name]} {name}" for name in VERDICTS if counts[name])


def _conditions(findings: Sequence[Finding]) -> Grid:
    return Grid(
        "Every condition of every claim",
        "Signed so that the claim predicts a number above the threshold. d: mean over standard "
        "deviation of the paired differences; p: paired t-test against 0, corrected by Holm's "
        "method within the claim. Intervals are Student's.",
        ("claim", "condition", "mean", "95 % interval", "threshold", "d", "p", "n", "says"),
        [
            _condition(finding, condition)
            for finding in findings
            for condition in finding.conditions
        ],
    )


def _condition(finding: Finding, condition: Condition) -> list[Cell]:
    effect = condition.effect
    there = effect.n > 0
    return [
        Cell(finding.claim.name),
        Cell(condition.under),
        Cell(f"{effect.mean:.4g}" if there else "—", effect.mean),
        Cell(f"{effect.low:.4g} to {effect.high:.4g}" if effect.n > 1 else "—", effect.low),
        Cell(f"{condition.threshold:.3g}", condition.threshold),
        Cell(f"{effect.size:.3g}" if math.isfinite(effect.size) else "—", effect.size),
        Cell(p_value(effect.corrected).removeprefix("p ") or "—", effect.corrected),
        Cell(str(effect.n), effect.n),
        Cell(condition.state),
    ]


def _sensitivity(changes: Sequence[Sensitivity]) -> Grid:
    turned = [
        f"{change.claim}: {change.choice} ({change.usual} becomes {change.verdict})"
        for change in changes
        if change.verdict != change.usual
    ]
    choices = len({change.choice for change in changes})
    return Grid(
        "Which open choice changes a verdict",
        "Each choice differs in one thing from the main protocol; verdict and usual verdict are both of "
        "the conditions that the choice was run in, so they can differ from the ledger's. No choice was "
        f"run for {_and(sorted(CLAIMS.keys() - {change.claim for change in changes}))}. Of {choices} "
        f"choices these change a verdict: {'; '.join(turned) or 'none'}.",
        (
            "choice",
            "claim",
            "conditions",
            "verdict",
            "usual verdict",
            "changes",
            "our figure with it",
        ),
        [
            [
                Cell(change.choice),
                Cell(change.claim),
                Cell(f"{change.known} of {change.total}", change.known / max(1, change.total)),
                Cell(change.verdict),
                Cell(change.usual),
                Cell(_changed(change)),
                Cell(change.ours),
            ]
            for change in changes
        ],
    )


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "none"


def _changed(change: Sensitivity) -> str:
    if not change.changes:
        return "nothing"
    parts = [("now holds: ", change.gained), ("no longer: ", change.lost)]
    words = "; ".join(word + ", ".join(names) for word, names in parts if names)
    return words or "the verdict"


def _origin(evidence: Evidence) -> dict[str, list[str]]:
    """Commands, versions, machines, data: each value once."""
    found: dict[str, list[str]] = {"command": [], "data": []}
    for record in evidence.records:
        entries = {"command": record.command, **record.versions}
        if "source" in record.outcome.summary:
            entries["data"] = str(record.outcome.summary["source"])
        for name, value in entries.items():
            values = found.setdefault(name, [])
            if value and value not in values:
                values.append(value)
    return found


def _colours(svgs: Iterable[Markup]) -> dict[str, tuple[str, str]]:
    """Each colour of the figures on a light and on a dark page."""
    names = sorted({name for svg in svgs for name in re.findall(r"var\(--c-([0-9a-f]{6})\)", svg)})
    return {name: (f"#{name}", _dark(name)) for name in names}


def _dark(name: str) -> str:
    red, green, blue = (int(name[k : k + 2], 16) / 255 for k in (0, 2, 4))
    hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
    if max(red, green, blue) - min(red, green, blue) < GREY_BELOW:
        # Ink becomes nearly white, and faint lines nearly the page's black.
        light = 0.93 - 0.83 * light
    else:
        light = max(light, LIGHTEST_COLOUR)
    shade = colorsys.hls_to_rgb(hue, light, saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in shade)
