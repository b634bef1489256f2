"""The short ways: the same records as the long one, and who has to take the long one."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import truestep
from truestep import direct, waiting, ways
from truestep.errors import TruestepError


@pytest.fixture
def uses(monkeypatch):
    """The uses that go the short way, counted by layer."""
    found = []
    start = direct.Use.__init__

    def init(use, watch, layer, *arguments):
        found.append(layer.name)
        start(use, watch, layer, *arguments)

    monkeypatch.setattr(direct.Use, "__init__", init)
    return found


def linear():
    """Layers of rows, one of them used twice."""
    shared = nn.Linear(4, 4)
    return nn.Sequential(
        nn.Linear(3, 4),
        nn.ReLU(inplace=True),
        shared,
        nn.ReLU(),
        shared,
        nn.Linear(4, 2, bias=False),
    )


def convolutional():
    """Layers of images and of rows."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(2),
        nn.LayerNorm(4),
        nn.Conv1d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(9, 2),
    )


def normed():
    """Norms of all kinds, of which one channel is constant, and so its own mean."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.GroupNorm(1, 6),
        nn.ReLU(),
        nn.Flatten(),
        nn.BatchNorm1d(96),
        nn.GroupNorm(4, 96),
        nn.LayerNorm(96),
        nn.Linear(96, 2),
    )
    with torch.no_grad():
        model[0].bias[3] = -100
    return model


class Tables(nn.Module):
    """Tables of all kinds; the one of texts is the last layer's too."""

    def __init__(self):
        super().__init__()
        self.column = nn.Embedding(7, 3)
        self.text = nn.Embedding(9, 4)
        self.bag = nn.EmbeddingBag(9, 5, mode="sum")
        self.ragged = nn.EmbeddingBag(9, 2, mode="mean")
        self.closed = nn.EmbeddingBag(9, 2, include_last_offset=True)
        self.rows = nn.Linear(16, 4)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.text.weight

    def forward(self, x):
        texts = self.text(x[:, 1:4]).relu().sum(1)
        flat, ends = x[:, 1:].flatten(), torch.arange(len(x) + 1) * 4
        ends[2::4] -= 4  # some bags are empty
        ends[-1] = len(flat)
        ragged, closed = self.ragged(flat, ends[:-1]), self.closed(flat, offsets=ends)
        found = [self.column(x[:, 0]), texts, self.bag(x[:, 1:]), ragged, closed]
        return self.out(self.rows(torch.cat(found, 1)).relu())


def trained(
    short, held, monkeypatch, batches, *, make=linear, unit="sample", penalty=False, accumulate=1
):
    """Counts, batch sizes and weights of a small model after some steps."""
    with monkeypatch.context() as patch:
        if not short:
            patch.setattr(ways.Direct, "node", lambda *_: None)
        patch.setattr(waiting, "MOST_OF_ALL", held)
        torch.manual_seed(0)
        model = make()
        rules = truestep.RULES | truestep.rules.BATCH_NORM
        counter = truestep.SampleCounter(model, unit=unit, rules=rules)
        optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=1e-6, counter=counter)
        found = []
        for number, batch in enumerate(batches):
            loss = model(batch).relu().square().sum()
            if penalty:
                gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
                loss = loss + 1e-6 * sum(g.square().sum() for g in gradients)
            loss.backward()
            if number % accumulate == accumulate - 1:
                found.append((counter.batch_size, counter.counts()))
                optimizer.step()
                optimizer.zero_grad()
    return found, [parameter.detach() for parameter in model.parameters()]


class Cast(nn.Module):
    """Layers that are given other numbers than autograd holds, with and without bias and positions."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.first, self.norm = nn.Linear(3, 4, bias=False), nn.LayerNorm(4)
        self.second, self.look = nn.Linear(4, 4), nn.Conv1d(4, 3, 2)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        with torch.autocast("cpu", dtype=self.dtype):
            inner = self.second(self.norm(self.first(x)).relu()).relu()
            seen = self.look(inner.float().transpose(1, 2)).relu().mean(2)
            return self.last(seen.float()).float()


@pytest.mark.parametrize("held", [0, waiting.MOST_OF_ALL])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("unit", ["sample", "position"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_lead_to_the_same_under_autocast(
    held, accumulate, unit, dtype, monkeypatch, uses
):
    batches = [torch.randn(size, 5, 3).relu() for size in (5, 70, 64, 1, 7, 6)]
    options = {"make": lambda: Cast(dtype), "accumulate": accumulate, "unit": unit}
    one, other = (trained(short, held, monkeypatch, batches, **options) for short in (True, False))
    # Not the norm, which autograd keeps a copy for.
    assert sorted(set(uses)) == ["first", "last", "look", "second"]
    assert_same(one, other)


def test_another_gradient_under_autocast_is_counted_with_all_bits(uses):
    torch.manual_seed(0)
    model = Cast(torch.bfloat16)
    counter = truestep.SampleCounter(model)
    model(torch.randn(6, 5, 3)).sum().backward()
    found = []
    for ask in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        output = model(torch.randn(6, 5, 3))
        output[:4].sum().backward(retain_graph=True)
        if ask:
            counter.counts()
        output[2:].square().sum().backward()
        found.append((counter.batch_size, counter.counts()))
    assert uses
    assert found[0][0] == found[1][0] == 12
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=0)
    assert all(int(counts.max()) <= 8 for counts in found[0][1].values())


def assert_same(one, other):
    """What `trained` found on both ways."""
    for (size, counts), (same_size, same_counts) in zip(one[0], other[0], strict=True):
        assert size == same_size
        assert all(torch.equal(counts[name], same_counts[name]) for name in same_counts)
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("held", [0, waiting.MOST_OF_ALL])
@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("unit", ["sample", "position"])
@pytest.mark.parametrize("positions", [(), (7,), (2, 3)])
def test_both_ways_lead_to_the_same(held, penalty, accumulate, unit, positions, monkeypatch, uses):
    batches = [torch.randn(size, *positions, 3).relu() for size in (5, 70, 64, 130, 1, 7)]
    options = {"penalty": penalty, "accumulate": accumulate, "unit": unit}
    one, other = (trained(short, held, monkeypatch, batches, **options) for short in (True, False))
    # All calls but the first, which is compared with the autograd graph.
    assert len(uses) == 4 * (len(batches) - 1)
    assert_same(one, other)


@pytest.mark.parametrize("held", [0, waiting.MOST_OF_ALL])
@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("unit", ["sample", "position"])
def test_both_ways_of_other_layers_lead_to_the_same(
    held, penalty, accumulate, unit, monkeypatch, uses
):
    batches = [torch.randn(size, 2, 4, 4).relu() for size in (5, 70, 1, 7)]
    options = {
        "make": convolutional, "penalty": penalty, "accumulate": accumulate, "unit": unit
    }  # fmt: skip
    one, other = (trained(short, held, monkeypatch, batches, **options) for short in (True, False))
    assert uses == ["0", "1", "3", "6", "7", "9"] * (len(batches) - 1)
    assert_same(one, other)


@pytest.mark.parametrize("held", [0, waiting.MOST_OF_ALL])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_both_ways_of_tables_lead_to_the_same(held, accumulate, monkeypatch, uses):
    batches = [torch.randint(0, 7, (size, 5)) for size in (6, 70, 1, 8)]
    options = {"make": Tables, "accumulate": accumulate}
    one, other = (trained(short, held, monkeypatch, batches, **options) for short in (True, False))
    layers = ["text", "ragged", "closed", "column", "bag", "rows", "out"]
    assert uses == layers * (len(batches) - 1)
    assert_same(one, other)


@pytest.mark.parametrize("held", [0, waiting.MOST_OF_ALL])
@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("unit", ["sample", "position"])
@pytest.mark.parametrize("shape", [(5,), (70, 3)])
def test_both_ways_of_one_table_lead_to_the_same(held, penalty, unit, shape, monkeypatch, uses):
    batches = [torch.randint(0, 9, shape) for _ in range(3)]

    def make():
        return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))

    options = {"make": make, "penalty": penalty, "unit": unit}
    one, other = (trained(short, held, monkeypatch, batches, **options) for short in (True, False))
    assert uses == ["0", "1"] * 2
    assert_same(one, other)


@pytest.mark.parametrize("held", [0, waiting.MOST_OF_ALL])
@pytest.mark.parametrize("unit", ["sample", "position"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_both_ways_of_norms_lead_to_the_same(held, unit, training, order, monkeypatch, uses):
    batches = [torch.randn(size, 2, 6, 6).relu().to(memory_format=order) for size in (5, 70, 7)]

    def make():
        return normed().to(memory_format=order).train(training)

    options = {"make": make, "unit": unit}
    one, other = (trained(short, held, monkeypatch, batches, **options) for short in (True, False))
    assert uses == ["0", "2", "3", "4", "5", "8", "9", "10", "11"] * (len(batches) - 1)
    assert_same(one, other)
    for _, counts in one[0]:
        assert counts["2.weight"][3] == 0 < counts["2.bias"][3]


# Layers, shapes of inputs, and the dimension of their outputs' positions.
AGAIN = {
    "linear": (lambda: nn.Linear(6, 3), (4, 5, 6), 1),
    "layer norm": (lambda: nn.LayerNorm(6), (4, 5, 6), 1),
    "linear behind an activation in place": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
        (4, 5, 6),
        1,
    ),
    "large layer norm": (lambda: nn.LayerNorm(8), (64, 1000, 8), 1),
    "group norm": (lambda: nn.GroupNorm(1, 3), (4, 3, 6), 2),
    "batch norm": (lambda: nn.BatchNorm1d(3).eval(), (4, 3, 6), 2),
    "convolution": (lambda: nn.Conv1d(3, 2, 2), (4, 3, 6), 2),
}


@pytest.mark.parametrize("kind", AGAIN)
@pytest.mark.parametrize("inner", [False, True])
def test_another_gradient_of_the_same_call_is_counted_as_the_first_would_be(kind, inner, uses):
    make, shape, positions = AGAIN[kind]
    model = nn.Sequential(nn.ReLU() if inner else nn.Identity(), make())
    rules = truestep.RULES | truestep.rules.BATCH_NORM
    counter = truestep.SampleCounter(model, rules=rules)
    inputs = torch.randn(shape)
    inputs[: shape[0] // 2] = 0
    model(inputs).sum().backward()
    model.zero_grad()
    out = model(inputs)
    every, few = torch.ones_like(out), torch.zeros_like(out)
    every[-1] = 0
    few.select(positions, 0).fill_(1)
    found = []
    for retained, delta in ((True, every), (True, few), (True, few), (False, few)):
        model.zero_grad()
        out.backward(delta, retain_graph=retained)
        found.append(counter.counts())
    assert uses
    for delta, counts in zip((every, few, few, few), found, strict=True):
        another = copy.deepcopy(model)
        other = truestep.SampleCounter(another, rules=rules)
        another.zero_grad()
        another(inputs).backward(delta)  # a first call goes the long way
        assert all(torch.equal(counts[name], values) for name, values in other.counts().items())


@pytest.mark.parametrize("layer", [nn.Embedding(9, 3), nn.EmbeddingBag(9, 3)])
def test_indices_filled_anew_after_a_backward_pass_change_nothing(layer, uses):
    counter, indices = truestep.SampleCounter(layer), torch.randint(0, 9, (4, 5))
    expected = torch.stack([(indices == row).any(1).sum() for row in range(9)])
    layer(indices).sum().backward()
    layer.zero_grad()
    out = layer(indices)
    for _ in range(2):
        layer.zero_grad()
        out.sum().backward(retain_graph=True)
        assert counter.counts()["weight"].equal(expected.unsqueeze(1).expand(9, 3))
    assert uses
    indices.fill_(1)
    assert counter.counts()["weight"].equal(expected.unsqueeze(1).expand(9, 3))


class Part(nn.Module):
    """A table that looks up some of its input's columns."""

    def __init__(self, table, view):
        super().__init__()
        self.table, self.view = table, view

    def forward(self, x):
        return self.table(self.view(x))


PARTS = {
    "bags of columns": (lambda: nn.EmbeddingBag(8, 1, mode="sum"), lambda x: x[:, 1:]),
    "bags of a transposed batch": (lambda: nn.EmbeddingBag(8, 1), lambda x: x.t()[1:].t()),
    "a column, renormalized": (lambda: nn.Embedding(8, 1, max_norm=9.0), lambda x: x[:, 1]),
    "columns, renormalized": (lambda: nn.Embedding(8, 1, max_norm=9.0), lambda x: x[:, 1:]),
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("short", [True, False])
def test_indices_of_which_autograd_holds_a_copy_may_be_filled_anew(kind, short, monkeypatch):
    if not short:
        monkeypatch.setattr(ways.Direct, "node", lambda *_: None)
    make, view = PARTS[kind]
    model, indices = Part(make(), view), torch.empty(4, 3, dtype=torch.int64)
    counter = truestep.SampleCounter(model)
    for _ in range(3):
        model.zero_grad()
        losses, expected = [], torch.zeros(8, dtype=torch.int64)
        for batch in torch.randint(0, 8, (2, 4, 3)):
            indices.copy_(batch)
            seen = view(batch).reshape(4, -1)
            expected += torch.stack([(seen == row).any(1).sum() for row in range(8)])
            losses.append(model(indices).sum())
        sum(losses).backward()
        assert torch.equal(counter.counts()["table.weight"].flatten(), expected)


def test_indices_made_in_inference_mode_are_counted():
    model = Part(nn.EmbeddingBag(8, 2), lambda x: x[:, :2])
    counter = truestep.SampleCounter(model)
    for _ in range(3):
        with torch.inference_mode():
            indices = torch.ones(5, 4, dtype=torch.int64)
        model.zero_grad()
        model(indices).sum().backward()
        assert counter.counts()["table.weight"][:, 0].tolist() == [0, 5, *[0] * 6]


def stepped(model, call, uses):
    """Which layers go the short way in a later call."""
    counter = truestep.SampleCounter(model)
    for _ in range(2):
        uses.clear()
        model.zero_grad()
        call()
    assert counter.counts().keys() == {
        name for name, p in model.named_parameters() if p.grad is not None
    }
    return list(uses)


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def of_rows(model):
    return model(torch.randn(5, 3))


def of_positions(model):
    return model(torch.randn(5, 6, 3))


def of_strided_positions(model):
    return model(torch.randn(6, 5, 3).transpose(0, 1))


def under_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(torch.randn(5, 3)).float()


@pytest.mark.parametrize(
    ("make", "call", "expected"),
    [
        (nn.Sequential, of_rows, ["0", "1"]),
        (nn.Sequential, of_positions, ["0", "1"]),
        (nn.Sequential, of_strided_positions, ["1"]),
        (nn.Sequential, under_autocast, ["0", "1"]),
        (Checkpointed, of_rows, []),
    ],
)
def test_who_takes_which_way(make, call, expected, uses):
    model = make(nn.Linear(3, 4), nn.Linear(4, 2))
    assert stepped(model, lambda: call(model).sum().backward(), uses) == expected


@pytest.mark.parametrize(
    ("layer", "inputs", "short"),
    [
        (nn.Conv1d(2, 3, 1), torch.randn(5, 2, 4), True),
        (nn.Conv1d(2, 3, 1), torch.randn(5, 4, 2).transpose(1, 2), True),
        (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), torch.randn(5, 2, 4), False),
        (nn.Conv1d(2, 3, 3, padding="same"), torch.randn(5, 2, 4), True),
        (nn.Conv1d(2, 3, 2, padding="same"), torch.randn(5, 2, 4), False),
        (nn.LayerNorm(2).bfloat16(), torch.randn(5, 2).bfloat16(), False),
        (nn.Linear(2, 3), torch.randn(5, 0, 2), False),
        (nn.LayerNorm(2), torch.randn(5, 4, 2), True),
        (nn.LayerNorm(2), torch.randn(5, 2, 4).transpose(1, 2), False),
        (nn.GroupNorm(1, 2), torch.randn(5, 2, 4), True),
        (nn.GroupNorm(1, 2), torch.randn(5, 4, 2).transpose(1, 2), False),
        (nn.RMSNorm(2), torch.randn(5, 2), False),
        (nn.Embedding(9, 2), torch.arange(5), True),  # the model's own: no positions
        (nn.Embedding(9, 2, sparse=True), torch.arange(5), True),
        (nn.Embedding(9, 2, padding_idx=3), torch.arange(5), False),
        (nn.Embedding(9, 2), torch.ones(2, 3, 4, dtype=torch.int64), False),
        (nn.EmbeddingBag(9, 2), torch.ones(5, 3, dtype=torch.int64), True),
        (nn.EmbeddingBag(9, 2, mode="max"), torch.ones(5, 3, dtype=torch.int64), False),
        (nn.EmbeddingBag(9, 2, padding_idx=0), torch.ones(5, 3, dtype=torch.int64), False),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_which_other_layers_take_the_short_way(layer, inputs, short, uses):
    model = nn.Sequential(layer)
    assert stepped(model, lambda: model(inputs).sum().backward(), uses) == ["0"] * short


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs_takes_the_long_way(uses):
    model = nn.Sequential(nn.Linear(2, 0))
    assert stepped(model, lambda: model(torch.randn(5, 4, 2)).sum().backward(), uses) == []


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("layer", [nn.Linear(2, 3), nn.LayerNorm(2), nn.GroupNorm(1, 2)])
def test_an_empty_batch_is_counted(layer):
    counter = truestep.SampleCounter(layer)
    for _ in range(2):
        layer.zero_grad()
        inputs = torch.empty(0, 2, requires_grad=True)
        layer(inputs).sum().backward(create_graph=True)
        assert counter.counts()["bias"].tolist() == [0] * len(layer.bias)


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 2, 1), nn.LayerNorm(4), nn.GroupNorm(1, 2)])
def test_a_call_without_a_backward_pass_leaves_nothing(layer):
    counter = truestep.SampleCounter(layer)
    layer(torch.randn(5, 2, 4)).sum().backward()
    inputs = torch.randn(5, 2, 4)
    reference = weakref.ref(inputs)
    layer(inputs)
    del inputs
    gc.collect()
    assert reference() is None
    assert counter.batch_size == 5


def test_both_ways_refuse_a_penalty_through_a_batch_norm():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    rules = truestep.RULES | truestep.rules.BATCH_NORM
    counter = truestep.SampleCounter(model, rules=rules)
    for _ in range(2):
        model.zero_grad()
        inputs = torch.randn(5, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        with pytest.raises(TruestepError, match="gradient penalty"):
            gradient.square().sum().backward()
    assert counter.nbytes == 0


@pytest.mark.parametrize("inputs", [torch.randn(5, 3), torch.randn(5, 4, 3)])
def test_a_penalty_after_a_backward_pass_is_refused(inputs):
    model = nn.Linear(3, 2)
    counter = truestep.SampleCounter(model)
    model(inputs).sum().backward()
    model.zero_grad()
    given = inputs.clone().requires_grad_()
    out = model(given)
    out.sum().backward(retain_graph=True)
    model.zero_grad()
    (gradient,) = torch.autograd.grad(out.sum(), given, create_graph=True)
    with pytest.raises(TruestepError, match="gradient penalty"):
        (out[:1].sum() + gradient.square().sum()).backward()
    assert counter.counts() == {}


def test_functional_gradients_of_a_model_with_a_table_are_left_alone():
    model, indices = nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2)), torch.randint(0, 9, (5,))
    counter = truestep.SampleCounter(model)
    for _ in range(2):
        model.zero_grad()
        model(indices).sum().backward()

    def loss(scale, indices):
        return (model(indices) * scale).square().sum()

    scale = torch.ones(2)
    found = torch.func.grad(loss)(scale, indices)
    assert torch.allclose(found, 2 * model(indices).detach().square().sum(0))
    by_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(scale, indices.unsqueeze(1))
    assert torch.allclose(by_sample.sum(0), found)
    assert counter.batch_size == 5


@pytest.mark.parametrize("inputs", [torch.randn(5, 3), torch.randn(5, 4, 3)])
def test_functional_gradients_are_left_alone(inputs):
    model = nn.Linear(3, 2)
    counter = truestep.SampleCounter(model)
    model(inputs).sum().backward()
    found = torch.func.grad(lambda x: model(x).square().sum())(inputs)
    given = inputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(given).square().sum(), given)
    assert torch.allclose(found, expected)
    assert counter.batch_size == 5


def test_a_layer_that_is_partly_frozen_takes_the_long_way(uses):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    assert stepped(model, lambda: of_rows(model).sum().backward(), uses) == ["1"]


class Fork(nn.Module):
    """Both branches get the same gradient; a hook writes into it when the later layer has seen it."""

    def __init__(self, early, late):
        super().__init__()
        self.early, self.late = early, late

    def forward(self, x):
        early = self.early(x)
        early.register_hook(lambda gradient: gradient.mul_(0))
        return early + self.late(x)


def test_a_bias_unfrozen_later_is_counted():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    model.bias.requires_grad_(requires_grad=False)
    counter = truestep.SampleCounter(model)
    for trained in (False, False, True, True):
        model.bias.requires_grad_(requires_grad=trained)
        model.zero_grad()
        model(x).square().sum().backward()
        assert counter.counts().get("bias", torch.zeros(2)).tolist() == [5 * trained] * 2


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Linear(3, 3), torch.randn(4, 3)),
        (lambda: nn.Conv1d(3, 3, 1), torch.randn(4, 3, 5)),
        (lambda: nn.LayerNorm(3), torch.randn(4, 3)),
    ],
)
def test_a_gradient_changed_in_place_while_it_is_held_is_an_error(make, x):
    model = Fork(make(), make())
    counter = truestep.SampleCounter(model)
    model(x).square().sum().backward()
    model.zero_grad()
    with pytest.raises(TruestepError, match=r"'late'.*changed in place during the backward pass"):
        model(x).square().sum().backward()
    model.zero_grad()
    model.late(x).square().sum().backward()
    assert counter.batch_size == 4


@pytest.mark.parametrize("between", ["frozen", "bias frozen", "other weights"])
@pytest.mark.parametrize("make", [linear, convolutional])
def test_calls_between_a_forward_and_its_backward_pass_change_nothing(make, between):
    model = make()
    x = torch.randn(5, 3) if make is linear else torch.randn(5, 2, 4, 4)
    counter = truestep.SampleCounter(model)
    model(x).sum().backward()
    expected = counter.counts()
    model.zero_grad()
    out = model(x)
    if between == "other weights":
        others = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.func.functional_call(model, others, (x,))
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(between != "frozen" and name != "0.bias")
        given = x.clone().requires_grad_()
        torch.autograd.grad(model(given).sum(), given)
        model.requires_grad_(True)
    out.sum().backward()
    found = counter.counts()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_backward_pass_within_another_through_a_layer_that_waits():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    counter = truestep.SampleCounter(model)
    model(x).sum().backward()
    expected = counter.counts()
    model.zero_grad()
    outputs = []

    def differentiate(_gradient):
        with torch.enable_grad():
            torch.autograd.grad(outputs[0][:1].sum(), model[2].weight, retain_graph=True)

    handle = model[2].register_forward_pre_hook(
        lambda _module, args: args[0].register_hook(differentiate) and None
    )
    outputs.append(model(x))
    handle.remove()
    outputs[0].sum().backward(retain_graph=True)
    found = counter.counts()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("make", [linear, convolutional])
def test_several_penalties_through_one_forward_pass(make, monkeypatch):
    x = torch.randn(5, 3) if make is linear else torch.randn(5, 2, 4, 4)
    found = []
    for short in (True, False):
        with monkeypatch.context() as patch:
            if not short:
                patch.setattr(ways.Direct, "node", lambda *_: None)
            torch.manual_seed(0)
            model = make()
            counter = truestep.SampleCounter(model)
            for _ in range(2):
                model.zero_grad()
                given = x.clone().requires_grad_()
                out = model(given).flatten(1)
                penalty = sum(
                    torch.autograd.grad(out[:, k].sum(), given, create_graph=True)[0].square().sum()
                    for k in range(2)
                )
                penalty.backward()
            found.append(counter.counts())
    one, other = found
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_inside_the_backward_pass_finds_what_has_landed():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    counter = truestep.SampleCounter(model)
    x = torch.randn(5, 3)
    model(x).sum().backward()
    expected = counter.counts()
    model.zero_grad()
    found = {}

    def note(parameter):
        name = {id(p): name for name, p in model.named_parameters()}[id(parameter)]
        found[name] = counter.counts()[name]

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    model(x).sum().backward()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_held_goes_with_the_backward_pass():
    model = nn.Linear(3, 2)
    counter = truestep.SampleCounter(model)
    x = torch.randn(5, 3)
    for _ in range(3):
        torch.autograd.grad(model(x).sum(), model.weight)
        assert counter.counts() == {}
        assert not counter._records._waiting


def test_counts_outlive_a_gradient_that_a_hook_has_used_up():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    counter = truestep.SampleCounter(model)
    model(x).sum().backward()
    expected = counter.counts()
    model.zero_grad()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for _ in range(2):
        model(x).sum().backward()
        found = counter.counts()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class Fails(nn.Linear):
    def forward(self, x):
        x.register_hook(self.fail)
        return super().forward(x)

    def fail(self, gradient):
        if self.failing:
            raise RuntimeError("a hook failed")


def test_inputs_filled_anew_after_a_backward_pass_that_raised_are_no_error():
    model, x = nn.Sequential(nn.Linear(3, 4), Fails(4, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    counter = truestep.SampleCounter(
        model, rules=truestep.RULES | {Fails: truestep.RULES[nn.Linear]}
    )
    for failing in (False, True, False):
        model[1].failing = failing
        model.zero_grad()
        loss = model(x.requires_grad_()).sum()
        if failing:
            with pytest.raises(RuntimeError, match="a hook failed"):
                loss.backward()
        else:
            loss.backward()
            assert counter.batch_size == 5
            assert counter.counts()["0.bias"].eq(5).all()
        with torch.no_grad():
            x.add_(1)


@pytest.mark.parametrize("full", ["inputs", "gradients", "both", "neither"])
def test_masks_that_are_on_everywhere_take_no_memory(full, monkeypatch):
    monkeypatch.setattr(waiting, "MOST_OF_ALL", 0)
    model, x = nn.Linear(64, 128), torch.ones(64, 64)
    if full in {"gradients", "neither"}:
        x[0] = 0
    counter = truestep.SampleCounter(model)
    for _ in range(2):
        model.zero_grad()
        delta = torch.ones(64, 128)
        if full in {"inputs", "neither"}:
            delta[1] = 0
        model(x.clone().requires_grad_()).backward(delta)
    words = counter._records.of(model.weight).activity
    held = {
        id(bits._all): len(bits._all) for bits in (words.inputs, words.outputs) if bits.address()
    }
    expected = {"inputs": 128, "gradients": 64, "both": 0, "neither": 192}
    assert sum(held.values()) == expected[full]
    reached = {"inputs": 63, "gradients": 63, "both": 64, "neither": 62}
    assert counter.counts()["weight"].unique().tolist() == [reached[full]]
