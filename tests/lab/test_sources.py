import importlib
import sys

import pytest

from truestep.lab.sources import own_imports


@pytest.fixture
def reached(tmp_path, monkeypatch):
    """Writes a user's files, imports the module `start` among them, and returns what it reaches."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(files):
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        importlib.invalidate_caches()
        return own_imports(importlib.import_module("start"))

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    "source",
    [
        "import other",
        "import other as another",
        "from other import function",
        "from other import NUMBER",
        "from other import *",
        "import importlib\nvalue = importlib.import_module('other').function",
        "import importlib\nvalue = importlib.import_module('other').Thing()",
        "def lazily():\n    from other import NUMBER\nlazily()",
    ],
)
def test_a_module_is_reached_however_it_is_imported(reached, source):
    other = "NUMBER = 3\ndef function(): pass\nclass Thing: pass\n"
    assert reached({"start.py": source, "other.py": other}) == {"other": other.encode()}


def test_packages_and_what_they_import_are_reached(reached):
    files = {
        "start.py": "from package.inner import thing",
        "package/__init__.py": "from . import also",
        "package/also.py": "",
        "package/inner.py": "from .deep import thing",
        "package/deep.py": "import start, last\nthing = 1",
        "package/unused.py": "",
        "last.py": "",
    }
    names = ["last", "package", "package.also", "package.deep", "package.inner"]
    assert list(reached(files)) == names


def test_what_others_have_written_is_not_reached(reached):
    source = "import os, json, typer, torch, numpy as np, truestep.lab.tasks\nfrom math import pi\n"
    assert reached({"start.py": source}) == {}


def test_an_import_that_never_ran_or_leads_nowhere_is_left_out(reached):
    source = "def never():\n    import other\n    from . import another\n    from .. import third\n"
    assert reached({"start.py": source, "other.py": ""}) == {}


def test_a_file_that_was_broken_since_counts_by_its_content(reached, tmp_path):
    assert reached({"start.py": "import other", "other.py": "import last", "last.py": ""})
    (tmp_path / "other.py").write_text("import last +")
    assert own_imports(sys.modules["start"]) == {"last": b"", "other": b"import last +"}
