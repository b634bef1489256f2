"""Optimizer steps of the right size, parameter by parameter, for any PyTorch model."""

from truestep.errors import TruestepError

__all__ = ["TruestepError"]
