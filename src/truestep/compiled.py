"""Counting inside compiled graphs, where hooks on tensors do not exist.

While a model is compiled, a layer's outputs go through `Tap`, an identity that becomes part of the graph.
Its backward pass calls an operator which, at run time, hands the layer's inputs and output gradients to
the receiver that the layer's hook has made. Nothing that tells one run from another may be frozen in the
graph, so all of it travels in tensors: the number of the receiver, and the key of the model's call, which
another operator makes anew in each run.
"""

import ast
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake
from torch.utils import _pytree as pytree

from truestep.activity import Activity
from truestep.calls import Call
from truestep.errors import TruestepError
from truestep.hooks import Hook, uncompiled
from truestep.layers import Layer
from truestep.layout import Inside, Layout, tensors_in

__all__ = ["Receiver", "begin", "call_of", "can_keep", "delivered", "give_key", "tapped"]

SERIALS = itertools.count()
CALLS: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()
RECEIVERS: weakref.WeakValueDictionary[int, "Receiver"] = weakref.WeakValueDictionary()


class Receiver:
    """Where taps deliver; they know it by a number and forget it with its last reference.

    Args:
        hook: called in the backward pass with the call, the gradients of the tapped tensors (None
            for those without one), and the arguments and keyword arguments.
        begins: the hook is called instead with nothing, when a graph with layers of any model is traced.

    Attributes:
        serial: the number.
    """

    def __init__(self, hook: Hook, *, begins: bool = False) -> None:
        self.hook, self.begins = hook, begins
        self.serial = next(SERIALS)
        # What graphs read: a plain number would be fixed in them.
        self.number = torch.tensor(self.serial, device="cpu")
        RECEIVERS[self.serial] = self


def give_key(call: Call) -> None:
    """Makes a call of the model known to compiled parts of the model, by its key."""
    serial = next(SERIALS)
    call.key = torch.full((1,), serial, device="cpu")
    CALLS[serial] = call


def call_of(key: Tensor) -> Call:
    """The call that a key stands for, the same object as long as anyone holds it."""
    serial, *numbers = key.tolist()
    call = CALLS.get(serial)
    if call is None:
        sizes, inputs = [size for size in numbers[1::2] if size >= 0], set(numbers[2::2])
        call = CALLS[serial] = Call(sizes, inputs, outside=numbers[:1] == [1], key=key)
    return call


def begin(inputs: Sequence[Tensor], batch_dim: int, *, outside: bool = False) -> Tensor | None:
    """The key of a call that begins in a graph: a new one in each run of the graph.

    An exported graph has no backward pass, and none.
    """
    if _exporting():
        return None
    key: Tensor = torch.ops.truestep.begin(list(inputs), batch_dim, outside, _apart())
    return key


def delivered(
    layer: Layer, layout: Layout, args: Any, kwargs: Any, deltas: list[Tensor | None]
) -> list[tuple[Callable[..., dict[str, Activity]], Sequence[Tensor | None]]]:
    """What a layer's rule returns for what a tap has delivered.

    A rule that looks inside the layer would find no autograd graph there: the layer runs once more.

    Args:
        layer: the layer.
        layout: of this call.
        args: the layer's arguments.
        kwargs: the layer's keyword arguments.
        deltas: the gradients of its outputs, None for those without one.

    Returns:
        Functions from gradients to activity, each with the gradients to call it with.

    Raises:
        TruestepError: the layer would have to run once more, but draws random numbers.
    """
    activity = layer.rule(layout, layer.module, *args, **kwargs)
    if not isinstance(activity, Inside):
        return [(activity, deltas)]
    found: list[tuple[Callable[..., dict[str, Activity]], Sequence[Tensor | None]]] = []
    with torch.enable_grad(), torch.random.fork_rng():
        before = _random_states()
        outputs = list(tensors_in(layer.module.forward(*args, **kwargs)))
        if _random_states() != before:
            raise TruestepError(
                f"{layer.name!r} draws random numbers, such as dropout, and a compiled graph does not "
                "show which; set its dropout to 0, or leave it out of the graph: "
                "layer.forward = torch.compiler.disable(layer.forward)"
            )
        given, inner = activity.see(outputs)
        if given is not None and not inner:
            return [(given, deltas)]
        for node, use in inner:
            node.register_prehook(lambda gradients, use=use: found.append((use, gradients[:1])))
        pairs = [
            (output, delta.to(output.dtype))
            for output, delta in zip(outputs, deltas, strict=True)
            if delta is not None
        ]
        trained = [p for p in layer.module.parameters() if p.requires_grad]
        roots, gradients = zip(*pairs, strict=True)
        torch.autograd.grad(roots, trained, gradients, allow_unused=True)
    return found if given is None else [*found, (given, deltas)]


def _random_states() -> list[bytes]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [state.numpy().tobytes() for state in states]


def tapped(
    value: Any, receiver: Receiver, call: Call | Tensor | None, arguments: tuple[Any, Any]
) -> Any:
    """The same nested tensors; in a graph, the gradients that reach them go to the receiver as well.

    Args:
        value: the outputs of a layer or of the model.
        receiver: who gets the gradients.
        call: the model's call, or its key; None outside any.
        arguments: what else the receiver gets: arguments and keyword arguments.

    Raises:
        TruestepError: an argument is neither a tensor nor a plain value.
    """
    leaves, structure = pytree.tree_flatten(value)
    waited: list[int] = []
    order: list[int | None] = []
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            order.append(len(waited) if leaf.requires_grad else None)
            if leaf.requires_grad:
                waited.append(place)
    if not waited or _exporting():
        return value
    if isinstance(call, Call):
        _tracing()  # gives it its key
        key = call.key
    else:
        key = call
    if key is None:
        key = begin([], 0, outside=True)
    inputs: list[Tensor] = []
    form = _encode([order, *arguments], inputs)
    outputs = [leaves[place] for place in waited]
    passed = Tap.apply(receiver.number, key, form, len(outputs), *outputs, *inputs)  # type: ignore[no-untyped-call]
    for place, output in zip(waited, passed, strict=True):
        leaves[place] = output
    return pytree.tree_unflatten(leaves, structure)


def can_keep(value: Any) -> bool:
    """Whether a graph can keep arguments for its backward pass: nested tensors and plain values."""
    if isinstance(value, tuple | list):
        return all(can_keep(item) for item in value)
    if isinstance(value, dict):
        return all(can_keep(item) for item in value.values())
    return value is None or isinstance(value, Tensor | bool | int | str)


def _exporting() -> bool:
    asked: bool = getattr(torch.compiler, "is_exporting", bool)()
    return asked


class Tap(torch.autograd.Function):
    """The identity on tensors; its backward pass delivers their gradients.

    It clones: a view made by a custom function refuses the in-place operations that may follow, and
    a function that marks its input as changed in place loses its node under DistributedDataParallel.
    """

    @staticmethod
    def forward(
        ctx: Any, number: Tensor, key: Tensor, form: str, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(number, key, *tensors[count:])
        ctx.form = form
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        number, key, *inputs = ctx.saved_tensors
        done = torch.ops.truestep.deliver(list(gradients), inputs, number, key, ctx.form)
        # The gradients must depend on the delivery, or it would be dropped as dead code.
        passed = [torch.where(done, gradient, 0) for gradient in gradients]
        return (None, None, None, None, *passed, *[None] * len(inputs))


def _tracing() -> int:
    # The last moment inside DistributedDataParallel: a graph may begin calls in its backward pass.
    for receiver in list(RECEIVERS.values()):
        if receiver.begins:
            receiver.hook()
    return 0


def _apart() -> int:
    _tracing()
    return next(SERIALS)


# Run while a graph is made. A number is fixed in it, or calls on the same inputs would be merged as common
# subexpressions. (This is all that torch.compiler.assume_constant_result does, after seconds of imports.)
for _constant in (_tracing, _apart):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001


def _begin(inputs: list[Tensor], batch_dim: int, outside: bool, _apart: int) -> Tensor:
    # All that a call knows: it may have to be made anew when its backward pass begins.
    numbers = [next(SERIALS), int(outside)]
    for tensor in inputs:
        size = tensor.shape[batch_dim] if tensor.dim() > batch_dim else -1
        numbers += [size, tensor.untyped_storage().data_ptr()]
    return torch.tensor(numbers, device="cpu")


def _begin_fake(inputs: list[Tensor], _batch_dim: int, _outside: bool, _apart: int) -> Tensor:
    return torch.empty(2 + 2 * len(inputs), dtype=torch.int64, device="cpu")


def _deliver(
    gradients: list[Tensor], inputs: list[Tensor], number: Tensor, key: Tensor, form: str
) -> Tensor:
    receiver = RECEIVERS.get(int(number))
    if receiver is not None:
        order, args, kwargs = _decode(_literal(form), inputs)
        given = [None if place is None else gradients[place] for place in order]
        receiver.hook(call_of(key), given, args, kwargs)
    return gradients[0].new_ones((), dtype=torch.bool)


def _deliver_fake(
    gradients: list[Tensor], _inputs: list[Tensor], _number: Tensor, _key: Tensor, _form: str
) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.bool)


LIBRARY = Library("truestep", "DEF")
# A replayed CUDA graph would not come back to Python.
TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
LIBRARY.define(
    "begin(Tensor[] inputs, int batch_dim, bool outside, int apart) -> Tensor", tags=TAGS
)
LIBRARY.define(
    "deliver(Tensor[] gradients, Tensor[] inputs, Tensor number, Tensor key, str form) -> Tensor",
    tags=TAGS,
)
for _name, _run, _fake in (("begin", _begin, _begin_fake), ("deliver", _deliver, _deliver_fake)):
    LIBRARY.impl(_name, uncompiled(_run, inside=False), "CompositeExplicitAutograd")
    register_fake(f"truestep::{_name}", _fake, lib=LIBRARY)


def _encode(value: Any, tensors: list[Tensor]) -> str:
    """Nested values as a Python literal, in which the set {n} stands for the n-th tensor."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return f"{{{len(tensors) - 1}}}"
    if type(value) is tuple:
        return "(" + "".join([_encode(item, tensors) + ", " for item in value]) + ")"
    if type(value) is list:
        return "[" + ", ".join([_encode(item, tensors) for item in value]) + "]"
    if type(value) is dict:
        items = [f"{name!r}: {_encode(item, tensors)}" for name, item in value.items()]
        return "{" + ", ".join(items) + "}"
    finite = not isinstance(value, float) or math.isfinite(value)
    if value is None or (isinstance(value, bool | int | float | str) and finite):
        return repr(value)
    raise TruestepError(
        f"a {type(value).__name__} given to a layer cannot be kept in a compiled graph; pass "
        "tensors and plain values, or leave the layer out with torch.compiler.disable(layer)"
    )


_literal = cache(ast.literal_eval)


def _decode(value: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(value, set):
        return tensors[next(iter(value))]
    if isinstance(value, list | tuple):
        return type(value)(_decode(item, tensors) for item in value)
    if isinstance(value, dict):
        return {name: _decode(item, tensors) for name, item in value.items()}
    return value
