"""What a backward pass has brought serves a step as records would, and becomes those where somebody asks."""

import copy

import pytest
import torch
from torch import nn

import truestep
from devices import choose, needs_no_cuda, needs_triton
from truestep.errors import TruestepError

pytestmark = pytest.mark.skipif(
    not truestep.kernels.dispatch.installed(),
    reason="a step goes by records without compiled loops",
)


class Words(nn.Module):
    """A table that is looked up, positions, norms and a vector."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.places = nn.Embedding(5, 8)
        self.end = nn.Linear(8, 3, bias=False)

    def forward(self, rows):
        inner = self.table(rows) + self.places(torch.arange(rows.shape[1]))
        return self.end(self.mix(self.norm(inner)).relu()).mean(1)


def images():
    layers = [
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 36, 3))


def vectors():
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 3))


BATCHES = {
    vectors: lambda: torch.randn(70, 7) * (torch.rand(70, 7) < 0.5),
    images: lambda: torch.randn(9, 2, 8, 8) * (torch.rand(9, 2, 8, 8) < 0.5),
    Words: lambda: torch.randint(0, 30, (9, 5)),
}
WAYS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "dampened": {"momentum": 0.5, "dampening": 0.3, "maximize": True, "factor_limit": 2.0},
}


def arrives(counter):
    """Whether a step has something without records."""
    return counter.arrived()[0] is not None


def trained(make, unit, *, asking, steps=5, step=None, **options):
    """Weights, counts and state after some steps, in which counts are asked for or not."""
    torch.manual_seed(0)
    model, batch = make(), BATCHES[make]
    counter = truestep.SampleCounter(model, unit=unit)
    if step is None:
        half = [[*model.parameters()][::2], [*model.parameters()][1::2]]
        groups = [{"params": half[0]}, {"params": half[1], "lr": 0.02}]
        optimizer = truestep.AdaptiveBatchSGD(groups, lr=0.1, counter=counter, **options)
    else:
        optimizer = step(model, counter)
    torch.manual_seed(1)
    for index in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch()), torch.arange(70)[: len(batch())] % 3).backward()
        if asking:
            counter.counts()
        assert arrives(counter) == (index > 0 and not asking)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return [*model.parameters()], counter.counts(), state


@pytest.mark.parametrize("unit", ["sample", "position"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", BATCHES)
def test_a_step_is_the_same_with_and_without_records(make, way, unit):
    without, with_records = (
        trained(make, unit, asking=asking, **WAYS[way]) for asking in (False, True)
    )
    torch.testing.assert_close(without, with_records, rtol=0, atol=0)


@needs_triton
@needs_no_cuda
def test_kernels_take_a_step_without_records_too(monkeypatch):
    choose(monkeypatch, "triton")
    without, with_records = (
        trained(vectors, "position", asking=asking, steps=2) for asking in (False, True)
    )
    torch.testing.assert_close(without, with_records, rtol=0, atol=0)


@pytest.mark.parametrize("make", BATCHES)
def test_gradients_are_corrected_the_same_with_and_without_records(make):
    def adam(model, counter):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        truestep.attach(optimizer, truestep.mean_effective_gradient(counter))
        return optimizer

    without, with_records = (
        trained(make, "sample", asking=asking, step=adam) for asking in (False, True)
    )
    torch.testing.assert_close(without, with_records, rtol=0, atol=0)


def usual():
    """A small model whose calls are usual by now, its counter, an optimizer and a batch."""
    torch.manual_seed(0)
    model = vectors()
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    batch = BATCHES[vectors]()
    model(batch).sum().backward()
    optimizer.zero_grad()
    return model, counter, optimizer, batch


def backward(model, batch):
    model(batch).square().sum().backward()


def test_gradients_are_added_to_after_a_step_that_needed_no_records():
    model, counter, optimizer, batch = usual()
    backward(model, batch)
    assert arrives(counter)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad.zero_()
    backward(model, batch[:30])
    assert counter.batch_size == 30
    backward(model, batch[:20])
    assert counter.batch_size == 50


def test_a_corrected_gradient_is_neither_corrected_twice_nor_added_to():
    model, counter, optimizer, batch = usual()
    backward(model, batch)
    expected = [counter.effective_gradient(p) for p in model.parameters()]
    optimizer.zero_grad()
    backward(model, batch)
    assert arrives(counter)
    counter.correct_gradients()
    assert not arrives(counter)
    counter.correct_gradients()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=0, atol=0)
    with pytest.raises(TruestepError, match="already"):
        backward(model, batch)


def test_some_are_corrected_and_a_step_does_the_rest():
    model, counter, optimizer, batch = usual()
    first = next(iter(model.parameters()))
    others = {"one": [first], "none": []}
    ends = {}
    start = copy.deepcopy(model.state_dict())
    for name, chosen in others.items():
        model.load_state_dict(start)
        optimizer.zero_grad()
        backward(model, batch)
        counter.correct_gradients(chosen)
        optimizer.step()
        ends[name] = [p.detach().clone() for p in model.parameters()]
    torch.testing.assert_close(ends["one"], ends["none"])


def test_a_graph_that_is_gone_through_again_leaves_the_first_counts_alone():
    model, counter, optimizer, batch = usual()
    loss = model(batch).square().sum()
    loss.backward(retain_graph=True)
    assert arrives(counter)
    loss.backward()
    assert counter.batch_size == 2 * len(batch)
    twice = counter.counts()
    optimizer.zero_grad()
    backward(model, batch)
    assert all(torch.equal(2 * m, twice[name]) for name, m in counter.counts().items())


@pytest.mark.parametrize("unit", ["sample", "position"])
def test_a_graph_gone_through_for_other_positions_adds_to_what_arrived(unit):
    found = []
    for asking in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3))
        counter = truestep.SampleCounter(model, unit=unit)
        for _ in range(2):
            model.zero_grad()
            output = model(torch.randn(5, 6, 4))
            output[:, :2].sum().backward(retain_graph=True)
        assert arrives(counter)
        if asking:
            assert counter.batch_size == {"sample": 5, "position": 10}[unit]
        output[:, 2:].sum().backward()
        found.append((counter.batch_size, counter.counts()))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)


class Inner(nn.Module):
    """Keeps what its first layer has made."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        self.inner = self.first(x).relu()
        return self.second(self.inner)


def test_a_backward_pass_from_inside_the_model_adds_to_what_arrived():
    found = []
    for asking in (False, True):
        torch.manual_seed(0)
        model = Inner()
        counter = truestep.SampleCounter(model)
        for _ in range(2):
            model.zero_grad()
            output = model(torch.randn(5, 4))
            output[:2].square().sum().backward(retain_graph=True)
        assert arrives(counter)
        if asking:
            counter.counts()
        model.inner[1:].sum().backward()
        found.append(counter.counts())
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert int(found[0]["first.bias"].max()) > 2


def test_a_layer_called_in_a_usual_and_in_an_unusual_way_has_both_counted():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    model = nn.ModuleList([layer])
    model.forward = lambda x, y: layer(x) + layer(y.transpose(0, 1)).sum(1)
    counter = truestep.SampleCounter(model)
    for _ in range(2):
        model.zero_grad()
        x, y = torch.zeros(6, 3), torch.zeros(4, 6, 3)
        x[:2], y[:, 4:] = 1, 1
        model(x, y).sum().backward()
    assert counter.counts()["0.weight"].tolist() == [[4, 4, 4]] * 2


def test_a_parameter_that_the_next_batch_does_not_reach_keeps_its_last_counts():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    model.forward = lambda x, names: sum(model[name](x) for name in names)
    counter = truestep.SampleCounter(model)
    for names in ("ab", "ab"):
        model.zero_grad()
        model(torch.ones(4, 3), names).sum().backward()
    model.zero_grad()
    model(torch.ones(6, 3), "a").square().sum().backward()
    counts = counter.counts()
    assert (counts["a.bias"] == 6).all()
    assert (counts["b.bias"] == 4).all()


def test_a_gradient_put_in_the_place_of_one_that_arrived_is_refused():
    model, counter, optimizer, batch = usual()
    backward(model, batch)
    assert arrives(counter)
    model[0].weight.grad = model[0].weight.grad.clone()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TruestepError, match=r"0\.weight"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_convolution_that_looks_elsewhere_since_the_last_step_is_counted_as_it_is_now():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1))
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter, eps=0.0)
    batch = torch.zeros(4, 1, 9)
    batch[0, 0, 4] = batch[1, 0, 0] = 1
    ends = []
    for dilation in (1, 1, 8):
        model[0].dilation = model[0].padding = (dilation,)
        optimizer.zero_grad()
        model(batch).sum().backward()
        before = model[0].weight.detach().clone()
        optimizer.step()
        ends.append((before - model[0].weight.detach()).flatten())
    # eps = 0: lr g N / m, with g the sum of what a tap sees, and m how many samples have any
    torch.testing.assert_close(ends[1], torch.full((3,), 0.4))
    # Eight away, the first tap sees the second sample alone, and the last one neither.
    torch.testing.assert_close(ends[2], torch.tensor([0.4, 0.4, 0.0]))


def test_a_parameter_made_smaller_after_the_backward_pass_is_refused():
    model, counter, optimizer, batch = usual()
    backward(model, batch)
    assert arrives(counter)
    model[0].weight.data = model[0].weight.data[:3]
    with pytest.raises(TruestepError, match="shape"):
        optimizer.step()


def test_a_batch_size_that_is_set_holds_without_records():
    ends = []
    for asking in (False, True):
        model, counter, optimizer, batch = usual()
        counter.batch_size = 1000
        backward(model, batch)
        if asking:
            counter.counts()
        optimizer.step()
        ends.append([*model.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_an_optimizer_of_some_parameters_leaves_the_others_counts_to_another():
    ends = []
    for asking in (False, True):
        model, counter, _, batch = usual()
        halves = [model[0].parameters(), [*model[2].parameters(), *model[3].parameters()]]
        made = [truestep.AdaptiveBatchSGD(half, lr=0.1, counter=counter) for half in halves]
        backward(model, batch)
        if asking:
            counter.counts()
        for optimizer in made:
            assert arrives(counter) != asking
            optimizer.step()
        ends.append([*model.parameters()])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_words_of_which_all_bits_are_on_are_not_held():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    counter = truestep.SampleCounter(model)
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(70, 5, 8)).square().sum().backward()
    made = {use.made for brought in counter.arrived()[0]._passes for use in brought._uses}
    assert [len(each._words) for each in made] == [0]
    assert counter.counts()["0.weight"].unique().tolist() == [70]


def test_records_take_as_much_memory_as_before_they_are_asked_for():
    model, counter, _, batch = usual()
    sizes = []
    for _ in range(3):
        model.zero_grad()
        backward(model, batch)
        sizes.append(counter.nbytes)
    assert len(set(sizes)) == 1
    assert 0 < sizes[0] < 4096
