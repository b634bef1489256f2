"""What torch functions do to the units of a model: one rule per family, a function on plain values.

A rule gets the ledger, the call and its result, and returns where the units are in the result: `Channels`, a
list of them for several results, or None. What goes together is joined in the ledger's slots. Functions
that only move numbers are not described: they are called once more, on the units' own indices.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from truestep.errors import TruestepError
from truestep.flow_arithmetic import ARITHMETIC
from truestep.flow_maps import MAPS
from truestep.flow_moves import MOVES
from truestep.units import Call, Channels, Ledger, View, tensors_in, values_of

__all__ = [
    "OPERATORS",
    "PLAIN",
    "READS",
    "apply",
    "is_transpose",
    "join_slopes",
    "refuse_chance",
]

Rule = Callable[[Ledger, Call, Any], Any]
# Of the weights of a resizing, which add up to 1 but for rounding.
SMALLEST = 1e-12

# Calls that make no tensor of numbers.
PLAIN = {
    *(f".{name}" for name in ("shape", "dtype", "device", "layout", "is_nested", "requires_grad")),
    *(f".{name}" for name in ("ndim", "is_sparse", "is_quantized", "is_cuda", "is_cpu", "grad_fn")),
    *(f".{name}" for name in ("is_meta", "is_mkldnn", "names", "itemsize", "nbytes", "is_leaf")),
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "is_floating_point", "__len__"),
    *("is_complex", "is_contiguous", "element_size", "data_ptr", "storage_offset", "get_device"),
    *("_set_grad_enabled", "_assert", "requires_grad_", "__hash__", "__repr__", "__format__"),
    *("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "is_same_size", "is_signed"),
    *("sym_size", "size.int", "sym_size.int", "_assert_scalar.default", "type", "untyped_storage"),
    *("_assert_tensor_metadata.default", "_has_compatible_shallow_copy_type", "is_inference"),
}

# Calls through which the model's code gets numbers to decide by.
READS = {
    *("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__"),
    *("item", "tolist", "numpy", "nonzero", "is_nonzero", "equal", "allclose", "unique"),
    *("unique_consecutive", "_local_scalar_dense"),
}

OPERATORS = {
    **{f"{side}{name}": name for name in ("add", "sub", "mul", "matmul") for side in ("", "i")},
    "radd": "add",
    "rmul": "mul",
    "rsub": "rsub",
    "truediv": "div",
    "itruediv": "div",
    "neg": "neg",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "pow": "pow",
    "getitem": "getitem",
}

DROPOUT = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
    *("feature_alpha_dropout", "native_dropout"),
}
RANDOM = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
    *("bernoulli", "normal", "uniform", "multinomial", "exponential", "random", "cauchy"),
    *("poisson", "gumbel_softmax", "log_normal", "geometric"),
}
RECURRENT = {"lstm", "gru", "rnn_relu", "rnn_tanh"}

_WAY_OUT = "call model.eval() first; what is found and removed holds for evaluation"


def refuse_chance(call: Call) -> None:
    """Raises `TruestepError` for a call whose result is left to chance, or to the rest of the batch."""
    name, chance = call.name, False
    if name in DROPOUT:
        chance = bool(call.get(2, "training", default=True)) and call.get(1, "p", 0.5) > 0
    elif name == "rrelu":
        chance = bool(call.get(3, "training", default=False))
    elif name == "scaled_dot_product_attention":
        chance = call.get(4, "dropout_p", 0.0) > 0
    elif name == "multi_head_attention_forward":
        chance = call.get(10, "dropout_p", 0.0) > 0 and call.get(13, "training", default=True)
    elif name in RECURRENT and len(call.args) > 6:  # noqa: PLR2004 - as torch._VF has them
        chance = call.args[-4] > 0 and call.args[-3]
    if name in RANDOM or chance:
        raise TruestepError(
            f"{call} draws random numbers, so the output is not a function: {_WAY_OUT}"
        )
    if name == "batch_norm" and call.get(5, "training", default=False):
        raise TruestepError(
            f"{call} normalises with the statistics of the batch, and changes its own: {_WAY_OUT}"
        )


def apply(ledger: Ledger, call: Call, output: Any) -> Any:
    """Where the units are in the result of a call."""
    if not any(
        ledger.channels(tensor) is not None or ledger.view(tensor) is not None
        for tensor in call.tensors
    ):
        return None
    rule = RULES.get(call.name)
    # A function without a rule may do anything.
    return ledger.end(call) if rule is None else rule(ledger, call, output)


def is_transpose(ledger: Ledger, call: Call, output: Any) -> bool:
    """Whether a call transposes a parameter that is a matrix, or passes one on; notes the view."""
    source = ledger.view(call.args[0]) if call.args else None
    if source is None or call.name not in {"t", "T", "mT", "transpose", "data", "detach"}:
        return False
    if len(source.dims) != 2 or not isinstance(output, Tensor):  # noqa: PLR2004
        return False
    turned = call.name in {"t", "T", "mT", "transpose"}
    ledger.note_view(output, View(source.name, source.dims[::-1] if turned else source.dims))
    return True


def join_slopes(ledger: Ledger, call: Call, units: Channels) -> None:
    """The slopes of a PReLU, one for each unit or one for all."""
    weight = ledger.view(call.get(1, "weight"))
    if weight is None:
        ledger.stop(call.get(1, "weight"), f"are the slopes of {call}")
    elif ledger.owned[weight.name].numel() > 1:
        ledger.slots.join(units.slots, ledger.rows(weight.name, 0))


def same(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """Passes its input on: dropout in evaluation, casts, copies."""
    units = ledger.channels(call.args[0])
    return None if units is None else units.but()


def each(ledger: Ledger, call: Call, output: Tensor) -> Channels | None:
    """Some function of each number."""
    others = [tensor for tensor in call.tensors[1:] if ledger.channels(tensor) is not None]
    units = ledger.channels(call.args[0])
    if units is None or others:
        return ledger.end(call)
    return units.bent()


def pool(ledger: Ledger, call: Call, output: Any) -> Any:
    """Pooling and resizing over positions, each channel by itself."""
    units = ledger.channels(call.args[0])
    if units is None:
        return ledger.end(call)
    rising = "max" in call.name or "lp" in call.name
    found = _alike(ledger, units, rising=rising, even=_keeps_ones(call))
    return found if isinstance(output, Tensor) else [found] + [None] * (len(output) - 1)


def _alike(ledger: Ledger, units: Channels, *, rising: bool, even: bool) -> Channels:
    """Units to all of which one homogeneous function was done: it leaves lines through zero."""
    scale, shift = units.scale, units.shift
    if scale is None or shift is None or bool(shift.any()) or (rising and bool((scale <= 0).any())):
        return units.bent()
    return units.but(
        rising=units.rising or rising,
        even=units.even and even,
        starts=ledger.onward(units.starts),
    )


def _keeps_ones(call: Call) -> bool:
    """Whether a pool makes ones of ones, and so leaves every constant as it is."""
    ones = torch.ones_like(call.args[0][:1], dtype=torch.float64)  # all samples are alike
    made = next(tensors_in(call.function(ones, *call.args[1:], **call.kwargs)))
    return bool(((made - 1).abs() < SMALLEST).all())


def reduce(ledger: Ledger, call: Call, output: Any) -> Any:
    """`mean`, `sum`, `amax`, `amin` over positions."""
    units = ledger.channels(call.args[0])
    dims = call.get(1, "dim", None)
    if units is None or dims is None or not isinstance(output, Tensor):
        return ledger.end(call)
    ndim = call.args[0].dim()
    over = {dim % ndim for dim in (dims if isinstance(dims, list | tuple) else (dims,))}
    if units.dim in over:
        return ledger.end(call)
    keep = bool(call.get(2, "keepdim", default=False))
    dim = units.dim - (0 if keep else sum(other < units.dim for other in over))
    fixed = units.fixed
    if call.name == "sum" and fixed is not None:
        fixed = fixed & (values_of(call.args[0], units.dim) == 0)  # lengths differ between batches
    rising = call.name in {"amax", "amin"}
    made = _alike(ledger, units, rising=rising, even=call.name != "sum")
    made.dim, made.fixed = dim, fixed
    return made


def embedding(ledger: Ledger, call: Call, output: Any) -> Any:
    """Rows of a table: its features are units, its rows are asked for by number."""
    tables = [t for t in call.tensors if ledger.view(t) is not None and t.dim() == 2]  # noqa: PLR2004
    found = ledger.view(tables[0]) if len(tables) == 1 else None
    if found is None or found.dims != (0, 1):
        return ledger.end(call)
    ledger.count_weight(found.name)
    for tensor in call.tensors:
        if tensor is not tables[0]:
            ledger.stop(tensor, f"goes into {call}")
    ledger.slots.pin(ledger.rows(found.name, 0), "is looked up by number")
    first = output if isinstance(output, Tensor) else output[0]
    units = Channels(first.dim() - 1, ledger.rows(found.name, 1), (ledger.layer(call, found.name),))
    return units if isinstance(output, Tensor) else [units] + [None] * (len(output) - 1)


_SAME = (
    *DROPOUT,
    *("contiguous", "clone", "detach", "to", "type_as", "float", "double", "half", "bfloat16"),
    *("data", "cpu", "cuda", "requires_grad", "alias", "lift_fresh", "positive"),
)
_EACH = (
    *("abs", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "square", "pow", "sin", "cos", "neg"),
    *("clamp", "clamp_min", "clamp_max", "sign", "erf", "reciprocal", "logsigmoid", "hardshrink"),
    *("softshrink", "tanhshrink", "softsign", "threshold", "rrelu", "ne", "eq", "gt", "ge", "lt"),
    *("le", "isnan", "isfinite", "bool", "int", "long", "round", "floor", "ceil", "nan_to_num"),
    *("zeros_like", "ones_like", "full_like"),
)
_POOLS = (
    *(f"{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg", "lp") for rank in "123"),
    *(f"adaptive_max_pool{rank}d" for rank in "123"),
    *(f"{kind}_pool{rank}d_with_indices" for kind in ("max", "adaptive_max") for rank in "123"),
    *(f"_max_pool{rank}d" for rank in "123"),
    *("interpolate", "upsample", "upsample_nearest2d", "upsample_bilinear2d"),
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_EACH, each),
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_POOLS, pool),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), reduce),
    **dict.fromkeys(("embedding", "embedding_bag"), embedding),
    **ARITHMETIC,
    **MAPS,
    **MOVES,
}
