"""What is compared: optimizers, and other libraries that can give the counts of aSGD."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

import truestep
from tasks import Task

Step = Callable[[], None]
LR = 1e-3


def trained_by(make: Callable[[Task], torch.optim.Optimizer]) -> Callable[[Task], Step]:
    """A training step: forward, backward and the optimizer's step."""

    def build(task: Task) -> Step:
        optimizer = make(task)

        def step() -> None:
            optimizer.zero_grad()
            task.backward()
            optimizer.step()

        return step

    return build


def momentum(*, fused: bool) -> Callable[[Task], torch.optim.Optimizer]:
    return lambda task: torch.optim.SGD(
        task.model.parameters(), lr=LR, momentum=0.9, fused=fused, foreach=not fused
    )


def adaptive(task: Task) -> torch.optim.Optimizer:
    counter = truestep.SampleCounter(task.model, unit=task.unit)
    return truestep.AdaptiveBatchSGD(task.model.parameters(), lr=LR, counter=counter)


def adaptive_adam(task: Task) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(task.model.parameters())
    counter = truestep.SampleCounter(task.model, unit=task.unit)
    truestep.attach(optimizer, truestep.mean_effective_gradient(counter))
    return optimizer


CANDIDATES: dict[str, Callable[[Task], Step]] = {
    "SGD": trained_by(lambda task: torch.optim.SGD(task.model.parameters(), lr=LR)),
    "AdaptiveBatchSGD": trained_by(adaptive),
    "Adam": trained_by(lambda task: torch.optim.Adam(task.model.parameters())),
    "Adam with asgd": trained_by(adaptive_adam),
    "SGD momentum, fused": trained_by(momentum(fused=True)),
    "SGD momentum, foreach": trained_by(momentum(fused=False)),
    "DASGD": trained_by(lambda task: truestep.DASGD(task.model.parameters(), lr=LR)),
}
# Candidate and what it is compared with, turn by turn.
PAIRS = [
    ("AdaptiveBatchSGD", "SGD"),
    ("Adam with asgd", "Adam"),
    ("DASGD", "SGD momentum, fused"),
    ("DASGD", "SGD momentum, foreach"),
]


# aSGD as one would write it on another library: all per-sample gradients, then their non-zeros.


@torch.no_grad()
def descend(parameter: Tensor, per_sample: Tensor) -> None:
    """A step of aSGD, from gradients that add up to the batch's mean gradient."""
    factor = len(per_sample) / ((per_sample != 0).sum(0) + 1)
    parameter.sub_(per_sample.sum(0) * factor, alpha=LR)


def by_torch_func(task: Task) -> Step:
    parameters = dict(task.model.named_parameters())

    def loss_of(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(task.model, values, (x.unsqueeze(0),))
        return task.loss_fn(output, y.unsqueeze(0)) / len(task.inputs)

    gradients = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0))

    def step() -> None:
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        for name, per_sample in gradients(values, task.inputs, task.targets).items():
            descend(parameters[name], per_sample)

    return step


def by_opacus(task: Task) -> Step:
    from opacus import GradSampleModule  # noqa: PLC0415 - a peer, where it is installed

    model = GradSampleModule(task.model, loss_reduction="mean")

    def step() -> None:
        model.zero_grad()
        task.loss_fn(model(task.inputs), task.targets).backward()
        for parameter in model.parameters():
            descend(parameter, parameter.grad_sample / len(task.inputs))

    return step


def by_backpack(task: Task) -> Step:
    from backpack import backpack, extend  # noqa: PLC0415 - a peer, where it is installed
    from backpack.extensions import BatchGrad  # noqa: PLC0415

    model, loss_fn = extend(task.model), extend(task.loss_fn)

    def step() -> None:
        model.zero_grad()
        with backpack(BatchGrad()):
            loss_fn(model(task.inputs), task.targets).backward()
        for parameter in model.parameters():
            descend(parameter, parameter.grad_batch)

    return step


# Peer -> its package and how to build its step.
PEERS: dict[str, tuple[str, Callable[[Task], Step]]] = {
    "torch.func vmap(grad)": ("torch", by_torch_func),
    "Opacus": ("opacus", by_opacus),
    "BackPACK": ("backpack", by_backpack),
}
PEERS_MEMORY = 3e9  # bytes of per-sample gradients that are tried


def refusal(peer: str, task: Task) -> str | None:
    """Why a peer is not measured on a task; None if it is."""
    package, _ = PEERS[peer]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; pip install -e '.[peers]'"
    size = len(task.inputs) * sum(p.nbytes for p in task.model.parameters())
    if size > PEERS_MEMORY:
        return f"its per-sample gradients take {size / 1e9:.0f} GB"
    if task.unit == "position":
        return "it has gradients by sample, not by position"
    if peer == "BackPACK" and not isinstance(task.model, nn.Sequential):
        return "it takes sequences of layers that it knows"
    return None
