"""A smaller model with the same output: redundant units out, what they gave taken over by others."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from truestep.checks import check_kind
from truestep.compression_report import CompressionReport
from truestep.errors import TruestepError
from truestep.layers import uncompiled_model
from truestep.lines import combinations
from truestep.measuring import largest_difference, measure, outputs_differ
from truestep.nodes import DummyNodes, call_model
from truestep.optimizer_state import check_optimizer, move_optimizer
from truestep.stages import Work, follow, key_of, redundant

__all__ = ["compress"]


def compress(
    model: nn.Module,
    nodes: DummyNodes,
    example_input: Any,
    optimizer: Optimizer | None = None,
) -> tuple[nn.Module, CompressionReport]:
    """Makes a model smaller by its redundant units, with the same output on the data.

    True dummies of ReLU are removed, constants are folded into the next bias, duplicates are merged into
    the unit that they are multiples of, units that are straight lines on the data become the fewest that the
    next layers need, and a layer of straight lines alone becomes one with the next where that is smaller.
    What cannot be removed exactly stays, and is listed with the reason.

    The same modules with smaller parameters come back, in the same mode. With y_j = c + sum_i r_i y_i on the
    data, for the weight W and the bias b of each layer that reads unit j::

        b <- b + c W_j           W_i <- W_i + r_i W_j           W_j is left out

    Several units that are straight lines B x + c, read by layers with the weights A, become as many as
    A B = U V has rank: their own layer gets the weights V, shifted so far that the units stay on a straight
    piece of their activation function, and the layers behind get U.

    Args:
        model: stays as it is.
        nodes: of `find_dummy_nodes` on this model.
        example_input: one batch, as the loader gives them.
        optimizer: of the model's parameters; it trains the small model from now on, with the part of its
            state that belongs to what is left.

    Returns:
        The small model, and what was done.

    Raises:
        TruestepError: the model draws random numbers or normalises by batch; the nodes are another model's;
            the optimizer's state cannot be cut; the outputs differ by more than rounding.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> model[0].bias.data = torch.tensor([0.0, -100.0, 0.0])
        >>> x = torch.randn(50, 2)
        >>> small, report = truestep.compress(model, truestep.find_dummy_nodes(model, [x]), x)
        >>> small[0], report.removed[0].how
        (Linear(in_features=2, out_features=2, bias=True), 'removed')
    """
    check_kind(model, nn.Module, "model", "a torch.nn.Module")
    model = uncompiled_model(model)
    if optimizer is not None:
        check_optimizer(model, optimizer)
    _check_nodes(model, nodes, example_input)
    work = Work(model, nodes, example_input)
    work.remove(redundant)
    work.remove(combinations)
    work.fold()
    work.merge()
    small, report = work.small, work.report()
    report.before, report.after = measure(model, small, example_input, nodes.forward)
    report.difference, report.largest, report.compared = largest_difference(
        model, small, nodes, example_input
    )
    _refuse_difference(model, report)
    if optimizer is not None:
        move_optimizer(optimizer, model, small, work.slices())
    return small, report


def _check_nodes(model: nn.Module, nodes: DummyNodes, example_input: Any) -> None:
    """Raises `TruestepError` where the output is no function of the input, or the nodes are not of this."""
    if not isinstance(nodes, DummyNodes):
        raise TruestepError(
            f"nodes is of type {type(nodes).__name__}; pass truestep.find_dummy_nodes(model, loader)"
        )
    flow = follow(model, replace(nodes, layers=[]), example_input)
    keys = {site.key for site in flow.ledger.sites}
    missing = [layer.layer for layer in nodes if key_of(layer) not in keys]
    if nodes.layers and len(missing) == len(nodes.layers):
        raise TruestepError(
            f"none of the layers of the nodes given ({', '.join(map(repr, missing))}) is met when this "
            f"{type(model).__name__} is called; call find_dummy_nodes on this model"
        )
    with torch.no_grad():
        first, second = (call_model(model, example_input, nodes.forward) for _ in range(2))
    if outputs_differ(first, second):
        raise TruestepError(
            "two calls of the model on the same input give different outputs, so equality could not be "
            "shown; call model.eval(), and take other randomness out"
        )


def _refuse_difference(model: nn.Module, report: CompressionReport) -> None:
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    report.tolerance = max((torch.finfo(dtype).eps for dtype in types), default=0.0) ** 0.5
    if not report.difference <= report.tolerance * max(report.largest, 1e-30):
        raise TruestepError(
            f"the small model's output differs by {report.difference:.3g} at outputs up to "
            f"{report.largest:.3g}: were the nodes found on this model, in this mode, and on the data that "
            "its loader still gives? Call find_dummy_nodes again. If it stays so, the model's code computes "
            "with the sizes of its layers, or does something that torch functions do not show"
        )
