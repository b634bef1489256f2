"""What is installed, which code runs on this machine, and whether its counts are right here."""

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from truestep import oracle
from truestep.counter import SampleCounter
from truestep.kernels import dispatch
from truestep.kernels.threads import teams

__all__ = ["Check", "installed_packages", "paths_in_use", "self_check"]

# Extra -> what it needs beyond torch and numpy, as imported.
EXTRAS = {
    "fast": ("numba",),
    "lab": (
        "numba",
        "sklearn",
        "scipy",
        "pandas",
        "matplotlib",
        "typer",
        "rich",
        "pooch",
        "jinja2",
        "wordfreq",
    ),
    "lightning": ("lightning",),
    "huggingface": ("transformers", "accelerate"),
}


@dataclass(frozen=True)
class Check:
    """One comparison of counts with the oracle.

    Attributes:
        name: the model.
        difference: the largest difference of a count; 0 is right.
    """

    name: str
    difference: int


def installed_packages() -> dict[str, str]:
    """Versions of what truestep stands on, and what each extra lacks.

    Example:
        >>> installed_packages()["torch"] == torch.__version__
        True
    """
    found = {
        "truestep": importlib.metadata.version("truestep"),
        "python": f"{sys.version.split()[0]} on {platform.platform(terse=True)}",
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
    }
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        advice = f"lacks {', '.join(missing)}: pip install '.[{extra}]'"
        found[f"extra {extra}"] = advice if missing else "complete"
    return found


def paths_in_use() -> dict[str, str]:
    """Which code counts and scales on which device."""
    compiled, threads = "torch operations (no numba)", "threads"
    if dispatch.installed():
        compiled = "compiled loops (numba)"
        threads = (
            "of torch's threads" if teams() else "threads of our own (torch has no GNU OpenMP)"
        )
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    kernels = "kernels (Triton)" if dispatch.triton_installed() else "torch operations (no Triton)"
    return {
        "CPU": f"{compiled}, {torch.get_num_threads()} {threads}",
        "CUDA": f"{kernels}; {', '.join(devices) or 'no device'}",
        "other devices": "torch operations",
    }


def self_check() -> list[Check]:
    """Counts small models on this machine and compares with the oracle.

    Example:
        >>> all(check.difference == 0 for check in self_check())
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [
            Check(
                f"{name}, {str(dtype).removeprefix('torch.')}", _largest_difference(*make(), dtype)
            )
            for name, make in MODELS.items()
            for dtype in (torch.float32, torch.float64)
        ]


def _largest_difference(model: nn.Module, inputs: Tensor, dtype: torch.dtype) -> int:
    model = model.to(dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    targets = torch.randint(0, 3, (len(inputs),))
    counter = SampleCounter(model)
    functional.cross_entropy(model(inputs), targets).backward()
    counts = counter.counts()
    counter.close()
    expected = oracle.counts(model, functional.cross_entropy, inputs, targets)
    return max(int((counts[name] - expected[name]).abs().max()) for name in expected)


def _sparse(*shape: int) -> Tensor:
    return torch.randn(*shape) * (torch.rand(*shape) < 0.5)  # noqa: PLR2004


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        _sparse(70, 6),
    ),
    "convolution": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)
        ),
        _sparse(6, 1, 5, 5),
    ),
    "embedding bag": lambda: (
        nn.Sequential(nn.EmbeddingBag(9, 4), nn.ReLU(), nn.Linear(4, 3)),
        torch.randint(0, 9, (20, 3)),
    ),
}
