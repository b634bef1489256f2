"""Where the numbers of an ensemble lie: the columns of its tables, and views of memory at addresses."""

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from truestep.kernels.loops.internal import internal
from truestep.kernels.loops.memory import pointer

__all__ = [
    "ADAGRAD",
    "ADAM",
    "ADAMW",
    "ADAPTIVE",
    "ADAPTIVE_EPS",
    "BATCH_LOSS",
    "BEST",
    "BETA_1",
    "BETA_2",
    "BIAS",
    "BINARY_CROSS_ENTROPY",
    "BOOST",
    "COUNT",
    "CROSS_ENTROPY",
    "CURSOR",
    "DIVERGED",
    "DONE",
    "EPS",
    "FACTOR_LIMIT",
    "FINISHED",
    "FIRST_UNDER",
    "GELU",
    "INPUTS",
    "INPUT_BITS",
    "LABELS",
    "LABELS_STEP",
    "LEAKY_RELU",
    "LINEAR",
    "LR",
    "MEAN_SQUARED_ERROR",
    "MOMENTUM",
    "NESTEROV",
    "OUTPUTS",
    "PAD",
    "RELU",
    "RMSPROP",
    "RULE",
    "RUNNING",
    "SCHEDULE",
    "SGD",
    "SIGMOID",
    "SIGMOID_OUTPUT",
    "SOFTMAX",
    "SQUARED_ERROR",
    "STATUS",
    "STOPPED",
    "STRIDE",
    "SUMMED",
    "SUMS",
    "TANH",
    "TARGETS_AT",
    "TARGETS_STEP",
    "TRAIN",
    "VALUES",
    "WAITED",
    "WANTED",
    "WEIGHT",
    "WEIGHT_DECAY",
    "X_ROW",
    "X_STEP",
    "Options",
    "Plan",
    "Records",
    "Sizes",
    "State",
    "X",
    "indices",
    "numbers",
    "words",
]

# Rows are whole vectors of any processor.
PAD = 16

# The columns of the table of layers; places are bytes from the beginning of parameters or scratch.
INPUTS, OUTPUTS, STRIDE, WEIGHT, BIAS, VALUES, SUMS, INPUT_BITS = range(8)

RELU, LEAKY_RELU, TANH, SIGMOID, GELU = range(5)
LINEAR, SIGMOID_OUTPUT, SOFTMAX = range(3)
CROSS_ENTROPY, BINARY_CROSS_ENTROPY, SQUARED_ERROR, MEAN_SQUARED_ERROR = range(4)

# The columns of the table of optimizers, float64 ``[replicas, 13]``.
RULE, LR, MOMENTUM, NESTEROV, WEIGHT_DECAY, BETA_1, BETA_2, EPS = range(8)
ADAPTIVE, ADAPTIVE_EPS, FACTOR_LIMIT, BOOST, SCHEDULE = range(8, 13)
SGD, ADAM, ADAMW, ADAGRAD, RMSPROP = range(5)

TRAIN = 0
RUNNING, FINISHED, STOPPED, DIVERGED = range(4)


class Options(NamedTuple):
    """What is asked for, in numbers."""

    steps: int
    batch_size: int
    stop_split: int
    stop_loss: float
    patience: int
    under: float
    with_nodes: int
    with_batch_sizes: int
    with_gradients: int
    with_parameters: int
    parameters: int


class Sizes(NamedTuple):
    """What a thread's memory holds and where: bytes from its beginning, but for width and the last six.

    Attributes:
        width: numbers in a row of ``[unit, sample]``.
        samples: the inputs of a batch, where they are narrow.
        targets: ``[outputs, width]``.
        delta: a layer's gradient by its sums.
        other: that of the layer below; used by the losses before.
        gradient: of some rows of a weight.
        counts: int64, of one row.
        bias_gradient: of a layer.
        delta_bits: which of the numbers at delta are not zero.
        identity: int32, 0, 1, 2, ...
        lines: a layer's inputs as ``[sample, input]``, where batches are thin.
        wide: whether inputs are read where their samples lie.
        thin: whether a batch has fewer samples than a vector, so that vectors run along inputs.
        one: whether a batch is a single sample, so that a layer's numbers are one row.
        activation: of the hidden layers.
        output: the output function.
        loss: the loss.
    """

    width: int
    samples: int
    targets: int
    delta: int
    other: int
    gradient: int
    counts: int
    bias_gradient: int
    delta_bits: int
    identity: int
    lines: int
    wide: int
    thin: int
    one: int
    activation: int
    output: int
    loss: int


class Plan(NamedTuple):
    """What does not change.

    Attributes:
        layers: int64 ``[layers, 8]``, where each layer's numbers lie.
        sizes: `Sizes`.
        splits: int64 ``[3, 9]``: training, validation, test. Addresses are those of the first data set.
        measured: int64, after how many steps to measure, ascending.
    """

    layers: Any
    sizes: Any
    splits: Any
    measured: Any


# The columns of `Plan.splits`.
X, X_STEP, X_ROW, COUNT, LABELS, LABELS_STEP, TARGETS_AT, TARGETS_STEP, WANTED = range(9)


class State(NamedTuple):
    """What training changes, by replica; the last four may be empty.

    Attributes:
        settings: float64 ``[replicas, 13]``, the table of optimizers.
        data_sets: int64 ``[replicas]``, which each learns from.
        progress: int64 ``[replicas, 6]``.
        levels: float64 ``[replicas, 2]``.
        parameters: float32 ``[replicas, numbers]``.
        previous: like parameters: DA-SGD's previous gradient.
        moments: like parameters.
        squares: like parameters.
        before: like parameters: the gradient of the step before, where gradients are recorded.
    """

    settings: Any
    data_sets: Any
    progress: Any
    levels: Any
    parameters: Any
    previous: Any
    moments: Any
    squares: Any
    before: Any


# The columns of `State.progress` and of `State.levels`.
CURSOR, STATUS, DONE, FIRST_UNDER, WAITED, SUMMED = range(6)
BEST, BATCH_LOSS = range(2)


class Records(NamedTuple):
    """What is measured, by replica; the last four may be empty. The last measurement is that of the end.

    Attributes:
        losses: float32 ``[replicas, 3, measured + 1]``.
        accuracies: likewise.
        batch_losses: float32 ``[replicas, measured + 1]``, of the batches since the measurement before.
        nodes: uint8 ``[replicas, measured + 1, hidden units]``.
        batch_sizes: int32 ``[replicas, measured, numbers]``.
        gradients: float32 ``[replicas, measured, 2]``.
        parameters: float32 ``[replicas, measured, numbers]``.
    """

    losses: Any
    accuracies: Any
    batch_losses: Any
    nodes: Any
    batch_sizes: Any
    gradients: Any
    parameters: Any


@internal
def numbers(address: Any, length: Any) -> Any:
    """The float32 numbers that begin at an address."""
    return carray(pointer(address), (length,), np.float32)


@internal
def words(address: Any, length: Any) -> Any:
    """The int64 words that begin at an address."""
    return carray(pointer(address), (length,), np.int64)


@internal
def indices(address: Any, length: Any) -> Any:
    """The int32 numbers that begin at an address."""
    return carray(pointer(address), (length,), np.int32)
