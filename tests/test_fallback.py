"""Modules without a rule, counted by each sample's own gradient."""

import gc
import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import truestep
from properties import (
    assert_accumulation_equals_joint_batch,
    assert_counts_equal_oracle,
    assert_step_equals_oracle,
    count,
)
from truestep import TruestepError, per_sample, rules_bare
from truestep.rules_bare import UncountableError
from zoo import Gated, Mixed, Polynomial


@pytest.fixture(autouse=True)
def _no_operation_is_known(monkeypatch):
    def read(self, _outputs):
        path = self._prefix.rstrip(".")
        raise UncountableError(f"{path or 'the model'!r} has no rule. {rules_bare.WAYS_OUT}")

    monkeypatch.setattr(rules_bare._Reader, "read", read)


def weighted(output, delta):
    return (output * delta).sum()


def sparse(*shape):
    return torch.randn(shape, dtype=torch.float64) * (torch.rand(shape) < 0.4)


def assert_exact(model, inputs, delta, **options):
    """In float64, where the counts tell whatever the oracle tells."""
    model = model.double()
    assert_counts_equal_oracle(model, weighted, inputs, delta, **options)
    counts, _ = count(model, weighted, inputs, delta, **options)
    assert len(inputs) == 1 or any(values.any() for values in counts.values())


def assert_refused(model, inputs, reason, **options):
    """At the first forward pass, by name, with both ways out, and a closed counter leaves no harm."""
    counter = truestep.SampleCounter(model, **options)
    with pytest.raises(TruestepError, match=reason) as error:
        model(inputs)
    assert "rules=" in str(error.value)
    assert "unsupported='mean'" in str(error.value)
    counter.close()


class Scale(nn.Module):
    """The smallest module without a rule."""

    def __init__(self, features=3):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(features))

    def forward(self, x):
        return x * self.scale.exp()


class Own(Scale):
    """A scale whose forward pass is a function of the test's."""

    def __init__(self, run, features=3):
        super().__init__(features)
        self.run = run

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


# Counts.


@pytest.mark.parametrize("samples", [1, 2, 67])
@pytest.mark.parametrize("kind", [Mixed, Gated, Polynomial])
def test_modules_of_ones_own(kind, samples):
    assert_exact(kind(), sparse(samples, 4), sparse(samples, 4))


@pytest.mark.parametrize("kind", [Mixed, Gated, Polynomial])
def test_positions_of_a_sample_are_joined(kind):
    assert_exact(kind(), sparse(5, 3, 4), sparse(5, 3, 4))


def test_a_subclass_with_a_forward_of_its_own():
    class Standardised(nn.Linear):
        def forward(self, input):
            weight = self.weight - self.weight.mean(1, keepdim=True)
            return functional.linear(input, weight / weight.std(1, keepdim=True), self.bias)

    assert_exact(Standardised(4, 3), sparse(6, 4), sparse(6, 3))


def first_token(module, x):
    return torch.cat([module.scale.expand(len(x), 1, -1), x * module.scale], 1)


def by_position(module, x):
    return torch.relu(x + module.scale[:2].unsqueeze(-1))


def pooled(module, x):
    return ((x @ module.scale).softmax(1).unsqueeze(-1) * x).sum(1)


def attending(module, x):
    return functional.scaled_dot_product_attention(x * module.scale, x, x * module.scale.exp())


def looping(module, x):
    state = torch.zeros_like(x[:, 0])
    for step in range(x.shape[1]):
        state = torch.tanh(x[:, step] + state * module.scale)
    return state


def largest(module, x):
    return (x * module.scale.tanh()).topk(2, -1).values


def in_place_on_its_input(module, x):
    return x.relu_() * module.scale


def in_place_on_its_output(module, x):
    return (x * module.scale).relu_()


@pytest.mark.parametrize(
    "run",
    [
        first_token,
        by_position,
        pooled,
        attending,
        looping,
        largest,
        in_place_on_its_input,
        in_place_on_its_output,
    ],
)
def test_forward_passes_of_all_kinds(run):
    model, inputs = Own(run), sparse(5, 2, 3)
    with torch.no_grad():
        shape = model.double()(inputs.clone()).shape
    assert_exact(model, inputs, sparse(*shape))


class TwoInputs(nn.Module):
    """Calls a module without a rule with arguments of all kinds."""

    def __init__(self, run):
        super().__init__()
        self.first, self.own, self.head = nn.Linear(4, 3), Own(run), nn.Linear(3, 2)
        self.table = torch.randn(5, 3, dtype=torch.float64)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.head(torch.relu(self.own(hidden, {"x": [x]}, table=self.table, power=2)))


def several(module, hidden, nested, *, table, power):
    mixed = nested["x"][0][:, :3] * hidden.tanh() * module.scale**power
    return mixed + (hidden @ (module.scale * table).T)[:, :3] ** power


def test_several_nested_shared_and_keyword_arguments():
    assert_exact(TwoInputs(several), sparse(7, 4), sparse(7, 2))


def test_a_shared_argument_of_the_batchs_length_is_an_error():
    model = TwoInputs(several).double()
    counter = truestep.SampleCounter(model)
    model(sparse(7, 4))
    with pytest.raises(TruestepError, match=r"'own' has no rule.*one by one"):
        model(sparse(5, 4))  # as long as the table: found out though 7 samples went well
    counter.close()


def test_frozen_parameters_are_left_out():
    model = Gated().double()
    model.gate.requires_grad_(requires_grad=False)
    inputs, delta = sparse(6, 4), sparse(6, 4)
    counts, _ = count(model, weighted, inputs, delta)
    assert counts.keys() == {"value", "shift"}
    assert_exact(model, inputs, delta)


def test_a_parameter_unfrozen_later_is_counted():
    model = Scale().requires_grad_(requires_grad=False)
    counter = truestep.SampleCounter(model)
    model.requires_grad_(requires_grad=True)
    model(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])).sum().backward()
    assert counter.counts()["scale"].tolist() == [1, 0, 2]


class TiedToALayer(nn.Module):
    """One parameter in a module with a rule and, twice in a call, in one without."""

    def __init__(self):
        super().__init__()
        self.layer, self.own = nn.Linear(4, 4, bias=False), Mixed()
        self.own.weight = self.layer.weight

    def forward(self, x):
        return self.own(torch.relu(self.own(torch.relu(self.layer(x)))))


def test_tied_to_a_layer_and_used_twice_in_a_call():
    model = TiedToALayer()
    assert_exact(model, sparse(9, 4), sparse(9, 4))
    inputs, delta = sparse(9, 4), sparse(9, 4)
    assert_accumulation_equals_joint_batch(model, weighted, inputs, delta, (4, 5))
    assert_step_equals_oracle(model, lambda o, d: (o * d).sum() / len(o), inputs, delta)


def test_several_outputs_of_which_some_are_used():
    model = Own(lambda m, x: {"a": x * m.scale, "b": [x.tanh(), x * m.scale**2], "c": 3}).double()
    inputs = torch.tensor([[1.0, 0, 0], [2, 3, 0], [0, 3, 0]], dtype=torch.float64)
    counter = truestep.SampleCounter(model)
    model(inputs)["b"][1][:, 1:].sum().backward()
    assert counter.counts()["scale"].tolist() == [0, 2, 0]
    model.zero_grad()
    output = model(inputs)
    (output["a"][0].sum() + output["b"][1][1].sum()).backward()
    assert counter.counts()["scale"].tolist() == [2, 1, 0]


def test_an_output_of_one_number_for_each_sample():
    model = Own(lambda m, x: (x * m.scale).sum(-1))
    assert_exact(model, sparse(6, 3), sparse(6))


def test_time_first_batches():
    inputs, delta = sparse(6, 4, 3), sparse(6, 4, 3)
    model = Own(lambda m, x: x * m.scale.exp()).double()
    expected, _ = count(model, weighted, inputs, delta)
    swapped = inputs.transpose(0, 1), delta.transpose(0, 1)
    counts, size = count(model, weighted, *swapped, batch_dim=1)
    assert size == 6
    assert torch.equal(counts["scale"], expected["scale"])


class WithTable(nn.Module):
    """Adds a table that all samples share, made by a module without arguments that hold samples."""

    def __init__(self):
        super().__init__()
        self.table = Own(lambda m, rows: m.scale.expand(rows, 3) * torch.arange(3.0).double())
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x + self.table(2)).sum(1)


def test_a_module_that_all_samples_share_counts_them_all():
    model, inputs = WithTable().double(), sparse(5, 2, 3)
    assert_refused(model, inputs, r"none of its arguments holds the 2 samples of its output")
    counter = truestep.SampleCounter(model, batch_dim={"table": None})
    model(inputs).sum().backward()
    assert counter.counts()["table.scale"].tolist() == [0, 5, 5]


def test_positions_as_samples_equal_a_flattened_batch():
    model, inputs, delta = Gated().double(), sparse(5, 3, 4), sparse(5, 3, 4)
    delta[1:3] = 0
    counts, size = count(model, weighted, inputs, delta, unit="position")
    flat, _ = count(model, weighted, inputs.flatten(0, 1), delta.flatten(0, 1))
    assert size == (delta != 0).any(-1).sum()
    for name, values in flat.items():
        assert torch.equal(counts[name], values), name


def test_positions_of_images_have_their_features_second():
    model = Own(lambda m, x: x * m.scale.exp().reshape(3, 1, 1)).double()
    inputs, delta = sparse(4, 3, 2, 5), sparse(4, 3, 2, 5)
    counts, _ = count(model, weighted, inputs, delta, unit="position")
    both = (inputs != 0) & (delta != 0)
    assert torch.equal(counts["scale"], both.sum((0, 2, 3)))


def test_positions_that_are_mixed_are_refused():
    model = Own(lambda m, x: (x * m.scale).cumsum(1))
    assert_exact(model, sparse(5, 4, 3), sparse(5, 4, 3))
    assert_refused(model, sparse(5, 4, 3), "mixes samples", unit="position")


def test_an_empty_batch_counts_nobody():
    model = Scale()
    counter = truestep.SampleCounter(model)
    model(torch.zeros(0, 3)).sum().backward()
    assert counter.counts()["scale"].tolist() == [0, 0, 0]
    assert counter.batch_size == 0


# Modes.


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.own = nn.Linear(4, 4), Gated()

        def forward(self, x):
            hidden = torch.relu(self.first(x))
            return checkpoint(self.own, hidden, use_reentrant=reentrant)

    model = Checkpointed().double()
    inputs, delta = sparse(6, 4), sparse(6, 4)
    counts, size = count(model, weighted, inputs, delta)
    hidden = torch.relu(model.first(inputs)).detach()
    expected, _ = count(model.own, weighted, hidden, delta)
    assert size == 6
    for name, values in expected.items():
        assert torch.equal(counts[f"own.{name}"], values), name


def test_autocast_runs_samples_as_the_batch_was():
    inputs = sparse(6, 4).float()
    inputs[0] *= 1e-30
    with_it, without = (
        Own(lambda m, x: functional.linear(x, m.scale.unsqueeze(0)), 4) for _ in range(2)
    )
    without.load_state_dict(with_it.state_dict())
    counters = [truestep.SampleCounter(model) for model in (with_it, without)]
    with torch.autocast("cpu", dtype=torch.float16):
        output = with_it(inputs)
        assert output.dtype == torch.float16
    output.sum().backward()
    without(inputs).sum().backward()
    counts = [counter.counts()["scale"] for counter in counters]
    reached = inputs != 0
    assert torch.equal(counts[1], reached.sum(0))
    assert torch.equal(counts[0], reached[1:].sum(0))  # 1e-30 is 0 in float16


def test_a_run_alone_leaves_the_module_as_it_was():
    def remembering(module, x):
        module.calls = getattr(module, "calls", 0) + 1
        module.last = x * module.scale
        module.gates = [module.last.detach()]
        return module.last

    model, inputs = Own(remembering), torch.randn(4, 3)
    counter = truestep.SampleCounter(model)
    for call in range(1, 4):
        output = model(inputs)
        output.sum().backward()
        assert model.calls == call
        assert model.last is output
        assert torch.equal(model.gates[0], output)
        assert counter.batch_size == 4 * call


def test_a_module_without_a_rule_keeps_its_plain_gradient_on_request():
    model = nn.Sequential(nn.Linear(3, 3), Scale())
    counter = truestep.SampleCounter(model, unsupported="mean")
    model(torch.randn(4, 3)).sum().backward()
    assert counter.counts().keys() == {"0.weight", "0.bias"}


def test_a_forward_without_a_backward_is_freed():
    model = Scale()
    counter = truestep.SampleCounter(model)
    for _ in range(2):
        model(torch.randn(4, 3))
    gc.collect()
    objects = len(gc.get_objects())
    for _ in range(20):
        model(torch.randn(4, 3))
    gc.collect()
    assert len(gc.get_objects()) - objects < 20
    counter.close()


class WithFrozenParts(nn.Module):
    """Its own parameter after frozen layers that have rules."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3).requires_grad_(requires_grad=False)
        self.norm = nn.BatchNorm1d(3, affine=False).eval()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return torch.relu(self.norm(self.first(x))) * self.scale.exp()


def test_frozen_layers_inside_are_run_along():
    model = WithFrozenParts().double()
    inputs, delta = sparse(6, 4), sparse(6, 3)
    counter = truestep.SampleCounter(model)
    for _ in range(2):
        model.zero_grad()
        weighted(model(inputs), delta).backward()
        expected = ((delta != 0) & (model(inputs) != 0)).sum(0)
        assert torch.equal(counter.counts()["scale"], expected)
    model.norm.train()
    with pytest.raises(TruestepError, match=r"has no rule.*Nor can its samples be run one by one"):
        model(inputs)
    model.norm.eval()
    model.first.requires_grad_(requires_grad=True)
    with pytest.raises(TruestepError, match="'first', which is counted by itself; put them"):
        model(inputs)
    counter.close()


# Memory.


@pytest.mark.parametrize("limit", [1, 40, 700, 1600])
def test_chunks_do_not_change_the_counts(limit, monkeypatch):
    monkeypatch.setattr(per_sample, "CHUNK_ELEMENTS", limit)
    assert_exact(TiedToALayer(), sparse(150, 4), sparse(150, 4))


class Largest(TorchDispatchMode):
    """The most bytes that any tensor has while it is on."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.found = max(self.found, tensor.numel() * tensor.element_size())
        return result


def test_memory_is_bounded(monkeypatch):
    model, inputs = Mixed(40, 30), sparse(256, 40).float()
    all_at_once = 256 * 40 * 30 * 4
    largest = []
    for limit in (1 << 22, 8 * 40 * 30):
        monkeypatch.setattr(per_sample, "CHUNK_ELEMENTS", limit)
        counter = truestep.SampleCounter(model)
        output = model(inputs)
        with Largest() as mode:
            output.sum().backward()
        largest.append(mode.found)
        # one bit for each sample and element
        assert counter.nbytes == 256 * 40 * 30 // 8
        counter.close()
        model.zero_grad()
    assert largest[0] >= all_at_once
    assert largest[1] <= all_at_once // 4


# Refusals.


def changes_a_buffer(module, x):
    module.seen += len(x)
    return x * module.scale


def rebinds_a_buffer(module, x):
    module.seen = module.seen + x.detach().mean(0)
    return x * module.scale


def in_place(module, x):
    output = torch.empty(x.shape)
    output[:] = x * module.scale
    return output


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: functional.dropout(x, 0.5, m.training) * m.scale, "draws random numbers"),
        (lambda m, x: x * m.scale * torch.rand_like(x), "draws random numbers"),
        (changes_a_buffer, "buffer|mutate"),
        (rebinds_a_buffer, "it changes its buffer 'seen'"),
        (lambda m, x: x * m.scale - (x * m.scale).mean(0), "mixes samples"),
        (lambda m, x: (x * m.scale).softmax(0), "mixes samples"),
        (lambda m, x: (x * m.scale).flip(0), "mixes samples"),
        (lambda m, x: functional.batch_norm(x, None, None, m.scale, training=True), "one by one"),
        (lambda m, x: x * m.scale / len(x), "mixes samples"),
        (lambda m, x: (x * m.scale).sum(0), "no samples|another output|shape|none of its"),
        (lambda m, x: (x * m.scale).sum(), "has no samples in dimension 0"),
        (lambda m, x: x * m.scale if x.sum() > 0 else -x * m.scale, "control flow"),
        (lambda m, x: x * m.scale * x.sum().item(), "item"),
        (in_place, "vmap: inplace"),
    ],
)
def test_unsound_modules_are_refused_at_the_first_forward_pass(run, reason):
    own = Own(run)
    own.register_buffer("seen", torch.zeros(3))
    assert_refused(nn.Sequential(nn.Linear(4, 3), own), torch.randn(5, 4), rf"'1'.*({reason})")


def test_memory_that_runs_out_is_left_to_the_caller():
    def hungry(module, x):
        if len(x) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * module.scale

    model = Own(hungry)
    counter = truestep.SampleCounter(model)
    with pytest.raises(torch.OutOfMemoryError):
        model(torch.ones(4, 3))
    counter.close()


def test_dropout_is_quiet_in_evaluation_and_refused_again_in_training():
    model = Own(lambda m, x: functional.dropout(x, 0.5, m.training) * m.scale)
    counter = truestep.SampleCounter(model)
    model.eval()
    model(torch.ones(4, 3)).sum().backward()
    assert counter.counts()["scale"].tolist() == [4, 4, 4]
    model.train()
    with pytest.raises(TruestepError, match=r"the model.* draws random numbers"):
        model(torch.ones(4, 3))


def test_an_argument_changed_in_place_is_refused():
    model = Own(lambda m, x: torch.relu(x) * m.scale)
    counter = truestep.SampleCounter(model)
    inputs = torch.randn(4, 3)
    output = model(inputs)
    inputs.neg_()  # autograd allows it: it has saved relu(x)
    with pytest.raises(TruestepError, match="an argument was changed in place after the call"):
        output.sum().backward()
    counter.close()


class Holder(nn.Module):
    """Parameters beside those of a layer."""

    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x * self.scale)


class Drops(Scale):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x * self.scale)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Holder, "parameters beside those of its 'layer'"),
        (Drops, "its 'drop' draws random numbers"),
    ],
)
def test_what_cannot_be_run_alone_says_why(kind, reason):
    assert_refused(nn.Sequential(nn.Linear(3, 3), kind()), torch.randn(4, 3), f"'1'.*{reason}")


def test_all_modules_that_show_unsound_in_the_first_forward_pass_are_named():
    def mixes(module, x):
        return x * module.scale - x.mean(0)

    model = nn.Sequential(nn.Linear(4, 3), Own(mixes), nn.ReLU(), Own(mixes), nn.Linear(3, 2))
    counter = truestep.SampleCounter(model)
    for _ in range(2):
        with pytest.raises(TruestepError) as error:
            model(torch.randn(5, 4))
        assert re.findall(r"^'(\d)[.']", str(error.value), re.MULTILINE) == ["1", "3"]
    assert not counter._watch._calls
    counter.close()
