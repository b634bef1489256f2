import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import truestep
from properties import (
    assert_accumulation_equals_joint_batch,
    assert_counts_equal_oracle,
    count,
    own_counts,
    upstream,
)
from truestep import TruestepError
from zoo import sparse_inputs

SAMPLES, TIME, WIDTH = 4, 5, 6


class Bare(nn.Module):
    """A linear map, what a function makes of it with the model's own parameters, and a head."""

    def __init__(self, function, *, embed=True, **shapes):
        super().__init__()
        self.embed = nn.Linear(3, WIDTH) if embed else None
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.function, self.pool = function, True
        self.head = nn.LazyLinear(3)
        self.double()(torch.zeros(1, TIME, 3 if embed else WIDTH).double())

    def forward(self, x):
        x = torch.relu(self.function(self, x if self.embed is None else self.embed(x)))
        x = self.head(x)
        return x.flatten(1, -2).mean(1) if self.pool else x


def in_chunks(self, x):
    first, second = self.a.chunk(2)
    return x * first + second.squeeze(0)


def with_token(self, x):
    return torch.cat([self.a.expand(len(x), -1, -1), x], 1) + self.b[:, : x.shape[1] + 1]


def token_among_unseen(self, x):
    return torch.cat([x.detach()[:, :1], self.a.expand(len(x), -1, -1), x.detach()], 1)


def masked(self, x):
    hidden = torch.rand(*x.shape[:2], 1, generator=torch.Generator().manual_seed(0)) < 0.5
    return torch.where(hidden.expand_as(x[:, :, :1])[:1], self.a, x)


def experts(self, x):
    weight = self.a.expand(len(x), -1, -1)
    return torch.bmm(x, weight)


def low_rank(self, x):
    return x + (x @ self.a.T) @ self.b.T * 0.5


def merged(self, x):
    return functional.linear(x, torch.tanh(self.a) * 2, self.b)


def lookup(self, x):
    ids = (x.detach()[..., 0] > 0).long() + 2
    return x + functional.embedding(ids, self.a, padding_idx=0) * self.b[ids]


def lookup_then_layer(self, x):
    return self.embed.weight.detach().sum() * 0 + x * functional.embedding(
        (x.detach()[..., 0] > 0).long(), self.a
    )


def grid(self, x):
    rows = self.a[:, None].expand(2, 3, -1) + self.b[None, :]
    return torch.cat([x, rows.flatten(0, 1).expand(len(x), -1, -1)], 1) + rows.reshape(6, WIDTH)[0]


def written(self, x):
    x = x * 1
    x[:, 0] = self.a * 2
    return x


def in_place(self, x):
    x = functional.softplus(x)
    x += self.a
    x *= self.b
    return x


def stacked(self, x):
    return x * torch.stack([self.a, self.b], -1).sum(-1).div(1)


WITH_UNSEEN = {
    "scale unseen": (lambda s, x: x * s.a, {"a": (WIDTH,)}),
    "shift unseen": (lambda s, x: x + s.a, {"a": (1, TIME, WIDTH)}),
    "shift and scale unseen": (lambda s, x: (x + s.a) * s.b, {"a": (TIME, WIDTH), "b": (WIDTH,)}),
    "matrix unseen": (lambda s, x: (x * s.b) @ s.a, {"a": (WIDTH, 4), "b": (1, WIDTH)}),
    "token unseen": (with_token, {"a": (1, 1, WIDTH), "b": (1, TIME + 3, WIDTH)}),
    "norm unseen": (
        lambda s, x: functional.layer_norm(x, (WIDTH,), s.a, s.b),
        {"a": (WIDTH,), "b": (WIDTH,)},
    ),
}
EXACT = {
    "scale": (lambda s, x: x * s.a, {"a": (WIDTH,)}),
    "scale of channels": (lambda s, x: (x.mT * s.a.view(1, -1, 1)).mT, {"a": (WIDTH,)}),
    "scalar": (lambda s, x: x * (1 + s.a) - s.b, {"a": (), "b": (1,)}),
    "gate": (lambda s, x: x * torch.sigmoid(s.a) + torch.exp(-s.b), {"a": (WIDTH,), "b": (1, 1)}),
    "division": (lambda s, x: s.b / (x.square() + 1) + x / s.a, {"a": (WIDTH,), "b": (TIME, 1)}),
    "positions": (lambda s, x: x + s.a[None, : x.shape[1]], {"a": (9, WIDTH)}),
    "positions by number": (
        lambda s, x: x + functional.embedding(torch.arange(x.shape[1]), s.a),
        {"a": (9, WIDTH)},
    ),
    "positions by index": (lambda s, x: x * s.a[torch.arange(TIME) // 2], {"a": (4, WIDTH)}),
    "token": (with_token, {"a": (1, 1, WIDTH), "b": (1, TIME + 3, WIDTH)}),
    "masked token": (masked, {"a": (1, 1, WIDTH)}),
    "chunks": (in_chunks, {"a": (2, WIDTH)}),
    "lookup": (lookup, {"a": (5, WIDTH), "b": (5, WIDTH)}),
    "lookup in a scale": (lookup_then_layer, {"a": (2, WIDTH)}),
    "grid": (grid, {"a": (2, WIDTH), "b": (3, WIDTH)}),
    "transposed": (
        lambda s, x: x * s.a.T + s.b.permute(1, 0),
        {"a": (WIDTH, TIME), "b": (WIDTH, 1)},
    ),
    "written": (written, {"a": (WIDTH,)}),
    "in place": (in_place, {"a": (TIME, 1), "b": (WIDTH,)}),
    "matrix": (lambda s, x: x @ s.a, {"a": (WIDTH, 4)}),
    "matrix transposed": (lambda s, x: x @ s.a.T + s.b, {"a": (4, WIDTH), "b": (4,)}),
    "linear": (merged, {"a": (4, WIDTH), "b": (4,)}),
    "batched": (experts, {"a": (WIDTH, 4)}),
    "batched transposed": (lambda s, x: (s.a @ x.mT).mT, {"a": (4, WIDTH)}),
    "einsum": (lambda s, x: torch.einsum("btd,dk->btk", x, s.a), {"a": (WIDTH, 4)}),
    "heads": (lambda s, x: torch.einsum("btd,hdk->bhtk", x, s.a), {"a": (2, WIDTH, 4)}),
    "slice of a matrix": (lambda s, x: x @ s.a[:, 1:5], {"a": (WIDTH, 7)}),
    "vector": (lambda s, x: (x @ s.a).unsqueeze(-1) + x * 0, {"a": (WIDTH,)}),
    "low rank": (low_rank, {"a": (2, WIDTH), "b": (WIDTH, 2)}),
    "norm": (
        lambda s, x: functional.layer_norm(x, (WIDTH,), s.a, s.b),
        {"a": (WIDTH,), "b": (WIDTH,)},
    ),
    "root mean square": (lambda s, x: functional.rms_norm(x, (WIDTH,), s.a), {"a": (WIDTH,)}),
    "prelu": (lambda s, x: functional.prelu(x, s.a), {"a": (TIME,)}),
    "two parameters": (lambda s, x: x * (s.a * s.b), {"a": (WIDTH,), "b": (TIME, 1)}),
    "stacked": (
        lambda s, x: torch.cat([torch.stack([s.a, s.b]).expand(len(x), -1, -1), x], 1),
        {"a": (WIDTH,), "b": (WIDTH,)},
    ),
    "twice": (lambda s, x: torch.relu(x * s.a) * s.a, {"a": (WIDTH,)}),
    **WITH_UNSEEN,
}


def make(name):
    function, shapes = EXACT[name]
    return Bare(function, embed=name not in WITH_UNSEEN, **shapes)


def batch(samples, name):
    width = WIDTH if name in WITH_UNSEEN else 3
    inputs = sparse_inputs(samples, TIME, width).double()
    return functional.cross_entropy, inputs, torch.randint(0, 3, (samples,))


@pytest.mark.parametrize("samples", [1, SAMPLES, TIME, WIDTH])
@pytest.mark.parametrize("name", EXACT)
def test_counts_equal_the_oracle(name, samples):
    # Also where the batch is as long as other dimensions.
    assert_counts_equal_oracle(make(name), *batch(samples, name))


@pytest.mark.parametrize("name", ["token", "scale", "gate", "low rank", "lookup", "shift unseen"])
def test_accumulation_equals_the_joint_batch(name):
    assert_accumulation_equals_joint_batch(make(name), *batch(7, name), (3, 4))


POSITIONWISE = [
    "scale",
    "scalar",
    "gate",
    "division",
    "positions",
    "positions by number",
    "positions by index",
    "chunks",
    "lookup",
    "lookup in a scale",
    "transposed",
    "matrix",
    "linear",
    "slice of a matrix",
    "vector",
    "low rank",
    "norm",
    "prelu",
    "two parameters",
    "scale unseen",
    "shift unseen",
    "matrix unseen",
]


@pytest.mark.parametrize("samples", [1, SAMPLES])
@pytest.mark.parametrize("name", POSITIONWISE)
def test_positions_count_as_samples(name, samples):
    model = make(name)
    model.pool = False
    _, inputs, _ = batch(samples, name)
    counter = truestep.SampleCounter(model, unit="position")
    outputs = model(inputs)
    delta = upstream(*outputs.shape)
    delta[0, 0, 0] = 1
    # Each position is a sample of its own: a batch of one position each, one after the other.
    alone = torch.zeros(samples, TIME, *outputs.shape, dtype=torch.float64)
    for n in range(samples):
        for t in range(TIME):
            alone[n, t, n, t] = delta[n, t]
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = {key: torch.zeros(p.shape, dtype=torch.int64) for key, p in model.named_parameters()}
    for one in alone.flatten(0, 1):
        gradients = torch.autograd.grad(outputs, parameters, one, retain_graph=True)
        for key, gradient in zip(names, gradients, strict=True):
            expected[key] += gradient != 0
    outputs.backward(delta)
    counts = counter.counts()
    assert counter.batch_size == int(delta.any(-1).sum())
    assert counts.keys() == expected.keys()
    for key, values in expected.items():
        assert torch.equal(counts[key], values), key


class Shift(nn.Module):
    """Changes what it is given in place."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        x += self.shift
        x *= self.scale
        return x


class Scale(nn.Module):
    def __init__(self, shape=WIDTH):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x * self.gamma


def classify(model, samples=SAMPLES):
    inputs = sparse_inputs(samples, TIME, 3).double()
    return model.double(), functional.cross_entropy, inputs, torch.randint(0, 3, (samples,))


class Pooled(nn.Sequential):
    def forward(self, x):
        return super().forward(x).mean(1)


def blocks(*inner):
    return Pooled(nn.Linear(3, WIDTH), nn.Sigmoid(), *inner, nn.ReLU(), nn.Linear(WIDTH, 3))


def test_a_module_that_changes_its_input_in_place():
    assert_counts_equal_oracle(*classify(blocks(nn.Softplus(), Shift(), nn.Softplus(), Shift())))


def test_a_module_that_is_called_twice():
    scale = Scale()
    assert_counts_equal_oracle(*classify(blocks(scale, scale, nn.ReLU(), scale)))


class Lists(nn.Module):
    """Parameters in lists and dictionaries, of which one is never used."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([torch.randn(WIDTH) for _ in range(3)])
        self.named = nn.ModuleList([nn.ParameterDict({"shift": nn.Parameter(torch.randn(WIDTH))})])

    def forward(self, x):
        return torch.relu(x * self.scales[0]) * self.scales[2] + self.named[0]["shift"]


def test_parameters_in_lists_and_dictionaries():
    model, loss_fn, inputs, targets = classify(blocks(Lists()))
    counts, _ = count(model, loss_fn, inputs, targets)
    expected = truestep.oracle.counts(model, loss_fn, inputs, targets)
    assert not expected.pop("2.scales.1").any()
    assert counts.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(counts[name], values), name


# Where the graph does not show all.


class Checkpointed(nn.Module):
    def __init__(self, inner, *, use_reentrant):
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


class Block(nn.Module):
    """A layer scale around a layer."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(WIDTH))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.relu(self.layer(x)) * self.gamma


def counted(model, forward, loss_fn, inputs, targets):
    counter = truestep.SampleCounter(model)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss_fn(forward(inputs), targets).backward()
        found.append(counter.counts())
    return found


def assert_same(found, expected):
    for counts in found:
        assert counts.keys() == expected.keys()
        assert all(torch.equal(counts[name], values) for name, values in expected.items())


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("inner", [Block, Scale])
def test_checkpointing(inner, use_reentrant):
    model, *rest = classify(blocks(Checkpointed(inner(), use_reentrant=use_reentrant)))
    reference = copy.deepcopy(model)
    reference[2].use_reentrant = False
    expected = truestep.oracle.counts(reference, *rest)
    assert_same(counted(model, model, *rest), expected)


class ChangedAfterwards(Scale):
    def forward(self, x):
        y = super().forward(x)
        x.zero_()
        return y


def test_a_tensor_changed_in_place_under_checkpointing_is_refused():
    inner = nn.Sequential(nn.Softplus(), ChangedAfterwards())
    model, loss_fn, inputs, targets = classify(blocks(Checkpointed(inner, use_reentrant=False)))
    _counter = truestep.SampleCounter(model)
    with pytest.raises(TruestepError, match="changed in place after it had met a parameter"):
        loss_fn(model(inputs), targets)


class RootNorm(Scale):
    """As language models write it: an operation that saves its result, which the next one saves, too."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        root = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        self.seen.append(weakref.ref(root))
        return super().forward(x * root)


def test_checkpointing_frees_what_a_module_saves():
    inner = RootNorm()
    model, loss_fn, inputs, targets = classify(blocks(Checkpointed(inner, use_reentrant=False)))
    _counter = truestep.SampleCounter(model)
    for _ in range(2):
        loss = loss_fn(model(inputs), targets)
        assert inner.seen[-1]() is None
        loss.backward()
        del loss
        assert not any(root() is not None for root in inner.seen)


compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@compiling
@pytest.mark.parametrize("make_inner", [Scale, lambda: nn.Sequential(nn.Softplus(), Shift())])
def test_modules_without_layers_are_counted_in_a_graph(make_inner):
    torch.compiler.reset()
    model, *rest = classify(blocks(make_inner()))
    expected = truestep.oracle.counts(model, *rest)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(counted(model, compiled, *rest), expected)


@compiling
@pytest.mark.parametrize("as_root", [True, False])
def test_modules_with_layers_are_refused_in_a_graph(as_root):
    torch.compiler.reset()
    model, loss_fn, inputs, targets = classify(blocks(Block()))
    if as_root:
        model.register_parameter("scale", nn.Parameter(torch.ones(3).double()))
        model.forward = lambda x: Pooled.forward(model, x) * model.scale
    _counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(TruestepError, match=r"torch\.compiler\.disable"):
        loss_fn(compiled(inputs), targets).backward()


@compiling
def test_a_module_left_out_of_the_graph():
    torch.compiler.reset()
    model, *rest = classify(blocks(Block()))
    expected = truestep.oracle.counts(model, *rest)
    model[2].forward = torch.compiler.disable(model[2].forward)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(counted(model, compiled, *rest), expected)


# What is refused.


class Provider(nn.Module):
    def __init__(self, shape=(1, TIME, WIDTH)):
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.table[:, : x.shape[1]]


class AddsProvided(nn.Module):
    def __init__(self):
        super().__init__()
        self.provider = Provider()

    def forward(self, x):
        return x + self.provider(x)


class Written(Scale):
    def forward(self, x):
        x = x * 1
        x[:, 0] += self.gamma
        return x


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(TIME, WIDTH, WIDTH))

    def forward(self, x):
        return torch.einsum("bed,edk->bek", x, self.weight)


class Between(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, x):
        token = self.token.expand(len(x), -1, -1)
        return torch.cat([x.detach()[:, :1], token, x.detach()], 1) + x.mean()


class Frequent(nn.Module):
    def __init__(self, look_up):
        super().__init__()
        self.table, self.look_up = nn.Parameter(torch.randn(2, WIDTH)), look_up

    def forward(self, x):
        found = self.look_up((x[..., 0] > 0).long(), self.table, scale_grad_by_freq=True)
        return x * found if found.dim() == x.dim() else x * found.unsqueeze(1)


REFUSED = {
    "divided": (lambda: Frequent(functional.embedding), "'2.table' .*scale_grad_by_freq=True"),
    "bags divided": (
        lambda: Frequent(functional.embedding_bag),
        "'2.table' .*scale_grad_by_freq=True",
    ),
    "between": (Between, "'2.token' is used by the operation 'CatBackward0'"),
    "provided": (AddsProvided, "'2.provider.table' leaves the module that owns it"),
    "without samples": (
        lambda: nn.Sequential(Scale(), nn.Flatten(0, 1), Scale(), nn.Unflatten(0, (SAMPLES, TIME))),
        r"'2.2' sees a batch of 20, the model one of 4",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_counted_is_refused_by_name(name):
    make_inner, message = REFUSED[name]
    model, loss_fn, inputs, targets = classify(blocks(make_inner()))
    _counter = truestep.SampleCounter(model)
    with pytest.raises(TruestepError, match=message):
        loss_fn(model(inputs), targets).backward()


@pytest.mark.parametrize("kind", [Written, Experts])
def test_what_is_done_in_an_unknown_way_is_counted_sample_by_sample(kind):
    model = blocks(kind()).double()
    assert_counts_equal_oracle(*classify(model))


def test_unsupported_mean_keeps_plain_gradients_only_there():
    model, loss_fn, inputs, targets = classify(blocks(Scale(), Written()))
    expected = truestep.oracle.counts(model, loss_fn, inputs, targets)
    counter = truestep.SampleCounter(model, unsupported="mean")
    model.zero_grad()
    loss_fn(model(inputs), targets).backward()
    plain = model[3].gamma.grad.clone()
    counts = counter.counts()
    del expected["3.gamma"]
    assert_same([counts], expected)
    counter.correct_gradients()
    assert torch.equal(model[3].gamma.grad, plain)


def test_a_frozen_module_does_not_matter():
    model, *rest = classify(blocks(Written().requires_grad_(requires_grad=False)))
    assert_counts_equal_oracle(model, *rest)


def test_an_exception_in_a_module_leaves_nothing():
    model, loss_fn, inputs, targets = classify(blocks(Block(), Scale()))
    counter = truestep.SampleCounter(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model[2](inputs)
    loss_fn(model(inputs), targets).backward()
    assert_same([counter.counts()], truestep.oracle.counts(model, loss_fn, inputs, targets))


def test_evaluation_leaves_nothing():
    model, loss_fn, inputs, targets = classify(blocks(Block(), Scale()))
    counter = truestep.SampleCounter(model)
    loss_fn(model(inputs), targets).backward()
    expected = counter.counts()
    with torch.no_grad():
        model(inputs[:2])
    assert_same([counter.counts()], expected)


def test_a_copy_is_inert():
    model, loss_fn, inputs, targets = classify(blocks(Block(), Scale()))
    counter = truestep.SampleCounter(model)
    twin = copy.deepcopy(model)
    loss_fn(twin(inputs), targets).backward()
    assert counter.counts() == {}


def test_nothing_keeps_the_graph_alive():
    model, loss_fn, inputs, targets = classify(blocks(Block(), Scale()))
    _counter = truestep.SampleCounter(model)
    gc.collect()
    gc.disable()
    try:
        middle = torch.sigmoid(model[0](inputs))
        freed = weakref.ref(middle)
        loss_fn(model[3:](model[2](middle)), targets).backward()
        del middle
        assert freed() is None
    finally:
        gc.enable()


class Sequences(nn.Module):
    """Samples in the second dimension."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 3))
        self.matrix = nn.Parameter(torch.randn(3, WIDTH))
        self.shift = nn.Parameter(torch.randn(TIME + 1, 1, WIDTH))

    def forward(self, x):
        x = torch.cat([self.token.expand(-1, x.shape[1], -1), x])
        return torch.relu(x @ self.matrix + self.shift)


@pytest.mark.parametrize("samples", [1, SAMPLES, TIME, TIME + 1])
def test_samples_in_another_dimension(samples):
    model = Sequences().double()
    inputs = sparse_inputs(TIME, samples, 3).double()
    counter = truestep.SampleCounter(model, batch_dim=1)
    outputs = model(inputs)
    delta = upstream(samples, TIME + 1, WIDTH).transpose(0, 1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = {
        name: torch.zeros(p.shape, dtype=torch.int64) for name, p in model.named_parameters()
    }
    for index in range(samples):
        alone = torch.zeros_like(delta)
        alone[:, index] = delta[:, index]
        gradients = torch.autograd.grad(outputs, parameters, alone, retain_graph=True)
        for name, gradient in zip(names, gradients, strict=True):
            expected[name] += gradient != 0
    outputs.backward(delta)
    assert_same([counter.counts()], expected)


def test_parameters_that_all_samples_share():
    model, loss_fn, inputs, targets = classify(blocks(AddsProvided()))
    shared = {"2.provider": None}
    counts, _ = count(model, loss_fn, inputs, targets, batch_dim=shared)
    expected = truestep.oracle.counts(model, loss_fn, inputs, targets)
    table = model[2].provider.table
    expected["2.provider.table"] = SAMPLES * (table.grad != 0)  # the upper bound
    assert_same([counts], expected)


class Rows(nn.Module):
    """A row of its own for each sample, as full-batch training on a graph's nodes has."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(SAMPLES, WIDTH).double())
        self.scale = nn.Parameter(torch.randn(WIDTH).double())

    def forward(self, x):
        return (x + self.table) * self.scale


def test_a_row_for_each_sample():
    model = Rows()
    inputs = sparse_inputs(SAMPLES, WIDTH).double().requires_grad_()
    counter = truestep.SampleCounter(model)
    output = model(inputs)
    delta = upstream(SAMPLES, WIDTH)
    expected = own_counts(model, [output], [delta], SAMPLES)
    output.backward(delta)
    assert_same([counter.counts()], expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize("name", ["Llama", "ViT"])
def test_models_of_transformers(name, use_reentrant):
    hub = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 12, "hidden_act": "relu"}
    if name == "Llama":
        base = hub.LlamaModel(hub.LlamaConfig(vocab_size=11, use_cache=False, **sizes))
        inputs = torch.randint(0, 11, (3, TIME))
    else:
        config = hub.ViTConfig(image_size=8, patch_size=4, qkv_bias=False, **sizes)
        base, inputs = (
            hub.ViTModel(config, add_pooling_layer=False),
            torch.randn(3, 3, 8, 8).double(),
        )
    model = Headed(base).double()
    targets = torch.randint(0, 3, (3,))
    expected = truestep.oracle.counts(model, functional.cross_entropy, inputs, targets)
    if use_reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        base.train()
    counts, _ = count(model, functional.cross_entropy, inputs, targets)
    assert_same([counts], expected)


class Headed(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.head = base, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.base(x).last_hidden_state)).mean(1)


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randint(-2, 3, (WIDTH, WIDTH)).float())

    def forward(self, x):
        return torch.relu(x @ self.matrix)


def test_autocast_casts_a_parameter_once_for_two_calls():
    module = Projected()
    second = sparse_inputs(SAMPLES, WIDTH).sign()
    first = torch.zeros_like(second)  # only the second call reaches the matrix
    model = nn.Sequential(module)
    model.forward = lambda x: module(first) + module(x)
    counter = truestep.SampleCounter(model)
    expected = (second != 0).float().T @ (second @ module.matrix > 0).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(second).float().sum()
    loss.backward()
    assert torch.equal(counter.counts()["0.matrix"], expected.long())
