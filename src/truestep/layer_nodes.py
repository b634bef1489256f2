"""What is known of the units of one layer: collected batch by batch, and what follows from it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from truestep.duplicates import Duplicates
from truestep.errors import TruestepError
from truestep.kernels.scanning import scan
from truestep.units import Channels, Key

__all__ = ["KINDS", "LayerNodes", "Statistics", "table_of"]

# What a unit is called, in the order in which a unit of several kinds gets its name.
KINDS = ("not finite", "true", "constant", "duplicate", "pseudo")
# Rounding that is allowed for, in units of the last place.
ROUNDING = 64


@dataclass(eq=False)
class LayerNodes:
    """The units of one layer behind one activation function.

    Attributes:
        layer: the layer's path; of a sum of layers, their paths joined by "+".
        activation: the activation function's name in torch.
        samples: n, how many samples were seen.
        rate: float64 ``[units]``, the share of samples and positions with z > 0.
        lowest: the smallest z of each unit, float64 ``[units]``.
        highest: the largest z.
        low: the smallest output.
        high: the largest output.
        twin: int64 ``[units]``, the unit that this one is a multiple of; -1 for none.
        ratio: float64 ``[units]``, the factor; nan for none.
        tolerance: relative, for constants and duplicates.
    """

    layer: str
    activation: str
    samples: int
    rate: Tensor
    lowest: Tensor
    highest: Tensor
    low: Tensor
    high: Tensor
    twin: Tensor
    ratio: Tensor
    tolerance: float

    def __len__(self) -> int:
        return len(self.rate)

    @property
    def finite(self) -> Tensor:
        """Bool ``[units]``: no nan or infinity was seen; other units are of no kind."""
        ends = (self.lowest, self.highest, self.low, self.high)
        return torch.stack([end.isfinite() for end in ends]).all(0)

    @property
    def true(self) -> Tensor:
        """Bool ``[units]``: never on."""
        return self.finite & (self.highest <= 0)

    @property
    def pseudo(self) -> Tensor:
        """Bool ``[units]``: always on."""
        return self.finite & (self.lowest > 0)

    @property
    def constant(self) -> Tensor:
        """Bool ``[units]``: the same output at all samples and positions; true dummies of ReLU are."""
        largest = torch.maximum(self.high.abs(), self.low.abs())
        return self.finite & (self.high - self.low <= self.tolerance * largest)

    @property
    def value(self) -> Tensor:
        """float64 ``[units]``: the output of constant units, nan for others."""
        middle = self.low + (self.high - self.low) / 2
        return torch.where(self.constant, middle, torch.nan)

    @property
    def duplicate(self) -> Tensor:
        """Bool ``[units]``: a multiple of the unit in `twin`, and no constant."""
        return self.finite & (self.twin >= 0) & ~self.constant

    def part(self, kept: Tensor) -> "LayerNodes":
        """Some of the units.

        Args:
            kept: bool ``[units]``; multiples of units that are left out become units of their own.
        """
        numbers = kept.cumsum(0) - 1
        has = (self.twin >= 0) & kept[self.twin.clamp_min(0)]
        twin = torch.where(has, numbers[self.twin.clamp_min(0)], -1)
        ratio = torch.where(has, self.ratio, torch.nan)
        names = ("rate", "lowest", "highest", "low", "high")
        values = {name: getattr(self, name)[kept] for name in names}
        return replace(self, **values, twin=twin[kept], ratio=ratio[kept])

    def kinds(self) -> list[str]:
        """One of `KINDS` for each unit, or ""."""
        masks = (~self.finite, self.true, self.constant, self.duplicate, self.pseudo)
        names = [""] * len(self)
        for kind, mask in reversed(list(zip(KINDS, masks, strict=True))):
            for unit in mask.nonzero().squeeze(1).tolist():
                names[unit] = kind
        return names

    def bound(self, confidence: float = 0.95) -> float:
        """Upper confidence bound on the chance that a new sample turns a never-on unit on.

        The exact binomial (Clopper-Pearson) bound for none of n samples, 1 - (1 - confidence)^(1/n), about
        3 / n at 95 %: absence in data is no proof. The same bounds the chance that an always-on unit
        is off. It is for one unit and for samples drawn independently from what the data were drawn from.

        Args:
            confidence: between 0 and 1.
        """
        return float(1 - (1 - confidence) ** (1 / self.samples))

    def summary(self) -> dict[str, Any]:
        """Counts, for a table or JSON."""
        kinds = self.kinds()
        counts = {kind: kinds.count(kind) for kind in KINDS}
        return {
            "layer": self.layer,
            "activation": self.activation,
            "units": len(self),
            **counts,
            "rate": float(self.rate.mean()) if len(self) else float("nan"),
            "bound": self.bound(),
        }


def table_of(layers: Iterable[LayerNodes]) -> list[list[str]]:
    """A table's head, and a line for each layer; "not finite" has a column where a unit was that."""
    rows = [layer.summary() for layer in layers]
    kinds = KINDS if any(row[KINDS[0]] for row in rows) else KINDS[1:]
    counted = ["layer", "activation", "units", *kinds]
    lines = [[*(str(row[name]) for name in counted), f"{row['rate']:.3f}"] for row in rows]
    return [[*counted, "rate"], *lines]


class Statistics:
    """Collects the statistics of all layers."""

    def __init__(self, tolerance: float | None) -> None:
        self.totals: dict[Key, _Total] = {}
        self._tolerance = tolerance

    def before(
        self, key: Key, z: Tensor, units: Channels, ends: Callable[[Tensor], Tensor] | None
    ) -> None:
        """Takes a pre-activation."""
        total = self.totals.get(key)
        if total is None:
            total = _Total(z.shape[units.dim], _tolerance(z, self._tolerance))
            self.totals[key] = total
        if total.units != z.shape[units.dim]:
            raise TruestepError(
                f"layer {key[0]!r} had {total.units} units in one call and {z.shape[units.dim]} in "
                "another; call find_dummy_nodes on a part of the model whose layers keep their widths"
            )
        total.see(z, units.dim, ends)

    def after(self, key: Key, output: Tensor, units: Channels) -> Tensor:
        """Takes an output, and returns it."""
        self.totals[key].see_output(output, units.dim)
        return output


def _tolerance(z: Tensor, given: float | None) -> float:
    if given is not None:
        return given
    exact = z.dtype in {torch.float16, torch.bfloat16}
    return 0.0 if exact else ROUNDING * torch.finfo(z.dtype).eps


class _Total:
    """The statistics of one layer so far."""

    def __init__(self, units: int, tolerance: float) -> None:
        self.units, self._tolerance = units, tolerance
        self._rows = 0
        self._on = torch.zeros(units, dtype=torch.int64, device="cpu")
        highest = torch.full((units,), -torch.inf, dtype=torch.float64, device="cpu")
        self._highest, self._high = highest, highest.clone()
        self._lowest, self._low = -highest, -highest
        self._ends: Tensor | None = None
        self._duplicates = Duplicates(units, tolerance)

    def see(self, z: Tensor, dim: int, ends: Callable[[Tensor], Tensor] | None) -> None:
        """Takes the pre-activations of a batch, before an in-place function overwrites them.

        Args:
            z: the pre-activations.
            dim: where the units are.
            ends: the activation function, if the ends of the outputs are those of the pre-activations.
        """
        self._ends = None
        if not z.numel():
            return
        self._rows += z.numel() // self.units
        low, high, on = scan(z, dim)
        self._on += on
        if ends is not None:
            self._ends = ends(torch.stack([low, high])).double().cpu()
        self._lowest = torch.minimum(self._lowest, low.double().cpu())
        self._highest = torch.maximum(self._highest, high.double().cpu())

    def see_output(self, y: Tensor, dim: int) -> None:
        """Takes the outputs of the batch."""
        if not y.numel():
            return
        if self._ends is None:
            others = [other for other in range(y.dim()) if other != dim]
            self._ends = torch.stack([y.amin(others), y.amax(others)]).double().cpu()
        low, high = self._ends
        self._low = torch.minimum(self._low, low)
        self._high = torch.maximum(self._high, high)
        size = torch.maximum(self._lowest.abs(), self._highest.abs())
        self._duplicates.update(y, dim, low, high, size)

    def result(self, key: Key, samples: int) -> LayerNodes:
        """What the statistics say."""
        largest = torch.maximum(self._low.abs(), self._high.abs())
        size = torch.maximum(self._lowest.abs(), self._highest.abs())
        units, firsts, ratios = self._duplicates.pairs(largest, size)
        twin = torch.full((self.units,), -1, device="cpu")
        ratio = torch.full((self.units,), torch.nan, dtype=torch.float64, device="cpu")
        twin[units], ratio[units] = firsts, ratios
        rate = self._on.double() / max(self._rows, 1)
        ends = (self._lowest, self._highest, self._low, self._high)
        seen = max(1, min(samples, self._rows))
        return LayerNodes(*key, seen, rate, *ends, twin, ratio, self._tolerance)
