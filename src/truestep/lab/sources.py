"""The files of a user's own that a module reaches, by what it imports and what its names stand for."""

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import truestep

__all__ = ["own_imports"]

NOT_OWN = [
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")),
    Path(truestep.__file__).resolve().parent,
]
# The folders of pip and of Linux distributions, of which there may be several.
INSTALLED = {"site-packages", "dist-packages"}


def own_imports(module: ModuleType) -> dict[str, bytes]:
    """The user's modules that a module reaches, directly or through others, and their files' contents.

    What is loaded counts: an import inside a function does once the function has run. The standard
    library, what is installed in site-packages, and truestep itself do not.

    Args:
        module: Where to begin; it is not among them itself.

    Returns:
        Name -> content of the file, in the order of the names.
    """
    found: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        for name in _reached(waiting.pop()):
            other = sys.modules.get(name)
            if other is None or other is module or name in found:
                continue
            path = _own_file(other)
            if path is not None:
                found[name] = path.read_bytes()
                waiting.append(other)
    return dict(sorted(found.items()))


def _own_file(module: ModuleType) -> Path | None:
    """The file of a module that is the user's own."""
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not Path(file).is_file():
        return None
    path = Path(file).resolve()
    if INSTALLED.intersection(path.parts) or any(path.is_relative_to(each) for each in NOT_OWN):
        return None
    return path


def _reached(module: ModuleType) -> set[str]:
    """The names of what a module imports, of their packages, and of where its values come from."""
    names = {
        value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        for value in vars(module).values()
    }
    # A number that was imported doesn't say where from, so that the source is asked too.
    names |= set(_imported(module))
    parts = [name.split(".") for name in names if isinstance(name, str)]
    return {".".join(part[: last + 1]) for part in parts for last in range(len(part))}


def _imported(module: ModuleType) -> Iterator[str]:
    """What the import statements of a module's source name: modules, and perhaps names in them."""
    path = _own_file(module)
    if path is None or path.suffix != ".py":
        return
    # Whoever has broken the file since it was imported will hear of it at the next import.
    with suppress(SyntaxError):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                source = _absolute(node, module)
                yield source
                yield from (f"{source}.{alias.name}" for alias in node.names)


def _absolute(node: ast.ImportFrom, module: ModuleType) -> str:
    """The module that a `from` names, "" for one outside of all packages."""
    relative = "." * node.level + (node.module or "")
    with suppress(ImportError):
        return importlib.util.resolve_name(relative, module.__package__ or "")
    return ""
