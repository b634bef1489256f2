"""Every public name and every command is documented, with an example or a help text."""

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import truestep
from truestep import cli

ROOT = Path(__file__).parent.parent
MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(truestep.__path__, "truestep.")
]
REFERENCE = (Path(__file__).parent.parent / "docs" / "reference.md").read_text()


def public(module):
    """The functions and classes that a module defines and lists in `__all__`."""
    for name in getattr(module, "__all__", []):
        thing = getattr(module, name)
        if getattr(thing, "__module__", None) == module.__name__ and callable(thing):
            yield name, thing


def methods(thing):
    for name, member in vars(thing).items():
        function = member.fget if isinstance(member, property) else member
        defined = inspect.isfunction(function) and function.__name__ == name
        if defined and not name.startswith("_"):
            yield name, function


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_modules_and_their_public_names_have_docstrings(module):
    assert module.__doc__, module.__name__
    for name, thing in public(module):
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for method, function in methods(thing):
                inherited = any(hasattr(base, method) for base in thing.__mro__[1:])
                assert function.__doc__ or inherited, f"{name}.{method}"


@pytest.mark.parametrize("name", truestep.__all__)
def test_the_contract_has_runnable_examples_and_a_place_in_the_reference(name):
    assert f"`{name}" in REFERENCE, name
    thing = getattr(truestep, name)
    if inspect.ismodule(thing) or not callable(thing):
        return
    assert ">>>" in inspect.getdoc(thing), name


@pytest.mark.parametrize("name", truestep.__all__)
def test_arguments_are_described(name):
    thing = getattr(truestep, name)
    if inspect.ismodule(thing) or not callable(thing) or issubclass(type(thing), type(Exception)):
        thing = getattr(thing, "__init__", None) if inspect.isclass(thing) else None
        if thing is None or not inspect.isfunction(thing):
            return
    text = inspect.getdoc(getattr(truestep, name))
    for argument in inspect.signature(thing).parameters:
        if argument != "self":
            assert re.search(rf"^\s+{argument}: ", text, re.MULTILINE), f"{name}({argument})"


TABLE = [
    line
    for line in (Path(__file__).parent.parent / "docs" / "layers.md").read_text().splitlines()
    if line.startswith("| `")
]


@pytest.mark.parametrize("layer", truestep.RULES | truestep.rules.BATCH_NORM)
def test_each_layer_with_a_rule_has_one_row_in_the_table_of_layers(layer):
    names = [line.split(" | ")[0] for line in TABLE]
    title = layer.rpartition(".")[2] if isinstance(layer, str) else f"nn.{layer.__name__}"
    assert sum(f"`{title}`" in name for name in names) == 1
    assert all(line.count(" |") == 6 for line in TABLE)


BLOCKS = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parent.parent / "README.md").read_text(),
    re.DOTALL,
)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_the_code_in_the_readme_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102
    if "print(" in block:
        assert "tensor(" in capsys.readouterr().out


# What a fragment that is no doctest may leave to its reader.
READERS = {"args", "data", "loader", "model", "optimizer"}
FRAGMENTS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in sorted((ROOT / "docs").glob("*.md"))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    if not block.startswith(">>>")
]


@pytest.mark.parametrize("block", FRAGMENTS)
def test_fragments_of_the_pages_import_what_they_use(block):
    nodes = list(ast.walk(ast.parse(block)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    known = READERS | set(vars(builtins)) | {n.id for n in names if isinstance(n.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            known.add(node.name)
    assert {node.id for node in names} <= known


def commands(group, path=("truestep",)):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_and_their_options_have_help_and_a_place_in_the_reference(name):
    assert f"`{name}" in REFERENCE, name
    assert COMMANDS[name].help, name
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name}"


@pytest.mark.parametrize("name", ["step", "ensemble", "floor"])
def test_benchmarks_ask_for_rounds_that_have_quartiles(name):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own script
    assert done.returncode == 2
    assert "argument --rounds: 1 has no quartiles; give 2 or more" in done.stderr


def test_the_pages_show_the_figures_that_are_kept():
    command = [sys.executable, str(ROOT / "benchmarks" / "document.py"), "--check"]
    subprocess.run(command, check=True, cwd=ROOT)  # noqa: S603 - our own script
