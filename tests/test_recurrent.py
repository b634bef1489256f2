import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import truestep
from properties import count, own_counts, upstream
from truestep import rules_recurrent
from truestep.recurrence import last_step, output_of
from truestep.sequences import weights_of
from zoo import sparse_inputs

LAYERS = {
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "lstm": nn.LSTM,
    "projected lstm": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=2, **options),
    "gru": nn.GRU,
}
kinds = st.sampled_from(list(LAYERS))
switches = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 3),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "bidirectional": st.booleans(),
    }
)


def make(kind, *, dropout=0.0, **options):
    dropout = dropout if options.get("num_layers", 1) > 1 else 0.0
    layer = LAYERS[kind](3, 4, dropout=dropout, dtype=torch.float64, **options)
    with torch.no_grad():  # zeros among the biases leave zeros in the states
        for name, parameter in layer.named_parameters():
            if name.startswith("bias"):
                parameter.mul_(torch.rand_like(parameter) < 0.5)
    return layer


def states(layer, samples):
    """Initial states with zeros, samples second."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size]
    h, c = (sparse_inputs(count, samples, width).double() for width in widths)
    return (h, c) if layer.mode == "LSTM" else h


def samples_first(layer, returned, used):
    """The outputs with samples first, and gradients of those that the loss uses."""
    output, hidden = returned
    if isinstance(output, PackedSequence):
        output = pad_packed_sequence(output, batch_first=True)[0]
    elif not layer.batch_first:
        output = output.transpose(0, 1)
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    tensors = [output, *(state.transpose(0, 1) for state in hidden)]
    tensors = [tensor for tensor, use in zip(tensors, used, strict=False) if use]
    return tensors, [upstream(*tensor.shape) for tensor in tensors]


def assert_counts_are_own(layer, counter, returned, samples, used=(True, True, True)):
    tensors, deltas = samples_first(layer, returned, used)
    expected = own_counts(layer, tensors, deltas, samples)
    torch.autograd.backward(tensors, deltas)
    counts = counter.counts()
    assert counter.batch_size == samples
    counter.close()
    assert counts.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(counts[name], values), name


@settings(max_examples=60)
@given(
    kind=kinds,
    samples=st.integers(1, 4),
    length=st.integers(1, 4),
    switches=switches,
    dropout=st.sampled_from([0.0, 0.4]),
    started=st.booleans(),
    used=st.sampled_from(
        [(True, False, False), (False, True, False), (False, False, True), (True,) * 3]
    ),
)
def test_recurrent(kind, samples, length, switches, dropout, started, used):
    layer = make(kind, dropout=dropout, **switches)
    if "lstm" not in kind and not any(used[:2]):
        used = (False, True, False)
    inputs = sparse_inputs(samples, length, 3).double()
    inputs = inputs if layer.batch_first else inputs.transpose(0, 1)
    counter = truestep.SampleCounter(layer, batch_dim=0 if layer.batch_first else 1)
    hx = states(layer, samples) if started else None
    assert_counts_are_own(layer, counter, layer(inputs, hx), samples, used)


@settings(max_examples=40)
@given(
    kind=kinds,
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    switches=switches,
    dropout=st.sampled_from([0.0, 0.4]),
    started=st.booleans(),
    in_order=st.booleans(),
)
def test_packed_sequences(kind, lengths, switches, dropout, started, in_order):
    layer = make(kind, dropout=dropout, **switches)
    if in_order:
        lengths = sorted(lengths, reverse=True)
    samples = len(lengths)
    inputs = sparse_inputs(samples, max(lengths), 3).double()
    packed = pack_padded_sequence(
        inputs, torch.tensor(lengths), batch_first=True, enforce_sorted=in_order
    )
    model = nn.ModuleDict({"layer": layer})
    counter = truestep.SampleCounter(model)  # of which packed sequences show no batch size
    hx = states(layer, samples) if started else None
    assert_counts_are_own(model, counter, layer(packed, hx), samples)


@pytest.fixture
def replays(monkeypatch):
    """How often a layer was run once more."""
    found = []
    run = rules_recurrent.forward
    monkeypatch.setattr(
        rules_recurrent, "forward", lambda *a, **k: (found.append(1), run(*a, **k))[1]
    )
    return found


@pytest.mark.parametrize("lengths", [None, [3, 1, 5, 2], [5, 3, 2, 2]])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("used", [(True, False, False), (False, True, False), (True,) * 3])
@pytest.mark.parametrize(
    "switches", [{}, {"num_layers": 3, "bias": False}, {"bidirectional": True}]
)
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_steps_without_zeros_are_not_replayed(
    kind, switches, used, started, packed, lengths, replays
):
    torch.manual_seed(0)
    layer = LAYERS[kind](3, 4, batch_first=True, dtype=torch.float64, **switches)
    inputs = torch.randn(4, 5, 3).double()
    shape = layer.num_layers * (1 + layer.bidirectional), 4, 4
    h, c = torch.randn(shape).double(), torch.randn(shape).double()
    model = nn.ModuleDict({"layer": layer})
    counter = truestep.SampleCounter(model)
    given = inputs
    if lengths is not None and packed:
        given = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    hx = ((h, c) if kind == "lstm" else h) if started else None
    returned = layer(given, hx)
    tensors, deltas = samples_first(layer, returned, used)
    for delta in deltas:
        delta[delta == 0] = 1
    if lengths is not None and not packed and used[0]:
        for sample, length in enumerate(lengths):
            deltas[0][sample, length:] = 0
    expected = own_counts(model, tensors, deltas, 4)
    replays.clear()
    torch.autograd.backward(tensors, deltas)
    counts = counter.counts()
    assert all(torch.equal(counts[name], values) for name, values in expected.items())
    # A sample's first step starts from h = 0 where no state is given.
    short = lengths is not None and 1 in lengths and (packed or used == (True, False, False))
    assert bool(replays) == (short and not started)


@pytest.mark.parametrize(
    "change",
    ["an input", "a gradient", "a state", "a given c", "a saturated c", "the output"],
)
@pytest.mark.parametrize("switches", [{}, {"num_layers": 2}, {"bidirectional": True}])
def test_zeros_in_the_last_step_are_replayed(change, switches, replays):
    layer = nn.LSTM(3, 4, dtype=torch.float64, **switches)
    shape = layer.num_layers * (1 + layer.bidirectional), 6, 4
    inputs, h, c = torch.randn(1, 6, 3), torch.randn(shape), torch.randn(shape)
    if change != "a given c":
        inputs = torch.cat([inputs, inputs.flip(1)])
    if change == "an input":
        inputs[:, 2, 1] = 0
    c[0, 3, 2] = 1000 if change == "a saturated c" else 0
    counter = truestep.SampleCounter(layer, batch_dim=1)
    for parameter in layer.parameters():
        if change == "a state":
            parameter.data[[1, 5, 9, 13]] = 0  # a unit that always is zero
    output, _ = layer(inputs.double(), (h.double(), c.double()))
    delta = torch.randn_like(output)
    if change == "a gradient":
        delta[:, 4, 3] = 0
    if change == "a saturated c":  # where no state says what tanh(c) was
        delta[-1] = 0
    tensors, deltas = [output.transpose(0, 1)], [delta.transpose(0, 1)]
    expected = own_counts(layer, tensors, deltas, 6)
    if change == "the output":
        with torch.no_grad():
            output.zero_()
    replays.clear()
    output.backward(delta)
    counts = counter.counts()
    assert all(torch.equal(counts[name], values) for name, values in expected.items())
    assert replays
    if change in ("a given c", "a saturated c"):
        assert counts["weight_hh_l0"].min() < 6


@pytest.mark.parametrize("kind", ["tanh", "relu", "lstm", "gru"])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_by_torch_are_those_of_the_textbook(kind, bias):
    layer = LAYERS[kind](3, 4, bias=bias, dtype=torch.float64)
    weights = weights_of(layer, "_l0")
    inputs, h, c = (torch.randn(shape).double() for shape in ((5, 6, 3), (6, 4), (6, 4)))
    with torch.no_grad():
        found = output_of(layer.mode, weights, inputs, (h, c))
    expected = rules_recurrent.forward(layer.mode, weights, inputs, (h, c)).output
    torch.testing.assert_close(found, expected)


def test_a_rounded_tanh_that_may_be_one_is_taken_for_one():
    layer = nn.LSTM(3, 4, bias=False)
    weights = weights_of(layer, "_l0")
    x, h, c = torch.randn(6, 3), torch.randn(6, 4), torch.randn(6, 4)
    gates = x @ weights.weight_ih.T + h @ weights.weight_hh.T
    after = torch.sigmoid(gates[:, 12:]) * (1 - torch.finfo(torch.float32).eps)
    ended = torch.tensor([[False]] * 3 + [[True]] * 3)
    deltas = torch.randn(6, 4), torch.zeros(6, 4)
    found, _ = last_step("LSTM", weights, x, (h, c), (after, c, ended), deltas)
    assert not found[:3, :12].any()
    assert found[3:].all()


class PackedAndPlain(nn.Module):
    """One layer on packed sequences and on their reverse."""

    def __init__(self):
        super().__init__()
        self.layer = make("lstm", batch_first=True)

    def forward(self, x):
        lengths = 1 + torch.arange(len(x)) % x.shape[1]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed = pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]
        return torch.cat([packed, self.layer(x.flip(1))[0]], -1)


def test_samples_keep_their_places_when_packed():
    model, inputs = PackedAndPlain(), sparse_inputs(6, 4, 3).double()
    delta = upstream(6, 4, 8) * (torch.rand(6, 1, 8) < 0.5)
    counter = truestep.SampleCounter(model)
    output = model(inputs)
    expected = own_counts(model, [output], [delta], 6)
    output.backward(delta)
    for name, values in counter.counts().items():
        assert torch.equal(values, expected[name]), name


CELLS = {
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
}


class Unrolled(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.cell = CELLS[kind](3, 4, dtype=torch.float64, **options)

    def forward(self, x, hx):
        outputs = []
        for step in x.unbind(1):
            hx = self.cell(step, hx)
            outputs.append(hx[0] if isinstance(hx, tuple) else hx)
        return torch.stack(outputs, 1)


@given(
    kind=st.sampled_from(list(CELLS)),
    samples=st.integers(1, 4),
    length=st.integers(1, 3),
    bias=st.booleans(),
    started=st.booleans(),
)
def test_cells(kind, samples, length, bias, started):
    model = Unrolled(kind, bias=bias)
    hx = sparse_inputs(2, samples, 4).double() if started else None
    if hx is not None:
        hx = tuple(hx) if kind == "lstm" else hx[0]
    counter = truestep.SampleCounter(model)
    output = model(sparse_inputs(samples, length, 3).double(), hx)
    delta = upstream(*output.shape)
    expected = own_counts(model, [output], [delta], samples)
    output.backward(delta)
    counts = counter.counts()
    assert counter.batch_size == samples
    counter.close()
    for name, values in expected.items():
        assert torch.equal(counts[name], values), name


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_counts_as_the_layer_of_one_step(kind):
    cell, layer = CELLS[kind](3, 4), LAYERS[kind](3, 4, batch_first=True)
    layer.load_state_dict({f"{name}_l0": values for name, values in cell.state_dict().items()})
    x = torch.randn(3)
    found = []
    for each, inputs in ((cell, x), (layer, x.unsqueeze(0))):
        counter = truestep.SampleCounter(nn.ModuleList([each]))
        returned = each(inputs)
        returned = returned[0] if isinstance(returned, tuple) else returned
        returned.square().sum().backward()
        found.append({name.removesuffix("_l0"): v for name, v in counter.counts().items()})
        assert counter.batch_size == 1
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        assert torch.equal(values, found[1][name]), name


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_single_precision(kind):
    """Where torch has other kernels than in double precision."""
    layer = make(kind, num_layers=2, dropout=0.3, batch_first=True, bidirectional=True).float()
    counter = truestep.SampleCounter(layer)
    output, _ = layer(sparse_inputs(5, 4, 3))
    delta = upstream(*output.shape).float()
    expected = own_counts(layer, [output], [delta], 5)
    output.backward(delta)
    for name, values in counter.counts().items():
        assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize("kind", LAYERS)
def test_an_unbatched_call_is_one_sample(kind):
    layer = make(kind, num_layers=2, batch_first=True)
    inputs = sparse_inputs(1, 4, 3).double()
    h = states(layer, 1)
    h_unbatched = tuple(each[:, 0] for each in h) if isinstance(h, tuple) else h[:, 0]
    found = []
    for call in ((inputs, h), (inputs[0], h_unbatched)):
        counter = truestep.SampleCounter(nn.ModuleList([layer]))
        layer(*call)[0].square().sum().backward()
        found.append(counter.counts())
        assert counter.batch_size == 1
        counter.close()
        layer.zero_grad()
    for name, values in found[0].items():
        assert torch.equal(found[1][name], values), name


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_that_are_changed_in_place(kind, batch_first):
    layer = make(kind, batch_first=batch_first, bidirectional=True)
    inputs = sparse_inputs(5, 3, 3).double()
    inputs = inputs if batch_first else inputs.transpose(0, 1)
    counter = truestep.SampleCounter(layer, batch_dim=0 if batch_first else 1)
    output, hidden = layer(inputs)
    nn.functional.relu_(output)
    assert_counts_are_own(layer, counter, (output, hidden), 5)


def step_by_step(layer, inputs, delta):
    """The gates' gradients of a one-layer LSTM at every step, by autograd, as counts by position."""
    h = c = torch.zeros(len(inputs), 4, dtype=torch.float64)
    gates, outputs, befores = [], [], []
    for x in inputs.unbind(1):
        befores.append(h)
        gates.append(
            nn.functional.linear(x, layer.weight_ih_l0, layer.bias_ih_l0)
            + nn.functional.linear(h, layer.weight_hh_l0, layer.bias_hh_l0)
        )
        i, f, g, o = gates[-1].chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    deltas = torch.autograd.grad(torch.stack(outputs, 1), gates, delta)
    on = [(delta != 0).long() for delta in deltas]
    return {
        "weight_ih_l0": sum(
            d.T @ (x != 0).long() for d, x in zip(on, inputs.unbind(1), strict=True)
        ),
        "weight_hh_l0": sum(d.T @ (h != 0).long() for d, h in zip(on, befores, strict=True)),
        "bias_ih_l0": sum(d.sum(0) for d in on),
        "bias_hh_l0": sum(d.sum(0) for d in on),
    }


def test_positions_as_samples():
    layer = make("lstm", batch_first=True)
    inputs, delta = sparse_inputs(5, 4, 3).double(), upstream(5, 4, 4)
    expected = step_by_step(layer, inputs, delta)
    counter = truestep.SampleCounter(layer, unit="position")
    layer(inputs)[0].backward(delta)
    for name, values in expected.items():
        assert torch.equal(counter.counts()[name], values), name


def test_positions_of_packed_sequences_are_those_that_there_are():
    layer, head = make("lstm", batch_first=True), nn.Linear(4, 2).double()
    lengths = [2, 4, 1]
    inputs = sparse_inputs(3, 4, 3).double()
    packed = pack_padded_sequence(
        inputs, torch.tensor(lengths), batch_first=True, enforce_sorted=False
    )
    counter = truestep.SampleCounter(nn.ModuleList([layer, head]), unit="position")
    head(layer(packed)[0].data).sum().backward()
    counts = counter.counts()
    expected = [
        step_by_step(layer, row[:length].unsqueeze(0), (head.weight.sum(0)).expand(1, length, 4))
        for row, length in zip(inputs, lengths, strict=True)
    ]
    assert counter.batch_size == 7
    assert counts["1.bias"].tolist() == [7, 7]
    for name in expected[0]:
        assert torch.equal(counts[f"0.{name}"], sum(row[name] for row in expected)), name


def test_frozen_parameters_have_no_counts():
    layer = make("gru", batch_first=True, num_layers=2)
    inputs = sparse_inputs(4, 3, 3).double()
    expected, _ = count(layer, lambda found, _: found[0].square().sum(), inputs, None)
    layer.weight_ih_l0.requires_grad_(requires_grad=False)
    layer.bias_hh_l1.requires_grad_(requires_grad=False)
    counts, _ = count(layer, lambda found, _: found[0].square().sum(), inputs, None)
    assert counts.keys() == expected.keys() - {"weight_ih_l0", "bias_hh_l1"}
    for name, values in counts.items():
        assert torch.equal(values, expected[name]), name


class Checkpointed(nn.Module):
    def __init__(self, layer, *, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recurrent_under_activation_checkpointing(reentrant):
    layer = make("lstm", batch_first=True, num_layers=2)
    inputs = sparse_inputs(4, 3, 3).double().requires_grad_()
    expected, _ = count(layer, lambda found, _: found[0].square().sum(), inputs, None)
    model = Checkpointed(layer, reentrant=reentrant)
    counts, _ = count(model, lambda found, _: found[0].square().sum(), inputs, None)
    for name, values in expected.items():
        assert torch.equal(counts[f"layer.{name}"], values), name


@pytest.mark.parametrize("hidden_by", ["checkpointing", "frozen layers"])
def test_dropout_that_does_not_show_is_refused(hidden_by):
    layer = make("lstm", batch_first=True, num_layers=2, dropout=0.4)
    if hidden_by == "frozen layers":
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("_l1" in name)
    model = nn.Sequential(layer)
    if hidden_by == "checkpointing":
        model = Checkpointed(layer, reentrant=False)
    counter = truestep.SampleCounter(model)
    with pytest.raises(truestep.TruestepError, match=r"one nn\.LSTM for each layer"):
        model(sparse_inputs(4, 3, 3).double())
    model.eval()
    model(sparse_inputs(4, 3, 3).double())[0].sum().backward()
    assert counter.batch_size == 4


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backward", [True, False])
def test_a_call_is_freed_without_the_garbage_collector(kind, backward):
    layer = make(kind, batch_first=True)
    counter = truestep.SampleCounter(layer)
    inputs = sparse_inputs(4, 3, 3).double().requires_grad_()
    middle = 2 * inputs
    freed = weakref.ref(middle)
    gc.disable()
    try:
        output, hidden = layer(middle)
        if backward:
            output.sum().backward()
        del middle, output, hidden
        assert freed() is None
    finally:
        gc.enable()
    counter.close()
