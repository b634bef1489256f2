"""Arrows point down: what each layer of the package may import."""

import ast
from pathlib import Path

import pytest

import truestep

ROOT = Path(truestep.__file__).parent

# Lower layers first; a module may import modules of lower layers and of its own.
LAYERS = [
    {"errors", "checks", "kernels"},
    {
        "bits",
        "activity",
        "combine",
        "blocks",
        "calls",
        "graph",
        "layout",
        "per_sample",
        "recurrence",
        "sequences",
        "last_steps",
        "placed",
        "derived",
        "meetings",
        "operations",
        "rules_bare",
        "rules_parametrized",
        "rules_attention",
        "rules_func",
        "rules_recurrent",
        "rules_norm",
        "rules_convolution",
        "rules_embedding",
        "rules",
        "way",
        "ways",
        "ways_embedding",
        "oracle",
        "consumers",
        "wire",
        "activations",
        "duplicates",
        "slots",
        "units",
        "flow_arithmetic",
        "flow_maps",
        "flow_moves",
        "flow_rules",
        "flow",
    },
    {"distributed", "exchange", "fused", "update"},
    {
        "record",
        "arrived",
        "brought",
        "succession",
        "nested",
        "records",
        "waiting",
        "batch",
        "direct",
        "hooks",
        "layers",
        "gradients",
        "penalties",
        "shapes",
        "compiled",
        "watch",
        "counter",
    },
    {
        "optim",
        "transforms",
        "doctor",
        "monitor",
        "files",
        "ensemble",
        "layer_nodes",
        "nodes",
        "plan",
    },
    {"surgery", "lines", "merging", "measuring", "optimizer_state"},
    {"compression_report", "stages", "compression", "history"},
    {""},  # the public names
    {"lab", "integrations"},
    {"terminal", "cli_nodes", "cli_paper", "cli", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
CORE = sorted(set().union(*LAYERS[:7]) - {"kernels", "doctor", "files", "ensemble"})


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "truestep":
                yield from (f"truestep.{alias.name}" for alias in node.names)
            else:
                yield node.module


def part(name):
    """The part of the package that a dotted name belongs to; public names belong to the package."""
    tail = name.removeprefix("truestep").removeprefix(".").split(".")[0]
    return tail if tail in LEVEL else ""


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0].replace("__init__", "")
    assert own in LEVEL, f"{path.name} has no layer; give it one in LAYERS"
    for name in imports(path):
        if name.split(".")[0] == "truestep":
            assert LEVEL[part(name)] <= LEVEL[own], f"{path.name} imports {name}"


@pytest.mark.parametrize("name", CORE)
def test_the_core_knows_torch_alone(name):
    allowed = {"torch", "numpy", "truestep"}
    known = {"abc", "array", "ast", "collections", "contextlib", "copy"}
    known |= {
        "io",
        "itertools",
        "math",
        "numbers",
        "operator",
        "statistics",
        "sys",
        "time",
        "typing",
    }
    known |= {"ctypes", "dataclasses", "functools", "types", "warnings", "weakref"}
    roots = {imported.split(".")[0] for imported in imports(ROOT / f"{name}.py")}
    assert roots <= allowed | known


def test_integrations_use_the_public_names_only():
    for path in FILES:
        if path.parent.name == "integrations":
            assert [n for n in imports(path) if n.startswith("truestep")] in ([], ["truestep"])


def test_only_the_compiled_loops_import_numba():
    importing = {
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name.split(".")[0] in {"numba", "llvmlite"} for name in imports(path))
    }
    assert all(name.startswith("kernels/loops/") for name in importing - {"kernels/dispatch.py"})


def test_only_the_kernels_for_gpus_import_triton():
    importing = [
        str(path.relative_to(ROOT))
        for path in FILES
        if any(name.split(".")[0] == "triton" for name in imports(path))
    ]
    assert importing
    assert all(name.startswith("kernels/gpu/") for name in importing)


def test_only_the_watch_hooks_modules():
    hooking = {
        str(path.relative_to(ROOT)) for path in FILES if "register_forward" in path.read_text()
    }
    assert hooking == {"watch.py"}


def test_there_is_no_drawer_for_everything():
    assert not [path for path in FILES if path.stem in {"utils", "helpers", "common", "misc"}]


def test_files_stay_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > 450} == {}
