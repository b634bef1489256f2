"""The experiments by name: which units each is made of, at three scales.

A plan is a list in the order in which units are run: all cells at the first seed, then all at the
second, so that what is interrupted is balanced. Variants, in which one thing differs from the main
protocol, say so in a word or two.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from truestep.errors import TruestepError
from truestep.lab.paper import plans_asgd, plans_dasgd
from truestep.lab.paper.planned import Planned

__all__ = ["EXPERIMENTS", "Experiment", "find_experiment"]


@dataclass(frozen=True)
class Experiment:
    """One of the papers' experiments.

    Attributes:
        name: As on the command line.
        title: What it is, in a few words.
        artefacts: Which of the paper's figures and tables it gives.
        seeds: How many seeds each cell has at the scales, where none are asked for.
        plan: From a scale and a number of seeds (None for the usual) to the units.
    """

    name: str
    title: str
    artefacts: str
    seeds: dict[str, int]
    plan: Callable[[str, int], list[Planned]]

    def units(self, scale: str, seeds: int | None = None) -> list[Planned]:
        """The plan at a scale, in the order of running.

        Args:
            scale: One of `SCALES`.
            seeds: How many; by default the scale's own.
        """
        return self.plan(scale, seeds or self.seeds[scale])


def find_experiment(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        TruestepError: There is none; the message names the nearest.
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
    hint = f"Perhaps {near[0]} is meant." if near else f"There are {', '.join(EXPERIMENTS)}."
    raise TruestepError(f"{name} is no experiment. {hint}")


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "asgd-backprop",
            "every sample's part in the gradient of a 2-3-2-1 network",
            "aSGD Figs 1-3",
            {"smoke": 4, "small": 50, "paper": 200},
            plans_asgd.backprop,
        ),
        Experiment(
            "asgd-trajectories",
            "every parameter over training under aSGD and SGD",
            "aSGD Fig 4",
            {"smoke": 4, "small": 50, "paper": 200},
            plans_asgd.trajectories,
        ),
        Experiment(
            "asgd-synthetic",
            "steps, accuracy, loss and dummy nodes on circles and spirals",
            "aSGD Figs 5-7",
            {"smoke": 8, "small": 200, "paper": 10_000},
            plans_asgd.synthetic,
        ),
        Experiment(
            "asgd-mnist",
            "784-30-20-10 on MNIST at equal and at suitable learning rates",
            "aSGD Fig 8, Tables 1-2",
            {"smoke": 2, "small": 3, "paper": 100},
            plans_asgd.mnist,
        ),
        Experiment(
            "asgd-stabilised",
            "aSGD with what its authors advise against late instability",
            "aSGD section 3.3",
            {"smoke": 2, "small": 3, "paper": 5},
            plans_asgd.stabilised,
        ),
        Experiment(
            "asgd-compression",
            "accuracy and size after redundant units are taken out",
            "aSGD section 2.2.3",
            {"smoke": 2, "small": 10, "paper": 50},
            plans_asgd.compression,
        ),
        Experiment(
            "dasgd-lr",
            "784-128-128-10 at batch 8, learning rates 0.001 to 0.01",
            "DA-SGD Fig 3",
            {"smoke": 2, "small": 3, "paper": 3},
            plans_dasgd.lr,
        ),
        Experiment(
            "dasgd-batch",
            "SGD and DA-SGD at nine batch sizes on three data sets",
            "DA-SGD Figs 4-5",
            {"smoke": 2, "small": 3, "paper": 3},
            plans_dasgd.batch,
        ),
        Experiment(
            "dasgd-premise",
            "gradient size and kept signs against the batch size",
            "DA-SGD section 2",
            {"smoke": 2, "small": 3, "paper": 3},
            plans_dasgd.premise,
        ),
        Experiment(
            "dasgd-momentum",
            "DA-SGD against momentum, Nesterov and SGD at 1.5x and 2x",
            "DA-SGD section 4",
            {"smoke": 2, "small": 3, "paper": 3},
            plans_dasgd.momentum,
        ),
    )
}
