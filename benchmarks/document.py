"""Writes the tables of docs/performance.md and docs/ensemble.md from the figures in results/performance.

    python benchmarks/document.py [--check]

With `--check` nothing is written; the exit code is 1 where a page differs from the figures.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ensemble
import floor
import scaling
import step
import survey

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Page -> its tables, by the names of their figures.
PAGES: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "performance.md": {
        "step": step.markdown,
        "survey": survey.markdown,
        "step-cuda": step.markdown,
        "floor": floor.markdown,
        "scaling": scaling.markdown,
    },
    "ensemble.md": {"ensemble": ensemble.markdown},
}


def written(name_of_page: str) -> str:
    """A page with its tables."""
    page = (DOCS / name_of_page).read_text()
    for name, markdown in PAGES[name_of_page].items():
        results = json.loads((ROOT / "results" / "performance" / f"{name}.json").read_text())
        opening, closing = f"<!-- {name} -->\n", "<!-- end -->"
        found = page.count(opening)
        if found != 1:
            sys.exit(f"{name_of_page} has {found} places for the table of {name}, not one")
        before, _, rest = page.partition(opening)
        _, _, after = rest.partition(closing)
        page = f"{before}{opening}{markdown(results).strip()}\n{closing}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    pages = {DOCS / name: written(name) for name in PAGES}
    if arguments.check:
        sys.exit(any(page.read_text() != text for page, text in pages.items()))
    for page, text in pages.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
