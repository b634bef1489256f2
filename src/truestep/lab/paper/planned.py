"""What a plan is made of: units, each with what it differs in from the main protocol."""

from dataclasses import dataclass
from typing import TypeVar

from truestep.lab.paper.unit import Unit

__all__ = ["LEARNING_RATE", "SCALES", "SMOKE", "Planned", "at"]

Value = TypeVar("Value")

# The scale that only shows that everything works.
SMOKE = "smoke"
SCALES = (SMOKE, "small", "paper")
# The variant of units that have another learning rate and are there to be chosen from.
LEARNING_RATE = "learning rate"


@dataclass(frozen=True)
class Planned:
    """A unit and its place in an experiment.

    Attributes:
        unit: The work.
        variant: ``""`` for the main protocol; else what differs: ``"start: torch"``.
    """

    unit: Unit
    variant: str = ""


def at(scale: str, smoke: Value, small: Value, paper: Value) -> Value:
    """The value for a scale."""
    return {"smoke": smoke, "small": small, "paper": paper}[scale]
