"""Gradient transforms in front of any torch optimizer: `attach(optimizer, *transforms)`.

A transform is a callable that edits the `.grad` of an optimizer's parameters just before its step and
may return a function to call just after it.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from truestep.checks import check_factor, check_kind
from truestep.counter import SampleCounter
from truestep.errors import TruestepError
from truestep.hooks import uncompiled
from truestep.kernels import boosting
from truestep.optim import DASGD, PREVIOUS, refuse_sparse
from truestep.update import boosted

__all__ = [
    "Handle",
    "Transform",
    "attach",
    "directional_boost",
    "mean_effective_gradient",
    "transform_names",
]

Transform = Callable[[Optimizer], Callable[[], None] | None]

# Kept in the first parameter group, the only place that copies, pickles and state_dicts carry along.
MARK = "transforms"

_attached: "weakref.WeakSet[Handle]" = weakref.WeakSet()
# Whose optimizers are in the middle of a step, which may take that of an optimizer inside.
_stepping: "weakref.WeakSet[Handle]" = weakref.WeakSet()


def attach(optimizer: Optimizer, *transforms: Transform) -> "Handle":
    """Lets every `optimizer.step()` first transform the gradients, in the order given.

    Closures are wrapped, so that the transforms see the gradients which the closure computes. A copy
    of the optimizer, or one unpickled, has no transforms and raises at its step until they are attached
    again; so does an optimizer that loads the state_dict of one with transforms.

    Args:
        optimizer: any `torch.optim.Optimizer` except LBFGS.
        transforms: for example `mean_effective_gradient(counter)`, `directional_boost()`. What a booster
            compares is what comes before it: behind aSGD two mean effective gradients, in front of it two
            gradients, to whose sum with the booster aSGD's factors then apply.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        TruestepError: no optimizer, one that takes no hooks, LBFGS, a booster for DASGD, no transform, or the
            optimizer has transforms already.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Linear(2, 1)
        >>> counter = truestep.SampleCounter(model)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> handle = truestep.attach(optimizer, truestep.mean_effective_gradient(counter),
        ...                          truestep.directional_boost())
        >>> model(torch.ones(4, 2)).mean().backward()
        >>> optimizer.step()
    """
    check_kind(optimizer, Optimizer, "optimizer", "a torch.optim.Optimizer")
    # Optimizer.__init__ makes the first and wraps the second, where hooks are called.
    takes_hooks = hasattr(optimizer, "_optimizer_step_pre_hooks")
    if not (takes_hooks and getattr(type(optimizer).step, "hooked", False)):
        raise TruestepError(
            f"{type(optimizer).__name__} wraps an optimizer and takes no hooks; attach the transforms to the "
            "one that it wraps"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TruestepError(
            "LBFGS compares losses and gradients along a line, which transformed gradients do not fit; "
            "attach the transforms to another optimizer"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise TruestepError(
            "transforms change .grad past autograd, so that a differentiable step would not know of "
            "them; use DASGD(differentiable=True), or leave out differentiable=True"
        )
    if not transforms:
        raise TruestepError(
            "attach() got no transform; pass for example truestep.directional_boost()"
        )
    makers: tuple[Any, ...] = (mean_effective_gradient, directional_boost)
    for transform in transforms:
        if not callable(transform) or transform in makers:
            raise TruestepError(
                f"attach() got {_name(transform)}, which is not a transform; "
                "pass mean_effective_gradient(counter), directional_boost() or a callable"
            )
    if isinstance(optimizer, DASGD) and directional_boost.__name__ in map(_name, transforms):
        raise TruestepError(
            "DASGD adds the booster itself, to gradients that directional_boost() would have boosted "
            "already; leave directional_boost() out, or attach it to torch.optim.SGD"
        )
    if _find_handle(optimizer) is not None:
        raise TruestepError(
            "this optimizer has transforms already; remove() their handle, then attach all in one call"
        )
    return Handle(optimizer, transforms)


class Handle:
    """The transforms on one optimizer; made by `attach`.

    Args:
        optimizer: the optimizer.
        transforms: what to run before its steps.
    """

    def __init__(self, optimizer: Optimizer, transforms: tuple[Transform, ...]) -> None:
        self._transforms = transforms
        self._finish: list[Callable[[], None]] = []
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self._mark()
        _attached.add(self)

    def remove(self) -> None:
        """Takes the transforms off the optimizer.

        The gradients that a booster has kept stay in the optimizer's state, for one that is attached again.
        """
        if _find_handle(self._optimizer) is self:
            self._optimizer.param_groups[0].pop(MARK, None)
        for handle in self._handles:
            handle.remove()
        _attached.discard(self)

    def _mark(self) -> None:
        self._optimizer.param_groups[0][MARK] = "+".join(map(_name, self._transforms))

    def is_inside(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer wraps this one, with the same parameter groups."""
        return self._optimizer.param_groups[0] is optimizer.param_groups[0]

    def serves(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer has some of the same parameters, as the one in ZeroRedundancyOptimizer."""
        own = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        return all(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        _stepping.add(self)
        self._mark()  # load_state_dict may have replaced the group
        self._finish.clear()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._call(None, optimizer)
            return None
        return (args[0], partial(self._call, closure, optimizer), *args[2:]), {
            name: value for name, value in kwargs.items() if name != "closure"
        }

    def _call(self, closure: Callable[[], Any] | None, optimizer: Optimizer) -> Any:
        try:
            loss = None if closure is None else closure()
            self._transform(optimizer)
        except BaseException:
            _stepping.discard(self)  # the step ends here, without its post-hooks
            raise
        return loss

    @uncompiled
    @torch.no_grad()
    def _transform(self, optimizer: Optimizer) -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            raise TruestepError(
                f"GradScaler leaves unscaling to the fused {type(optimizer).__name__}, so the transforms "
                "would see scaled gradients; call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and found_inf.item() > 0:
            return  # the fused step skips itself
        for transform in self._transforms:
            finish = transform(optimizer)
            if finish is not None:
                self._finish.append(finish)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        _stepping.discard(self)
        for finish in self._finish:
            finish()
        self._finish.clear()


def mean_effective_gradient(
    counter: SampleCounter, *, eps: float = 1.0, factor_limit: float | None = None
) -> Transform:
    """aSGD as a transform: g <- g N / (m + eps) where m > 0 (Shi et al. 2022, Algorithm 2).

    Args:
        counter: the `SampleCounter` of the model that the optimizer trains.
        eps: added to the adaptive batch size m; the paper's non-zero natural number.
        factor_limit: the largest N / (m + eps) allowed; None for no limit.

    Raises:
        TruestepError: no counter, or a number that makes no factor.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> transform = truestep.mean_effective_gradient(truestep.SampleCounter(model))
        >>> handle = truestep.attach(optimizer, transform)
    """
    check_kind(counter, SampleCounter, "counter", "truestep.SampleCounter(model)")
    check_factor(eps, factor_limit)

    def mean_effective_gradient(optimizer: Optimizer) -> Callable[[], None]:
        params = _with_gradient(optimizer)
        counter.check(params)
        counter.correct_gradients(params, eps=eps, factor_limit=factor_limit)
        return partial(counter.mark_step, params)

    return mean_effective_gradient


def directional_boost() -> Transform:
    """DA-SGD as a transform: add the average of two gradients where their signs agree (Ahn, equation 1).

    The previous gradient is kept in `optimizer.state[parameter]["previous_gradient"]`, so it is saved
    and loaded with the optimizer. The boosted gradient stays in `.grad`: call `zero_grad()` before the next
    backward pass, which would add to it, and take no second step with it. `DASGD` leaves `.grad` as it is.

    Example:
        >>> import torch, truestep
        >>> optimizer = torch.optim.Adam(torch.nn.Linear(2, 1).parameters())
        >>> handle = truestep.attach(optimizer, truestep.directional_boost())
    """

    def directional_boost(optimizer: Optimizer) -> Callable[[], None]:
        memory: dict[Tensor, Tensor] = {}
        gradients, previous = [], []
        for parameter in _with_gradient(optimizer):
            refuse_sparse(parameter, "directional_boost")
            gradient = parameter.grad
            assert gradient is not None  # noqa: S101
            remembered = optimizer.state[parameter].get(PREVIOUS)
            if remembered is None:
                memory[parameter] = gradient.clone()
            else:
                gradients.append(gradient)
                previous.append(remembered)
        _boost(gradients, previous)

        def remember() -> None:
            # Only now: optimizers take an empty state as the sign of their first step.
            for parameter, gradient in memory.items():
                optimizer.state[parameter][PREVIOUS] = gradient

        return remember

    return directional_boost


def transform_names(optimizer: Optimizer) -> list[str]:
    """The names of the transforms attached to an optimizer, in order.

    Args:
        optimizer: any.
    """
    groups = optimizer.param_groups
    mark = groups[0].get(MARK) if groups else None
    return mark.split("+") if mark else []


def _boost(gradients: list[Tensor], previous: list[Tensor]) -> None:
    table = boosting.table(gradients, previous)
    if table is not None:
        boosting.boost_(table)
        return
    for gradient, remembered in zip(gradients, previous, strict=True):
        direction = boosted(gradient, remembered)
        remembered.copy_(gradient)
        gradient.copy_(direction)


def _name(transform: Transform) -> str:
    found: str = getattr(transform, "__name__", type(transform).__name__)
    return found


def _with_gradient(optimizer: Optimizer) -> list[Tensor]:
    groups = optimizer.param_groups
    return [p for group in groups for p in group["params"] if p.grad is not None]


def _find_handle(optimizer: Optimizer) -> Handle | None:
    for hook in optimizer._optimizer_step_pre_hooks.values():  # noqa: SLF001
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Handle):
            return owner
    return None


def _guard(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    mark = optimizer.param_groups[0].get(MARK) if optimizer.param_groups else None
    if mark is None or _find_handle(optimizer) is not None:
        return
    inside = any(handle.serves(optimizer) for handle in _stepping)
    if not inside and not any(handle.is_inside(optimizer) for handle in _attached):
        raise TruestepError(
            f"this optimizer's gradients were transformed by {mark}, but it is a copy, or was unpickled, or "
            "has loaded such an optimizer's state: attach the transforms again with truestep.attach(), or "
            f"go on without them after `del optimizer.param_groups[0][{MARK!r}]`"
        )


# PyTorch drops an optimizer's hooks when it is copied or pickled; a global hook is what remains.
register_optimizer_step_pre_hook(_guard)
