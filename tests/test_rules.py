import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

import truestep
from properties import assert_counts_equal_oracle, count
from truestep.layout import Layout
from truestep.rules import RULES, find_rule
from truestep.rules_bare import bare

batches = st.integers(1, 6)
small = st.integers(1, 3)


def weighted(output, weights):
    """A loss whose output gradient is `weights`, zeros included."""
    return (output * weights).sum()


def sparse(*shape):
    return torch.randn(*shape) * (torch.rand(*shape) < 0.4)


def judge(layer, inputs):
    with torch.no_grad():
        shape = layer(inputs).shape
    assert_counts_equal_oracle(layer, weighted, inputs, sparse(*shape))


@given(batches, small, small, st.booleans(), st.lists(small, max_size=2))
def test_linear(batch, inputs, outputs, bias, positions):
    judge(nn.Linear(inputs, outputs, bias=bias), sparse(batch, *positions, inputs))


@given(
    rank=st.integers(1, 3),
    batch=batches,
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    bias=st.booleans(),
)
def test_convolution(rank, batch, groups, kernel, stride, dilation, padding, bias):
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1](
        2 * groups, groups, kernel, stride, padding, dilation, groups, bias
    )
    judge(layer, sparse(batch, 2 * groups, *[5, 6, 5][:rank]))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", (1, 2)])
def test_convolution_paddings(mode, padding):
    layer = nn.Conv2d(2, 3, (2, 3), padding=padding, padding_mode=mode)
    judge(layer, sparse(4, 2, 5, 6))


@given(
    rank=st.integers(1, 3),
    batch=batches,
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 3),
    padding=st.integers(0, 1),
    extra=st.integers(0, 2),
    bias=st.booleans(),
)
def test_transposed_convolution(
    rank, batch, groups, kernel, stride, dilation, padding, extra, bias
):
    extra = min(extra, max(stride, dilation) - 1)
    layer = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][rank - 1](
        groups, 2 * groups, kernel, stride, padding, extra, groups, bias, dilation
    )
    judge(layer, sparse(batch, groups, *[3, 4, 3][:rank]))


@given(batches, small, small, small, st.booleans(), st.lists(small, max_size=1))
def test_bilinear(batch, first, second, outputs, bias, positions):
    layer = nn.Bilinear(first, second, outputs, bias=bias)
    other = sparse(batch, *positions, second)

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x[..., :first], x[..., first:])

    judge(Pairs(), torch.cat([sparse(batch, *positions, first), other], -1))


@given(batches, st.lists(small, max_size=2), st.booleans())
def test_prelu(batch, positions, channels):
    judge(nn.PReLU(3 if channels else 1), sparse(batch, 3, *positions))


@given(st.integers(1, 3), batches, st.booleans(), st.booleans())
def test_instance_norm(rank, batch, track, train):
    layer = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][rank - 1](
        2, affine=True, track_running_stats=track
    )
    layer.train(train)
    judge(layer, sparse(batch, 2, *[3, 2, 2][:rank]))


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_on_request_counts_given_the_statistics(train):
    model = nn.BatchNorm2d(3).train(train)
    nn.init.normal_(model.running_mean)
    inputs, delta = sparse(5, 3, 2, 2), sparse(5, 3, 2, 2)
    rules = truestep.RULES | truestep.rules.BATCH_NORM
    before = model.running_mean.clone()
    momentum, model.momentum = model.momentum, 1.0
    with torch.no_grad():
        mean = inputs.mean((0, 2, 3)) if train else before
    counts, batch_size = count(model, weighted, inputs, delta, rules=rules)
    model.momentum = momentum
    if (
        train
    ):  # one batch with momentum 1 leaves that batch's mean: the rule's second look left no trace
        torch.testing.assert_close(model.running_mean, mean)
    centred = inputs != mean[:, None, None]
    assert batch_size == 5
    assert counts["weight"].tolist() == ((delta != 0) & centred).any(-1).any(-1).sum(0).tolist()
    assert counts["bias"].tolist() == (delta != 0).any(-1).any(-1).sum(0).tolist()


@given(batches, st.lists(small, max_size=2), st.none() | st.integers(0, 4), st.booleans())
def test_embedding(batch, positions, padding, dense):
    layer = nn.Embedding(5, 3, padding_idx=padding, sparse=not dense)
    judge(layer, torch.randint(0, 5, (batch, *positions)))


@given(batches, st.integers(1, 5), st.sampled_from(["sum", "mean", "max"]), st.booleans())
def test_embedding_bag(batch, length, mode, padded):
    layer = nn.EmbeddingBag(5, 3, mode=mode, padding_idx=0 if padded else None)
    judge(layer, torch.randint(0, 5, (batch, length)))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("include_last", [False, True])
def test_embedding_bag_with_offsets(mode, include_last):
    """Ragged bags, an empty one among them, against one bag at a time."""
    layer = nn.EmbeddingBag(6, 3, mode=mode, include_last_offset=include_last)
    bags = [torch.tensor(bag) for bag in ([1, 1, 4], [], [2], [0, 5, 5, 2])]
    starts = [0, 3, 3, 4] + ([8] if include_last else [])
    delta = sparse(4, 3)
    counter = truestep.SampleCounter(layer)
    weighted(layer(torch.cat(bags).long(), torch.tensor(starts)), delta).backward()
    expected = torch.zeros(6, 3, dtype=torch.int64)
    for bag, row in zip(bags, delta, strict=True):
        single = layer(bag.long(), torch.tensor([0] + ([len(bag)] if include_last else [])))
        expected += torch.autograd.grad(weighted(single, row), layer.weight)[0] != 0
    assert counter.batch_size == 4
    assert torch.equal(counter.counts()["weight"], expected)


@pytest.mark.parametrize("layer", [nn.Embedding(5, 3), nn.EmbeddingBag(5, 3)])
def test_indices_of_32_bits_may_have_gaps_and_be_filled_anew(layer):
    indices = torch.randint(0, 5, (8, 6), dtype=torch.int32)[:, ::2]
    judge(layer, indices)
    rows = indices.contiguous()
    expected, _ = count(layer, lambda y, _: y.sum(), rows.long(), None)
    counter = truestep.SampleCounter(layer)
    layer(rows).sum().backward()
    rows.zero_()
    assert torch.equal(counter.counts()["weight"], expected["weight"])


def test_embedding_bag_weights_of_zero_do_not_contribute():
    layer = nn.EmbeddingBag(4, 2, mode="sum")
    counter = truestep.SampleCounter(layer)
    rows, weights = torch.tensor([[0, 1], [1, 2]]), torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    layer(rows, per_sample_weights=weights).sum().backward()
    assert counter.counts()["weight"][:, 0].tolist() == [1, 1, 1, 0]


@given(batches, st.lists(small, max_size=1), st.sampled_from([(4,), (2, 3)]), st.booleans())
def test_layer_norm(batch, positions, shape, bias):
    judge(nn.LayerNorm(shape, bias=bias), sparse(batch, *positions, *shape))


@given(batches, st.lists(small, max_size=1), st.sampled_from([(4,), (2, 3)]))
def test_rms_norm(batch, positions, shape):
    judge(nn.RMSNorm(shape), sparse(batch, *positions, *shape))


@given(batches, st.lists(st.integers(2, 3), max_size=2), st.integers(1, 2))
def test_group_norm(batch, positions, groups):
    judge(nn.GroupNorm(groups, 4), sparse(batch, 4, *positions))


def test_a_constant_input_does_not_reach_the_weight_of_a_norm():
    layer = nn.LayerNorm(3)
    counter = truestep.SampleCounter(layer)
    layer(torch.ones(2, 3)).sum().backward()
    assert counter.counts()["weight"].tolist() == [0, 0, 0]
    assert counter.counts()["bias"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4)])
def test_norms_are_not_computed_twice(norm, monkeypatch):
    inputs = torch.cat([torch.ones(1, 4), torch.tensor([[1.0, 3.0, 2.0, 2.0]]), torch.randn(4, 4)])
    expected, _ = count(norm, weighted, inputs, torch.ones(6, 4))
    counter = truestep.SampleCounter(norm)
    norm(inputs).sum().backward()  # the first call goes the long way
    norm.zero_grad()
    monkeypatch.setattr("truestep.rules_norm._normalize", None)
    norm(inputs).sum().backward()
    assert torch.equal(counter.counts()["weight"], expected["weight"])
    assert expected["weight"].tolist() == [5, 5, 4, 4]


POSITIONWISE = {
    "linear": lambda: nn.Linear(3, 2),
    "embedding": lambda: nn.Embedding(5, 2),
    "layer norm": lambda: nn.LayerNorm(3),
    "rms norm": lambda: nn.RMSNorm(3),
}


@pytest.mark.parametrize("name", POSITIONWISE)
def test_positions_as_samples_equal_a_flattened_batch(name):
    layer = POSITIONWISE[name]()
    inputs = torch.randint(0, 5, (4, 7)) if name == "embedding" else sparse(4, 7, 3)
    delta = sparse(4, 7, layer(inputs).shape[-1])
    flat, _ = count(layer, weighted, inputs.flatten(0, 1), delta.flatten(0, 1))
    positions, batch_size = count(layer, weighted, inputs, delta, unit="position")
    assert batch_size == int((delta != 0).any(-1).sum())
    for key, values in flat.items():
        assert torch.equal(positions[key], values), key


def test_convolution_positions_as_samples_equal_unfolded_patches():
    layer = nn.Conv2d(2, 3, 3, padding=1, stride=2)
    inputs, delta = sparse(4, 2, 5, 5), sparse(4, 3, 3, 3)
    counts, batch_size = count(layer, weighted, inputs, delta, unit="position")
    patches = nn.functional.unfold(inputs, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    rows = delta.flatten(2).transpose(1, 2).flatten(0, 1)
    expected = ((rows != 0).long().T @ (patches != 0).long()).reshape(3, 2, 3, 3)
    assert torch.equal(counts["weight"], expected)
    assert torch.equal(counts["bias"], (rows != 0).sum(0))
    assert batch_size == int((rows != 0).any(1).sum())


def test_transposed_convolution_positions_as_samples():
    layer = nn.ConvTranspose1d(2, 3, 3, stride=2)
    inputs, delta = sparse(4, 2, 5), sparse(4, 3, 11)
    counts, _ = count(layer, weighted, inputs, delta, unit="position")
    patches = delta.unfold(2, 3, 2).transpose(1, 2).flatten(2).flatten(0, 1)
    rows = inputs.transpose(1, 2).flatten(0, 1)
    expected = ((rows != 0).long().T @ (patches != 0).long()).reshape(2, 3, 3)
    assert torch.equal(counts["weight"], expected)


def test_positions_without_gradient_do_not_inflate_n():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    counter = truestep.SampleCounter(model, unit="position")
    targets = torch.full((2, 10), -100)
    targets[0, 3] = targets[1, 7] = 1
    logits = model(torch.randint(0, 5, (2, 10)))
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    assert counter.batch_size == 2
    assert counter.counts()["1.bias"].tolist() == [2, 2, 2]


class Tokens(nn.Module):
    """Logits at each position of padded sentences, by layers that see positions or flattened ones."""

    def __init__(self, *, flat):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 5)
        self.flat = flat

    def forward(self, x):
        hidden = torch.relu(self.embedding(x))
        return self.head(hidden.flatten(0, -2) if self.flat else hidden)


def token_loss(logits, targets):
    total = nn.functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=0, reduction="sum"
    )
    return total / max(1, len(targets))


def padded_sentences():
    inputs = torch.randint(1, 7, (5, 6))
    for sample, length in enumerate((6, 1, 4, 6, 2)):
        inputs[sample, length:] = 0
    targets = inputs.roll(-1, 1).clamp(max=4)
    targets[:, -1] = 0
    targets[3] = 0  # a sentence without any target
    return inputs, targets * (inputs != 0)


def test_padded_sentences_by_sample():
    inputs, targets = padded_sentences()
    assert_counts_equal_oracle(Tokens(flat=False), token_loss, inputs, targets)


@pytest.mark.parametrize("flat", [False, True])
def test_padded_sentences_by_position_leave_padding_out(flat):
    inputs, targets = padded_sentences()
    model = Tokens(flat=flat)
    counts, batch_size = count(model, token_loss, inputs, targets, unit="position")
    kept = targets.flatten() != 0
    rows, goals = inputs.flatten()[kept], targets.flatten()[kept]
    expected = truestep.oracle.counts(model, token_loss, rows, goals)
    assert batch_size == kept.sum()
    for name, values in expected.items():
        assert torch.equal(counts[name], values), name


def test_time_first_batches():
    layer = nn.Linear(3, 2)
    inputs, delta = sparse(5, 4, 3), sparse(5, 4, 2)
    first, _ = count(layer, weighted, inputs.transpose(0, 1), delta.transpose(0, 1))
    time_first, batch_size = count(layer, weighted, inputs, delta, batch_dim=1)
    assert batch_size == 4
    assert torch.equal(first["weight"], time_first["weight"])


def test_layout_keeps_samples_apart_from_positions():
    mask = torch.rand(2, 3, 4, 5) < 0.5
    assert torch.equal(Layout().arrange(mask), mask.flatten(1, 2))
    assert torch.equal(Layout(unit="position").arrange(mask), mask.flatten(0, 2))
    assert torch.equal(Layout().arrange(mask, 2), mask.flatten(2))
    assert torch.equal(Layout(1).arrange(mask, 2), mask.transpose(0, 1).flatten(2))
    assert torch.equal(Layout().arrange(mask[0, 0, 0]), mask[0, 0, 0].unsqueeze(0))


class Scaled(nn.Linear):
    def forward(self, input):
        return super().forward(2 * input)


class Plain(nn.Linear):
    """Inherits the forward pass, and so the rule."""


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.BatchNorm1d(3), "mixes the samples"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.utils.parametrizations.weight_norm(nn.GRU(2, 2), "weight_hh_l0"), "parametrization"),
        (nn.ParameterList([torch.ones(2)]), "known to use them"),
        (prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5), "prune.remove()"),
        (nn.MultiheadAttention(4, 2).out_proj, "without being called"),
    ],
)
def test_no_rule_comes_with_a_reason(module, reason):
    found = find_rule(module, RULES)
    assert isinstance(found, str)
    assert reason in found


def test_a_forward_of_its_own_is_read_off_the_graph():
    assert find_rule(Scaled(2, 2), RULES) is bare


def test_a_layer_left_out_of_the_rules_has_none():
    rules = {kind: rule for kind, rule in RULES.items() if kind is not nn.Linear}
    assert find_rule(nn.Linear(2, 2), rules) == "Linear has no rule"


def test_a_subclass_inherits_the_rule():
    assert find_rule(Plain(2, 2), RULES) is RULES[nn.Linear]


def test_a_users_rule():
    def scaled(layout, module, input):
        return RULES[nn.Linear](layout, module, 2 * input)

    layer = Scaled(3, 2)
    assert_counts_equal_oracle(
        layer, weighted, sparse(5, 3), sparse(5, 2), rules={**RULES, Scaled: scaled}
    )


def test_a_rule_of_the_wrong_shape_is_named():
    def wrong(layout, module, input):
        return RULES[nn.Linear](layout, nn.Linear(7, 2), sparse(len(input), 7))

    model = nn.Sequential(nn.Linear(3, 2))
    truestep_counter = truestep.SampleCounter(model, rules={nn.Linear: wrong})
    with pytest.raises(truestep.TruestepError, match=r"the rule for '0' gives 'weight'"):
        model(sparse(5, 3)).sum().backward()
    truestep_counter.close()


@pytest.mark.parametrize(
    ("layer", "inputs", "change"),
    [
        (nn.Linear(4, 4), torch.ones(6, 4), prune.random_unstructured),
        (nn.Linear(4, 4), torch.ones(6, 4), parametrizations.spectral_norm),
        (nn.Conv1d(4, 4, 1), torch.ones(6, 4, 3), parametrizations.orthogonal),
        (nn.Embedding(9, 4), torch.arange(6), prune.random_unstructured),
    ],
)
def test_a_weight_that_becomes_computed_is_refused_until_it_is_permanent(layer, inputs, change):
    model = nn.Sequential(layer)
    counter = truestep.SampleCounter(model)
    pruned = change is prune.random_unstructured
    change(layer, "weight", *([0.5] if pruned else []))
    for _ in range(2):
        with pytest.raises(
            truestep.TruestepError, match=r"'weight' of '0' is computed from others"
        ):
            model(inputs)
    if pruned:
        prune.remove(layer, "weight")
        model(inputs).sum().backward()
        assert counter.batch_size == 6
