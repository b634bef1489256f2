import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import truestep
from properties import count, own_counts, upstream
from zoo import sparse_inputs

WIDTH = 4
lengths = st.integers(2, 4)


def sequences(samples, length, width=WIDTH):
    """Zeros, and a first feature that is never zero."""
    inputs = sparse_inputs(samples, length, width).double()
    inputs[..., 0] = 1 + torch.rand(samples, length)
    return inputs


class SamplesFirst(nn.Module):
    """Attention that is called with samples first and returns samples first."""

    def __init__(self, **options):
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, 2, dtype=torch.float64, **options)

    def forward(self, *sources, **options):
        if self.layer.batch_first:
            return self.layer(*sources, **options)
        turned = {id(source): source.transpose(0, 1) for source in sources}
        output, weights = self.layer(*[turned[id(source)] for source in sources], **options)
        return output.transpose(0, 1), weights


def assert_counts_are_own(model, *sources, **options):
    """The key's bias apart: its terms cancel, so it is held against a feature that is never zero."""
    counter = truestep.SampleCounter(model)
    outputs = [tensor for tensor in model(*sources, **options) if tensor is not None]
    deltas = [upstream(*tensor.shape) for tensor in outputs]
    samples = len(sources[0])
    expected = own_counts(model, outputs, deltas, samples)
    if "layer.in_proj_bias" in expected:
        keys = slice(WIDTH, 2 * WIDTH)
        packed = expected.get("layer.in_proj_weight")
        column = expected["layer.k_proj_weight"] if packed is None else packed[keys]
        expected["layer.in_proj_bias"][keys] = column[:, 0]
    torch.autograd.backward(outputs, deltas)
    counts = counter.counts()
    assert counter.batch_size == samples
    counter.close()
    assert counts.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(counts[name], values), name


switches = st.fixed_dictionaries(
    {
        "batch_first": st.booleans(),
        "bias": st.booleans(),
        "add_bias_kv": st.booleans(),
        "add_zero_attn": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.5]),
    }
)
wanted = st.fixed_dictionaries(
    {"need_weights": st.booleans(), "average_attn_weights": st.booleans()}
)


@settings(max_examples=60)
@given(
    samples=st.integers(1, 4),
    queries=lengths,
    keys=lengths,
    kind=st.sampled_from(["self", "cross", "three", "widths"]),
    mask=st.sampled_from([None, "causal", "padding", "float", "heads"]),
    switches=switches,
    wanted=wanted,
)
def test_attention(samples, queries, keys, kind, mask, switches, wanted):
    widths = {"kdim": 3, "vdim": 5} if kind == "widths" else {}
    model = SamplesFirst(**switches, **widths)
    query = sequences(samples, queries)
    key = query if kind == "self" else sequences(samples, keys, widths.get("kdim", WIDTH))
    keys, value = key.shape[1], key
    if kind in {"three", "widths"}:
        value = sequences(samples, keys, widths.get("vdim", WIDTH))
    later = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    masks = {
        "causal": {"attn_mask": later},
        "heads": {"attn_mask": later.expand(2 * samples, -1, -1)},
        "float": {"attn_mask": torch.randn(queries, keys, dtype=torch.float64)},
        "padding": {"key_padding_mask": (torch.arange(keys) == 1).expand(samples, -1)},
    }
    assert_counts_are_own(model, query, key, value, **wanted, **masks.get(mask, {}))


class Classifier(nn.Module):
    """Attention over positions in a model; the loss sees their mean."""

    def __init__(self, *, checkpointed=None, **options):
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
        self.head = nn.Linear(WIDTH, 3)
        self.checkpointed = checkpointed

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x):
        x = torch.relu(self.embed(x))
        if self.checkpointed is None:
            x = self.attend(x)
        else:
            x = checkpoint(self.attend, x, use_reentrant=self.checkpointed)
        return self.head(torch.relu(x)).mean(1)


def classes(samples):
    return torch.randint(0, 3, (samples,))


def without_key_bias(counts):
    return {
        name: torch.cat([values[:WIDTH], values[2 * WIDTH :]]) if "in_proj_bias" in name else values
        for name, values in counts.items()
    }


@given(st.integers(1, 5), lengths)
def test_attention_in_a_model_equals_the_oracle(samples, length):
    model, loss_fn = Classifier().double(), nn.functional.cross_entropy
    inputs, targets = sequences(samples, length, 3), classes(samples)
    counts, batch_size = count(model, loss_fn, inputs, targets)
    expected = without_key_bias(truestep.oracle.counts(model, loss_fn, inputs, targets))
    assert batch_size == samples
    assert counts.keys() == expected.keys()
    for name, values in without_key_bias(counts).items():
        assert torch.equal(values, expected[name]), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_attention_under_activation_checkpointing(reentrant):
    model = Classifier()
    inputs, targets = sequences(5, 4, 3).float(), classes(5)
    plain, _ = count(model, nn.functional.cross_entropy, inputs, targets)
    model.checkpointed = reentrant
    checkpointed, _ = count(model, nn.functional.cross_entropy, inputs, targets)
    for name, values in plain.items():
        assert torch.equal(checkpointed[name], values), name


def test_dropout_under_checkpointing_is_right_or_refused():
    model = Classifier(dropout=0.5, checkpointed=True)
    inputs, targets = sequences(5, 4, 3).float(), classes(5)
    state = torch.get_rng_state()
    checkpointed, _ = count(model, nn.functional.cross_entropy, inputs, targets)
    model.checkpointed = None
    torch.set_rng_state(state)
    plain, _ = count(model, nn.functional.cross_entropy, inputs, targets)
    for name, values in plain.items():
        assert torch.equal(checkpointed[name], values), name
    model.checkpointed = False
    with pytest.raises(truestep.TruestepError, match="use_reentrant=True"):
        count(model, nn.functional.cross_entropy, inputs, targets)


class ByHand(nn.Module):
    """The same attention from four linear layers."""

    def __init__(self, layer):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH).double() for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH).double()
        self.out.load_state_dict(layer.out_proj.state_dict())
        for index, part in enumerate((self.q, self.k, self.v)):
            rows = slice(index * WIDTH, (index + 1) * WIDTH)
            part.load_state_dict(
                {"weight": layer.in_proj_weight[rows], "bias": layer.in_proj_bias[rows]}
            )

    def forward(self, query, key, value):
        heads = [
            part(source).unflatten(-1, (2, -1)).transpose(1, 2)
            for part, source in ((self.q, query), (self.k, key), (self.v, value))
        ]
        attended = nn.functional.scaled_dot_product_attention(*heads)
        return self.out(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("unit", ["sample", "position"])
@pytest.mark.parametrize("keys", [None, 3, 5])
def test_attention_equals_four_linear_layers(unit, keys):
    model = SamplesFirst(batch_first=True)
    with torch.no_grad():
        model.layer.in_proj_bias.normal_()
    query = sequences(4, 4)
    key = query if keys is None else sequences(4, keys)
    delta = upstream(4, 4, WIDTH)
    counted, by_hand = (
        (truestep.SampleCounter(each, unit=unit), each(query, key, key))
        for each in (model, ByHand(model.layer))
    )
    counted[1][0].backward(delta)
    by_hand[1].backward(delta)
    counts, expected = counted[0].counts(), by_hand[0].counts()
    for name in ("weight", "bias"):
        parts = torch.cat([expected[f"{part}.{name}"] for part in "qkv"])
        assert torch.equal(counts[f"layer.in_proj_{name}"], parts)
        assert torch.equal(counts[f"layer.out_proj.{name}"], expected[f"out.{name}"])
    if keys != 5:  # more keys than queries: a position of the projections has no output
        positions = int((delta != 0).any(-1).sum())
        assert counted[0].batch_size == (4 if unit == "sample" else positions)


def test_an_unbatched_call_is_one_sample():
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True)
    x, mask = sequences(1, 3).float(), torch.tensor([[False, True, False]])
    batched = truestep.SampleCounter(layer)
    layer(x, x, x, key_padding_mask=mask)[0].square().sum().backward()
    expected = batched.counts()
    batched.close()
    layer.zero_grad()
    counter = truestep.SampleCounter(nn.ModuleList([layer]))  # called outside the model it watches
    layer(x[0], x[0], x[0], key_padding_mask=mask[0])[0].square().sum().backward()
    for name, values in counter.counts().items():
        assert torch.equal(values, expected[name.removeprefix("0.")]), name
    assert counter.batch_size == 1


@pytest.mark.parametrize(
    ("length", "samples", "options"),
    [(4, 3, {}), (3, None, {}), (4, 3, {"batch_dim": 0})],
)
def test_samples_in_another_place_are_refused(length, samples, options):
    layer = nn.MultiheadAttention(WIDTH, 2)
    counter = truestep.SampleCounter(layer, **options)
    x = torch.randn(length, WIDTH) if samples is None else torch.randn(length, samples, WIDTH)
    with pytest.raises(truestep.TruestepError, match="Say where its samples are"):
        layer(x, x, x, need_weights=False)[0].sum().backward()
    counter.close()


def test_frozen_projections_have_no_counts():
    model = SamplesFirst(batch_first=True, kdim=3)
    for name in ("k_proj_weight", "out_proj.weight", "in_proj_bias"):
        model.layer.get_parameter(name).requires_grad_(requires_grad=False)
    x, key = sequences(3, 4), sequences(3, 2, 3)
    full = SamplesFirst(batch_first=True, kdim=3)
    full.load_state_dict(model.state_dict())
    loss = lambda outputs, _: outputs[0].square().sum()  # noqa: E731
    expected, counts = {}, {}
    for each, found in ((full, expected), (model, counts)):
        counter = truestep.SampleCounter(each)
        loss(each(x, key, sequences(3, 2).copy_(x[:, :2])), None).backward()
        found.update(counter.counts())
    names = {"layer.q_proj_weight", "layer.v_proj_weight", "layer.out_proj.bias"}
    assert counts.keys() == names
    for name in names:
        assert torch.equal(counts[name], expected[name])


def test_attention_without_a_rule_keeps_its_plain_gradients():
    model = Classifier()
    rules = {
        kind: rule for kind, rule in truestep.RULES.items() if kind is not nn.MultiheadAttention
    }
    with pytest.raises(truestep.TruestepError, match="MultiheadAttention has no rule"):
        truestep.SampleCounter(model, rules=rules)
    counter = truestep.SampleCounter(model, rules=rules, unsupported="mean")
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    before = model.attention.out_proj.weight.detach().clone()
    model(sequences(3, 4, 3).float()).square().sum().backward()
    optimizer.step()
    step = before - 0.1 * model.attention.out_proj.weight.grad
    torch.testing.assert_close(model.attention.out_proj.weight.detach(), step)
    assert counter.counts().keys() == {"embed.weight", "embed.bias", "head.weight", "head.bias"}


def test_a_forward_without_a_backward_is_freed():
    layer = nn.MultiheadAttention(WIDTH, 2)
    counter = truestep.SampleCounter(layer, batch_dim=1)
    x = torch.randn(3, 2, WIDTH, requires_grad=True)
    middle = 2 * x
    freed = weakref.ref(middle)
    gc.disable()
    try:
        output = layer(middle, middle, middle)
        del middle, output
        assert freed() is None
    finally:
        gc.enable()
    counter.close()


@pytest.mark.parametrize("training", [True, False])
def test_attention_under_autocast(training):
    model = Classifier(dropout=0.3 if training else 0.0).train(training)
    inputs, targets = sequences(5, 4, 3).float(), classes(5)
    loss_fn = nn.functional.cross_entropy

    def mixed(outputs, goals):
        return loss_fn(outputs.float(), goals)

    with torch.autocast("cpu", torch.bfloat16):
        counter = truestep.SampleCounter(model)
        loss = mixed(model(inputs), targets)
    loss.backward()
    counts = counter.counts()
    assert counter.batch_size == 5
    assert counts.keys() == dict(model.named_parameters()).keys()
    assert all((values > 0).any() for values in counts.values())
