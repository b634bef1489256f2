import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import truestep
from properties import own_counts, upstream
from zoo import sparse_inputs

WIDTH = 4


def without_key_biases(counts):
    """Their terms cancel: see tests/test_attention.py."""
    return {
        name: values[torch.arange(len(values)) // WIDTH != 1] if "in_proj_bias" in name else values
        for name, values in counts.items()
    }


def assert_counts_are_own(model, samples, *inputs, batch_first=True, **options):
    turned = inputs if batch_first else [each.transpose(0, 1) for each in inputs]
    counter = truestep.SampleCounter(model, batch_dim=0 if batch_first else 1)
    output = model(*turned, **options)
    output = output if batch_first else output.transpose(0, 1)
    delta = upstream(*output.shape)
    expected = without_key_biases(own_counts(model, [output], [delta], samples))
    output.backward(delta)
    counts = without_key_biases(counter.counts())
    assert counter.batch_size == samples
    counter.close()
    assert counts.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(counts[name], values), name


switches = st.fixed_dictionaries(
    {
        "dropout": st.sampled_from([0.0, 0.4]),
        "batch_first": st.booleans(),
        "norm_first": st.booleans(),
        "bias": st.booleans(),
        "activation": st.sampled_from(["relu", "gelu"]),
    }
)


def padding(samples, length):
    mask = torch.zeros(samples, length, dtype=torch.bool)
    mask[samples // 2 :, -1] = True
    return mask


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(2, 4), switches, st.booleans(), st.booleans())
def test_encoder(samples, length, switches, training, padded):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, dtype=torch.float64, **switches)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    inputs = sparse_inputs(samples, length, WIDTH).double()
    mask = padding(samples, length) if padded else None
    options = {"src_key_padding_mask": mask, "batch_first": switches["batch_first"]}
    assert_counts_are_own(model, samples, inputs, **options)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(2, 4), st.integers(2, 4), switches)
def test_decoder(samples, length, memory, switches):
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 6, dtype=torch.float64, **switches)
    inputs = sparse_inputs(samples, length, WIDTH).double()
    memories = sparse_inputs(samples, memory, WIDTH).double()
    mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
    options = {"tgt_mask": mask, "batch_first": switches["batch_first"]}
    assert_counts_are_own(nn.TransformerDecoder(layer, 1), samples, inputs, memories, **options)


def test_transformer():
    model = nn.Transformer(WIDTH, 2, 1, 1, 6, batch_first=True, dtype=torch.float64)
    inputs, targets = sparse_inputs(3, 4, WIDTH).double(), sparse_inputs(3, 2, WIDTH).double()
    assert_counts_are_own(model, 3, inputs, targets)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, mask=None):
        if x.shape[-1] != WIDTH:
            raise ValueError("no such width")
        return self.head(self.encoder(x, src_key_padding_mask=mask))


@pytest.fixture
def fused(monkeypatch):
    """How often a layer ran as one operation."""
    calls = []
    operation = torch._transformer_encoder_layer_fwd

    def counted(*args):
        calls.append(1)
        return operation(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    return calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mask", [None, padding(3, 5)])
def test_evaluation_keeps_the_fused_layers(fused, mask):
    model, inputs = Classifier(), torch.randn(3, 5, WIDTH)
    counter = truestep.SampleCounter(model)
    model.eval()
    with torch.no_grad():
        before = model(inputs, mask)
    assert len(fused) == 2
    model.train()
    model(inputs, mask).square().mean().backward()
    assert counter.batch_size == 3
    assert counter.counts().keys() == dict(model.named_parameters()).keys()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(inputs, mask), before)
    assert len(fused) == 4
    counter.close()


def test_a_failed_evaluation_leaves_the_hooks_in_place():
    model = Classifier().eval()
    counter = truestep.SampleCounter(model)
    with torch.no_grad(), pytest.raises(ValueError, match="no such width"):
        model(torch.randn(3, 5, WIDTH + 1))
    model(torch.randn(2, 5, WIDTH)).square().mean().backward()
    assert counter.batch_size == 2
    assert counter.counts().keys() == dict(model.named_parameters()).keys()


def test_closing_leaves_no_hook():
    model = Classifier().eval()
    counter = truestep.SampleCounter(model)
    with torch.no_grad():
        model(torch.randn(3, 5, WIDTH))
    counter.close()
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


class Recalls(nn.Module):
    """Each position sees those before it, as under causal attention."""

    def __init__(self):
        super().__init__()
        self.below, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.below(x).relu().cumsum(1))


def test_by_position_a_prompt_counts_below_and_not_in_n():
    """N is the loss's denominator, so a factor below 1 is the mean over the positions that took part."""
    samples, prompt, answer = 3, 6, 2
    torch.manual_seed(0)
    model = Recalls().double()
    counter = truestep.SampleCounter(model, unit="position")
    x = torch.rand(samples, prompt + answer, 5).double()
    labels = torch.randint(0, 3, (samples, prompt + answer))
    labels[:, :prompt] = -100
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten())
    loss.backward()
    counts = counter.counts()
    assert counter.batch_size == samples * answer  # the loss's denominator
    assert counts["head.bias"].eq(samples * answer).all()
    active = model.below(x).gt(0).flatten(0, 1).sum(0)  # the whole prompt reaches the answers
    assert torch.equal(counts["below.bias"], active)
    assert counts["below.bias"].max() > counter.batch_size

    # The sum over contributing positions, divided by their number.
    total = model.below.bias.grad * counter.batch_size
    expected = torch.where(active > 0, total / active, model.below.bias.grad)
    found = counter.effective_gradient(model.below.bias, eps=0.0)
    torch.testing.assert_close(found, expected)
