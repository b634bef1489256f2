"""The stages of a compression: what goes in each, and what is known afterwards."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from truestep.compression_report import CompressionReport
from truestep.errors import TruestepError
from truestep.flow import Flow
from truestep.layer_nodes import LayerNodes
from truestep.lines import fold, foldable
from truestep.merging import find_merger
from truestep.nodes import DummyNodes, call_model
from truestep.plan import Candidate, Kept, Plan, Removal, decide
from truestep.surgery import Cut, copied, exchanged, operate
from truestep.units import Channels, Key

__all__ = ["Work", "follow", "key_of", "redundant"]

Slice = Callable[[Tensor], Tensor]


class Work:
    """A model on its way to a smaller one, and what is known of its units on that way."""

    def __init__(self, model: nn.Module, nodes: DummyNodes, example_input: Any) -> None:
        self.small = copied(model)
        self._nodes, self._example = nodes, example_input
        self._removed: list[Removal] = []
        self._kept: dict[tuple[str, int], Kept] = {}
        self._cuts: list[dict[str, Cut]] = []
        self._anew: set[str] = set()
        self._folded: list[list[str]] = []
        # Depthwise convolutions may be left with a single group.
        self._grouped = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1  # noqa: SLF001
        }
        # The numbers that units had in the beginning.
        self._numbers = {key_of(layer): torch.arange(len(layer), device="cpu") for layer in nodes}

    def remove(self, find: Callable[[Flow, DummyNodes], list[Candidate]]) -> None:
        """Takes units out; one forward call shows where they arrive."""
        flow = follow(self.small, self._nodes, self._example)
        candidates = find(flow, self._nodes)
        if flow.reads:
            reason = (
                f"{', '.join(flow.reads)} reads numbers of the data, so other data may take another way "
                "through the model"
            )
            self._note(
                Plan(kept=[Kept(c.site.key[0], c.unit, c.kind, reason) for c in candidates]), flow
            )
            return
        while True:
            plan = decide(flow.ledger, candidates)
            if not plan.roots:
                break
            smaller, cuts = operate(self.small, flow.ledger, plan)
            known = self._known(flow, plan)
            broken = _breaks(flow, plan, smaller, known, self._example)
            if broken is None:
                self._note(plan, flow)
                self._cuts.append(cuts)
                self._follow_numbers(flow, plan)
                self.small, self._nodes = smaller, known
                return
        self._note(plan, flow)

    def fold(self) -> None:
        """Makes one of neighbours with nothing but straight lines between them."""
        while True:
            flow = follow(self.small, self._nodes, self._example)
            if flow.reads:
                return
            found, kept = foldable(self.small, flow, self._nodes)
            self._note(Plan(kept=kept), flow)
            if found is None:
                return
            self.small = fold(self.small, found)
            self._note(Plan(removals=found.removals), flow)
            self._folded.append([found.first, found.second, *found.between])
            self._anew |= {f"{found.second}.weight", f"{found.second}.bias"}
            keys = {(one.layer,) for one in found.removals}
            layers = [layer for layer in self._nodes if (layer.layer,) not in keys]
            self._nodes = replace(self._nodes, layers=layers)

    def merge(self) -> None:
        """Writes straight units as the few that the layers behind them need, the last layer first."""
        tried: set[Key] = set()
        while True:
            flow = follow(self.small, self._nodes, self._example)
            found = None if flow.reads else find_merger(flow, self._nodes, tried)
            if found is None:
                return
            tried.add(found.key)
            before = self.small, self._nodes, len(self._removed)
            layers = [found.layer if key_of(one) == found.key else one for one in self._nodes]
            self.small = exchanged(self.small, found.values)
            self._nodes = replace(self._nodes, layers=layers)
            self.remove(found.candidates)
            if len(self._removed) == before[2]:
                self.small, self._nodes, _ = before
            else:
                self._anew |= found.values.keys()

    def report(self) -> CompressionReport:
        """What was done so far."""
        gone = {(one.layer, one.unit) for one in self._removed}
        stay = [one for place, one in self._kept.items() if place not in gone]
        listed = {(one.layer, one.unit) for one in stay} | gone
        structure: dict[str, Any] = {}
        groups = {
            name: module.groups
            for name, module in self.small.named_modules()
            if name in self._grouped
        }
        if self._folded:
            structure["folded"] = self._folded
        if groups:
            structure["groups"] = groups
        return CompressionReport(
            removed=sorted(self._removed, key=lambda one: (one.layer, one.unit)),
            kept=stay + self._others(listed),
            structure=structure,
        )

    def _others(self, listed: set[tuple[str, int]]) -> list[Kept]:
        """Dummies that nothing could be done with from the start."""
        found: list[Kept] = []
        for layer in self._nodes:
            numbers, kinds = self._numbers[key_of(layer)].tolist(), layer.kinds()
            for unit, kind in zip(numbers, kinds, strict=True):
                if kind and (layer.layer, unit) not in listed:
                    found.append(Kept(layer.layer, unit, kind, _why(layer, kind)))
        return found

    def slices(self) -> dict[str, Slice]:
        """By name of a parameter of the small model, how the large one's tensors are cut to it."""
        names = {name for name, _ in self.small.named_parameters()} - self._anew

        def cut_all(name: str) -> Slice:
            def cut(values: Tensor) -> Tensor:
                for cuts in self._cuts:
                    values = cuts[name](values) if name in cuts else values
                return values

            return cut

        return {name: cut_all(name) for name in names}

    def _known(self, flow: Flow, plan: Plan) -> DummyNodes:
        """What is known of the units that a plan leaves."""
        stay = _stay(flow, plan)
        return replace(
            self._nodes,
            layers=[
                layer.part(stay[key_of(layer)]) if key_of(layer) in stay else layer
                for layer in self._nodes
            ],
        )

    def _follow_numbers(self, flow: Flow, plan: Plan) -> None:
        """Lists what went along with a unit of another layer, and keeps the numbers of the others."""
        listed = {(one.layer, one.unit) for one in self._removed}
        for key, kept in _stay(flow, plan).items():
            layer = self._nodes.find(key)
            if layer is None:
                continue
            numbers, kinds = self._numbers[key], layer.kinds()
            for unit in (~kept).nonzero().squeeze(1).tolist():
                number = int(numbers[unit])
                if (key[0], number) not in listed:
                    how = "removed with a unit that it is added to or multiplied with"
                    self._removed.append(Removal(key[0], number, kinds[unit] or "joined", how))
            self._numbers[key] = numbers[kept]

    def _note(self, plan: Plan, flow: Flow) -> None:
        """Writes down what went and what stays, under the numbers that units had in the beginning."""
        keys = {site.key[0]: site.key for site in flow.ledger.sites}
        for one in plan.removals:
            number = int(self._numbers[keys[one.layer]][one.unit])
            self._removed.append(replace(one, unit=number))
        for other in plan.kept:
            number = int(self._numbers[keys[other.layer]][other.unit])
            # What a unit itself lacks says more than what its whole layer does.
            self._kept.setdefault((other.layer, number), replace(other, unit=number))


def follow(model: nn.Module, nodes: DummyNodes, example_input: Any) -> Flow:
    """One forward call in which units that are constant on the data have their constants.

    Args:
        model: the model.
        nodes: what is known of its units.
        example_input: a batch.
    """
    flow = Flow(model, _Constants(nodes), whole=True)
    flow.ledger.begin(example_input)
    with torch.no_grad(), flow:
        output = call_model(model, example_input, nodes.forward)
    flow.finish(output)
    return flow


class _Constants:
    """Writes constants over the outputs of constant units."""

    def __init__(self, nodes: DummyNodes) -> None:
        self._nodes = nodes

    def before(self, key: Key, z: Tensor, units: Channels, ends: Any) -> None:
        found = self._nodes.find(key)
        if found is not None and len(found) != z.shape[units.dim]:
            raise TruestepError(
                f"layer {key[0]!r} has {z.shape[units.dim]} units, but {len(found)} in the nodes given: "
                "call find_dummy_nodes on this model"
            )

    def after(self, key: Key, output: Tensor, units: Channels) -> Tensor:
        found = self._nodes.find(key)
        if found is not None and bool(found.constant.any()):
            units.fixed = found.constant
            places = found.constant.nonzero().squeeze(1)
            values = found.value[places].to(output)
            shape = [1] * output.dim()
            shape[units.dim] = len(places)
            size = [*output.shape]
            size[units.dim] = len(places)
            output.index_copy_(units.dim, places.to(output.device), values.view(shape).expand(size))
        return output


def redundant(flow: Flow, nodes: DummyNodes) -> list[Candidate]:
    """Units that are constant, or multiples of another one."""
    found: list[Candidate] = []
    seen: set[tuple[Key, int]] = set()
    for site in flow.ledger.sites:
        layer = nodes.find(site.key)
        if layer is None:
            continue
        kinds = layer.kinds()
        for unit in (layer.constant | layer.duplicate).nonzero().squeeze(1).tolist():
            if (site.key, unit) in seen:
                continue
            seen.add((site.key, unit))
            twin = int(layer.twin[unit])
            terms = ((twin, float(layer.ratio[unit])),) if layer.duplicate[unit] else ()
            found.append(Candidate(site, unit, kinds[unit], terms))
    return found


def _breaks(
    flow: Flow, plan: Plan, smaller: nn.Module, known: DummyNodes, example_input: Any
) -> str | None:
    """Where the code of the model does not take the smaller sizes; those units are pinned there."""
    expected = [
        [_expected(flow, plan, *pair) for pair in zip(step.shapes, step.units, strict=True)]
        for step in flow.steps
    ]
    trial = Flow(smaller, _Constants(known), whole=True)
    trial.ledger.begin(example_input)
    try:
        with torch.no_grad(), trial:
            call_model(smaller, example_input, known.forward)
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):
        place = len(trial.steps)
    else:
        place = len(expected)
    for index, step in enumerate(trial.steps[:place]):
        if index >= len(expected) or step.shapes != expected[index]:
            place = index
            break
    if place >= len(expected):
        return None
    return _pin_at(flow, plan, place)


def _pin_at(flow: Flow, plan: Plan, place: int) -> str:
    """Pins what goes into a step, or into the nearest one before it that is given units that go."""
    slots = flow.ledger.slots
    for step in reversed(flow.steps[: place + 1]):
        for units in step.given:
            if not plan.roots.isdisjoint(slots.roots(units.slots)):
                inside = f" in {step.module!r}" if step.module else ""
                reason = f"has its size written in the code, at {step.name}{inside}"
                slots.pin(units.slots.clone(), reason)
                return reason
    raise TruestepError(
        "the model's code does not take smaller layers, and it is not clear where; compress parts of it"
    )


def _expected(
    flow: Flow, plan: Plan, shape: tuple[int, ...], units: Channels | None
) -> tuple[int, ...]:
    if units is None:
        return shape
    gone = int(flow.ledger.slots.inside(units.slots, plan.roots).sum())
    return (*shape[: units.dim], shape[units.dim] - gone, *shape[units.dim + 1 :])


def _stay(flow: Flow, plan: Plan) -> dict[Key, Tensor]:
    return {
        site.key: ~flow.ledger.slots.inside(site.outputs.slots, plan.roots)
        for site in flow.ledger.sites
    }


def key_of(layer: LayerNodes) -> Key:
    """What a layer is found by: its name and its activation function's."""
    return layer.layer, layer.activation


def _why(layer: LayerNodes, kind: str) -> str:
    name = layer.activation
    if kind == "true":
        return f"is never on, but its output varies: {name} is not constant where z <= 0"
    if kind == "pseudo":
        return f"is always on, and no combination of others: {name} still passes its values on"
    if kind == "not finite":
        return "has been nan or infinite on some sample"
    return "was not met when the model was called on the example input"
