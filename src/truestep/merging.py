"""Units on straight lines, written as the few lines that the layers behind them need.

A unit whose pre-activations all lie on one straight piece of its activation function is on the data an affine
function of its layer's inputs, y = B x + b. Of several such units the weights A behind them make
A B x + A b, so no more lines are needed than A B has rank: at most as many as the layers behind have outputs.
The units that stay get these lines, shifted so far that they, too, lie on a straight piece. The activation
function stays where it is, so it may be one that is called in the model's code.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from truestep.activations import Activation, Piece
from truestep.flow import Flow
from truestep.layer_nodes import LayerNodes
from truestep.lines import straight_rows
from truestep.nodes import DummyNodes
from truestep.plan import Candidate, decide
from truestep.surgery import bias_of
from truestep.units import Key, Ledger, Site, Use

__all__ = ["Merger", "find_merger"]

# How far from the ends of a straight piece new units stay, in widths of their own range.
MARGIN = 1e-3


@dataclass(eq=False)
class Merger:
    """Units of a layer that become fewer.

    Attributes:
        key: of the layer and its activation function.
        gone: the units that nothing reads any more.
        partner: one of those that stay.
        how: what became of them.
        values: parameters by name with their new numbers, float64; what had none gets a bias.
        layer: what is known of the layer's units then.
    """

    key: Key
    gone: list[int]
    partner: int
    how: str
    values: dict[str, Tensor]
    layer: LayerNodes

    def candidates(self, flow: Flow, nodes: DummyNodes) -> list[Candidate]:
        """The units to take out, once the parameters are exchanged.

        Args:
            flow: of a forward call of the model with the new numbers.
            nodes: with `layer` in them.
        """
        site = next(site for site in flow.ledger.sites if site.key == self.key)
        kinds = self.layer.kinds()
        return [_candidate(site, unit, kinds[unit], self.partner, self.how) for unit in self.gone]


def find_merger(flow: Flow, nodes: DummyNodes, tried: set[Key]) -> Merger | None:
    """The last layer with more straight units than the layers behind it need.

    Args:
        flow: of a forward call of the model.
        nodes: what is known of its units.
        tried: layers that are done with.
    """
    for site in reversed(flow.ledger.sites):
        layer = nodes.find(site.key)
        if layer is not None and site.key not in tried:
            found = _merger(flow, site, layer)
            if found is not None:
                return found
    return None


def _merger(flow: Flow, site: Site, layer: LayerNodes) -> Merger | None:
    rows = straight_rows(flow, site, layer)
    home = _home(site.activation)
    # 16-bit types have no tolerance, and new numbers in them would not be near enough.
    if rows is None or home is None or not layer.tolerance:
        return None
    first, units, lines, constants = rows
    chosen = _removable(flow.ledger, site, units)
    units, lines, constants = units[chosen], lines[chosen], constants[chosen]
    readers = _readers(flow.ledger, site, units) if len(units) > 1 else []
    if not readers or not _alone(flow.ledger, first):
        return None
    weights = torch.cat([reader.weights() for reader in readers])
    if not 0 < len(weights) < len(units) or not all(reader.takes() for reader in readers):
        return None
    made = _fewer(weights, lines)
    if not 0 < made.shape[1] < len(units):
        return None
    news = _News(
        made.T @ weights, layer.low[units] - constants, layer.high[units] - constants, home
    )
    kept, gone = units[: made.shape[1]], units[made.shape[1] :]
    values = _first(flow.ledger, first, site, kept, made.T @ weights @ lines, news)
    for reader, part in zip(readers, made.split([r.size for r in readers]), strict=True):
        values |= reader.rewritten(part, constants, news)
    added = sum(len(bias) for name, bias in values.items() if name not in flow.ledger.owned)
    if len(gone) * (lines.shape[1] + len(weights)) <= added:
        return None
    how = f"one of {len(units)} straight lines that became {len(kept)}"
    known = _known(layer, units, kept, home, news)
    return Merger(site.key, gone.tolist(), int(kept[0]), how, values, known)


def _candidate(site: Site, unit: int, kind: str, partner: int, how: str) -> Candidate:
    """A unit that nothing reads: 0 times another one."""
    return Candidate(site, unit, kind or "line", ((partner, 0.0),), how=how)


def _home(activation: Activation) -> Piece | None:
    """The straight piece for new units: one without an upper end, if there is one."""
    pieces = [piece for piece in activation.pieces if piece.slope and math.isfinite(piece.low)]
    return max(pieces, key=lambda piece: piece.high, default=None)


def _alone(ledger: Ledger, use: Use) -> bool:
    """Whether a map's weight and bias are used once; there has to be a place for a bias."""
    if use.bias is None:
        return use.takes_bias and bool(use.module) and ledger.weights[use.weight] == 1
    return ledger.weights[use.bias] == ledger.weights[use.weight] == 1


def _removable(ledger: Ledger, site: Site, units: Tensor) -> Tensor:
    """Bool: which units could be taken out of every layer that reads them, and reach it alike."""
    numbers = units.tolist()
    accepted: set[int] = set()
    if len(numbers) > 1:
        for some, partner in ((numbers[1:], numbers[0]), (numbers[:1], numbers[1])):
            plan = decide(ledger, [_candidate(site, unit, "", partner, "") for unit in some])
            accepted |= {one.unit for one in plan.removals}
    roots = ledger.slots.roots(site.outputs.slots)
    return torch.tensor(
        [unit in accepted and roots.count(roots[unit]) == 1 for unit in numbers],
        dtype=torch.bool,
        device="cpu",
    )


def _readers(ledger: Ledger, site: Site, units: Tensor) -> list["_Reader"]:
    """The maps that read units; none where one of them does not read all."""
    roots = [ledger.slots.root(int(site.outputs.slots[unit])) for unit in units]
    found = []
    for use in ledger.uses:
        if use.inputs is None:
            continue
        columns: dict[int, list[int]] = {root: [] for root in roots}
        for column, root in enumerate(ledger.slots.roots(use.inputs.slots)):
            if root in columns:
                columns[root].append(column)
        if any(columns.values()):
            if len({len(places) for places in columns.values()}) > 1:
                return []
            found.append(_Reader(ledger, use, torch.tensor(list(columns.values()), device="cpu")))
    return found


def _fewer(weights: Tensor, lines: Tensor) -> Tensor:
    """An orthonormal basis ``[read, rank]`` of what weights ``[read, units]`` make of lines."""
    left, sizes, _ = torch.linalg.svd(weights @ lines, full_matrices=False)
    smallest = torch.finfo(sizes.dtype).eps * max(weights.shape + lines.shape) * sizes[0]
    made: Tensor = left[:, : int((sizes > smallest).sum())]
    return made


class _News:
    """New units as combinations of old ones, on a straight piece of the activation function.

    With y of the old units and v = C (y - b), a new unit has the pre-activation gain * v + lift.

    Args:
        factors: C, ``[new, old]``.
        low: the smallest y - b.
        high: the largest.
        home: the piece.
    """

    def __init__(self, factors: Tensor, low: Tensor, high: Tensor, home: Piece) -> None:
        up, down = factors.clamp_min(0), factors.clamp_max(0)
        self.low, self.high = up @ low + down @ high, up @ high + down @ low
        width = self.high - self.low
        if math.isfinite(home.high):
            room = home.high - home.low
            self.gain = (1 - 2 * MARGIN) * room / width
            self.lift = home.low + MARGIN * room - self.gain * self.low
        else:
            self.gain = torch.ones_like(width)
            self.lift = home.low + MARGIN * width - self.low
        self.slope = home.slope * self.gain
        self.level = home.slope * self.lift + home.intercept


def _first(
    ledger: Ledger, use: Use, site: Site, kept: Tensor, lines: Tensor, news: _News
) -> dict[str, Tensor]:
    """The layer's own weight and bias."""
    scale, shift = site.inputs.scale, site.inputs.shift
    assert scale is not None and shift is not None  # noqa: S101, PT018
    weight = _wide(ledger, use.weight).movedim(use.out_dim, 0).clone()
    bias = _bias(ledger, use)
    rows = news.gain[:, None] * lines / scale[kept, None]
    weight[kept] = rows.view_as(weight[kept])
    bias[kept] = (news.lift - shift[kept]) / scale[kept]
    return {use.weight: weight.movedim(0, use.out_dim).contiguous(), bias_of(use): bias}


class _Reader:
    """A map that reads the units.

    Args:
        ledger: with the parameters.
        use: the map.
        columns: ``[units, columns of one]``.
    """

    def __init__(self, ledger: Ledger, use: Use, columns: Tensor) -> None:
        inputs = use.inputs
        assert inputs is not None and inputs.scale is not None and inputs.shift is not None  # noqa: S101, PT018
        self._ledger, self._use, self._columns = ledger, use, columns
        self._weight = _wide(ledger, use.weight).movedim(use.in_dim, 0).clone()
        shape = (*columns.shape, *[1] * (self._weight.dim() - 1))
        self._scale = inputs.scale[columns].view(shape)
        self._shift = inputs.shift[columns].view(shape)

    @property
    def size(self) -> int:
        """How many numbers it has for a unit."""
        return self._columns.shape[1] * self._weight[0].numel()

    def takes(self) -> bool:
        """Whether its bias can take over a constant, wherever the units come from."""
        use = self._use
        assert use.inputs is not None  # noqa: S101
        kept = not use.borders and use.inputs.even and bool((self._scale != 0).all())
        return kept and _alone(self._ledger, use)

    def weights(self) -> Tensor:
        """What it multiplies each unit's output with, ``[size, units]``."""
        return (self._weight[self._columns] * self._scale).flatten(1).T

    def rewritten(self, made: Tensor, constants: Tensor, news: _News) -> dict[str, Tensor]:
        """Its weight and bias for new units.

        Args:
            made: what is to arrive of each new unit's v, ``[size, new]``.
            constants: b of the old units.
            news: the new units.
        """
        new, use = made.shape[1], self._use
        old = self._constant(constants)
        kept = self._columns[:new]
        slope = news.slope.view(-1, *[1] * self._weight.dim())
        columns = made.T.reshape(new, kept.shape[1], *self._weight.shape[1:])
        self._weight[self._columns[new:]] = 0
        self._weight[kept] = columns / (slope * self._scale[:new])
        levels = torch.zeros_like(constants)
        levels[:new] = news.level
        bias = _bias(self._ledger, use) + old - self._constant(levels)
        weight = self._weight.movedim(0, use.in_dim).contiguous()
        return {use.weight: weight, bias_of(use): bias}

    def _constant(self, numbers: Tensor) -> Tensor:
        """What it makes of units that have these outputs, ``[outputs]``."""
        each = numbers.view(-1, *[1] * self._weight.dim())
        arriving = self._weight[self._columns] * (self._scale * each + self._shift)
        total = arriving.sum((0, 1))
        return total.flatten(1).sum(1) if total.dim() > 1 else total


def _known(layer: LayerNodes, units: Tensor, kept: Tensor, home: Piece, news: _News) -> LayerNodes:
    """What is known of the units with the new ones among them."""
    ends = {name: getattr(layer, name).clone() for name in ("lowest", "highest", "low", "high")}
    for name, values in (("lowest", news.low), ("highest", news.high)):
        ends[name][kept] = news.gain * values + news.lift
    outputs = [home.slope * ends[name][kept] + home.intercept for name in ("lowest", "highest")]
    ends["low"][kept] = torch.minimum(*outputs)
    ends["high"][kept] = torch.maximum(*outputs)
    alone = torch.isin(torch.arange(len(layer), device="cpu"), units) | torch.isin(
        layer.twin, units
    )
    twin = torch.where(alone, -1, layer.twin)
    return replace(layer, **ends, twin=twin, ratio=torch.where(alone, torch.nan, layer.ratio))


def _bias(ledger: Ledger, use: Use) -> Tensor:
    if use.bias is None:
        return torch.zeros(
            ledger.owned[use.weight].shape[use.out_dim], dtype=torch.float64, device="cpu"
        )
    return _wide(ledger, use.bias).clone()


def _wide(ledger: Ledger, name: str) -> Tensor:
    return ledger.owned[name].detach().double().cpu()
