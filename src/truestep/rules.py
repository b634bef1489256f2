"""One pure function per layer family: inputs and output gradients to activity.

A rule is called as the layer is, ``rule(layout, module, *args, **kwargs)``, in the forward pass; it
returns a function that takes the gradient of the layer's output and returns the activity of each of
the layer's own parameters. What the rule closes over is all that stays in memory between the two, so
it packs the inputs to bits at once. The rules are structural: see `truestep.activity`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from truestep.activity import Activity, Elements, Outer
from truestep.bits import pack
from truestep.layout import Layout, Rule, as_read
from truestep.rules_attention import attention
from truestep.rules_bare import HOLDERS, bare
from truestep.rules_convolution import CONVOLUTIONS, convolution, transposed_convolution
from truestep.rules_embedding import embedding, embedding_bag
from truestep.rules_norm import BATCH_NORM, normalization
from truestep.rules_parametrized import parametrized
from truestep.rules_recurrent import cell, recurrent

__all__ = [
    "BATCH_NORM",
    "RULES",
    "backward_is_known",
    "find_rule",
    "refused",
]


def linear(
    layout: Layout,
    module: nn.Linear,
    input: Tensor,
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.Linear`: weight (j, k) needs output gradient j and input k, bias j output gradient j."""
    # Not module.weight: nn.Module looks parameters up in three places, which small layers feel.
    parameters = module._parameters  # noqa: SLF001
    weight, bias = parameters["weight"], parameters["bias"]
    assert weight is not None  # noqa: S101
    inputs = pack(layout.arrange(as_read(input))) if weight.requires_grad else None

    def activity(delta: Tensor) -> dict[str, Activity]:
        found: dict[str, Activity] = {}
        outputs = pack(layout.arrange(delta))
        if inputs is not None:
            found["weight"] = Outer(weight.shape, outputs, inputs)
        if bias is not None and bias.requires_grad:
            found["bias"] = Elements(bias.shape, outputs.any_position())
        return found

    return activity


def transposed_linear(
    layout: Layout, module: nn.Module, x: Tensor
) -> Callable[[Tensor], dict[str, Activity]]:
    """`transformers.pytorch_utils.Conv1D`: `nn.Linear` with a weight ``[inputs, outputs]``."""
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    inputs = pack(layout.arrange(as_read(x))) if weight.requires_grad else None

    def activity(delta: Tensor) -> dict[str, Activity]:
        found: dict[str, Activity] = {}
        outputs = pack(layout.arrange(delta))
        if inputs is not None:
            found["weight"] = Outer(weight.shape, inputs, outputs, transposed=True)
        if bias.requires_grad:
            found["bias"] = Elements(bias.shape, outputs.any_position())
        return found

    return activity


def bilinear(
    layout: Layout, module: nn.Bilinear, input1: Tensor, input2: Tensor
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.Bilinear`: weight (j, k, l) needs output gradient j, first input k and second input l."""
    pairs = None
    if module.weight.requires_grad:
        both = (input1 != 0).unsqueeze(-1) & (input2 != 0).unsqueeze(-2)
        pairs = pack(layout.arrange(both.flatten(-2)))

    def activity(delta: Tensor) -> dict[str, Activity]:
        outputs = pack(layout.arrange(delta))
        found: dict[str, Activity] = {}
        if pairs is not None:
            found["weight"] = Outer(module.weight.shape, outputs, pairs)
        if module.bias is not None and module.bias.requires_grad:
            found["bias"] = Elements(module.bias.shape, outputs.any_position())
        return found

    return activity


def prelu(
    layout: Layout, module: nn.PReLU, input: Tensor
) -> Callable[[Tensor], dict[str, Activity]]:
    """`nn.PReLU`: slope j needs output gradient and negative input in its channel."""

    def arrange(mask: Tensor) -> Tensor:
        if module.num_parameters == 1:
            mask = mask.unsqueeze(-1)
        elif mask.dim() > 2:  # noqa: PLR2004
            mask = mask.movedim(1, -1)
        return layout.arrange(mask)

    negative = pack(arrange(input < 0))

    def activity(delta: Tensor) -> dict[str, Activity]:
        both = pack(arrange(delta)) & negative
        return {"weight": Elements(module.weight.shape, both.any_position())}

    return activity


RULES: dict[type[nn.Module] | str, Rule] = {
    nn.Linear: linear,
    "transformers.pytorch_utils.Conv1D": transposed_linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: transposed_convolution,
    nn.ConvTranspose2d: transposed_convolution,
    nn.ConvTranspose3d: transposed_convolution,
    nn.Bilinear: bilinear,
    nn.PReLU: prelu,
    nn.Embedding: embedding,
    nn.EmbeddingBag: embedding_bag,
    nn.LayerNorm: normalization,
    nn.GroupNorm: normalization,
    nn.RMSNorm: normalization,
    nn.InstanceNorm1d: normalization,
    nn.InstanceNorm2d: normalization,
    nn.InstanceNorm3d: normalization,
    nn.MultiheadAttention: attention,
    nn.RNN: recurrent,
    nn.LSTM: recurrent,
    nn.GRU: recurrent,
    nn.RNNCell: cell,
    nn.LSTMCell: cell,
    nn.GRUCell: cell,
}
"""The rules that `SampleCounter` uses unless told otherwise: layer class, or its dotted name, to rule."""

# Rules that read no more of a layer's parameters than their shapes.
READ_SHAPES = {
    linear,
    transposed_linear,
    convolution,
    transposed_convolution,
    bilinear,
    prelu,
    embedding,
    normalization,
}


def backward_is_known(module: nn.Module, rule: Rule) -> bool:
    """Whether a layer's backward pass uses its weight, and nothing else of its own, in a way that is known.

    Args:
        module: the layer.
        rule: its rule.
    """
    if rule not in (*CONVOLUTIONS, linear, transposed_linear, normalization):
        return False
    # What other paddings put beside the input is not in the input's gradient, and a batch's statistics mix
    # its samples.
    plain = getattr(module, "padding_mode", "zeros") == "zeros"
    return plain and not isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001


def refused(module: nn.Module, rules: Mapping[Any, Rule]) -> str | None:  # noqa: PLR0911
    """Why no rule for its class could be right for a module; None where nothing speaks against one.

    Args:
        module: a module with parameters of its own.
        rules: layer class to rule.
    """
    name = type(module).__name__
    if getattr(module, "scale_grad_by_freq", False):
        return f"{name}(scale_grad_by_freq=True) divides by counts itself; set it to False"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in rules:  # noqa: SLF001
        return (
            f"{name} mixes the samples of a batch, so no sample has a gradient of its own; to count "
            "given the batch's statistics add truestep.rules.BATCH_NORM to rules="
        )
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{name} is used by nn.MultiheadAttention without being called"
    if nn.utils.parametrize.is_parametrized(module):
        if _inherited(type(module), rules) in READ_SHAPES:
            return None
        return f"{name} computes its parameters from others (a parametrization)"
    computed = [key for key, value in vars(module).items() if isinstance(value, Tensor)]
    if computed:
        return (
            f"{name} computes its {' and '.join(computed)} from others (pruning, weight_norm, "
            "spectral_norm); make that permanent with prune.remove() and the like"
        )
    return None


def find_rule(module: nn.Module, rules: Mapping[Any, Rule]) -> Rule | str:
    """The rule for a module, or the reason why there is none.

    A subclass inherits the rule of its base only if it inherits `forward` too: with another forward
    pass the rule could be wrong. For modules of other kinds it is `bare`.

    Args:
        module: a module with parameters of its own.
        rules: layer class to rule.
    """
    reason = refused(module, rules)
    if reason is not None:
        return reason
    rule, name = _inherited(type(module), rules), type(module).__name__
    if rule is not None and nn.utils.parametrize.is_parametrized(module):
        return parametrized(rule, module)
    if isinstance(module, HOLDERS):
        return f"{name} holds parameters for no module that is known to use them"
    # Who leaves a layer out of the rules wants its plain gradients.
    left_out = f"{name} has no rule" if _inherited(type(module), RULES) else bare
    return rule or left_out


def _inherited(kind: type[nn.Module], rules: Mapping[Any, Rule]) -> Rule | None:
    for base in kind.__mro__:
        if getattr(base, "forward", None) is kind.forward:
            rule = rules.get(base) or rules.get(f"{base.__module__}.{base.__qualname__}")
            if rule is not None:
                return rule
    return None
