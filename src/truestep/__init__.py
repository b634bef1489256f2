"""Optimizer steps of the right size, parameter by parameter, for any PyTorch model."""

import importlib
from typing import TYPE_CHECKING, Any

from truestep.counter import SampleCounter
from truestep.errors import TruestepError
from truestep.optim import DASGD, AdaptiveBatchSGD
from truestep.rules import RULES
from truestep.transforms import attach, directional_boost, mean_effective_gradient

if TYPE_CHECKING:
    from truestep import ensemble, monitor, oracle
    from truestep.compression import compress
    from truestep.history import NodeHistory
    from truestep.nodes import find_dummy_nodes
    from truestep.surgery import shrink_to

__all__ = [
    "DASGD",
    "RULES",
    "AdaptiveBatchSGD",
    "NodeHistory",
    "SampleCounter",
    "TruestepError",
    "attach",
    "compress",
    "directional_boost",
    "ensemble",
    "find_dummy_nodes",
    "mean_effective_gradient",
    "monitor",
    "oracle",
    "shrink_to",
]

# What a training script does not need is imported when it is first asked for: where it is.
LATER = {
    "NodeHistory": "history",
    "compress": "compression",
    "ensemble": None,
    "find_dummy_nodes": "nodes",
    "monitor": None,
    "oracle": None,
    "shrink_to": "surgery",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = LATER[name]
    if module is None:
        return importlib.import_module(f"{__name__}.{name}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
