"""The data of an ensemble: one data set for all replicas, or several to choose from."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from truestep.ensemble.settings import Network
from truestep.errors import TruestepError

__all__ = ["Data", "Split"]


@dataclass(frozen=True)
class Split:
    """Samples of training, validation or test.

    Attributes:
        inputs: Numbers ``[samples, features]``, or ``[data sets, samples, features]``.
        targets: Classes, whole numbers ``[samples]``, or numbers ``[samples, outputs]``; with one more
            dimension in front where there are several data sets.

    Example:
        >>> Split([[0.0, 1.0]], [1]).samples
        1

    Raises:
        TruestepError: Shapes don't fit each other, or something is not a number.
    """

    inputs: Any
    targets: Any

    def __post_init__(self) -> None:
        inputs, targets = _array("inputs", self.inputs), _array("targets", self.targets)
        whole = targets.dtype.kind in "iub"
        # Copies: what the user does to theirs later changes nothing here.
        inputs = inputs.astype(np.float32)
        targets = targets.astype(np.int64 if whole else np.float32)
        several = inputs.ndim == 3  # noqa: PLR2004 - a dimension of data sets
        expected = inputs.ndim - 1 if whole else inputs.ndim
        if (
            inputs.ndim not in {2, 3}
            or targets.ndim != expected
            or targets.shape[: 1 + several] != inputs.shape[: 1 + several]
            or 0 in inputs.shape
        ):
            raise TruestepError(
                f"Split: inputs are {list(inputs.shape)} and targets {list(targets.shape)} of "
                f"{targets.dtype}. Give inputs [samples, features] with classes [samples] or numbers "
                "[samples, outputs]; several data sets are one more dimension in front of both."
            )
        for name, values in (("inputs", inputs), ("targets", targets)):
            if not np.isfinite(values).all():
                place = np.argwhere(~np.isfinite(values))[0].tolist()
                raise TruestepError(
                    f"Split: {name}{place} is {values[tuple(place)]}. Replace or leave out samples "
                    "that are not finite."
                )
        object.__setattr__(self, "inputs", inputs if several else inputs[None])
        object.__setattr__(self, "targets", targets if several else targets[None])

    @property
    def samples(self) -> int:
        """How many there are, in each data set."""
        return int(self.inputs.shape[1])

    @property
    def classes(self) -> bool:
        """Whether targets are classes."""
        return bool(self.targets.dtype == np.int64)


@dataclass(frozen=True)
class Data:
    """Training data, and what to measure on besides.

    Attributes:
        train: What gradients are computed on.
        validation: For stopping and choosing.
        test: For the result.

    Example:
        >>> Data(Split(np.eye(4), np.arange(4))).data_sets
        1

    Raises:
        TruestepError: The splits differ in features or in the number of data sets.
    """

    train: Split
    validation: Split | None = None
    test: Split | None = None

    def __post_init__(self) -> None:
        for name, split in self.splits.items():
            for what, axis in (("data sets", 0), ("features", 2)):
                mine, theirs = split.inputs.shape[axis], self.train.inputs.shape[axis]
                if mine != theirs:
                    raise TruestepError(
                        f"Data: {name} has {mine} {what} and train has {theirs}. Give both the same."
                    )
            if split.classes != self.train.classes:
                raise TruestepError(
                    f"Data: targets of {name} and of train are of different kinds; give classes, "
                    "whole numbers, in both, or numbers in both."
                )

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        named = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    @property
    def data_sets(self) -> int:
        """How many data sets there are."""
        return int(self.train.inputs.shape[0])

    def check(self, network: Network) -> None:
        """Whether a network fits.

        Args:
            network: that is to learn from this.

        Raises:
            TruestepError: It has other features or outputs.
        """
        features, outputs = network.widths[0], network.widths[-1]
        for name, split in self.splits.items():
            if split.inputs.shape[2] != features:
                raise TruestepError(
                    f"Data: {name} has {split.inputs.shape[2]} features and the network takes "
                    f"{features}. Change the first of its widths."
                )
            if not split.classes:
                if split.targets.shape[2] != outputs:
                    raise TruestepError(
                        f"Data: {name} has {split.targets.shape[2]} targets a sample and the network "
                        f"{outputs} outputs. Change the last of its widths."
                    )
                continue
            highest = 1 if outputs == 1 else outputs - 1
            low, high = int(split.targets.min()), int(split.targets.max())
            if low < 0 or high > highest:
                raise TruestepError(
                    f"Data: classes of {name} go from {low} to {high}; a network of {outputs} "
                    f"{'output' if outputs == 1 else 'outputs'} has the classes 0 to {highest}. "
                    "Number the classes from 0, or change the last of its widths."
                )


def _array(name: str, values: Any) -> NDArray[Any]:
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = (values.float() if values.is_floating_point() else values).numpy()
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise TruestepError(f"Split: {name} are no array ({error}). Give real numbers.") from error
    if array.dtype.kind not in "iubf":
        raise TruestepError(f"Split: {name} are of type {array.dtype}. Give real numbers.")
    return array
