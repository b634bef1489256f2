"""Ways to train many small networks: what benchmarks/ensemble.py compares.

Each takes a case, the name of an optimizer and how many replicas and steps, and returns a function that
trains so many replicas for so many steps. All read the same data; mini-batches are drawn for each replica.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import truestep
from truestep import ensemble

LR = 0.01
Run = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A network and its batches."""

    widths: tuple[int, ...]
    samples: int
    batch_size: int

    @property
    def full(self) -> bool:
        return self.batch_size == self.samples

    @property
    def products(self) -> int:
        """Multiplications of a step; the first layer needs no gradient by its inputs."""
        sizes = [a * b for a, b in pairwise(self.widths)]
        return self.batch_size * (3 * sum(sizes) - sizes[0])

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(0)
        inputs = generator.random((self.samples, self.widths[0]), np.float32)
        return inputs, generator.integers(0, max(2, self.widths[-1]), self.samples)

    def model(self) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(self.widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def loss(self, z: Tensor, targets: Tensor) -> Tensor:
        if self.widths[-1] == 1:
            return nn.functional.binary_cross_entropy_with_logits(z[..., 0], targets.float())
        return nn.functional.cross_entropy(z, targets)


CASES = {
    "2-10x5-1, 128 samples, full batches": Case((2, 10, 10, 10, 10, 10, 1), 128, 128),
    "784-30-20-10, batch 64": Case((784, 30, 20, 10), 6400, 64),
    "784-128-128-10, batch 1": Case((784, 128, 128, 10), 2560, 1),
    "784-128-128-10, batch 8": Case((784, 128, 128, 10), 2560, 8),
    "784-128-128-10, batch 64": Case((784, 128, 128, 10), 2560, 64),
    "784-128-128-10, batch 256": Case((784, 128, 128, 10), 2560, 256),
}


def by_ensemble(backend: str) -> Callable[[Case, str, int, int], Run]:
    def build(case: Case, optimizer: str, replicas: int, steps: int) -> Run:
        binary = case.widths[-1] == 1
        network = ensemble.Network(
            case.widths,
            output="sigmoid" if binary else "softmax",
            loss="binary_cross_entropy" if binary else "cross_entropy",
        )
        data = ensemble.Data(ensemble.Split(*case.data()))

        def run() -> None:
            ensemble.train(
                network,
                data,
                replicas=replicas,
                steps=steps,
                batch_size=case.batch_size,
                optimizer=ensemble.Optimizer(lr=LR, asgd=optimizer == "aSGD"),
                record=ensemble.Record(splits=()),
                backend=backend,
            )

        return run

    return build


def batches(case: Case, replicas: int, steps: int) -> Tensor:
    """Indices ``[replicas, steps, batch]``."""
    if case.full:
        return torch.arange(case.samples).expand(replicas, steps, -1)
    return torch.randint(case.samples, (replicas, steps, case.batch_size))


def by_torch_loop(case: Case, optimizer: str, replicas: int, steps: int) -> Run:
    inputs, targets = (torch.from_numpy(part) for part in case.data())

    def run() -> None:
        for replica in range(replicas):
            torch.manual_seed(replica)
            model = case.model()
            if optimizer == "aSGD":
                counter = truestep.SampleCounter(model)
                descent: Any = truestep.AdaptiveBatchSGD(model.parameters(), lr=LR, counter=counter)
            else:
                descent = torch.optim.SGD(model.parameters(), lr=LR)
            for index in batches(case, 1, steps)[0]:
                x, y = (inputs, targets) if case.full else (inputs[index], targets[index])
                descent.zero_grad()
                case.loss(model(x), y).backward()
                descent.step()

    return run


def by_vmap(case: Case, optimizer: str, replicas: int, steps: int) -> Run:
    inputs, targets = (torch.from_numpy(part) for part in case.data())
    base = case.model().to("meta")
    models = [case.model() for _ in range(replicas)]
    parameters, _ = torch.func.stack_module_state(models)

    def loss_of(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return case.loss(torch.func.functional_call(base, values, (x,)), y)

    shared = None if case.full else 0
    gradients = torch.func.vmap(torch.func.grad(loss_of), in_dims=(0, shared, shared))
    index = batches(case, replicas, steps)

    @torch.no_grad()
    def run() -> None:
        values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for step in range(steps):
            x, y = (
                (inputs, targets)
                if case.full
                else (inputs[index[:, step]], targets[index[:, step]])
            )
            for name, gradient in gradients(values, x, y).items():
                values[name].sub_(gradient, alpha=LR)

    return run


def by_bmm(case: Case, optimizer: str, replicas: int, steps: int) -> Run:
    inputs, targets = (torch.from_numpy(part) for part in case.data())
    index = batches(case, replicas, steps)

    def run() -> None:
        layers = []
        for width, units in pairwise(case.widths):
            weight = torch.empty(replicas, width, units).uniform_(-(width**-0.5), width**-0.5)
            layers.append(
                (weight.requires_grad_(), torch.zeros(replicas, 1, units).requires_grad_())
            )
        flat = [part for layer in layers for part in layer]
        for step in range(steps):
            if case.full:
                x, y = inputs.expand(replicas, -1, -1), targets.expand(replicas, -1)
            else:
                x, y = inputs[index[:, step]], targets[index[:, step]]
            for number, (weight, bias) in enumerate(layers):
                x = torch.baddbmm(bias, x, weight)
                if number < len(layers) - 1:
                    x = torch.relu(x)
            loss = case.loss(x.flatten(0, 1), y.flatten()) * replicas
            with torch.no_grad():
                torch._foreach_sub_(flat, torch.autograd.grad(loss, flat), alpha=LR)

    return run


def by_jax(case: Case, optimizer: str, replicas: int, steps: int) -> Run:
    import jax  # noqa: PLC0415 - a peer, where it is installed
    from jax import numpy as jnp  # noqa: PLC0415

    inputs, targets = (jnp.asarray(part) for part in case.data())
    index = jnp.asarray(batches(case, 1 if case.full else replicas, steps).numpy(), jnp.int32)

    def loss_of(layers: Any, x: Any, y: Any) -> Any:
        for number, (weight, bias) in enumerate(layers):
            x = x @ weight + bias
            if number < len(layers) - 1:
                x = jax.nn.relu(x)
        if case.widths[-1] == 1:
            z = x[:, 0]
            return (jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z)))).mean()
        return -jnp.take_along_axis(jax.nn.log_softmax(x), y[:, None], 1).mean()

    def train(key: Any, order: Any) -> Any:
        layers = []
        for width, units in pairwise(case.widths):
            key, part = jax.random.split(key)
            bound = width**-0.5
            weight = jax.random.uniform(part, (width, units), minval=-bound, maxval=bound)
            layers.append((weight, jnp.zeros(units)))

        def step(number: Any, layers: Any) -> Any:
            x, y = (
                (inputs, targets) if case.full else (inputs[order[number]], targets[order[number]])
            )
            gradient = jax.grad(loss_of)(layers, x, y)
            return jax.tree.map(lambda p, g: p - LR * g, layers, gradient)

        return jax.lax.fori_loop(0, steps, step, layers)

    together = jax.jit(jax.vmap(train, in_axes=(0, None if case.full else 0)))
    keys = jax.random.split(jax.random.PRNGKey(0), replicas)
    order = index[0] if case.full else index

    def run() -> None:
        jax.block_until_ready(together(keys, order))

    return run


@dataclass(frozen=True)
class Way:
    """One way to train: how it is built, which optimizers it has, and numbers of replicas worth trying."""

    build: Callable[[Case, str, int, int], Run]
    optimizers: tuple[str, ...] = ("SGD",)
    replicas: tuple[int, ...] = (32, 256)
    package: str = "torch"

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


OURS = "truestep.ensemble"
WAYS = {
    OURS: Way(by_ensemble("compiled"), ("SGD", "aSGD"), (8,), "numba"),
    "truestep.ensemble, backend='torch'": Way(by_ensemble("torch"), ("SGD", "aSGD"), (32,)),
    "torch loop": Way(by_torch_loop, ("SGD", "aSGD"), (1,)),
    "torch.func.vmap": Way(by_vmap),
    "torch.baddbmm": Way(by_bmm),
    "jax.vmap in lax.fori_loop": Way(by_jax, replicas=(4, 32, 256), package="jax"),
}
