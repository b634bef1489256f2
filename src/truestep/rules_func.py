"""The rule for modules that have none: each sample's own gradient, through torch.func.

The module runs once more for each sample alone, forward and backward from that sample's output gradient,
many samples at once under `torch.func.vmap`. That is right for a module that computes a sample's output
from that sample alone and in the same way each time, so its first use is compared with the batch's own
output. `vmap` itself refuses random numbers and values that are read into Python.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from truestep.activity import Activity, Elements
from truestep.bits import Bits, appended, pack
from truestep.errors import TruestepError
from truestep.graph import saved_tensors_are_packed
from truestep.kernels.packing import WORD
from truestep.layout import Inside, Layout
from truestep.per_sample import Use, use_of

__all__ = ["AloneError", "PerSample", "unusable"]


def unusable(module: nn.Module) -> str | None:
    """Why a module cannot be counted by each sample's own gradient; None where it may be.

    Args:
        module: one with parameters of its own.

    Example:
        >>> unusable(nn.ParameterList([torch.ones(2)]))
        'it has no forward pass'
    """
    if getattr(module.forward, "__func__", None) is nn.Module.forward:
        return "it has no forward pass"
    if isinstance(module, ParametrizationList):
        return "it computes a parameter, not samples"
    for name, child in module.named_modules():
        trained = any(p is not None and p.requires_grad for p in child._parameters.values())  # noqa: SLF001
        if name and trained:
            return (
                f"it has parameters beside those of its {name!r}, which is counted by itself; put them, and "
                "what is done with them, in a module of their own"
            )
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0:  # noqa: SLF001
            return f"its {name!r} draws random numbers"
    return None


class AloneError(TruestepError):
    """A module's samples cannot be run one by one.

    Args:
        reason: why.
        message: the whole of it.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class PerSample:
    """Counts a module by each sample's own gradient: m = number of samples with g_i != 0.

    A sample's summed gradient is tested, in the module's dtype, as the oracle does it in float64; other
    rules ask whether any of its terms is non-zero. Tensors among the arguments whose batch dimension has
    the output's size hold samples; others are shared by all. With ``unit="position"``, dimensions of the
    output other than its features must be positions that the module computes one by one.

    A step takes one more forward pass of the module, and a backward pass with per-sample gradients in
    chunks of bounded memory; one bit per sample and parameter element is kept, and the arguments until
    the backward pass.

    Args:
        name: the module's, for errors.

    Raises:
        TruestepError: from the rule, where the module mixes samples, changes its buffers, draws random
            numbers, or does what `torch.func` cannot.

    Example:
        >>> class Gain(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.ones(2))
        ...
        ...     def forward(self, x):
        ...         return x * self.gain.exp()
        >>> gain, x = Gain(), torch.tensor([[1.0, 0.0], [2.0, 3.0]])
        >>> activity, _ = PerSample("gain")(Layout(), gain, x).see([gain(x)])
        >>> activity(torch.ones(2, 2))["gain"].count()
        tensor([2, 1])
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # How the module was used where its output was compared: modes, arguments with samples.
        self._compared: set[tuple[Any, ...]] = set()

    def __call__(self, layout: Layout, module: nn.Module, *args: Any, **kwargs: Any) -> Inside:
        """A rule: see `truestep.rules`."""
        return Inside(partial(self._see, layout, module, args, kwargs))

    def _see(
        self, layout: Layout, module: nn.Module, args: Any, kwargs: Any, outputs: list[Tensor]
    ) -> tuple[Callable[..., dict[str, Activity]], list[Any]]:
        with self._refusing(module):
            hindrance = unusable(module)
            if hindrance is not None:
                raise ValueError(hindrance)
            use = use_of(layout, module, args, kwargs, outputs)
            how = (tuple(m.training for m in module.modules()), *use.pieces, use.count > 1)
            if how not in self._compared and use.count:
                _compare(use, outputs)
                self._compared.add(how)
        return partial(self._activity, use), []

    def _activity(self, use: Use, *deltas: Tensor | None) -> dict[str, Activity]:
        with self._refusing(use.module):
            return _activity(use, deltas)

    @contextmanager
    def _refusing(self, module: nn.Module) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            kind = type(module).__name__
            name = repr(self._name) if self._name else "the model"
            reason = str(error).strip().split("\n")[0].rstrip(".")
            if "random operation" in reason:  # vmap's own advice is for who calls it
                reason = "it draws random numbers"
            raise AloneError(
                reason,
                f"{name} ({kind}) has no rule, and its samples cannot be run one by one: {reason}. Give "
                f"it a rule, SampleCounter(model, rules=truestep.RULES | {{{kind}: my_rule}}), or keep "
                "its plain gradient with unsupported='mean'",
            ) from error


def _compare(use: Use, outputs: list[Tensor]) -> None:
    """Raises `ValueError` where samples alone give other outputs than in the batch."""
    for start, stop in use.ranges(0, use.count):
        for place, alone in zip(use.trained, use.forwards(start, stop), strict=True):
            together = use.spread(outputs[place].detach())[start:stop]
            if not _close(alone.to(together.dtype), together):
                raise ValueError(
                    "alone they give another output than in their batch, so the module mixes samples, "
                    "changes from call to call or writes into its arguments"
                )
    # What only a backward pass refuses is refused here, except where checkpointing leaves no place.
    if not saved_tensors_are_packed():
        zeros = {place: use.spread(torch.zeros_like(outputs[place])) for place in use.trained}
        use.gradients(0, 1, zeros)


def _activity(use: Use, deltas: Sequence[Tensor | None]) -> dict[str, Activity]:
    if not use.is_unchanged():
        raise ValueError("an argument was changed in place after the call")
    parameters = use.parameters()
    given = {
        place: use.spread(delta)
        for place, delta in enumerate(deltas)
        if delta is not None and place in use.trained
    }
    if not given:
        return {}
    parts: dict[str, list[Bits]] = {name: [] for name in parameters}
    # bits come in words: masks of a multiple of so many samples are packed at once
    step = max(WORD, use.chunk - use.chunk % WORD)
    for start in range(0, max(1, use.count), step):
        masks = {name: [p.new_zeros(0, p.numel()) != 0] for name, p in parameters.items()}
        for first, last in use.ranges(start, min(start + step, use.count)):
            for name, gradient in use.gradients(first, last, given).items():
                masks[name].append((gradient != 0).reshape(last - first, -1))
        for name, found in masks.items():
            parts[name].append(pack(torch.cat(found)))
    return {name: Elements(parameters[name].shape, appended(b)) for name, b in parts.items()}


def _close(alone: Tensor, together: Tensor) -> bool:
    """Whether two outputs differ by rounding at most, that of sums taken in another order included."""
    finite = together[together.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    tolerance = torch.finfo(together.dtype).eps ** 0.5
    return torch.allclose(alone, together, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
