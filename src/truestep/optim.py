"""The two papers' optimizers: DASGD and AdaptiveBatchSGD.

Both are plain SGD steps along another direction, so the step itself (weight decay, momentum, maximize,
learning rates that are tensors, foreach) is torch's own `torch.optim.sgd.sgd`. Where it can, DASGD takes the
same step in one compiled pass over all parameters.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from truestep.arrived import Buffer
from truestep.checks import check_factor, check_kind, require_at_least_zero
from truestep.counter import SampleCounter
from truestep.distributed import local
from truestep.errors import TruestepError
from truestep.fused import Found, Pass
from truestep.hooks import uncompiled
from truestep.kernels import boosting
from truestep.kernels.stepping import Options
from truestep.update import boosted, mean_effective

__all__ = ["DASGD", "AdaptiveBatchSGD"]

# A parameter group with those of its parameters that have a gradient.
Group = tuple[dict[str, Any], list[Tensor]]
# A pass over parameters, with their buffers of momentum.
Planned = tuple[Pass, list[Tensor], list[Buffer]]
# Where the state keeps the gradient of one step before.
PREVIOUS = "previous_gradient"


class DASGD(Optimizer):
    """Direction accelerated SGD: add the average of two gradients where they agree in sign.

    With g the gradient and rho the booster (Ahn, "A Directional Gradient Acceleration Method In
    Mini-Batch Gradient Descent", equation 1)::

        rho = (g_t + g_{t-1}) / 2  where sign(g_t) == sign(g_{t-1}), else 0
        w <- w - lr * (g_t + rho)

    The first step is plain SGD's. Weight decay comes after the booster, which compares data gradients
    only. It keeps one value per parameter, the previous gradient, as momentum does.

    Args:
        params: parameters or parameter groups, named or not.
        lr: learning rate, a number or a tensor.
        weight_decay: L2 penalty, as in `torch.optim.SGD`.
        maximize: ascend instead of descend.
        foreach: True for torch's multi-tensor step instead of a compiled pass; False to keep torch from
            it where there is no compiled pass; None leaves that choice to torch.
        differentiable: let autograd run through the step, for meta-learning.

    Raises:
        TruestepError: a negative learning rate or weight decay; at the step, a sparse gradient.

    Example:
        >>> import torch, truestep
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = truestep.DASGD([w], lr=0.1)
        >>> for _ in range(2):
        ...     w.grad = torch.tensor([1.0])
        ...     optimizer.step()
        >>> round(w.item(), 4)  # 1 - 0.1 * 1 - 0.1 * (1 + 1)
        0.7
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        require_at_least_zero(lr=lr, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: computes the gradients anew and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = _call(closure)
        for group in self.param_groups:
            in_torch = group["foreach"] or group["differentiable"] or torch.compiler.is_compiling()
            if in_torch or not self._update_at_once(group):
                self._update(group)
        return loss

    def _update_at_once(self, group: dict[str, Any]) -> bool:
        """Updates a group in one pass, or does nothing and says so."""
        params, state = group["params"], self.state
        gradients = [g for p in params if (g := p.grad) is not None]
        if len(gradients) < len(params):
            params = [p for p in params if p.grad is not None]
        previous = [state[p].get(PREVIOUS) for p in params]
        first = [memory is None for memory in previous]
        begins = any(first)
        if begins:
            pairs = zip(gradients, previous, strict=True)
            previous = [torch.empty_like(g) if memory is None else memory for g, memory in pairs]
        table = boosting.table(gradients, previous, params)
        if table is None:
            return False
        boosting.step_(
            table,
            first if begins else (),
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )
        if begins:
            for parameter, memory in zip(params, previous, strict=True):
                state[parameter][PREVIOUS] = memory
        return True

    def _update(self, group: dict[str, Any]) -> None:
        """Updates a group in torch operations."""
        with torch.set_grad_enabled(group["differentiable"]):
            params, directions = [], []
            for parameter in group["params"]:
                if parameter.grad is not None:
                    params.append(parameter)
                    directions.append(self._direction(parameter, group["differentiable"]))
            sgd(
                params,
                directions,
                [None] * len(params),
                foreach=group["foreach"],
                # The multi-tensor step takes a learning rate as a number, whose gradient would be lost.
                fused=False if group["differentiable"] else None,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
                momentum=0,
                dampening=0,
                nesterov=False,
            )

    def _direction(self, parameter: Tensor, differentiable: bool) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None  # noqa: S101
        refuse_sparse(parameter, "DASGD")
        state = self.state[parameter]
        previous = state.get(PREVIOUS)
        direction = gradient if previous is None else boosted(gradient, previous)
        if previous is None or differentiable:
            state[PREVIOUS] = gradient.clone()
        else:
            previous.copy_(gradient)
        return direction


class AdaptiveBatchSGD(Optimizer):
    """aSGD: SGD along the mean effective gradient.

    Each parameter's summed gradient is divided by the number of samples that contributed to it, its
    adaptive batch size m, instead of by the batch size N (Shi et al. 2022, Algorithm 2)::

        g <- g * N / (m + eps)  where m > 0
        w <- w - lr * g

    Momentum and weight decay are `torch.optim.SGD`'s and act on the corrected gradient. Without
    momentum it keeps no state at all. `.grad` is left as it is.

    Args:
        params: parameters or parameter groups, named or not, all of the counter's model.
        lr: learning rate, a number or a tensor.
        counter: the `SampleCounter` of the model.
        momentum: momentum factor.
        dampening: dampening of momentum.
        weight_decay: L2 penalty.
        nesterov: Nesterov momentum.
        eps: added to m; the paper's non-zero natural number.
        factor_limit: the largest N / (m + eps) allowed; None for no limit.
        maximize: ascend instead of descend.
        foreach: use torch's multi-tensor step over all parameters at once, which holds all corrected
            gradients at a time; by default one parameter goes after another.

    Raises:
        TruestepError: a negative value, Nesterov without momentum, a parameter that is not the
            model's; at the step, a parameter with a gradient but no counted sample.

    Example:
        >>> import torch, truestep
        >>> model = torch.nn.Linear(2, 1)
        >>> counter = truestep.SampleCounter(model)
        >>> optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
        >>> model(torch.tensor([[1.0, 0.0], [2.0, 3.0]])).mean().backward()
        >>> optimizer.step()
    """

    # A copied or unpickled optimizer gets only state and groups back, and no counter: its step says so.
    counter: SampleCounter | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        counter: SampleCounter,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1.0,
        factor_limit: float | None = None,
        maximize: bool = False,
        foreach: bool = False,
    ) -> None:
        require_at_least_zero(lr=lr, momentum=momentum, weight_decay=weight_decay)
        check_factor(eps, factor_limit)
        check_kind(counter, SampleCounter, "counter", "truestep.SampleCounter(model)")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise TruestepError("nesterov=True needs momentum > 0 and dampening = 0; set them")
        self.counter = counter
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "factor_limit": factor_limit,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # those of torch.optim.SGD know neither eps nor a limit
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, which must be the counter's model's."""
        super().add_param_group(param_group)
        if self.counter is not None:
            try:
                self.counter.check(self.param_groups[-1]["params"])
            except TruestepError:
                self.param_groups.pop()
                raise

    @uncompiled
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: computes the gradients anew and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        if self.counter is None:
            raise TruestepError(
                "this AdaptiveBatchSGD was copied or unpickled and has no counter; set "
                "optimizer.counter = truestep.SampleCounter(model) with the model it now trains"
            )
        loss, counter = _call(closure), self.counter
        counter.prepare(p for group in self.param_groups for p in group["params"])
        groups = [
            (group, [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        plans, rest = self._add_arrived(groups)
        # All groups are looked at before the first moves.
        found = [counter.reach_all(params) for _, params in rest]
        for whole, params, buffers in plans:
            whole.run()
            for parameter, (buffer, fresh) in zip(params, buffers, strict=False):
                if fresh:
                    self.state[parameter]["momentum_buffer"] = buffer
        for (group, params), reached in zip(rest, found, strict=True):
            self._update(group, params, reached)
        for _, params in groups:
            counter.mark_step(params)
        return loss

    def _add_arrived(self, groups: list[Group]) -> tuple[list[Planned], list[Group]]:
        """Plans a step for what needs no record, mostly all of it; also returns the groups of the rest."""
        assert self.counter is not None  # noqa: S101
        arrived, size = self.counter.arrived()
        if arrived is None or any(group["foreach"] for group, _ in groups):
            return [], groups
        plans: list[Planned] = []
        rest: list[Group] = []
        for group, params in groups:
            own, others = arrived.split(params)
            whole, buffers = Pass(_options(group)), self._buffers(group, own)
            if not arrived.add_to(whole, size, own, buffers, steps=True):
                return [], groups
            plans.append((whole, own, buffers))
            if others:
                rest.append((group, others))
        return plans, rest

    def _buffers(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[Buffer]:
        """The buffers of a group with momentum."""
        if not group["momentum"]:
            return []
        known = [self.state[p].get("momentum_buffer") for p in params]
        pairs = zip(params, known, strict=True)
        return [(torch.empty_like(p), True) if b is None else (b, False) for p, b in pairs]

    def _update(
        self, group: dict[str, Any], params: list[Tensor], reached: Iterable[Found]
    ) -> None:
        """Takes the step of one group, with the counting in one compiled pass where that takes all of it."""
        whole = Pass(_options(group))
        gradients: list[Any] = [parameter.grad for parameter in params]
        at_once = not (group["momentum"] or group["foreach"])
        if at_once and whole.add_all(gradients, reached, params):
            whole.run()
        else:
            self._update_singly(group, zip(params, reached, strict=True), whole)

    @torch.no_grad()
    def _update_singly(
        self, group: dict[str, Any], found_for: Iterable[tuple[Tensor, Found]], whole: Pass
    ) -> None:
        """The same where some have a buffer of momentum, or parts on other ranks, or are only for torch."""
        plain: list[Tensor] = []
        directions: list[Tensor] = []
        begun: list[tuple[dict[str, Any], Tensor]] = []
        plain_step = not (group["momentum"] or group["foreach"])
        for parameter, found in found_for:
            gradient: Any = parameter.grad
            state = self.state[parameter] if group["momentum"] else {}
            buffer = state.get("momentum_buffer")
            fresh = buffer is None and bool(group["momentum"])
            if plain_step and gradient.is_sparse and whole.add_sparse(gradient, found, parameter):
                continue
            own, weights = local(gradient), local(parameter)
            known = () if buffer is None else (local(buffer),)
            if not group["foreach"] and whole.takes(own, weights, *known):
                if fresh:
                    buffer = torch.empty_like(parameter)
                    known = (local(buffer),)
                    begun.append((state, buffer))
                whole.add(own, found, weights, *known, fresh=fresh)
                continue
            direction = mean_effective(
                gradient.detach(), found, group["eps"], group["factor_limit"]
            )
            if found is None and group["foreach"] and group["nesterov"]:
                direction = direction.clone()  # torch adds the buffer to it in place
            plain.append(parameter)
            directions.append(direction)
            if not group["foreach"]:
                self._step(group, [plain.pop()], [directions.pop()])
        whole.run()
        # Only now: until then they hold nothing, should a later parameter be refused.
        for state, buffer in begun:
            state["momentum_buffer"] = buffer
        self._step(group, plain, directions)

    def _step(self, group: dict[str, Any], params: list[Tensor], directions: list[Tensor]) -> None:
        """torch's own step along directions."""
        buffers = [
            self.state[p].get("momentum_buffer") if group["momentum"] else None for p in params
        ]
        sgd(
            params,
            directions,
            buffers,
            has_sparse_grad=any(direction.is_sparse for direction in directions),
            foreach=group["foreach"],
            fused=False,
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"]:
            for parameter, buffer in zip(params, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer


def _options(group: dict[str, Any]) -> Options:
    return Options(
        float(group["lr"]),
        float(group["weight_decay"]),
        float(group["momentum"]),
        float(group["dampening"]),
        group["nesterov"],
        group["maximize"],
        float(group["eps"]),
        group["factor_limit"],
    )


def refuse_sparse(parameter: Tensor, what: str) -> None:
    """Raises `TruestepError` if the gradient is sparse: another step's has other rows to compare with."""
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise TruestepError(
            f"{what} compares two steps' gradients element by element, and the parameter of shape "
            f"{tuple(parameter.shape)} has a sparse gradient; build its embedding with sparse=False"
        )


def _call(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
