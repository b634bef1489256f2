"""Dummy nodes while a model trains, from the bits that its counter keeps anyway."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from truestep.activity import Activity, Outer
from truestep.bits import Bits
from truestep.checks import check_kind
from truestep.combine import Joint, Total
from truestep.counter import SampleCounter
from truestep.errors import TruestepError
from truestep.flow import Flow
from truestep.layers import uncompiled_model
from truestep.nodes import DummyNodes, Forward
from truestep.stages import follow
from truestep.units import Ledger, Site, Use

__all__ = ["NodeHistory"]

RELU_LIKE = {"relu", "relu6"}
FULL = -1  # a word with all bits on


class NodeHistory:
    """How many dummy nodes each ReLU layer has, over the course of a training.

    A unit of a ReLU layer is on at a sample where the layer that reads it gets another number than 0, and
    that is one of the bits that a `SampleCounter` keeps for aSGD. So the counts cost a look at those bits:
    nothing is computed again and no data are gone through. A unit that no sample turned on since the last
    `mark` is a true dummy of that stretch of training, one that all turned on is a pseudo dummy. Weights
    change meanwhile and dropout turns units off: `find_dummy_nodes` is for a model that stands still.

    Make it before the first backward pass whose bits are added.

    Args:
        counter: of the model.
        model: the model.
        example_input: a batch, which shows which layer reads which.
        forward: called as ``forward(model, example_input)`` instead of on the batch's first tensor.

    Attributes:
        rows: one dict for each mark and layer: label, layer, samples, units, true, pseudo.

    Raises:
        TruestepError: no layer reads the units of a ReLU layer, or the counter is not the model's; at
            `add`, no gradient is there.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> model[0].bias.data = torch.tensor([-100.0, 100.0, 0.0])
        >>> history = truestep.NodeHistory(truestep.SampleCounter(model), model, torch.rand(4, 2))
        >>> model(torch.randn(50, 2)).sum().backward()
        >>> history.add()
        >>> history.mark("epoch 1")
        >>> row = history.rows[0]
        >>> row["layer"], row["samples"], row["true"], row["pseudo"]
        ('0', 50, 1, 1)
    """

    def __init__(
        self,
        counter: SampleCounter,
        model: nn.Module,
        example_input: Any,
        *,
        forward: Forward | None = None,
    ) -> None:
        check_kind(counter, SampleCounter, "counter", "truestep.SampleCounter(model)")
        self.rows: list[dict[str, Any]] = []
        self._counter = counter
        model = uncompiled_model(model)
        modes = {module: module.training for module in model.modules()}
        model.eval()  # dropout and BatchNorm are no matter: only the wiring is looked at
        try:
            flow = follow(model, DummyNodes([], 0, forward=forward), example_input)
        finally:
            for module, training in modes.items():
                module.training = training
        parameters = dict(model.named_parameters())
        self._links = [
            _Link(layer, parameters[use.weight], units, len(site.outputs.slots))
            for layer, site, use, units in _readers(flow)
            if use.weight in parameters
        ]
        if not self._links:
            raise TruestepError(
                "no layer of this model reads the output of a ReLU layer alone, so the counter's bits do not "
                "show which units are on; use find_dummy_nodes on data instead"
            )
        counter.check(link.weight for link in self._links)
        counter.keep_bits()

    def add(self) -> None:
        """Takes the bits of the batch whose gradients are there.

        Call it once a step: after its last backward pass, with the bits of all, and before `zero_grad`.
        """
        for link in self._links:
            found = self._counter.activity(link.weight)
            if found is None:
                raise TruestepError(
                    f"the weight that reads {link.layer!r} has no counted gradient; call add() after "
                    "backward() and before zero_grad(), with the layer trained"
                )
            link.see(found)

    def mark(self, label: Any) -> None:
        """Ends a stretch, such as an epoch: appends to `rows`, and begins anew.

        Args:
            label: what the rows are called by, such as the number of the epoch.
        """
        for link in self._links:
            self.rows.append({"label": label, **link.row()})
            link.clear()


def _readers(flow: Flow) -> list[tuple[str, Site, Use, Tensor]]:
    """For each ReLU layer the first weight that reads it alone, and which unit each of its columns is."""
    found: dict[tuple[str, str], tuple[str, Site, Use, Tensor]] = {}
    for use in flow.ledger.uses:
        site = _site_of(flow.ledger, use)
        if site is None or site.activation.name not in RELU_LIKE or site.key in found:
            continue
        assert use.inputs is not None  # noqa: S101
        numbers = {slot: unit for unit, slot in enumerate(site.outputs.slots.tolist())}
        units = [numbers.get(slot, -1) for slot in use.inputs.slots.tolist()]
        if set(units) == set(range(len(site.outputs.slots))):
            found[site.key] = (site.key[0], site, use, torch.tensor(units, device="cpu"))
    return list(found.values())


def _site_of(ledger: Ledger, use: Use) -> Site | None:
    """The activation function whose zeros a weight reads as zeros."""
    inputs = use.inputs
    origin = None if inputs is None else ledger.origin(inputs)
    if inputs is None or origin is None or origin[0] != "units" or ledger.weights[use.weight] > 1:
        return None
    assert inputs.scale is not None and inputs.shift is not None  # noqa: S101, PT018
    through_zero = not bool(inputs.shift.any()) and bool((inputs.scale != 0).all())
    return ledger.sites[origin[1]] if through_zero and use.groups == 1 else None


@dataclass(eq=False)
class _Link:
    """A ReLU layer and the weight that reads it.

    Attributes:
        layer: the layer's path.
        weight: that reads it.
        places: int64 ``[columns]``, the unit of each column of the weight.
        units: how many units the layer has.
    """

    layer: str
    weight: Tensor
    places: Tensor
    units: int

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self._samples = 0
        self._fired = torch.zeros(self.units, dtype=torch.bool, device="cpu")
        self._missed = torch.zeros(self.units, dtype=torch.bool, device="cpu")

    def see(self, activity: Activity) -> None:
        """Takes the bits of a batch."""
        self._samples += activity.samples
        for bits in _inputs(activity):
            fired, missed = _any(bits)
            self._fired[self.places[fired]] = True
            self._missed[self.places[missed]] = True

    def row(self) -> dict[str, Any]:
        """What was seen."""
        seen = self._samples > 0
        return {
            "layer": self.layer,
            "samples": self._samples,
            "units": self.units,
            "true": int((~self._fired).sum()) if seen else 0,
            "pseudo": int((~self._missed).sum()) if seen else 0,
        }


def _inputs(activity: Activity) -> list[Bits]:
    """The bits of the inputs in all uses."""
    if isinstance(activity, Outer):
        return [activity.outputs if activity.transposed else activity.inputs]
    if isinstance(activity, Total | Joint):
        parts = activity.parts if isinstance(activity, Total) else activity.uses
        return [bits for part in parts for bits in _inputs(part)]
    raise TruestepError(
        "the counter has turned the bits of accumulated batches into counts, which do not show single "
        "units; zero the gradients between calls of add(), at least for the steps that are added"
    )


def _any(bits: Bits) -> tuple[Tensor, Tensor]:
    """Bool ``[units]``: on anywhere, and off anywhere."""
    if bits.words is None:
        on = torch.full((bits.units,), bits.length > 0, device="cpu")
        return on, torch.zeros(bits.units, dtype=torch.bool, device="cpu")
    words = bits.words.cpu()
    full = torch.full((len(words), 1), FULL, device="cpu")
    left = bits.length % 64
    if left:
        full[-1] = (1 << left) - 1
    return (words != 0).any(0), (words != full).any(0)
