"""Gradients that several backward passes add up serve a step without records too."""

import random

import pytest
import torch
from torch import nn

import truestep
from truestep import arrived, succession
from truestep.errors import TruestepError
from truestep.kernels.stepping import Line

pytestmark = pytest.mark.skipif(
    not truestep.kernels.dispatch.installed(),
    reason="a step goes by records without compiled loops",
)
SIZES = [1, 3, 40, 63, 64, 65, 128]


class Branches(nn.Module):
    """A layer that some calls leave out, and one that is used twice by some."""

    def __init__(self):
        super().__init__()
        self.first, self.some, self.last = nn.Linear(7, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        inner = self.first(x).relu()
        for _ in range((1, 1, 1, 0, 2)[self.calls % 5]):
            inner = inner + self.some(inner)
        return self.last(inner)


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.norm, self.end = (
            nn.Linear(7, 6),
            nn.LayerNorm(6),
            nn.Linear(6, 3, bias=False),
        )

    def forward(self, x):
        return self.end(self.norm(self.mix(x)).relu()).mean(1)


def vectors():
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 3))


def images():
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.GroupNorm(2, 4)]
    layers += [nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 9, 3))


MODELS = {vectors: (7,), images: (2, 8, 8), Positions: (5, 7), Branches: (7,)}


def batch_for(make, samples, draw):
    full = (samples, *MODELS[make])
    kind = draw.choice(["some", "some", "most", "all"])
    return (
        torch.rand(full)
        if kind == "all"
        else torch.randn(full) * (torch.rand(full) < {"some": 0.2, "most": 0.9}[kind])
    )


@pytest.fixture
def joined(monkeypatch):
    """How many passes each step has put together that was taken without records."""
    found, as_one = [], arrived.as_one

    def noting(passes, held):
        seen = as_one(passes, held)
        found.append(0 if seen is None else len(passes))
        return seen

    monkeypatch.setattr(arrived, "as_one", noting)
    return found


def loss_of(outputs):
    return outputs.square().sum() * 0.01


class Training:
    """A model that is trained in micro-batches, and what may come between them, drawn by a seed."""

    def __init__(self, make, unit, seed, *, asking):
        self.make, self.draw, self.asking = make, random.Random(seed), asking
        torch.manual_seed(seed)
        self.model = make()
        self.counter = truestep.SampleCounter(self.model, unit=unit)
        self.parameters = [*self.model.parameters()]
        options = {"lr": 0.05, "momentum": 0.9 * (seed % 2), "counter": self.counter}
        self.optimizer = truestep.AdaptiveBatchSGD(self.parameters, **options)
        self.size = self.draw.choice([None, 64])

    def batch(self, size=None):
        return batch_for(self.make, size or self.size or self.draw.choice(SIZES), self.draw)

    def backward(self, loss, **options):
        loss.backward(**options)
        if self.asking:
            self.counter.counts()

    def add(self):
        for _ in range(self.draw.choice([1, 2, 3, 5])):
            self.backward(loss_of(self.model(self.batch())))

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step_and_zero_in_place(self):
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def go_again(self):
        outputs = self.model(self.batch(40))
        self.backward(loss_of(outputs), retain_graph=True)
        self.add()
        self.backward(loss_of(outputs[:3]))

    def clip(self):
        nn.utils.clip_grad_norm_(self.parameters, 0.1)

    def ask_autograd(self):
        torch.autograd.grad(loss_of(self.model(self.batch(3))), self.parameters[-1:])

    def interrupt(self):
        handle = self.parameters[-1].register_hook(lambda _: 1 / 0)
        try:
            self.add()
        finally:
            handle.remove()

    def correct(self):
        self.counter.correct_gradients(self.draw.choice([None, self.parameters[:2]]))

    def exchange(self):
        first = self.parameters[0]
        first.grad = None if first.grad is None else first.grad.clone()

    def freeze(self):
        first = self.parameters[0]
        first.requires_grad_(False).grad = None
        self.add()
        first.requires_grad_(True)

    def run(self):
        """What is seen after every event: the error, weights, gradients."""
        events = [*[self.add] * 12, *[self.step] * 9, *[self.step_and_zero_in_place] * 3]
        events += [self.go_again, self.clip, self.ask_autograd, self.interrupt, self.correct]
        events += [self.exchange, self.freeze, self.optimizer.zero_grad]
        seen = []
        for _ in range(30):
            event, error = self.draw.choice(events), ""
            try:
                event()
            except (TruestepError, ZeroDivisionError) as raised:
                error = f"{type(raised).__name__}: {raised}"
                self.optimizer.zero_grad()
            found = [p.detach().clone() for p in self.parameters]
            found += [p.grad.clone() for p in self.parameters if p.grad is not None]
            seen.append((event.__name__, error, found))
        return [*seen, ("end", str(self.counter.batch_size), [*self.counter.counts().values()])]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unit", ["sample", "position"])
@pytest.mark.parametrize("make", MODELS)
def test_micro_batches_are_the_same_with_and_without_records(make, unit, seed, joined):
    with_records = Training(make, unit, seed, asking=True).run()
    assert not joined
    without = Training(make, unit, seed, asking=False).run()
    for (event, error, found), (_, other_error, expected) in zip(
        without, with_records, strict=True
    ):
        assert error == other_error
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=f"after {event}")


def test_random_micro_batches_are_put_together(joined):
    for make, seed in ((vectors, 1), (images, 5)):
        Training(make, "sample", seed, asking=False).run()
        assert min(joined) > 1
        joined.clear()


def usual(make=vectors, unit="sample", **options):
    torch.manual_seed(0)
    model = make()
    counter = truestep.SampleCounter(model, unit=unit)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter, **options)
    model(torch.randn(4, *MODELS[make])).sum().backward()
    optimizer.zero_grad()
    return model, counter, optimizer


@pytest.mark.parametrize("sizes", [(64, 64, 64), (64, 64, 9), (7, 40, 65), (1, 1)])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("make", [vectors, images, Positions])
def test_a_step_after_micro_batches_counts_all_their_samples(make, full, sizes, joined):
    model, counter, optimizer = usual(make)
    draw = random.Random(1)
    batches = [
        torch.rand(size, *MODELS[make]) if full else batch_for(make, size, draw) for size in sizes
    ]
    total = {name: torch.zeros_like(p, dtype=torch.int64) for name, p in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        loss_of(model(batch)).backward()
        for name, m in counter.counts().items():
            total[name] += m
    model.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    for batch in batches:
        loss_of(model(batch)).backward()
    optimizer.step()
    for (name, p), old in zip(model.named_parameters(), before, strict=True):
        m, g = total[name], p.grad
        torch.testing.assert_close(p, old - 0.1 * torch.where(m > 0, g * sum(sizes) / (m + 1), g))
    # Words of samples with positions cannot always follow each other.
    assert joined in ([len(sizes)], [0])
    assert joined == [len(sizes)] or make is not vectors
    assert counter.batch_size == sum(sizes)
    assert all(torch.equal(total[name], m) for name, m in counter.counts().items())


def test_gradients_zeroed_in_place_begin_anew_without_records():
    model, counter, optimizer = usual()
    for size in (5, 6, 7):
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(size, 7)).square().sum().backward()
        assert counter.arrived()[0] is not None
        optimizer.step()
    assert counter.batch_size == 7


def test_bits_that_take_more_than_counts_become_those_while_batches_are_added(monkeypatch):
    monkeypatch.setattr(arrived, "LITTLE_OF_ALL", 0)
    model, counter, _ = usual()
    passes = 0
    while passes < 100:
        model(torch.randn(70, 7)).square().sum().backward()
        passes += 1
        if counter.arrived()[0] is None:
            break
    assert 1 < passes < 20
    assert counter.batch_size == 70 * passes


def test_a_parameter_without_gradient_in_one_pass_takes_records():
    model, counter, _ = usual()
    model(torch.randn(5, 7)).square().sum().backward()
    model[0](torch.randn(6, 7)).sum().backward()
    before = counter.counts()
    assert int(before["3.bias"].max()) == 5
    model(torch.randn(5, 7)).square().sum().backward()
    model.zero_grad()
    model(torch.randn(5, 7)).square().sum().backward()
    alone = counter.counts()["0.bias"]
    model[0](torch.randn(6, 7)).sum().backward()
    assert counter.arrived()[0] is None
    assert torch.equal(counter.counts()["0.bias"], alone + 6)


def test_lines_that_differ_are_not_made_one():
    entry = truestep.kernels.stepping.Entry(3, 2, samples=4)
    shape = torch.Size((3, 2))
    lines = [Line(shape, 4, entry), Line(shape, 4, entry._replace(positions=2))]
    parameter = torch.zeros(3, 2)
    passes = [{1: (parameter, line, (0, 0))} for line in lines]
    assert succession.as_one(passes, []) is None
    assert succession.as_one(passes[:1] * 2, [])[1][1].samples == 8


def test_what_autograd_kept_is_not_held_for_all_micro_batches():
    model, counter, _ = usual()
    for _ in range(4):
        model(torch.randn(5, 7)).square().sum().backward()
    kept = [[use.kept for use in brought._uses] for brought in counter.arrived()[0]._passes]
    assert len(kept) == 4
    assert all(means is None for passed in kept[:-1] for means in passed)
    assert any(means is not None for means in kept[-1])
