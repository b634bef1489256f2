"""Optimizer steps of the right size, parameter by parameter, for any PyTorch model."""

from truestep import ensemble, monitor, oracle
from truestep.counter import SampleCounter
from truestep.errors import TruestepError
from truestep.optim import DASGD, AdaptiveBatchSGD
from truestep.rules import RULES
from truestep.transforms import attach, directional_boost, mean_effective_gradient

__all__ = [
    "DASGD",
    "RULES",
    "AdaptiveBatchSGD",
    "SampleCounter",
    "TruestepError",
    "attach",
    "directional_boost",
    "ensemble",
    "mean_effective_gradient",
    "monitor",
    "oracle",
]
