"""The experiments' data: points in the plane, and images as vectors."""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import make_circles

from truestep.errors import TruestepError
from truestep.lab.datasets import Images, load_images

__all__ = [
    "POINTS_TEST",
    "POINTS_TRAIN",
    "Vectors",
    "at_hand",
    "circles",
    "spirals",
    "splits_of",
    "vectors",
]

Points = tuple[NDArray[np.float32], NDArray[np.int64]]

# "The ratio is 7:3" with "128 samples for training" (aSGD, section 3.2).
POINTS_TRAIN, POINTS_TEST = 128, 55
PIXEL_RANGE = 255
# The last sixth of a training set is for validation: MNIST's last 10,000 images.
VALIDATION_SHARE = 6


def circles(samples: int, seed: int, *, noise: float, factor: float) -> Points:
    """scikit-learn's concentric circles; the inner one is the positive class.

    Args:
        samples: How many points, of both circles together.
        seed: Of their places.
        noise: Standard deviation of the noise.
        factor: Radius of the inner circle; the outer one's is 1.

    Returns:
        Points [samples, 2] and labels 0 or 1 [samples].
    """
    points, labels = make_circles(samples, noise=noise, factor=factor, random_state=seed)
    return points.astype(np.float32), labels.astype(np.int64)


def spirals(samples: int, seed: int, *, noise: float, degrees: float) -> Points:
    """Two spiral arms, as in the data set that the aSGD paper cites (N-Arm-Spiral-Dataset).

    With u uniform in [0, 1), the angle and the radius of a point are t = sqrt(u) * degrees in
    radians; each coordinate then gets noise uniform in [0, noise). The second arm is the first
    one's law turned by 180 degrees.

    Args:
        samples: How many points, of both arms together.
        seed: Of their places.
        noise: As above.
        degrees: How far an arm winds.

    Returns:
        Points [samples, 2], which reach out to a radius of `degrees` in radians, and labels 0 or
        1 [samples].
    """
    random = np.random.default_rng(seed)
    arm = random.permutation(samples) % 2
    angle = np.sqrt(random.random(samples)) * math.radians(degrees)
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1)
    points += random.random((samples, 2)) * noise
    points[arm == 1] *= -1
    return points.astype(np.float32), arm.astype(np.int64)


@dataclass(frozen=True)
class Vectors:
    """Images as vectors of pixels in 0..1, float32 [samples, 784], with labels int64 [samples].

    Attributes:
        train: All that may be trained on.
        validation: The last sixth of the published training images.
        test: The published test images.
        source: A sentence on where they came from.
        fingerprint: A hash of the images and labels, so that other data is noticed.
    """

    train: tuple[NDArray[np.float32], NDArray[np.int64]]
    validation: tuple[NDArray[np.float32], NDArray[np.int64]]
    test: tuple[NDArray[np.float32], NDArray[np.int64]]
    source: str
    fingerprint: str


def at_hand(name: str, data_dir: Path | None = None) -> Images:
    """Images that are on this machine, or are fetched now.

    Args:
        name: As in `truestep data list`.
        data_dir: Folder of local copies.

    Raises:
        TruestepError: There are none to be had; the message names the folder and the command.
    """
    try:
        return load_images(name, data_dir)
    except TruestepError as error:
        reason = str(error).rstrip(".")
        raise TruestepError(
            f"The experiment needs {name}: {reason}. What is here is told by: truestep data list; "
            f"where there is a network, this fetches it: truestep data get {name}"
        ) from error


@lru_cache(maxsize=2)
def vectors(name: str, data_dir: Path | None = None) -> Vectors:
    """An image data set for the experiments; the last two are kept in memory.

    Args:
        name: As in `truestep data list`.
        data_dir: Folder of local copies.

    Raises:
        TruestepError: It is neither on this machine nor to be had; the message says where to put
            it and which command gets it.
    """
    images = at_hand(name, data_dir)
    digest = hashlib.sha256()
    for part in (images.train, images.test):
        digest.update(part.images.data)
        digest.update(part.labels.data)
    train = _scaled(images.train)
    kept = len(train[1]) - len(train[1]) // VALIDATION_SHARE
    return Vectors(
        train=train,
        validation=(train[0][kept:], train[1][kept:]),
        test=_scaled(images.test),
        source=images.source,
        fingerprint=digest.hexdigest()[:16],
    )


def splits_of(
    data: Vectors, train: int
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """The parts of a data set by name, the training part cut to its first `train` images.

    Args:
        data: The data set.
        train: 0 for all that validation leaves; a larger number takes validation images too.
    """
    kept = train or len(data.train[1]) - len(data.validation[1])
    return {
        "train": (data.train[0][:kept], data.train[1][:kept]),
        "validation": data.validation,
        "test": data.test,
    }


def _scaled(part: Any) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    pixels = part.images.reshape(len(part.images), -1).astype(np.float32) / PIXEL_RANGE
    return pixels, part.labels.astype(np.int64)
