"""Thousands of trainings of one small network at once, in compiled loops.

`train` takes a `Network`, `Data`, and for each replica a seed and an `Optimizer`; `Record` says what is
measured on the way and `Stop` when a replica ends early. Replicas are independent: each equals one training
with torch from the same numbers.
"""

from truestep.ensemble.data import Data, Split
from truestep.ensemble.result import Result
from truestep.ensemble.settings import Network, Optimizer, Record, Stop
from truestep.ensemble.training import train

__all__ = ["Data", "Network", "Optimizer", "Record", "Result", "Split", "Stop", "train"]
