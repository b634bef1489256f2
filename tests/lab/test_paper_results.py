"""The store that the repository keeps: it is read by this version, is small, and gives a ledger."""

from pathlib import Path

import pytest

from truestep.lab.paper.claims import CLAIMS
from truestep.lab.paper.evidence import gather
from truestep.lab.paper.ledger import ledger
from truestep.lab.paper.store import UnitStore

RESULTS = Path(__file__).parents[2] / "results" / "papers"
MOST_BYTES = 20e6


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    # A copy: SQLite may write to a file that it only reads.
    copy = tmp_path_factory.mktemp("results") / "papers.db"
    copy.write_bytes((RESULTS / "papers.db").read_bytes())
    with UnitStore(copy) as store:
        yield gather(store)


def test_it_is_small():
    assert (RESULTS / "papers.db").stat().st_size < MOST_BYTES


def test_every_unit_says_where_it_came_from(evidence):
    for record in evidence.records:
        assert record.command.startswith("truestep paper run ")
        assert {"truestep", "torch", "machine"} <= record.versions.keys()
        assert record.outcome.engine.startswith(("ensemble", "torch"))


def test_units_are_found_by_this_version(evidence):
    assert sum(map(len, evidence.found.values())) > 0
    assert "paper" in evidence.scales.values()


def test_the_ledger_and_the_report_that_is_kept_agree(evidence):
    report = (RESULTS / "report.md").read_text()
    for finding in ledger(evidence):
        assert finding.claim.name in CLAIMS
        assert f"| {finding.claim.name} | **{finding.verdict}** |" in report
