import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import saved_model
import truestep
from test_cli import call  # noqa: F401 - a fixture

FILE = Path(__file__).parent / "saved_model.py"


def test_nodes_prints_a_table_that_fits_and_draws_a_figure(call, tmp_path):  # noqa: F811
    code, out, err = call("nodes", FILE, "--figure", "map.png")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    row = next(line.split() for line in out.splitlines() if line.startswith("0 "))
    assert row[:4] == ["0", "relu", "12", "2"]
    assert "640 samples" in out
    assert "95 % confidence" in out
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_nodes_as_json_are_all_of_the_output(call):  # noqa: F811
    code, out, err = call("nodes", FILE, "--json", "--quiet")
    assert code == 0, err
    data = json.loads(out, parse_constant=pytest.fail)
    assert data["samples"] == 640
    assert data["layers"][0]["kinds"][1:6] == ["true", "true", "constant", "duplicate", "pseudo"]
    assert "a user may print" in err


def test_compress_writes_what_shrink_to_takes(call, tmp_path):  # noqa: F811
    code, out, err = call("compress", FILE, "--out", "small.pt")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    for text in ("parameters", "folded into the next bias", "why it stays", "Saved: small.pt"):
        assert text in out
    saved = torch.load(tmp_path / "small.pt", weights_only=True)
    small = truestep.shrink_to(saved_model.make(), saved).eval()
    assert small[0].out_features == 8
    x = saved_model.loader[0]
    torch.testing.assert_close(small(x), saved_model.model.eval()(x), rtol=1e-5, atol=1e-5)


def test_progress_is_shown_on_a_terminal_and_can_be_left_out(call, monkeypatch):  # noqa: F811
    assert call("compress", FILE, "--out", "small.pt")[2] == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, _, err = call("compress", FILE, "--out", "small.pt")
    assert "looking at units" in err
    assert "comparing outputs" in err
    _, _, err = call("compress", FILE, "--out", "small.pt", "--quiet")
    assert err == ""


def test_compress_as_json_has_the_report(call):  # noqa: F811
    code, out, err = call("compress", FILE, "--out", "small.pt", "--json")
    assert code == 0, err
    data = json.loads(out, parse_constant=pytest.fail)
    assert data["after"]["parameters"] < data["before"]["parameters"]
    assert {one["kind"] for one in data["removed"]} == {"true", "constant", "duplicate"}
    assert data["difference"] < 1e-5
    assert data["file"] == "small.pt"


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_an_exported_program_comes_back_as_one(call, tmp_path, dynamic, suffix):  # noqa: F811
    model = saved_model.model.eval()
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (saved_model.loader[0],), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = torch.cat(saved_model.loader)[: 600 if dynamic else 640]
    if suffix == ".npy":
        np.save(tmp_path / "inputs.npy", inputs.numpy())
    else:
        torch.save((inputs, torch.zeros(3)), tmp_path / "inputs.pt")
    arguments = ("model.pt2", "--data", f"inputs{suffix}")
    code, out, err = call("nodes", *arguments)
    assert code == 0, err
    assert out.splitlines()[1].split()[:4] == ["0", "relu", "12", "2"]
    code, _, err = call("compress", *arguments, "--out", "small.pt2", "--quiet")
    assert code == 0, err
    small = torch.export.load(tmp_path / "small.pt2").module()
    x = saved_model.loader[1]
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "small.pt2").stat().st_size > 0
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nodes", "nothing.py"), 2, "nothing.py"),
        (("nodes", "empty.py"), 2, "empty.py has no `model`; it needs a module-level"),
        (("nodes", "broken.py"), 2, "broken.py: ValueError: so it is; correct the file"),
        (("nodes", "bare.py"), 2, "bare.py has no `loader`; add a module-level"),
        (("nodes", "bare.py", "--data", "text.npy"), 2, "text.npy holds no tensor: ValueError"),
        (("nodes", "bare.py", "--data", "text.pt"), 2, "text.pt holds no tensor: "),
        (("nodes", "bare.py", "--data", "words.npy"), 2, "words.npy holds no tensor: TypeError"),
        (("nodes", "bare.py", "--data", "single.npy"), 2, "single.npy holds a single number"),
        (("nodes", "bare.py", "--data", "x.csv"), 2, "x.csv ends in none of .npy, .pt and .py"),
        (("nodes", "text.pt2"), 2, "text.pt2 is no exported program"),
        (
            ("nodes", "bare.py", "--data", "wide.npy"),
            1,
            "first batch of wide.npy, [4, 3] of float32",
        ),
        (("nodes", "bare.py", "--data", "int.npy"), 1, "first batch of int.npy, [4, 2] of int64"),
        (("nodes", "bare.py", "--data", "x.npy", "--figure", "x.gif"), 2, "end in .png or .svg"),
        (
            ("compress", "bare.py", "--data", "x.npy", "--out", "no/x.pt"),
            2,
            "there is no folder no",
        ),
        (("compress", "bare.py", "--data", "x.npy", "--out", "small.pt2"), 2, "should end in .pt"),
        (("compress", "bare.py"), 2, "--out"),
        (("nodes", FILE, "--batch-size", "8"), 2, "leave --batch-size out"),
        (("nodes", FILE, "--data", FILE, "--batch-size", "8"), 2, "leave --batch-size out"),
        (("compress", FILE, "--out", "x.pt", "--batch-size", "8"), 2, "leave --batch-size out"),
    ],
)
def test_what_is_wrong_is_said_with_the_way_out(call, tmp_path, arguments, code, message):  # noqa: F811
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("raise ValueError('so it is')")
    (tmp_path / "bare.py").write_text("from torch import nn\nmodel = nn.Linear(2, 2)")
    for name in ("text.npy", "text.pt", "text.pt2", "x.csv"):
        (tmp_path / name).write_text("text")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "single.npy", np.float32(1))
    np.save(tmp_path / "x.npy", np.zeros((4, 2), np.float32))
    np.save(tmp_path / "wide.npy", np.zeros((4, 3), np.float32))
    np.save(tmp_path / "int.npy", np.zeros((4, 2), np.int64))
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    assert message in " ".join(err.split())
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [("nodes", FILE, "--figure", "x.png"), ("compress", FILE, "--out", "x.pt")]
)
def test_a_folder_that_cannot_be_written_is_told_before_the_work(call, monkeypatch, arguments):  # noqa: F811
    def refused(dir):
        raise OSError(30, "Read-only file system")

    def load(*_):
        pytest.fail("the work has begun")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    monkeypatch.setattr("truestep.lab.saved_models.load_saved", load)
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "can't be written (Read-only file system); choose another folder" in err


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (("compress", "model.pt2", "--data", "x.npy", "--out", "./model.pt2"), "model.pt2"),
        (("compress", "model.pt2", "--data", "x.npy", "--out", "link.pt2"), "link.pt2"),
        (("compress", FILE, "--data", "x.pt", "--out", "x.pt"), "x.pt"),
        (("nodes", FILE, "--figure", "link.png"), "link.png"),
    ],
)
def test_files_that_are_read_are_not_written(call, tmp_path, monkeypatch, arguments, written):  # noqa: F811
    def load(*_):
        pytest.fail("the work has begun")

    monkeypatch.setattr("truestep.lab.saved_models.load_saved", load)
    for name in ("model.pt2", "x.npy", "x.pt"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "link.pt2").symlink_to("model.pt2")
    (tmp_path / "link.png").symlink_to(FILE)
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{written} would overwrite " in err
    assert "which the command reads; give another name" in err


@pytest.mark.parametrize(
    "arguments", [("nodes", FILE), ("compress", FILE, "--out", "small.pt")], ids=str
)
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt, 130, "interrupted."),
        (OSError(5, "Input/output error", "x"), 1, "Input/output error (x). Mend that, then give"),
        (OSError("no more handles"), 1, "no more handles. Mend that, then give the command again."),
    ],
    ids=str,
)
def test_who_keeps_nothing_does_not_say_so(call, monkeypatch, arguments, error, code, message):  # noqa: F811
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("truestep.find_dummy_nodes", fail)
    found, _, err = call(*arguments)
    assert found == code
    assert f"truestep: {message}" in err
    assert "kept" not in err


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that has no more than a kilobyte left for each file."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("exported", [False, True])
def test_a_full_disk_leaves_the_earlier_model(call, tmp_path, full_disk, exported):  # noqa: F811
    file, out = FILE, tmp_path / "small.pt"
    if exported:
        file, out = tmp_path / "model.pt2", tmp_path / "small.pt2"
        model = saved_model.model.eval()
        torch.export.save(torch.export.export(model, (saved_model.loader[0],)), file)
        np.save(tmp_path / "x.npy", torch.cat(saved_model.loader).numpy())
    data = ("--data", "x.npy") if exported else ()
    out.write_text("an earlier model")
    before = sorted(tmp_path.iterdir())
    full_disk()
    code, _, err = call("compress", file, *data, "--out", out, "--quiet")
    assert code == 1
    assert f"truestep: Can't write {out}: File too large. What was there is left as it was." in err
    assert err.count("truestep: ") == 1
    assert out.read_text() == "an earlier model"
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_the_table_and_no_half_of_a_figure(call, tmp_path, full_disk):  # noqa: F811
    full_disk()
    code, out, err = call("nodes", FILE, "--figure", "map.png", "--quiet")
    assert code == 1
    assert "640 samples" in out
    assert err.startswith("truestep: Can't write map.png: File too large.")
    assert "give --figure another folder" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_rows_that_do_not_fill_the_batches_of_an_exported_program_are_an_error(call, tmp_path):  # noqa: F811
    program = torch.export.export(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.ones(4, 2),))
    torch.export.save(program, tmp_path / "model.pt2")
    np.save(tmp_path / "x.npy", np.zeros((6, 2), np.float32))
    code, _, err = call("nodes", "model.pt2", "--data", "x.npy")
    assert code == 2
    assert "has 6 rows, and the exported program takes batches of 4 only" in err


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_numpys_own_doubles_are_taken_in_the_models_precision(call, tmp_path):  # noqa: F811
    (tmp_path / "bare.py").write_text(
        "from torch import nn\nmodel = nn.Sequential(nn.Linear(2, 2), nn.ReLU())"
    )
    np.save(tmp_path / "doubles.npy", np.zeros((4, 2)))
    code, out, _ = call("nodes", "bare.py", "--data", "doubles.npy")
    assert code == 0
    assert "4 samples" in out
    program = torch.export.export(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.ones(4, 2),))
    torch.export.save(program, tmp_path / "model.pt2")
    assert call("nodes", "model.pt2", "--data", "doubles.npy")[0] == 0
    code, _, err = call("nodes", "model.pt2")
    assert code == 2
    assert "loader" not in err
    assert "model.pt2 holds no data; give the inputs as --data FILE" in err
