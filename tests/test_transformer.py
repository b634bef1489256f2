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
