"""Optimizers by name: torch's, truestep's, joins such as ``asgd+adam``, and import paths."""

import difflib
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from truestep import (
    DASGD,
    AdaptiveBatchSGD,
    SampleCounter,
    TruestepError,
    attach,
    directional_boost,
    mean_effective_gradient,
)
from truestep.lab.sources import own_imports

__all__ = ["NAMES", "Recipe", "build", "find_optimizer", "learning_rates", "stored_name"]

Parameters = Iterable[nn.Parameter]
Grids = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Base:
    """A torch optimizer and the learning rates that a race tries where nobody says otherwise.

    Attributes:
        build: Called as ``build(parameters, lr=lr)``.
        lowest: First of five learning rates, about half a decade apart, in half decades: -4 is
            0.01, -3 is 0.03.
        proportional: Whether its step grows with the gradient. If so, the mean effective
            gradient, which is larger than the gradient, asks for smaller learning rates.
        like: The optimizer whose learning rates suit this one too.
    """

    build: Callable[..., torch.optim.Optimizer]
    lowest: int
    proportional: bool = False
    like: str = ""


BASES: dict[str, Base] = {
    "sgd": Base(torch.optim.SGD, -4, proportional=True),
    "momentum": Base(partial(torch.optim.SGD, momentum=0.9), -6, proportional=True),
    "nesterov": Base(
        partial(torch.optim.SGD, momentum=0.9, nesterov=True),
        lowest=-6,
        proportional=True,
        like="momentum",
    ),
    "adagrad": Base(torch.optim.Adagrad, -5),
    "rmsprop": Base(torch.optim.RMSprop, -8),
    "adam": Base(torch.optim.Adam, -7),
    "adamw": Base(torch.optim.AdamW, -7, like="adam"),
}
# In the order in which they change the gradient.
TRANSFORMS = ("asgd", "dasgd")
NAMES: tuple[str, ...] = (*BASES, *reversed(TRANSFORMS))
"""Every built-in name; any of ``asgd`` and ``dasgd`` joins with one of the others by ``+``."""

GRID_SIZE = 5
# An optimizer of unknown kind: where those of sgd and adam meet.
UNKNOWN_LOWEST = -6
# The adaptive batch size of a ReLU network's weights is some third of the batch size.
MEAN_EFFECTIVE_GRADIENT_SHIFT = -1


@dataclass(frozen=True)
class Recipe:
    """How to build an optimizer.

    Attributes:
        transforms: Those of ``TRANSFORMS`` that change the gradient first.
        base: Name in ``BASES``, an import path, or "" for truestep's own optimizer.
    """

    transforms: tuple[str, ...]
    base: str

    @property
    def name(self) -> str:
        """The name that this recipe has however the parts of the join were ordered."""
        return "+".join((*self.transforms, self.base) if self.base else self.transforms)

    @property
    def module(self) -> str:
        """The module of an import path, "" for built-in optimizers."""
        return self.base.partition(":")[0] if ":" in self.base else ""


def find_optimizer(name: str) -> Recipe:
    """Reads the name of an optimizer.

    Args:
        name: One of ``NAMES``, a join such as ``"asgd+adam"`` in any order, or an import path
            such as ``"my.module:MyOptimizer"``, which may be joined too.

    Returns:
        The recipe; ``recipe.name`` is the name in its usual order.

    Raises:
        TruestepError: The name or a part of a join is unknown, stands twice, or there are two
            optimizers in one join.

    Example:
        >>> find_optimizer("adam+asgd").name
        'asgd+adam'
    """
    parts = [part.strip() for part in name.split("+")]
    for part in parts:
        if part not in NAMES and ":" not in part:
            raise TruestepError(_unknown(part, name))
        if parts.count(part) > 1:
            raise TruestepError(f"{name!r} has {part} twice. Leave one of them out.")
    bases = [part for part in parts if part not in TRANSFORMS]
    if len(bases) > 1:
        raise TruestepError(
            f"{name!r} joins two optimizers ({' and '.join(bases)}), but only "
            f"{' and '.join(TRANSFORMS)} can stand before another. Race them one by one."
        )
    return Recipe(
        transforms=tuple(transform for transform in TRANSFORMS if transform in parts),
        base=bases[0] if bases else "",
    )


def build(
    name: str, model: nn.Module, lr: float
) -> tuple[torch.optim.Optimizer, SampleCounter | None]:
    """Builds an optimizer over all parameters of a model.

    Args:
        name: As for `find_optimizer`.
        model: The model; ``asgd`` puts a counter on it.
        lr: Learning rate.

    Returns:
        The optimizer, and the counter to close after the run (None without ``asgd``).

    Raises:
        TruestepError: The name is unknown, its import path leads nowhere or to something that
            isn't an optimizer, or the counter can't count a layer of the model.
    """
    recipe = find_optimizer(name)
    parameters = list(model.parameters())
    if recipe.name == "dasgd":
        return DASGD(parameters, lr), None
    if recipe.name == "asgd":
        watching = SampleCounter(model)
        return AdaptiveBatchSGD(parameters, lr, counter=watching), watching
    optimizer = _base(recipe, parameters, lr)
    counter = SampleCounter(model) if "asgd" in recipe.transforms else None
    transforms = []
    if counter is not None:
        transforms.append(mean_effective_gradient(counter))
    if "dasgd" in recipe.transforms:
        transforms.append(directional_boost())
    if transforms:
        attach(optimizer, *transforms)
    return optimizer, counter


def learning_rates(name: str, grids: Grids) -> tuple[float, ...]:
    """The learning rates that a race tries for an optimizer.

    Args:
        name: As for `find_optimizer`.
        grids: What a task recommends, by name. An optimizer without an entry takes that of its
            nearest kin: ``asgd+dasgd`` that of ``asgd``, ``adamw`` and ``asgd+adam`` that of
            ``adam``.

    Returns:
        Five learning rates, about half a decade apart, unless the task says otherwise.

    Example:
        >>> learning_rates("sgd", {})
        (0.01, 0.03, 0.1, 0.3, 1.0)
        >>> learning_rates("asgd+adamw", {"adam": (0.001, 0.01)})
        (0.001, 0.01)
    """
    recipe = find_optimizer(name)
    base = BASES.get(recipe.base or "sgd")
    kin = [recipe.name]
    if base is None:
        return _grid(UNKNOWN_LOWEST)
    shifted = "asgd" in recipe.transforms and base.proportional
    if not shifted:
        kin += [recipe.base or "sgd", base.like]
    elif recipe.base in {"", "sgd"}:
        kin.append("asgd")
    for relative in kin:
        if relative in grids:
            return tuple(grids[relative])
    return _grid(base.lowest + MEAN_EFFECTIVE_GRADIENT_SHIFT * shifted)


def stored_name(name: str) -> str:
    """The name under which a store keeps an optimizer.

    Returns:
        For an import path the name with a fingerprint of its module's source and of what that
        reaches of the user's, so that an optimizer that has changed is another one; other names as
        they are.
    """
    recipe = find_optimizer(name)
    if not recipe.module:
        return recipe.name
    _import(recipe.base)
    module = sys.modules[recipe.module]
    source = getattr(module, "__file__", None)
    if source is None:
        return recipe.name
    digest = hashlib.sha256(Path(source).read_bytes())
    for imported, code in own_imports(module).items():
        digest.update(f"{imported} {len(code)} ".encode() + code)
    return f"{recipe.name}#{digest.hexdigest()[:8]}"


def _grid(lowest: int) -> tuple[float, ...]:
    # Through text, because 3 * 10**-4 is not 0.0003.
    return tuple(
        float(f"{3 if half % 2 else 1}e{half // 2}") for half in range(lowest, lowest + GRID_SIZE)
    )


def _base(recipe: Recipe, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if not recipe.module:
        return BASES[recipe.base or "sgd"].build(parameters, lr=lr)
    maker = _import(recipe.base)
    try:
        optimizer = maker(parameters, lr=lr)
    except Exception as error:
        raise TruestepError(
            f"{recipe.base} can't be called as {maker.__name__}(params, lr={lr:g}): "
            f"{type(error).__name__}: {error}. Give a class or function that can."
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TruestepError(
            f"{recipe.base} gave a {type(optimizer).__name__}, not a torch.optim.Optimizer. "
            "Give the import path of an optimizer class, or of a function that returns one."
        )
    return optimizer


def _import(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    # The console script, unlike `python -m`, has no folder of the user's on the path. Last, so
    # that it hides nothing.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise TruestepError(_broken(path, module_name, error)) from error
        raise TruestepError(
            f"There is no module {error.name!r} for the optimizer {path}. Call truestep in the "
            "folder that holds it, or install it."
        ) from error
    except Exception as error:
        raise TruestepError(_broken(path, module_name, error)) from error
    try:
        found: Any = getattr(module, attribute)
    except AttributeError as error:
        classes = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        ]
        has = f"its optimizers are {', '.join(classes)}" if classes else "it has no optimizer"
        raise TruestepError(
            f"Module {module_name!r} has no {attribute!r}; {has}. Write MODULE:CLASS."
        ) from error
    if not callable(found):
        raise TruestepError(
            f"{path} must be an optimizer's class, not of type {type(found).__name__}. Name one."
        )
    return cast("Callable[..., Any]", found)


def _broken(path: str, module: str, error: Exception) -> str:
    return (
        f"Module {module!r} of the optimizer {path} can't be imported: "
        f"{type(error).__name__}: {error}. Mend it, then try again."
    )


def _unknown(part: str, name: str) -> str:
    where = "" if part == name else f" in {name!r}"
    close = difflib.get_close_matches(part, NAMES, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return (
        f"Unknown optimizer {part!r}{where}.{hint} There are {', '.join(NAMES)}, joins such as "
        "asgd+adam, and import paths such as my.module:MyOptimizer."
    )
