"""Trainings of random steps end the same whether or not somebody asks for counts after a backward pass."""

import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import truestep
from truestep.errors import TruestepError

STEPS = 40


class Net(nn.Module):
    """Layers of many kinds, of which a call uses those that the bits of `way` say; some twice."""

    def __init__(self, kind):
        super().__init__()
        self.table = nn.Embedding(12, 6, sparse=kind == "sparse")
        self.a, self.b, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.c, self.conv = nn.Linear(6, 6, bias=False), nn.Conv1d(6, 6, 3, padding=1)
        self.heads = nn.ModuleList([nn.Linear(6, 3) for _ in range(3)])
        self.places = nn.Embedding(4, 6)
        self.scale = nn.Parameter(torch.ones(6)) if kind == "scaled" else None
        if kind == "tied":
            self.c.weight = self.b.weight

    def forward(self, rows, way):
        h = self.table(rows)
        if way & 1:
            h = h + self.places(torch.arange(rows.shape[1]))
        h = self.norm(self.a(h)).relu()
        if way & 2:
            h = self.conv(h.transpose(1, 2)).transpose(1, 2).relu()
        for bit, layer in ((4, self.b), (8, self.c), (16, self.a)):
            if way & bit:
                h = layer(h).relu()
        if self.scale is not None:
            h = h * self.scale
        if way & 32:
            h = checkpoint(self.c, h, use_reentrant=bool(way & 64))
        return [self.heads[0](h.mean(1)), self.heads[1](h.mean(1)), self.heads[2](h).mean(1)]


class Training:
    """A model, its counter and optimizer, and what happens to them, drawn by a seed."""

    def __init__(self, seed, *, asking):
        self.draw, self.asking = random.Random(seed), asking
        torch.manual_seed(seed)
        kind = self.draw.choice(["plain", "tied", "scaled", "sparse"])
        self.model = Net(kind)
        self.parameters = [*self.model.parameters()]
        unit = self.draw.choice(["sample", "sample", "position"])
        self.counter = truestep.SampleCounter(self.model, unit=unit)
        self.optimizer = self.make_optimizer(self.draw.randrange(4), kind == "sparse")
        self.ways = [self.draw.randrange(128) for _ in range(2)]

    def make_optimizer(self, number, sparse):
        params, counter = self.parameters, self.counter
        if number == 0 and not sparse:
            optimizer = torch.optim.Adam(params, lr=0.01)
            truestep.attach(optimizer, truestep.mean_effective_gradient(counter))
            return optimizer
        if number == 1:
            groups = [{"params": params[:5]}, {"params": params[5:], "lr": 0.02}]
            return truestep.AdaptiveBatchSGD(groups, lr=0.05, counter=counter)
        momentum = 0.9 if number == 2 else 0.0
        return truestep.AdaptiveBatchSGD(params, lr=0.05, counter=counter, momentum=momentum)

    def loss(self):
        rows = torch.randint(0, 12, (self.draw.choice([2, 3, 5, 70]), 4))
        outputs = self.model(rows, self.draw.choice(self.ways))
        chosen = outputs if self.draw.random() < 0.4 else [self.draw.choice(outputs)]
        return sum(output.square().sum() for output in chosen), outputs

    def backward(self, loss, **options):
        loss.backward(**options)
        if self.asking:
            self.counter.counts()

    def train(self):
        self.optimizer.zero_grad()
        self.backward(self.loss()[0])
        self.optimizer.step()

    def accumulate(self):
        self.backward(self.loss()[0])

    def step(self):
        self.optimizer.step()

    def zero(self):
        self.optimizer.zero_grad(set_to_none=self.draw.random() < 0.7)

    def correct(self):
        self.counter.correct_gradients(self.draw.choice([None, self.parameters[::3]]))

    def go_again(self):
        loss, outputs = self.loss()
        self.backward(loss, retain_graph=True)
        if self.draw.random() < 0.5:
            self.zero()
        self.backward(self.draw.choice(outputs).sum())

    def ask_autograd(self):
        torch.autograd.grad(self.loss()[0], self.parameters[:3], allow_unused=True)

    def call_twice(self):
        self.backward(self.loss()[0] + self.loss()[0])

    def interrupt(self):
        handle = self.model.norm.weight.register_hook(lambda _: 1 / 0)
        try:
            self.backward(self.loss()[0])
        finally:
            handle.remove()

    def exchange(self):
        parameter = self.draw.choice(self.parameters)
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()

    def freeze(self):
        parameter = self.draw.choice(self.parameters)
        parameter.requires_grad_(not parameter.requires_grad)
        parameter.grad = None

    def set_size(self):
        self.counter.batch_size = self.draw.choice([None, None, 100])

    def run(self):
        """What is seen after every step: the error, weights, gradients."""
        steps = [*[self.train] * 6, self.accumulate, self.step, self.zero, self.zero, self.correct]
        steps += [self.go_again, self.ask_autograd, self.call_twice, self.interrupt]
        steps += [self.exchange, self.freeze, self.set_size]
        seen = []
        for _ in range(STEPS):
            step, error = self.draw.choice(steps), ""
            try:
                step()
            except (TruestepError, RuntimeError, ZeroDivisionError) as raised:
                error = f"{type(raised).__name__}: {raised}"
            found = [p.detach().clone() for p in self.parameters]
            found += [p.grad.clone() for p in self.parameters if p.grad is not None]
            seen.append((step.__name__, error, found))
        return [*seen, ("end", str(self.counter.batch_size), [*self.counter.counts().values()])]


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.filterwarnings("ignore")
def test_asking_for_counts_changes_nothing(seed):
    quiet, asked = (Training(seed, asking=asking).run() for asking in (False, True))
    for (name, error, found), (_, other_error, others) in zip(quiet, asked, strict=True):
        assert error == other_error, name
        torch.testing.assert_close(found, others, rtol=0, atol=0, equal_nan=True, msg=name)
