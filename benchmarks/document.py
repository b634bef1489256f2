"""Writes the tables of docs/performance.md from the figures in results/performance.

    python benchmarks/document.py [--check]

With `--check` nothing is written; the exit code is 1 where the page differs from the figures.
"""

import argparse
import json
import sys
from pathlib import Path

import floor
import scaling
import step

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
TABLES = {"step": step.markdown, "floor": floor.markdown, "scaling": scaling.markdown}


def written(page: str) -> str:
    """The page with its tables."""
    for name, markdown in TABLES.items():
        results = json.loads((ROOT / "results" / "performance" / f"{name}.json").read_text())
        opening, closing = f"<!-- {name} -->\n", "<!-- end -->"
        found = page.count(opening)
        if found != 1:
            sys.exit(f"{PAGE} has {found} places for the table of {name}, not one")
        before, _, rest = page.partition(opening)
        _, _, after = rest.partition(closing)
        page = f"{before}{opening}{markdown(results).strip()}\n{closing}{after}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    if arguments.check:
        sys.exit(written(page) != page)
    PAGE.write_text(written(page))


if __name__ == "__main__":
    main()
