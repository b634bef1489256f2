"""The one base error: every message says what is wrong, where, why, and what to do."""

from collections.abc import Iterable

__all__ = [
    "TruestepError",
    "corrected_already",
    "hidden_use",
    "resized",
    "without_numbers",
    "without_record",
]


class TruestepError(Exception):
    """Anything truestep refuses to do; the message ends with the way out.

    Example:
        >>> import truestep
        >>> issubclass(truestep.TruestepError, Exception)
        True
    """


def without_record(name: str, *, closed: bool = False) -> TruestepError:
    """For a parameter with a gradient that no record describes.

    Args:
        name: the parameter's.
        closed: whether its counter is.
    """
    if closed:
        return TruestepError(
            f"{name!r} has a gradient, but its SampleCounter was closed; make a new one and give it to the "
            "optimizer"
        )
    return TruestepError(
        f"{name!r} has a gradient, but no sample was counted for it. Either "
        "the forward pass ran before the SampleCounter was made, or torch.compile did (make the "
        "counter before the compiled model's first call, or call torch.compiler.reset() after "
        "making it; where other models of the same classes are compiled, set "
        "torch._dynamo.config.skip_nnmodule_hook_guards = False before), or the parameter was used "
        "without calling its module, or .grad was set by hand. Call the module, "
        "change gradients in place, leave the parameter to another optimizer, or its module out with "
        "SampleCounter(model, unsupported='mean') and rules without its class"
    )


def corrected_already(name: str) -> TruestepError:
    """For a parameter to whose corrected gradient a plain one is added."""
    return TruestepError(
        f"the gradient of {name!r} is a mean effective gradient already, and a "
        "further backward pass adds a plain one to it; call zero_grad() first, or correct after "
        "the last backward pass"
    )


def without_numbers(name: str) -> TruestepError:
    """For a parameter on the meta device."""
    return TruestepError(
        f"{name!r} is on the meta device, where gradients have shapes but no numbers to count; give "
        "the model memory with model.to_empty(device=...) and make the counter then"
    )


def hidden_use(name: str) -> TruestepError:
    """For a parameter that a nested backward pass has reached past its module."""
    return TruestepError(
        f"{name!r} got a gradient from a backward pass inside another, as reentrant activation checkpointing "
        "runs them, without its module being called there, so the samples would go uncounted; pass "
        "use_reentrant=False, or call the module that owns the parameter"
    )


def resized(now: Iterable[int], then: Iterable[int]) -> TruestepError:
    """For a parameter that has another shape at the step than in the backward pass."""
    return TruestepError(
        f"a parameter of shape {tuple(then)} in the backward pass has the shape {tuple(now)} at the "
        "step; resize it before the forward pass, or after the step"
    )
