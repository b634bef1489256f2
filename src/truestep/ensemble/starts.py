"""Where replicas begin and in which order they see the data: functions of a seed alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from truestep.ensemble.settings import Network

__all__ = ["first_parameters", "orders"]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def first_parameters(network: Network, seed: int) -> NDArray[np.float32]:
    """The parameters that a replica begins with.

    Args:
        network: whose `start` says how.
        seed: of the replica.

    Returns:
        float32 ``[parameters]``.

    Example:
        >>> network = Network((3, 2), output="linear", loss="squared_error", start="he_uniform")
        >>> abs(first_parameters(network, 1)).max() <= 2**0.5
        np.True_
    """
    generator = np.random.Generator(np.random.Philox(key=np.uint64(seed)))
    flat = np.zeros(network.parameters, np.float32)
    for (inputs, outputs), (weight, bias) in zip(network.layers, network.split(flat), strict=True):
        size = {
            "torch": inputs**-0.5,
            "glorot_uniform": (6 / (inputs + outputs)) ** 0.5,
            "glorot_normal": (2 / (inputs + outputs)) ** 0.5,
            "he_uniform": (6 / inputs) ** 0.5,
            "he_normal": (2 / inputs) ** 0.5,
        }.get(network.start, network.scale)
        if network.start.endswith("normal"):
            weight[:] = generator.standard_normal(weight.shape, np.float32) * np.float32(size)
            continue
        weight[:] = (generator.random(weight.shape, np.float32) * 2 - 1) * np.float32(size)
        if network.start == "torch":
            bias[:] = (generator.random(bias.shape, np.float32) * 2 - 1) * np.float32(size)
    return flat


def orders(seeds: Sequence[int], epochs: range, samples: int) -> NDArray[np.int32]:
    """In which order replicas see the samples, epoch after epoch.

    The samples are sorted by a hash (splitmix64) of seed, epoch and sample, so that an epoch's order does
    not depend on the epochs before.

    Args:
        seeds: of the replicas.
        epochs: which ones.
        samples: how many there are.

    Returns:
        int32 ``[replicas, epochs * samples]``.

    Example:
        >>> sorted(orders([7], range(3, 4), 5)[0].tolist())
        [0, 1, 2, 3, 4]
    """
    order = np.empty((len(seeds), len(epochs) * samples), np.int32)
    numbers = np.arange(samples, dtype=np.uint64)
    for row, seed in zip(order, seeds, strict=True):
        base = _hash(np.array([seed], np.uint64))
        for place, epoch in enumerate(epochs):
            stream = _hash(base ^ np.uint64(epoch))
            row[place * samples : (place + 1) * samples] = np.argsort(
                _hash(stream + numbers * GOLDEN)
            )
    return order


def _hash(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The mixing function of splitmix64 (Steele, Lea, Flood 2014)."""
    words = words + GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
