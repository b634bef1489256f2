import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from papers_made_up import COMMAND, VERSIONS, fill
from papers_made_up import record as made_up_record

from truestep import TruestepError, cli
from truestep.lab.paper import figures_curves, figures_more, figures_small
from truestep.lab.paper import page as page_module
from truestep.lab.paper.claims import CLAIMS
from truestep.lab.paper.evidence import gather
from truestep.lab.paper.experiments import EXPERIMENTS
from truestep.lab.paper.page import write_report
from truestep.lab.paper.store import UnitStore
from truestep.lab.workers import Failure

CHROMIUM = Path("/usr/bin/chromium")
FIGURES = {
    *(f"asgd-figure-{name}" for name in ("1", "2", "3", "4", "5", "6", "7", "8a", "8b")),
    *(f"dasgd-figure-{name}" for name in ("3", "4", "5a", "5b", "5c")),
    "asgd-stabilised",
    "asgd-compression",
    "asgd-compression-rates",
    "dasgd-premise",
    "dasgd-momentum",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("papers") / "papers.db"
    with UnitStore(path) as units:
        fill(units, "smoke", gain=0.01)
        # A setting of Table 1's level, so that its figure and table are drawn too.
        for item in EXPERIMENTS["asgd-mnist"].units("paper", 2):
            if item.variant.startswith("level: 10,000") or not item.variant:
                units.add(made_up_record(item.unit, 0.01))
    return path


@pytest.fixture(scope="module")
def written(store, tmp_path_factory):
    """The data, the page and the Markdown of one report."""
    out = tmp_path_factory.mktemp("report") / "made for it" / "both.html"
    with UnitStore(store) as units:
        data = write_report(gather(units), out)
    return data, out.read_text(), out.with_suffix(".md").read_text(), out


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.addresses, self.ids, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "srcset"}:
                self.addresses.append((tag, value))
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script", "svg"} & set(self.open):
            self.text += data


def test_the_page_needs_nothing_else_and_its_names_are_unique(written):
    _, text, *_ = written
    page = Page(text)
    assert {value for _, value in page.addresses if not value.startswith("#")} == {"data:,"}
    assert not re.search(r"url\((?!#)|@import|fetch\(", text)
    assert len(page.ids) == len(set(page.ids))
    references = {value[1:] for _, value in page.addresses if value.startswith("#")}
    references |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert references <= set(page.ids)


def test_every_figure_is_there_in_colours_of_the_page(written):
    _, text, *_ = written
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(svgs) == len(FIGURES) + 1
    for svg in svgs:
        assert not re.search(r"[:\"'\s]#[0-9a-f]{6}", svg)
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    for block in re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL):
        assert used <= set(re.findall(r"(--[a-z0-9-]+):", block))


def test_markdown_says_the_same_and_its_pictures_are_there(written):
    data, text, markdown, out = written
    for finding in data["ledger"]:
        row = f"| {finding['claim']} | **{finding['verdict']}** | {finding['scale']} |"
        assert row in markdown
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert {Path(picture).stem for picture in pictures} >= FIGURES
    for picture in pictures:
        assert (out.parent / picture).read_bytes().startswith(b"\x89PNG")
    # Every row of a table has as many cells as its head.
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block[:200]
    seen = " ".join(Page(text).text.split())
    for finding in data["ledger"]:
        assert finding["ours"] in seen


def test_what_users_wrote_is_escaped(written):
    _, text, *_ = written
    assert "mnist &lt;made up&gt;" in text
    assert COMMAND.replace("<", "&lt;").replace(">", "&gt;") in text
    for version in VERSIONS.values():
        assert version in text


def test_the_data_are_plain_and_complete(written):
    data, *_ = written
    assert [row["claim"] for row in data["ledger"]] == list(CLAIMS)
    a1 = data["ledger"][0]
    assert len(a1["conditions"]) == 12
    assert {"mean", "low", "high", "p", "corrected", "size", "n", "state"} <= set(
        a1["conditions"][0]
    )
    json.dumps(data)


def test_tables_have_the_papers_number_and_the_difference(written):
    _, text, *_ = written
    assert "0.5783 ± 0.1189" in text
    assert "Table 1, at the lowest test loss of each training, as in the paper" in text
    assert "Table 2, at the lowest validation loss of each training" in text


def test_figures_of_stand_ins_say_what_they_are(written):
    *_, markdown, _ = written
    captions = {
        letter: re.search(rf"### DA-SGD Figure {letter}.*\n(?:.*\n){{0,4}}", markdown)[0]
        for letter in ("4", "5a", "5b", "5c")
    }
    said = {letter: "compared with published figures" in c for letter, c in captions.items()}
    assert said == {"4": True, "5a": False, "5b": True, "5c": True}
    assert "Figure 5c: quickdraw10-other\n" in captions["5c"]


def test_what_cannot_differ_is_no_comparison(written):
    ends = {
        (help_, optimizer): end
        for help_, optimizer, *_, end in re.findall(
            r"^\| ([^|]+) \| (aSGD|SGD) \|.*\| ([^|]+) \|$", written[2], re.MULTILINE
        )
    }
    assert ends["early stopping", "aSGD"] == ends["early stopping", "SGD"] == "—"
    assert "d " in ends["cosine schedule", "SGD"]
    assert "p-values corrected for 10 comparisons" in written[2]


def test_intervals_of_what_helps_stay_in_their_panels():
    # Two seeds whose spreads differ this much have an interval that begins far under 0.
    curves = pd.DataFrame(
        [
            ("help: alone", "sgd", seed, epoch, 0.3, 0.3 + wave * (epoch % 2), 0.9)
            for seed, wave in enumerate((0.001, 0.3))
            for epoch in range(20)
        ],
        columns=[
            *("variant", "optimizer", "seed", "epoch"),
            *("validation_loss", "test_loss", "test_accuracy"),
        ],
    )
    for axes in figures_more.stabilised(curves).axes:
        low, high = axes.get_xlim()
        ends = [
            end for bar in axes.collections for part in bar.get_segments() for end in part[:, 0]
        ]
        assert ends
        assert low < min(ends) <= max(ends) < high
        assert axes.get_xlabel()


def test_bands_of_accuracy_stay_between_0_and_1():
    # Two seeds this far apart have an interval of several units.
    curves = pd.DataFrame(
        [
            (name, "fashion-mnist", "fashion-mnist", 1, seed, epoch, 0.3 + 0.6 * seed)
            for name in ("sgd", "dasgd")
            for seed in range(2)
            for epoch in range(3)
        ],
        columns=["optimizer", "data", "data_read", "batch_size", "seed", "epoch", "test_accuracy"],
    ).assign(unit=lambda table: table.groupby(["optimizer", "seed"]).ngroup(), epochs=2)
    (bands, *_) = figures_curves.accuracy_by_epoch(curves).axes
    for band in bands.collections:
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (0, 1)
    (bars, *_) = figures_curves.error_by_batch(curves).axes
    ends = [end for bar in bars.collections for part in bar.get_segments() for end in part[:, 1]]
    assert (min(ends), max(ends)) == pytest.approx((0, 1))


@pytest.mark.parametrize("dummy", [None, 0, 1])
def test_the_dummy_node_is_marked(dummy):
    active = np.ones((4, 2))
    if dummy is not None:
        active[:, dummy] = -1
    arrays = dict.fromkeys(("z3", "a3", "delta3", "db3", "dw4", "points"), active)
    arrays |= {"w4": active[:1], "delta4": active[:, :1], "labels": np.array([0, 1, 0, 1])}
    _, network = figures_small.network(arrays).axes
    marks = [text.xy for text in network.texts if text.get_text() == "dummy"]
    assert len(marks) == (dummy is not None)
    for draw in (figures_small.backpropagation, figures_small.gradients):
        rows = [axes.get_ylabel() for axes in draw(arrays).axes if axes.get_ylabel()]
        assert [row.startswith("dummy node") for row in rows] == [dummy == 0, dummy == 1]


def test_writing_twice_gives_the_same_files(tmp_path):
    with UnitStore(tmp_path / "papers.db") as units:
        fill(units, "smoke", names=["asgd-trajectories"])
        evidence = gather(units)
    pages = [tmp_path / place / "report.html" for place in ("first", "second")]
    for out in pages:
        write_report(evidence, out)
    for suffix in (".html", ".md"):
        first, second = (out.with_suffix(suffix).read_bytes() for out in pages)
        assert first == second


def test_what_was_not_run_says_how_to_run_it(tmp_path):
    with UnitStore(tmp_path / "papers.db") as units:
        fill(units, "smoke", names=["asgd-trajectories"])
        write_report(gather(units), tmp_path / "report.html")
    seen = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    assert "Not run. Run: truestep paper run dasgd-batch --scale small" in seen
    assert "not run" in seen


def test_an_empty_store_is_an_error(tmp_path):
    with (
        UnitStore(tmp_path / "papers.db") as units,
        pytest.raises(TruestepError, match="truestep paper run asgd-synthetic"),
    ):
        write_report(gather(units), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("light", "dark"), [("222222", "#d1d1d1"), ("ececec", "#292929"), ("0072b2", None)]
)
def test_dark_colours_stand_out_from_a_dark_page(light, dark):
    found = page_module._dark(light)
    assert re.fullmatch("#[0-9a-f]{6}", found)
    if dark:
        assert found == dark
    else:
        assert max(int(found[k : k + 2], 16) for k in (1, 3, 5)) > 0xC0


# The command line.


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["paper", *map(str, arguments)])
        out, err = capsys.readouterr()
        # A command that returns nothing has ended well.
        return ended.value.code or 0, out, err

    return run


def test_experiments_are_listed(call, store, tmp_path):
    code, out, err = call("list", "--json", "--store", store)
    assert err == ""
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows.keys() == EXPERIMENTS.keys()
    assert {row["artefacts"].split()[0] for row in rows.values()} == {"aSGD", "DA-SGD"}
    assert all(row["scales"][0]["done"] == row["scales"][0]["units"] for row in rows.values())
    code, out, err = call("list")
    assert code == 0
    assert err.startswith("truestep: there is no store results/papers/papers.db")
    assert all(name in out for name in EXPERIMENTS)
    assert max(map(len, out.splitlines())) <= 80
    assert not list(tmp_path.iterdir()), "listing makes nothing"


def test_run_and_report_from_the_command_line(call, tmp_path):
    code, out, err = call(
        *("run", "asgd-trajectories", "--scale", "smoke", "--store", "p.db", "--jobs", 1)
    )
    assert code == 0, err
    assert "asgd-trajectories: 1 units in p.db" in out
    with UnitStore(tmp_path / "p.db") as units:
        (record,) = units.records(units.keys()).values()
    # Where a machine keeps its files says nothing about a unit.
    assert record.command == "truestep paper run asgd-trajectories --scale smoke --jobs 1"
    code, out, _ = call("report", "--store", "p.db", "--out", "page.html", "--json")
    assert code == 0
    assert json.loads(out)["files"] == ["page.html", "page.md", "page-figures"]
    assert (tmp_path / "page.html").is_file()
    code, out, _ = call("report", "--store", "p.db")
    assert code == 0
    assert "Report: report.html" in out
    assert "A8  no verdict (scale smoke)\n" in out


def test_a_verdict_on_the_console_says_what_it_is_under(call, tmp_path, monkeypatch):
    with UnitStore(tmp_path / "p.db") as units:
        fill(units, "smoke", names=["asgd-trajectories"])
    states = {"further": "holds", "faster": "holds", "stop under aSGD only": "open"}
    row = {"claim": "A8", "verdict": "only under ...", "scale": "small"}
    row["conditions"] = [{"under": name, "state": state} for name, state in states.items()]
    data = {"ledger": [row], "files": ["page.html"]}
    monkeypatch.setattr(page_module, "write_report", lambda *_: data)
    code, out, _ = call("report", "--store", "p.db")
    assert code == 0
    assert out.startswith("A8  only under further, faster (scale small)\n")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("run", "asgd-mnits"), 2, "Perhaps asgd-mnist is meant"),
        (("run", "asgd-mnist", "--scale", "huge"), 2, "none of smoke, small, paper"),
        (("run", "asgd-mnist", "--seeds", "0"), 2, "impossible"),
        (("run", "asgd-mnist", "--option", "strat=torch"), 2, "Perhaps start is meant"),
        (("run", "asgd-mnist", "--option", "noise=1"), 2, "has no option noise"),
        (("run", "asgd-synthetic", "--option", "start=bar"), 2, "choose one of torch"),
        (("run", "asgd-mnist", "--option", "eps=1", "--option", "eps=2"), 2, "eps is 1.0 and 2.0"),
        (("run", "asgd-mnist", "--store", "."), 2, ". is a folder; name a file"),
        (("run", "asgd-mnist", "--store", "notes.txt/p.db"), 2, "notes.txt is a file; name"),
        (("run", "asgd-mnist", "--store", "/proc/x/p.db"), 2, "/proc can't be written"),
        (("report",), 2, "there is no store results/papers/papers.db"),
        (("report", "--store", "notes.txt"), 1, "not a database"),
        (("list", "--store", "notes.txt"), 1, "not a database"),
    ],
)
def test_wrong_usage_is_one_line(call, tmp_path, arguments, code, complaint):
    (tmp_path / "notes.txt").write_text("my own notes " * 100)
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    assert complaint in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_store_that_may_not_be_written_is_one_line(call, tmp_path, monkeypatch):
    # Not by its permissions: the superuser may write anywhere.
    monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)
    UnitStore(tmp_path / "p.db").close()
    code, out, err = call("run", "asgd-synthetic", "--scale", "smoke", "--store", "p.db")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "p.db can't be written; name a file in a folder that can be written" in err


def test_a_page_that_cannot_be_written_is_told_before_the_work(call, tmp_path, monkeypatch):
    UnitStore(tmp_path / "p.db").close()
    monkeypatch.setattr(
        "truestep.lab.paper.evidence.gather", lambda _: pytest.fail("the work has begun")
    )
    code, out, err = call("report", "--store", "p.db", "--out", "/proc/x/page.html")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "/proc can't be written" in err


def test_units_that_fail_alike_are_told_once_and_end_with_1(call, monkeypatch):
    def fail(workers, units):
        return (Failure(unit, "ValueError: so it is") for unit in units)

    monkeypatch.setattr("truestep.lab.workers.Workers.run", fail)
    code, out, err = call(
        *("run", "asgd-synthetic", "--scale", "smoke", "--store", "p.db", "--jobs", 1, "--quiet"),
    )
    assert code == 1
    assert out == "asgd-synthetic: 0 units in p.db.\n"
    assert err == (
        "truestep: 8 units of points failed (data circles, optimizer asgd, lr 0.01, first 0, ...): "
        "ValueError: so it is\n"
    )
    code, _, err = call("report", "--store", "p.db")
    assert (code, err.count("\n")) == (2, 1)
    assert "no finished units of any experiment" in err


# The browser.


@pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"needs Debian's chromium at {CHROMIUM}")
@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(390, 844, "dark"), (1280, 900, "light")], ids=["phone", "desk"]
)
def test_a_browser_shows_the_page(written, width, height, scheme):
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    *_, out = written
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        messages = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(out.as_uri())
        assert messages == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        # Every figure has a size, and what is drawn has a colour of this page.
        sizes = page.evaluate(
            "[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect().height)"
        )
        assert len(sizes) == len(FIGURES) + 1
        assert min(sizes) > 100
        # A click on a head sorts, another one turns it round.
        summary = page.locator("details summary")
        summary.click()
        head = page.locator("details table th button", has_text="mean").first
        values = []
        for _ in range(2):
            head.click()
            values.append(
                page.evaluate(
                    "[...document.querySelectorAll('details tbody tr')]"
                    ".map(row => Number(row.cells[2].dataset.value)).filter(x => !isNaN(x))"
                )
            )
        assert values[0] == sorted(values[0])
        assert values[1] == sorted(values[1], reverse=True)
        assert messages == []
        browser.close()


def test_the_browser_of_the_test_is_the_one_that_is_installed():
    found = shutil.which("chromium")
    assert found is None or os.path.realpath(found) == os.path.realpath(CHROMIUM)
