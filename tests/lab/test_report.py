import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic import VERSIONS, make_race, make_result, make_task_info

from truestep import TruestepError
from truestep.lab import report
from truestep.lab.report import write_report

CHROMIUM = Path("/usr/bin/chromium")
SMALL = ("sgd", "adam", "asgd")


@pytest.fixture(scope="module")
def race():
    return make_race(SMALL, scale=0.1)


@pytest.fixture(scope="module")
def large():
    return make_race(("sgd", "asgd"), (64, 256), reference=64)


@pytest.fixture(scope="module")
def written(race, tmp_path_factory):
    """The folder, the data and the page of one report."""
    folder = tmp_path_factory.mktemp("report") / "made" / "for it"
    info = make_task_info(source="images <of> digits & more", target=["accuracy", 0.64])
    data = write_report(folder, info, race, "sgd")
    return folder, data, (folder / "report.html").read_text()


class Page(HTMLParser):
    """What a reader sees, and every address the page would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.ids, self.text, self._quiet = [], [], [], "", 0
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "xlink:href", "srcset", "data"}:
                self.addresses.append((tag, value))
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"style", "script", "svg"} & set(self.open):
            self.text += data


def test_the_page_needs_nothing_else(written):
    folder, _, text = written
    page = Page(text)
    loaded = [value for tag, value in page.addresses if tag != "a" and not value.startswith("#")]
    assert loaded == []
    assert not re.search(r"url\((?!#)|@import|fetch\(|<link", text)
    for tag, value in page.addresses:
        if tag == "a":
            assert (folder / value).exists(), value


def test_every_name_inside_is_unique_and_every_reference_resolves(written):
    *_, text = written
    ids = Page(text).ids
    assert len(ids) == len(set(ids)) > 50
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert references <= set(ids)


def test_figures_are_inline_and_take_their_colours_from_the_page(written):
    _, data, text = written
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(svgs) == 3
    for svg in svgs:
        assert not re.search(r"[:\"'\s]#[0-9a-f]{6}", svg), "a colour that dark mode can't change"
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
    light, dark = re.findall(r":root \{(.*?)\}", text, flags=re.DOTALL)
    for block in (light, dark):
        assert used <= set(re.findall(r"(--[a-z0-9-]+):", block))
    assert "prefers-color-scheme: dark" in text
    assert len([name for name in data["files"] if name.endswith(".png")]) == 3


def test_png_files_are_pictures(written):
    _, data, _ = written
    for name in data["files"]:
        if name.endswith(".png"):
            content = Path(name).read_bytes()
            assert content.startswith(b"\x89PNG")
            assert int.from_bytes(content[16:20]) == 1600


def test_the_page_says_how_it_was_made(written):
    *_, text = written
    seen = re.sub(r"\s+", " ", Page(text).text)
    assert "images <of> digits & more" in seen
    assert "truestep race --task digits --seeds 3" in seen
    assert "1,257 training, 270 validation and 270 test samples" in seen
    assert "chosen on validation data" in seen
    assert "measured on the test set with the weights of the best validation" in seen
    assert "The torch loop trains all runs: asked for." in seen
    assert "3fa9c2e1d0b4" in seen
    for name, version in VERSIONS.items():
        assert name in seen
        assert version in seen


def test_versions_that_differ_between_runs_are_all_told(race, tmp_path):
    other = make_result(versions=VERSIONS | {"torch": "2.99"}, lr=0.9, seed=7)
    data = write_report(tmp_path, make_task_info(), [*race, other], "sgd")
    assert data["versions"]["torch"] == "2.13.0, 2.99"
    assert data["versions"]["numpy"] == "2.4.0"


def test_the_data_is_json_without_nan(written, tmp_path):
    _, data, _ = written
    assert json.loads(json.dumps(data, allow_nan=False))["task"]["name"] == "digits"
    (sgd,) = [row for row in data["rows"] if row["optimizer"] == "sgd"]
    assert sgd["batch_size"] == 64
    assert sgd["lr"] in sgd["grid"]
    assert sgd["test_loss_low"] < sgd["test_loss"] < sgd["test_loss_high"]
    never = write_report(
        tmp_path, make_task_info(target=["loss", 0.0]), make_race(("sgd",), seeds=1), "sgd"
    )
    assert never["rows"][0]["epoch_to_target"] is None
    assert never["rows"][0]["test_loss_low"] is None
    json.dumps(never, allow_nan=False)


def test_diverged_runs_are_shown_as_diverged(race, tmp_path):
    lost = [
        make_result("nesterov", lr, seed=seed, losses=(math.nan,), status="diverged")
        for lr in (0.1, 1.0)
        for seed in range(3)
    ]
    data = write_report(tmp_path, make_task_info(), race + lost, "sgd")
    text = (tmp_path / "report.html").read_text()
    (row,) = re.findall(r'<th scope="row"[^>]*>nesterov</th>.*?</tr>', text, flags=re.DOTALL)
    assert row.count(">diverged<") == 2
    assert ">nan<" not in text
    (row,) = [row for row in data["rows"] if row["optimizer"] == "nesterov"]
    assert (row["lr"], row["diverged"], row["test_loss"]) == (None, 1.0, None)


def test_a_race_in_which_everything_diverged_has_a_report(tmp_path):
    lost = [make_result("sgd", 9.0, losses=(math.nan,), status="diverged")]
    data = write_report(tmp_path, make_task_info(), lost, "sgd")
    assert "every run diverged" in data["notes"][0]
    assert "every run diverged" in (tmp_path / "report.html").read_text()


def test_a_choice_at_the_edge_is_noted(tmp_path):
    results = make_race(("sgd",), grid=(0.0, 0.5, 1.0), batch_sizes=(64,))
    data = write_report(tmp_path, make_task_info(), results, "sgd")
    assert any("Extend the grid: --lr sgd=" in note for note in data["notes"])
    assert "Extend the grid: --lr sgd=" in (tmp_path / "report.html").read_text()


def test_several_batch_sizes_add_their_figures(large, tmp_path):
    info = make_task_info(reference_batch_size=64, target=["loss", 1.2])
    data = write_report(tmp_path, info, large, "sgd")
    names = [Path(name).name for name in data["files"]]
    assert names == [
        "batch-sizes.png",
        "steps-to-target.png",
        "learning-rates.png",
        "curves-loss.png",
        "curves-accuracy.png",
        "report.html",
    ]
    assert "batch size 64, kept for all" in (tmp_path / "report.html").read_text()


def test_the_same_results_give_the_same_page(written, race, tmp_path):
    _, _, text = written
    info = make_task_info(source="images <of> digits & more", target=["accuracy", 0.64])
    write_report(tmp_path, info, race, "sgd")
    assert (tmp_path / "report.html").read_text() == text


def test_a_file_is_whole_or_not_there(race, tmp_path, monkeypatch):
    write_report(tmp_path, make_task_info(), race, "sgd")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TruestepError, match=r"\.png: No space left on device\. .*make space"):
        write_report(tmp_path, make_task_info(title="Other"), race, "sgd")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_named(race, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TruestepError, match=r"Can't write .*file/.*choose another folder"):
        write_report(tmp_path / "file", make_task_info(), race, "sgd")


def test_files_have_the_usual_permissions(written):
    folder, *_ = written
    usual = os.umask(0)
    os.umask(usual)
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~usual


def test_no_results_are_an_error(tmp_path):
    with pytest.raises(TruestepError, match=r"no results to report on yet\. Run the race first"):
        write_report(tmp_path, make_task_info(), [], "sgd")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"needs Debian's chromium at {CHROMIUM}")
def test_the_table_fits_a_browser_of_1000_pixels(large, tmp_path):
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    write_report(tmp_path, make_task_info(reference_batch_size=64), large, "sgd")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto((tmp_path / "report.html").as_uri())
        hidden = "box => box.scrollWidth - box.clientWidth"
        assert page.locator(".wide").first.evaluate(hidden) == 0
        page.set_viewport_size({"width": 500, "height": 900})
        assert page.locator(".wide").first.evaluate(hidden) > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 500
        browser.close()


def test_the_terminal_table_is_at_hand():
    assert report.table.__module__ == "truestep.lab.tables"
