"""The report's sections: an experiment's figures with their captions, and its tables."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pandas as pd
from matplotlib.figure import Figure

from truestep.lab.board import duration
from truestep.lab.paper import figures_compression as compressions
from truestep.lab.paper import figures_curves as curves
from truestep.lab.paper import figures_more as more
from truestep.lab.paper import figures_points as points
from truestep.lab.paper import figures_small as small
from truestep.lab.paper.comparison import Grid, cells_table, level_table, rivals_table, stable_table
from truestep.lab.paper.comparison_compression import compression_tables
from truestep.lab.paper.evidence import Evidence
from truestep.lab.paper.experiments import EXPERIMENTS
from truestep.lab.paper.ledger_asgd import ENDING
from truestep.lab.paper.levels import distances
from truestep.lab.paper.planned import SMOKE
from truestep.lab.paper.plans_asgd import ASGD_LRS, SGD_LRS
from truestep.lab.paper.plans_dasgd import DASGD_DATA
from truestep.lab.paper.tables import main_only

__all__ = ["Drawing", "Section", "sections"]

# What is read where the paper's data are not at hand.
STAND_INS = {
    "kmnist10k": "8,000 and 2,000 of KMNIST's test images",
    "quickdraw10-other": "other classes and fewer images than the paper's",
}


@dataclass(frozen=True)
class Drawing:
    """A figure and what stands under it.

    Attributes:
        name: Of its file, without ending.
        title: Which of the paper's figures it can be laid beside.
        caption: Protocol and n.
        figure: The figure.
    """

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """What an experiment has to show.

    Attributes:
        name: The experiment's.
        title: Of the section.
        note: Scale, units and engine; or that it was not run, with the command.
        drawings: Figures.
        tables: Tables.
    """

    name: str
    title: str
    note: str
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Grid] = field(default_factory=list)


def sections(evidence: Evidence) -> list[Section]:
    """A section per experiment, in their order; what was not run says so.

    Args:
        evidence: What there is.
    """
    made = []
    for experiment in EXPERIMENTS.values():
        found = evidence.found[experiment.name]
        section = Section(
            experiment.name,
            f"{experiment.artefacts}: {experiment.title}",
            _note(evidence, experiment.name),
        )
        if found:
            section.drawings.extend(DRAWINGS[experiment.name](evidence))
            if experiment.name in TABLES:
                section.tables.extend(TABLES[experiment.name](evidence))
        made.append(section)
    return made


def _note(evidence: Evidence, name: str) -> str:
    found, scale = evidence.found[name], evidence.scales[name]
    if not found:
        return f"Not run. Run: truestep paper run {name} --scale small"
    engines = ", ".join(sorted({record.outcome.engine for _, record in found}))
    seconds = sum(record.seconds for _, record in found)
    note = f"Scale {scale}: {len(found)} units, computed by {engines}; {duration(seconds)} on one core."
    if evidence.missing[name]:
        note += (
            f" {evidence.missing[name]} units of this scale are not run yet: truestep paper run "
            f"{name} --scale {scale}"
        )
    if scale == SMOKE:
        note += " This scale only shows that everything works."
    return note


def _seeds(table: pd.DataFrame, by: str = "seed") -> str:
    counts = table.groupby([c for c in ("data", "optimizer", "lr", "batch_size") if c in table])[
        by
    ].nunique()
    low, high = int(counts.min()), int(counts.max())
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _backprop(evidence: Evidence) -> Iterator[Drawing]:
    record = evidence.found["asgd-backprop"][0][1]
    arrays, said = record.outcome.arrays, record.outcome.summary
    protocol = (
        f"2-3-2-1 on 128 points, aSGD with learning rate {record.settings['lr']:g} for "
        f"{record.settings['steps']:,} full batches. Of {record.settings['replicas']} starts, "
        f"{said['with one dummy']} end with one true dummy node in L3; shown is the one of lowest "
        f"loss among them or, without any, the first (start {said['shown']}, accuracy "
        f"{said['accuracy']:.2f}); a dummy is the second node, marked"
    )
    yield Drawing("asgd-figure-1", "aSGD Figure 1", f"{protocol}.", small.network(arrays))
    yield Drawing(
        "asgd-figure-2",
        "aSGD Figure 2",
        f"Equation 4 for every sample: {protocol}. Orange is positive, blue negative, grey 0.",
        small.backpropagation(arrays),
    )
    yield Drawing(
        "asgd-figure-3",
        "aSGD Figure 3",
        f"Equations 5 and 6 for every sample, gradients by autograd: {protocol}.",
        small.gradients(arrays),
    )


def _trajectories(evidence: Evidence) -> Iterator[Drawing]:
    record = next(
        record for planned, record in evidence.found["asgd-trajectories"] if not planned.variant
    )
    said, settings = record.outcome.summary, record.settings
    node = said["node"]
    which = (
        f"a start at which node {node} of L3 stops under aSGD and moves on under SGD, the one of "
        "lowest loss"
        if node
        else "the start of lowest loss; at none does a node of L3 stop under aSGD only"
    )
    yield Drawing(
        "asgd-figure-4",
        "aSGD Figure 4",
        f"Every parameter over {settings['steps']:,} full batches at learning rate "
        f"{settings['lr']:g}; biases dotted. Of {settings['replicas']} starts, {which}.",
        small.trajectories(record.outcome.arrays),
    )


def _synthetic(evidence: Evidence) -> Iterator[Drawing]:
    table = main_only(evidence.points)
    chosen, start = table[table["ending"] == ENDING], table[table["ending"] == "start"]
    protocol = (
        f"2-10-10-10-10-10-1, 128 training and 55 test points, full batches, learning rate 0.01 on "
        f"circles and 0.05 on spirals; training ends at a {ENDING} or the last step; {_seeds(chosen)}. "
        "Boxes are quartiles, whiskers the 5 % and 95 % quantiles, diamonds means."
    )
    yield Drawing("asgd-figure-5", "aSGD Figure 5", protocol, points.steps(chosen))
    yield Drawing("asgd-figure-6", "aSGD Figure 6", protocol, points.accuracy_and_loss(chosen))
    yield Drawing(
        "asgd-figure-7",
        "aSGD Figure 7",
        f"True dummy nodes (z <= 0 for all training samples) when training ends at a {ENDING} or "
        f"the last step; {_seeds(chosen)}. Vertical lines are means; dotted is the probability "
        "before the first step.",
        points.dummies(chosen, start),
    )


def _mnist(evidence: Evidence) -> Iterator[Drawing]:
    table = main_only(evidence.mnist)
    row = table.iloc[0]
    protocol = (
        f"MNIST, 784-30-20-10, batch 64, {row['epochs']} epochs, start {row['start']}; mean and 95 % "
        f"interval, {_seeds(table)}. Validation images are not trained on. Axes fit the means after the "
        f"first {curves.EARLY:.0%} of the epochs; lines and bands beyond are cut off."
    )
    equal = [(name, lr) for name in ("asgd", "sgd") for lr in (0.001, 0.003, 0.01)]
    suitable = [("asgd", lr) for lr in ASGD_LRS]
    suitable += [("sgd", lr) for lr in SGD_LRS if lr >= 0.01]  # noqa: PLR2004
    for letter, cells in (("a", equal), ("b", suitable)):
        yield Drawing(
            f"asgd-figure-8{letter}",
            f"aSGD Figure 8{letter}",
            protocol,
            curves.learning_curves(table, cells),
        )
    levels = evidence.mnist[evidence.mnist["variant"].str.startswith("level")]
    if len(levels):
        yield Drawing(
            "asgd-level",
            "Which setting gives the paper's level",
            "Root mean square distance of our means to the entries of Tables 1 and 2, in the paper's "
            "standard deviations, for trainings on fewer images read after 500 epochs of so many "
            f"steps; at the lowest test loss, as in the paper; {_seeds(levels)}.",
            more.level(distances(evidence.mnist)),
        )


def _stabilised(evidence: Evidence) -> Iterator[Drawing]:
    table = evidence.stabilised
    row = table.iloc[0]
    yield Drawing(
        "asgd-stabilised",
        "aSGD with what its authors advise",
        f"MNIST's first {row['train']:,} images, 784-30-20-10, batch 64, {row['epochs']} epochs, aSGD "
        "at 0.01 and SGD at 0.03, a tenth of it with momentum; late is the last fifth of the "
        "epochs; mean and 95 % interval, from 0 on where it would begin lower, "
        f"{_seeds(table)}. BatchNorm is counted given the batch's statistics.",
        more.stabilised(table),
    )


def _compression(evidence: Evidence) -> Iterator[Drawing]:
    table = main_only(evidence.compression)
    protocol = (
        "2-10-10-10-10-10-1 on 128 points, full batches, and 784-30-20-10 on images, batch 64; "
        "units redundant on the training data are taken out, outputs there unchanged; test accuracy "
        f"of points on 2,000 others; {_seeds(table)}"
    )
    yield Drawing(
        "asgd-compression",
        "Accuracy and size after compression",
        f"{protocol}. Small marks are networks, large ones means; lines lead from the networks as they "
        "were trained. Best: lowest mean validation loss of "
        f"{', '.join(f'{lr:g}' for lr in sorted(table['lr'].unique()))}.",
        compressions.accuracy_and_size(table),
    )
    yield Drawing(
        "asgd-compression-rates",
        "Size and accuracy at equal learning rates",
        f"{protocol}; mean and 95 % interval, without trainings that diverged.",
        compressions.by_rate(table),
    )


def _dasgd_protocol(table: pd.DataFrame) -> str:
    row = table.iloc[0]
    return (
        f"784-128-128-10, sigmoid, {row['loss'].replace('_', ' ')}, start {row['start']}, "
        f"{row['epochs']} epochs; mean and 95 % interval where there are two seeds or more, "
        f"{_seeds(table)}"
    )


def _rates(evidence: Evidence) -> Iterator[Drawing]:
    yield Drawing(
        "dasgd-figure-3",
        "DA-SGD Figure 3",
        f"SGD at batch 8 on Fashion-MNIST: {_dasgd_protocol(evidence.rates)}.",
        curves.rates(evidence.rates),
    )


def _batch(evidence: Evidence) -> Iterator[Drawing]:
    table = main_only(evidence.dasgd)
    yield Drawing(
        "dasgd-figure-4",
        "DA-SGD Figure 4",
        f"Test error at the last epoch: {_dasgd_protocol(table)}.{_stand_ins(table)}",
        curves.error_by_batch(table),
    )
    for letter, data in zip("abc", DASGD_DATA, strict=True):
        part = table[table["data"] == data]
        if len(part):
            yield Drawing(
                f"dasgd-figure-5{letter}",
                f"DA-SGD Figure 5{letter}: {part['data_read'].iloc[0]}",
                f"{_dasgd_protocol(part)}.{_stand_ins(part)}",
                curves.accuracy_by_epoch(part),
            )


def _stand_ins(table: pd.DataFrame) -> str:
    return "".join(
        f" {name} is {STAND_INS[name]}: it cannot be compared with published figures."
        for name in table["data_read"].unique()
        if name in STAND_INS
    )


def _premise(evidence: Evidence) -> Iterator[Drawing]:
    found = evidence.found["dasgd-premise"]
    settings = found[0][1].settings
    yield Drawing(
        "dasgd-premise",
        "The premise of DA-SGD's section 2",
        f"Gradients of {settings['pairs']} pairs of disjoint batches at the same weights, Fashion-MNIST, "
        f"784-128-128-10 trained by SGD at batch 32; mean and 95 % interval, n = {len(found)} seeds. "
        "Two zeros count as the same sign, as in the method.",
        more.premise(found),
    )


def _momentum(evidence: Evidence) -> Iterator[Drawing]:
    yield Drawing(
        "dasgd-momentum",
        "DA-SGD's open question",
        f"Fashion-MNIST: {_dasgd_protocol(evidence.rivals)}. Momentum and Nesterov at the listed "
        "learning rates.",
        curves.rivals(evidence.rivals),
    )


DRAWINGS: dict[str, Callable[[Evidence], Iterator[Drawing]]] = {
    "asgd-backprop": _backprop,
    "asgd-trajectories": _trajectories,
    "asgd-synthetic": _synthetic,
    "asgd-mnist": _mnist,
    "asgd-stabilised": _stabilised,
    "asgd-compression": _compression,
    "dasgd-lr": _rates,
    "dasgd-batch": _batch,
    "dasgd-premise": _premise,
    "dasgd-momentum": _momentum,
}
TABLES: dict[str, Callable[[Evidence], Iterator[Grid]]] = {
    "asgd-mnist": lambda evidence: iter([*cells_table(evidence), *level_table(evidence)]),
    "asgd-stabilised": lambda evidence: iter([stable_table(evidence)]),
    "asgd-compression": compression_tables,
    "dasgd-momentum": lambda evidence: iter([rivals_table(evidence)]),
}
