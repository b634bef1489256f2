"""Optimizer steps of the right size, parameter by parameter, for any PyTorch model."""

from truestep import ensemble, monitor, oracle
from truestep.compress import compress
from truestep.counter import SampleCounter
from truestep.errors import TruestepError
from truestep.history import NodeHistory
from truestep.nodes import find_dummy_nodes
from truestep.optim import DASGD, AdaptiveBatchSGD
from truestep.rules import RULES
from truestep.surgery import shrink_to
from truestep.transforms import attach, directional_boost, mean_effective_gradient

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
