import copy
import gc
import io
import re
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import truestep
from truestep import TruestepError
from truestep.activity import Elements
from truestep.bits import pack
from truestep.calls import Call
from truestep.kernels import dispatch
from zoo import Twice, mlp, sparse_inputs


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def counter(model):
    return truestep.SampleCounter(model)


def backward(model, inputs):
    model(inputs).square().mean().backward()


def expected(model, *batches):
    """Counts of batches, one after the other, each alone on a copy of the model."""
    total = {}
    for inputs in batches:
        targets = torch.zeros(len(inputs), 3)
        loss = lambda output, _: output.square().mean()  # noqa: E731
        for name, values in truestep.oracle.counts(model, loss, inputs, targets).items():
            total[name] = total.get(name, 0) + values
    return total


def assert_counted(counter, model, *batches):
    counts = counter.counts()
    for name, values in expected(model, *batches).items():
        assert torch.equal(counts[name], values), name
    assert counter.batch_size == sum(len(inputs) for inputs in batches)


def living_calls():
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Call]


# The life of a record.


def test_backward_passes_add_up_until_the_gradient_is_dropped(model, counter):
    first, second, third = sparse_inputs(5, 4), sparse_inputs(2, 4), sparse_inputs(3, 4)
    backward(model, first)
    assert_counted(counter, model, first)
    backward(model, second)
    assert_counted(counter, model, first, second)
    model.zero_grad()
    assert_counted(counter, model, first, second)  # readable until the next batch
    backward(model, third)
    assert_counted(counter, model, third)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("owner", ["model", "optimizer"])
def test_zero_grad_of_either_kind_starts_a_new_batch(model, counter, set_to_none, owner):
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    first, second = sparse_inputs(5, 4), sparse_inputs(3, 4)
    backward(model, first)
    optimizer.step()
    (model if owner == "model" else optimizer).zero_grad(set_to_none=set_to_none)
    backward(model, second)
    assert_counted(counter, model, second)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_dropped_batch_without_a_step_leaves_nothing(model, counter, set_to_none):
    backward(model, sparse_inputs(5, 4))
    model.zero_grad(set_to_none=set_to_none)
    second = sparse_inputs(3, 4)
    backward(model, second)
    assert_counted(counter, model, second)


def test_zeroing_behind_autograds_back_starts_a_new_batch_after_a_step(model, counter):
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    for samples in (5, 4, 3):
        backward(model, sparse_inputs(samples, 4))
        assert counter.batch_size == samples
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad.data.zero_()


def test_clipping_between_micro_batches_keeps_the_record(model, counter):
    first, second = sparse_inputs(5, 4), sparse_inputs(3, 4)
    backward(model, first)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    backward(model, second)
    assert_counted(counter, model, first, second)


def test_torch_autograd_grad_counts_nothing(model, counter):
    first = sparse_inputs(5, 4)
    backward(model, first)
    penalty = torch.autograd.grad(model(sparse_inputs(4, 4)).sum(), list(model.parameters()))
    assert len(penalty) == 4
    assert_counted(counter, model, first)
    assert not counter._records._pending


def test_a_gradient_penalty_counts_its_one_backward(model, counter):
    inputs = sparse_inputs(5, 4).requires_grad_()
    output = model(inputs)
    (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    assert counter.batch_size == 0
    (output.square().mean() + slope.square().mean()).backward()
    assert counter.batch_size == 5


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_accumulating_with_create_graph_adds_up(model, counter):
    first, second = sparse_inputs(5, 4), sparse_inputs(3, 4)
    model(first).square().mean().backward(create_graph=True)
    model(second).square().mean().backward(create_graph=True)
    assert_counted(counter, model, first, second)
    model.zero_grad()  # breaks the reference cycle that create_graph makes


def test_backward_twice_through_one_forward_counts_twice(model, counter):
    inputs = sparse_inputs(5, 4)
    loss = model(inputs).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_counted(counter, model, inputs, inputs)


def test_backward_into_some_parameters_counts_those(model, counter):
    loss = model(sparse_inputs(5, 4)).square().mean()
    loss.backward(inputs=[model[2].bias])
    assert counter.counts().keys() == {"2.bias"}
    assert not counter._records._pending


def test_a_forward_without_a_backward_leaves_nothing(model, counter):
    before = len(living_calls())
    output = model(sparse_inputs(50, 4))
    first = sparse_inputs(5, 4)
    backward(model, first)
    assert_counted(counter, model, first)
    assert len(living_calls()) == before + 2
    del output
    assert len(living_calls()) == before + 1  # the record's


def test_evaluation_between_backward_and_step_leaves_nothing(model, counter):
    first = sparse_inputs(5, 4)
    backward(model, first)
    model.eval()
    with torch.no_grad():
        model(sparse_inputs(50, 4))
    model(sparse_inputs(50, 4))  # evaluation by someone who forgot no_grad
    model.train()
    assert_counted(counter, model, first)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_forward_and_backward_leaves_nothing(model, counter, mode):
    first = sparse_inputs(5, 4)
    loss = model(first).square().mean()
    model.eval()
    with mode():
        model(sparse_inputs(50, 4))
    model.train()
    loss.backward()
    assert_counted(counter, model, first)


def test_an_exception_in_backward_leaves_nothing(model, counter):
    def fail(gradient):
        raise ValueError("stop")

    output = model[0](sparse_inputs(5, 4))
    output.register_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        model[2](output).square().mean().backward()
    model.zero_grad()
    second = sparse_inputs(3, 4)
    backward(model, second)
    assert_counted(counter, model, second)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_exception_between_layers_of_a_backward_leaves_nothing(model, counter, set_to_none):
    first, second = sparse_inputs(5, 4), sparse_inputs(3, 4)
    backward(model, first)
    model.zero_grad(set_to_none=set_to_none)
    failing = True

    def fail(module, inputs, output):
        def stop(gradient):
            if failing:
                raise ValueError("stop")

        output.register_hook(stop)

    handle = model[1].register_forward_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        backward(model, sparse_inputs(7, 4))
    assert model[2].weight.grad.any()  # it came half the way
    assert not any(p.grad.any() for p in model[0].parameters() if p.grad is not None)
    model.zero_grad(set_to_none=set_to_none)
    failing = False
    backward(model, second)
    assert_counted(counter, model, second)
    handle.remove()


def test_an_exception_after_a_layer_of_a_forward_leaves_nothing(model, counter):
    def fail(module, inputs):
        raise ValueError("stop")

    handle = model[2].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        model(sparse_inputs(7, 4))
    handle.remove()
    second = sparse_inputs(3, 4)
    backward(model, second)
    assert_counted(counter, model, second)
    assert not counter._watch._calls


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("evaluating", [True, False])
def test_an_interrupted_forward_leaves_nothing(reentrant, evaluating):
    """torch tells always-called hooks of exceptions, but not of Ctrl-C."""

    class Interrupted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.interrupt, self.reentrant = False, False

        def block(self, x):
            return torch.relu(self.layer(torch.relu(self.layer(x))))

        def forward(self, x):
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
            if self.interrupt:
                raise KeyboardInterrupt
            return self.head(x)

    model, inputs = Interrupted(), sparse_inputs(8, 4).requires_grad_()
    counts = expected(model, inputs.detach())
    counter = truestep.SampleCounter(model)
    model.interrupt, model.reentrant = True, reentrant
    with torch.set_grad_enabled(not evaluating), pytest.raises(KeyboardInterrupt):
        model(inputs)
    model.interrupt = False
    for _ in range(2):
        model.zero_grad()
        backward(model, inputs)
        assert counter.batch_size == 8
        for name, values in counter.counts().items():
            assert torch.equal(values, counts[name]), name


def test_an_exception_in_forward_leaves_nothing(model, counter):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(sparse_inputs(5, 7))
    second = sparse_inputs(3, 4)
    backward(model, second)
    assert_counted(counter, model, second)
    assert not counter._watch._calls


def test_an_l2_term_by_a_backward_of_its_own_keeps_the_record(model, counter):
    first = sparse_inputs(5, 4)
    for order in ([0, 1], [1, 0]):
        model.zero_grad()
        passes = [
            lambda: backward(model, first),
            lambda: sum(p.square().sum() for p in model.parameters()).backward(),
        ]
        for index in order:
            passes[index]()
        assert_counted(counter, model, first)


def test_an_l2_term_first_after_zeroing_in_place_drops_the_old_batch(model, counter):
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    backward(model, sparse_inputs(5, 4))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    sum(p.square().sum() for p in model.parameters()).backward()
    second = sparse_inputs(3, 4)
    backward(model, second)
    assert_counted(counter, model, second)


def test_where_no_sample_contributes_the_gradient_stays():
    model = nn.Linear(2, 1)
    counter = truestep.SampleCounter(model)
    inputs = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    (model(inputs).sum() + 5 * model.weight.sum()).backward()
    assert counter.counts()["weight"].tolist() == [[3, 0]]
    counter.correct_gradients()
    assert model.weight.grad.tolist() == [[(6 + 5) * 3 / 4, 5.0]]


# What a sample is.


def test_a_sample_that_uses_a_layer_twice_counts_once():
    model = Twice()
    counter = truestep.SampleCounter(model)
    backward(model, sparse_inputs(6, 4))
    assert counter.counts()["layer.bias"].max() <= 6
    assert counter.batch_size == 6


def test_separate_calls_are_separate_samples(model, counter):
    first, second = sparse_inputs(5, 4), sparse_inputs(3, 4)
    (model(first).square().mean() + model(second).square().mean()).backward()
    assert_counted(counter, model, first, second)


def test_batch_size_can_be_set_and_returned_to_counting(model, counter):
    backward(model, sparse_inputs(5, 4))
    plain = model[0].weight.grad.clone()
    counter.batch_size = 40
    counts = counter.counts()["0.weight"]
    factor = torch.where(counts > 0, torch.tensor(40.0) / (counts + 1.0), 1.0)
    assert torch.equal(counter.effective_gradient(model[0].weight), plain * factor)
    counter.batch_size = None
    assert counter.batch_size == 5
    with pytest.raises(TruestepError, match="set a positive number"):
        counter.batch_size = 0


def test_another_batch_size_inside_the_model_is_an_error_that_names_the_layer():
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 3)
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2]))

    model = Flattened()
    counter = truestep.SampleCounter(model)
    with pytest.raises(TruestepError, match=r"'body' sees a batch of 12, the model one of 4"):
        model(torch.randn(4, 3, 3)).sum().backward()
    counter.close()
    counter = truestep.SampleCounter(model, unit="position")
    model(torch.randn(4, 3, 3)).sum().backward()
    assert counter.batch_size == 12


def test_a_layer_called_outside_the_model_counts(model, counter):
    inputs = sparse_inputs(5, 4)
    model[2](torch.relu(model[0](inputs))).square().mean().backward()
    assert_counted(counter, model, inputs)


def test_a_layer_called_twice_outside_the_model_is_ambiguous(model, counter):
    hidden = model[0](sparse_inputs(5, 4)) + model[0](sparse_inputs(5, 4))
    with pytest.raises(TruestepError, match=r"'0\.\w+' is used several times outside a call"):
        hidden.sum().backward()


def test_keyword_arguments_and_nested_inputs_and_outputs():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, batch):
            return {"logits": [self.layer(input=batch["x"])]}

    model = Nested()
    counter = truestep.SampleCounter(model)
    model({"x": torch.ones(4, 3)})["logits"][0].sum().backward()
    assert counter.counts()["layer.weight"].tolist() == [[4] * 3] * 2


class TiedHead(nn.Module):
    def __init__(self, *, call):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False) if call else None
        if call:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        hidden = self.embedding(x)
        return self.head(hidden) if self.head else functional.linear(hidden, self.embedding.weight)


def test_a_use_without_calling_the_module_is_an_error_at_the_first_forward():
    model = TiedHead(call=False)
    counter = truestep.SampleCounter(model)
    with pytest.raises(TruestepError, match=r"uses 'embedding\.weight' without calling the module"):
        model(torch.tensor([1, 2]))
    counter.close()
    model = TiedHead(call=True)
    counter = truestep.SampleCounter(model)
    model(torch.tensor([1, 2])).sum().backward()
    assert counter.counts()["embedding.weight"][4].tolist() == [2, 2, 2]


@dataclass
class Answer:
    logits: torch.Tensor


class Plain:
    """What no library knows: attributes, a slot, and a way back to itself."""

    __slots__ = ("__dict__", "logits")

    def __init__(self, logits):
        self.me = self
        self.logits = logits


class Nesting:
    def __init__(self, logits):
        self.parts = [{"answer": Plain(logits)}]


@pytest.mark.parametrize("answer", [Answer, Plain, Nesting])
def test_a_use_without_calling_the_module_shows_through_objects(answer):
    class Wrapped(TiedHead):
        def forward(self, x):
            return answer(super().forward(x))

    model = Wrapped(call=False)
    counter = truestep.SampleCounter(model)
    with pytest.raises(TruestepError, match=r"uses 'embedding\.weight' without calling the module"):
        model(torch.tensor([1, 2]))
    counter.close()


class WithPositions(nn.Module):
    """A language model's two tables: one looked up by samples, one by position for all of them."""

    def __init__(self, lookup):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(8, 4)
        self.head = nn.Linear(4, 2)
        self.lookup = lookup

    def forward(self, x):
        hidden = self.tokens(x) + self.positions(self.lookup(x))
        return self.head(torch.relu(hidden)).mean(1)


@pytest.mark.parametrize("shape", ["[T]", "[1, T]"])
@pytest.mark.parametrize("unit", ["sample", "position"])
def test_positions_shared_by_all_samples_count_them_all(shape, unit):
    index = torch.arange(3) if shape == "[T]" else torch.arange(3).unsqueeze(0)
    model = WithPositions(lambda _: index)
    counter = truestep.SampleCounter(model, unit=unit)
    model(torch.randint(0, 9, (5, 3))).sum().backward()
    used = model.positions.weight.grad != 0
    assert used[:3].any()
    assert torch.equal(counter.counts()["positions.weight"], 5 * used)
    assert counter.counts()["tokens.weight"].max() <= 15


def test_positions_looked_up_for_each_sample_are_exact():
    model = WithPositions(lambda x: torch.arange(3).expand(len(x), 3))
    counter = truestep.SampleCounter(model)
    model(torch.randint(0, 9, (5, 3))).sum().backward()
    assert counter.counts()["positions.weight"].max() <= 5


def test_as_many_positions_as_samples_are_ambiguous_until_said():
    tokens = torch.randint(0, 9, (3, 3))
    model = WithPositions(lambda _: torch.arange(3))
    counter = truestep.SampleCounter(model)
    with pytest.raises(
        TruestepError, match=r"'positions' looks up 3 consecutive rows in a batch of 3"
    ):
        model(tokens)
    counter.close()
    counter = truestep.SampleCounter(model, batch_dim={"positions": None})
    model(tokens).sum().backward()
    assert torch.equal(counter.counts()["positions.weight"], 3 * (model.positions.weight.grad != 0))


def test_what_indices_have_shown_themselves_to_be_decides_where_they_are_ambiguous():
    model = WithPositions(lambda x: torch.arange(x.shape[1]))
    counter = truestep.SampleCounter(model)
    for samples in (5, 3):  # the last batch has as many samples as positions
        model.zero_grad()
        model(torch.randint(0, 9, (samples, 3))).sum().backward()
        used = model.positions.weight.grad != 0
        assert torch.equal(counter.counts()["positions.weight"], samples * used)
    counter.close()

    class Columns(nn.Module):
        """A table looked up by numbers that the model makes from its input."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 2)

        def forward(self, x):
            return self.table(x[:, 0].long())

    model = Columns()
    counter = truestep.SampleCounter(model)
    for rows in ([2.0, 0.0, 0.0, 1.0], [1.0, 2.0]):  # consecutive by chance
        model.zero_grad()
        model(torch.tensor(rows).unsqueeze(1)).sum().backward()
        expected = torch.tensor(rows).long().bincount(minlength=4)
        assert torch.equal(counter.counts()["table.weight"], expected.unsqueeze(1).expand(4, 2))
    counter.close()


class WithDistances(nn.Module):
    """Scores of tokens with a bias for the distance of each two positions, as T5 has it."""

    def __init__(self):
        super().__init__()
        self.tokens, self.bias = nn.Embedding(9, 4), nn.Embedding(7, 1)

    def forward(self, x):
        hidden, places = self.tokens(x), torch.arange(x.shape[1])
        distances = (places - places.unsqueeze(1)).clamp(-2, 2) + 2
        return (hidden @ hidden.mT + self.bias(distances).squeeze(-1)).softmax(-1) @ hidden


@pytest.mark.parametrize("unit", ["sample", "position"])
def test_biases_for_distances_count_all_samples(unit):
    model = WithDistances()
    counter = truestep.SampleCounter(model, unit=unit)
    for samples, length in ((5, 4), (3, 6)):
        model.zero_grad()
        model(torch.randint(0, 9, (samples, length))).square().sum().backward()
        used = model.bias.weight.grad != 0
        assert used[:5].all()
        assert not used[5:].any()
        counts = counter.counts()["bias.weight"]
        assert torch.equal(counts > 0, used)
        assert unit == "position" or torch.equal(counts, samples * used)


def test_as_many_distances_as_samples_are_ambiguous_until_said():
    model, tokens = WithDistances(), torch.randint(0, 9, (4, 4))
    counter = truestep.SampleCounter(model)
    with pytest.raises(TruestepError, match=r"'bias' looks up rows by distances in a batch of 4"):
        model(tokens)
    counter.close()
    counter = truestep.SampleCounter(model, batch_dim={"bias": None})
    model(tokens).square().sum().backward()
    assert torch.equal(counter.counts()["bias.weight"], 4 * (model.bias.weight.grad != 0))


def test_consecutive_indices_that_are_the_models_input_are_samples():
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 1))
    counter = truestep.SampleCounter(model)
    model(torch.arange(4)).sum().backward()
    assert counter.counts()["0.weight"].unique().tolist() == [1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_the_same(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.other.weight = self.layer.weight  # tied across two checkpoints
            self.on = True

        def block(self, x):
            return torch.relu(self.layer(torch.relu(self.layer(x))))

        def last(self, x):
            return torch.relu(self.other(x))

        def forward(self, x):
            for part in (self.block, self.last):
                x = checkpoint(part, x, use_reentrant=reentrant) if self.on else part(x)
            return self.head(x)

    model = Checkpointed()
    inputs = sparse_inputs(8, 4).requires_grad_()
    counter = truestep.SampleCounter(model)
    expected_counts = []
    for model.on in (False, True):
        model.zero_grad()
        for _ in range(2):  # and accumulates
            backward(model, inputs)
        expected_counts.append(counter.counts())
        assert counter.batch_size == 16
    plain, checkpointed = expected_counts
    assert plain.keys() == checkpointed.keys()
    for name, values in plain.items():
        assert torch.equal(checkpointed[name], values), name


def test_a_rule_for_a_module_with_two_outputs_gets_both_gradients():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return x * self.weight, (x.detach(), -x * self.weight)

    def pair(layout, module, x):
        def activity(first, constant, second):
            assert constant is None
            zero = torch.zeros(len(x), 2)
            mask = sum(((zero if d is None else d) != 0) & (x != 0) for d in (first, second)) > 0
            return {"weight": Elements(module.weight.shape, pack(mask))}

        return activity

    model = Pair()
    counter = truestep.SampleCounter(model, rules={Pair: pair})
    inputs = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 3.0]])
    first, (_, second) = model(inputs)
    (first[0].sum() + second[1:].sum()).backward()
    assert counter.counts()["weight"].tolist() == [2, 2]
    model.zero_grad()
    model(inputs)[0].sum().backward()  # only one of the outputs is used
    assert counter.counts()["weight"].tolist() == [2, 2]
    assert counter.batch_size == 3


# Corrections.


def test_correct_gradients_is_not_repeated_by_the_step(model, counter):
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=1.0, counter=counter)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, sparse_inputs(5, 4))
    effective = [counter.effective_gradient(p) for p in model.parameters()]
    counter.correct_gradients()
    counter.correct_gradients()
    for parameter, gradient in zip(model.parameters(), effective, strict=True):
        assert torch.equal(parameter.grad, gradient)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    clipped = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for parameter, start, gradient in zip(model.parameters(), before, clipped, strict=True):
        assert torch.equal(parameter.detach(), start - gradient)


def test_one_parameter_is_corrected(model, counter):
    backward(model, sparse_inputs(5, 4))
    weight, bias = model[0].weight, model[0].bias.grad.clone()
    expected = counter.effective_gradient(weight)
    counter.correct_gradients(weight)
    assert torch.equal(weight.grad, expected)
    assert torch.equal(model[0].bias.grad, bias)


def test_a_corrected_gradient_of_no_sample_zeroed_in_place_begins_a_batch(model, counter):
    (0 * model(sparse_inputs(5, 4))).sum().backward()
    counter.correct_gradients()
    model.zero_grad(set_to_none=False)
    backward(model, sparse_inputs(3, 4))
    assert counter.batch_size == 3


def test_a_backward_on_corrected_gradients_is_an_error(model, counter):
    backward(model, sparse_inputs(5, 4))
    counter.correct_gradients()
    with pytest.raises(
        TruestepError, match=r"mean effective gradient already.*zero_grad\(\) first"
    ):
        backward(model, sparse_inputs(5, 4))
    model.zero_grad()
    second = sparse_inputs(3, 4)
    backward(model, second)
    assert_counted(counter, model, second)


def test_a_gradient_without_a_record_is_an_error_that_names_it(model, counter):
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(
        TruestepError, match=r"'0\.weight' has a gradient, but no sample was counted"
    ):
        counter.correct_gradients()


def test_a_gradient_set_by_hand_after_a_batch_is_an_error(model, counter):
    backward(model, sparse_inputs(5, 4))
    model[0].weight.grad = model[0].weight.grad.clone()
    with pytest.raises(TruestepError, match=r"'0\.weight'"):
        counter.effective_gradient(model[0].weight)


def test_a_use_that_bypasses_the_module_is_an_error_that_names_it():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "bypassed": nn.Linear(3, 3)})
    counter = truestep.SampleCounter(model)
    hidden = model["used"](torch.randn(4, 3))
    functional.linear(hidden, model["bypassed"].weight).sum().backward()
    with pytest.raises(TruestepError, match=r"'bypassed\.weight' has a gradient, but no sample"):
        counter.correct_gradients()


class CallsItself(nn.Sequential):
    """A model whose call calls it once more, as Lightning's under DistributedDataParallel does."""

    inner = False

    def forward(self, input):
        if self.inner:
            return super().forward(input)
        self.inner = True
        return self(input).square().mean()


def test_a_model_that_calls_itself_is_counted_in_the_inner_call():
    model = CallsItself(nn.Linear(6, 3))
    counter, inputs = truestep.SampleCounter(model), sparse_inputs(5, 6)
    model(inputs).backward()
    assert torch.equal(counter.counts()["0.weight"], (inputs != 0).sum(0).expand(3, 6))
    assert counter.batch_size == 5


# Hooks and copies.


class Couple(nn.Linear):
    """Two outputs, the earlier one last."""

    def forward(self, input):
        output = super().forward(input)
        first = output.relu()
        return output.tanh(), first


def couple(layout, module, input):
    def activity(*deltas):
        asked.append([delta is not None for delta in deltas])
        delta = sum(delta for delta in deltas if delta is not None)
        return {"bias": Elements(module.bias.shape, pack(delta))}

    asked = couple.asked = []
    return activity


@pytest.mark.parametrize("used", [[True, True], [True, False], [False, True]])
@pytest.mark.parametrize("start", ["loss", "outputs"])
def test_a_layer_of_several_outputs_hears_of_all_gradients_at_once(used, start):
    layer = Couple(3, 4)
    counter = truestep.SampleCounter(layer, rules=truestep.RULES | {Couple: couple})
    outputs = [output for output, use in zip(layer(torch.randn(5, 3)), used, strict=True) if use]
    for _ in range(2):
        if start == "loss":
            sum(output.sum() for output in outputs).backward(retain_graph=True)
        else:
            torch.autograd.backward(outputs, [torch.ones(5, 4)] * len(outputs), retain_graph=True)
    assert couple.asked == [used, used]
    assert counter.counts()["bias"].tolist() == [10] * 4


def test_unsupported_modules_are_all_named_before_training():
    rare = nn.Embedding(4, 4, scale_grad_by_freq=True)
    with pytest.raises(TruestepError) as error:
        truestep.SampleCounter(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), rare))
    message = str(error.value)
    assert "1: BatchNorm1d mixes the samples" in message
    assert "2: Embedding(scale_grad_by_freq=True) divides" in message
    assert "rules=" in message
    assert "unsupported='mean'" in message


def test_unsupported_mean_keeps_the_plain_gradient_there():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    counter = truestep.SampleCounter(model, unsupported="mean")
    backward(model, sparse_inputs(5, 4))
    plain = model[1].weight.grad.clone()
    counter.correct_gradients()
    assert torch.equal(model[1].weight.grad, plain)
    assert counter.counts().keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_frozen_unsupported_modules_are_fine():
    model = nn.Sequential(nn.BatchNorm1d(4).requires_grad_(requires_grad=False), nn.Linear(4, 2))
    counter = truestep.SampleCounter(model)
    backward(model, sparse_inputs(5, 4))
    assert counter.counts()["1.bias"].tolist() == [5, 5]


def test_layers_that_get_their_sizes_later_are_counted():
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 3))
    counter, inputs = truestep.SampleCounter(model), sparse_inputs(5, 4)
    for _ in range(2):
        model.zero_grad()
        backward(model, inputs)
        assert_counted(counter, model, inputs)


def test_parameters_unfrozen_later_are_counted(model):
    model.requires_grad_(requires_grad=False)
    counter = truestep.SampleCounter(model)
    model.requires_grad_(requires_grad=True)
    inputs = sparse_inputs(5, 4)
    backward(model, inputs)
    assert_counted(counter, model, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_cast_after_the_counter_was_made_goes_on(model, counter, dtype):
    first, second = sparse_inputs(5, 4).round(), sparse_inputs(3, 4).round()
    backward(model, first)
    model.to(dtype)  # with the gradient
    assert_counted(counter, model, first)
    counter.correct_gradients()
    assert model[0].weight.grad.dtype == dtype
    model.zero_grad()
    backward(model, second.to(dtype))
    counts = counter.counts()
    assert counter.batch_size == 3
    counter.close()
    other = truestep.SampleCounter(model)
    model.zero_grad()
    backward(model, second.to(dtype))
    for name, values in other.counts().items():
        assert torch.equal(counts[name], values), name


def test_a_model_that_left_the_meta_device_needs_a_counter_made_afterwards():
    model = nn.Sequential(nn.Linear(4, 3, device="meta"))
    counter = truestep.SampleCounter(model)
    model.to_empty(device="cpu").load_state_dict(nn.Sequential(nn.Linear(4, 3)).state_dict())
    with pytest.raises(TruestepError, match=r"'weight' of '0' is another.*counter afterwards"):
        model(sparse_inputs(5, 4))
    counter.close()
    counter, inputs = truestep.SampleCounter(model), sparse_inputs(5, 4)
    backward(model, inputs)
    assert_counted(counter, model, inputs)


class Split(nn.Module):
    """A part on the CPU, and one on another device; the CPU's own stand-in for one has no numbers."""

    def __init__(self):
        super().__init__()
        self.here, self.there = nn.Linear(3, 2), nn.Linear(3, 2, device="meta")

    def forward(self, x):
        return self.here(x), self.there(x.to("meta"))


def test_parameters_on_several_devices_count_each_on_its_own():
    model, x = Split(), sparse_inputs(6, 3)
    counter = truestep.SampleCounter(model)
    here = truestep.AdaptiveBatchSGD(model.here.parameters(), lr=0.1, counter=counter)
    expected = truestep.oracle.counts(model.here, nn.MSELoss(), x, torch.ones(6, 2))
    for _ in range(3):
        model.zero_grad()
        one, other = model(x)
        torch.autograd.backward([(one - 1).square().mean(), other.sum()])
        weights = model.here.weight.clone()
        here.step()
        assert not torch.equal(weights, model.here.weight)
        record = counter._records.of(model.here.weight)
        assert torch.equal(record.activity.count(), expected["weight"])
    there = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    before = model.here.weight.clone()
    for use in (there.step, counter.counts, counter.correct_gradients):
        with pytest.raises(TruestepError, match=r"'there\.weight' is on the meta device"):
            use()
    assert torch.equal(before, model.here.weight)


def test_an_averaged_model_writes_nothing_into_the_counter(model, counter):
    averaged = torch.optim.swa_utils.AveragedModel(model)
    first = sparse_inputs(5, 4)
    backward(model, first)
    averaged.update_parameters(model)
    backward(averaged, sparse_inputs(9, 4))
    assert_counted(counter, model, first)


def test_the_model_keeps_its_keys_and_outputs(model):
    keys, inputs = list(model.state_dict()), sparse_inputs(5, 4)
    output = model(inputs)
    counter = truestep.SampleCounter(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(inputs), output)
    counter.close()


def test_close_takes_every_hook_off(model):
    counter = truestep.SampleCounter(model)
    backward(model, sparse_inputs(5, 4))
    counter.close()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    model.zero_grad()
    backward(model, sparse_inputs(5, 4))
    assert counter.counts() == {}
    assert counter.batch_size == 0


def test_a_second_counter_is_an_error_until_the_first_is_closed(model, counter):
    with pytest.raises(TruestepError, match=r"another SampleCounter watches"):
        truestep.SampleCounter(model[0])
    counter.close()
    truestep.SampleCounter(model).close()


def test_a_forgotten_counter_goes_and_its_hooks_do_nothing(model):
    counter = weakref.ref(truestep.SampleCounter(model))
    gc.collect()
    assert counter() is None
    backward(model, sparse_inputs(5, 4))
    truestep.SampleCounter(model)


def test_copies_of_the_model_do_not_write_into_the_counter(model, counter):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), torch.load(stream, weights_only=False)]
    inputs = sparse_inputs(5, 4)
    backward(model, inputs)
    for other in copies:
        backward(other, sparse_inputs(9, 4))
        assert_counted(counter, model, inputs)
        own = truestep.SampleCounter(other)
        other.zero_grad()
        backward(other, sparse_inputs(9, 4))
        assert own.batch_size == 9


class Owner(nn.Module):
    """Has the counter of a part of it, as a LightningModule may."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.counter = truestep.SampleCounter(self.net)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "average"])
def test_a_counter_that_was_copied_with_its_model_says_so_when_it_is_used(how):
    owner, inputs = Owner(), sparse_inputs(5, 4)
    backward(owner.net, inputs)
    stream = io.BytesIO()
    torch.save(owner, stream)
    stream.seek(0)
    ways = {
        "deepcopy": lambda: copy.deepcopy(owner),
        "pickle": lambda: torch.load(stream, weights_only=False),
        "average": lambda: torch.optim.swa_utils.AveragedModel(owner).module,
    }
    other = ways[how]()
    backward(other.net, sparse_inputs(9, 4))
    assert_counted(owner.counter, owner.net, inputs)
    for use in ("counts", "batch_size", "correct_gradients", "statistics", "close"):
        with pytest.raises(TruestepError, match="make a new SampleCounter on the copy"):
            getattr(other.counter, use)
    with pytest.raises(TruestepError, match="make a new SampleCounter on the copy"):
        other.counter.batch_size = 3
    with pytest.raises(TruestepError, match=r"pass .*SampleCounter\(model\)"):
        truestep.AdaptiveBatchSGD(other.net.parameters(), lr=0.1, counter=other.counter)
    copy.deepcopy(other)  # and again
    assert "was copied" in repr(other.counter)
    other.counter = truestep.SampleCounter(other.net)
    assert other.counter.batch_size == 0


def test_wrong_options_are_named(model):
    with pytest.raises(TruestepError, match=r"unit is 'token'; use 'sample' or 'position'"):
        truestep.SampleCounter(model, unit="token")
    with pytest.raises(TruestepError, match="unsupported is 'skip'"):
        truestep.SampleCounter(model, unsupported="skip")
    with pytest.raises(TruestepError, match=r"use torch\.nn\.parallel\.DistributedDataParallel"):
        truestep.SampleCounter(nn.DataParallel(model))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_modules_are_refused_by_name(model):
    for scripted in (torch.jit.script(model), nn.Sequential(torch.jit.script(model))):
        with pytest.raises(TruestepError, match=r"is a TorchScript module.*use torch\.compile"):
            truestep.SampleCounter(scripted)


# To watch.


def test_statistics_leave_out_parameters_without_elements():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2))
    counter = truestep.SampleCounter(model)
    model(torch.ones(4, 3)).sum().backward()
    assert counter.statistics().keys() == {"1.bias"}


def test_statistics_of_a_batch():
    model = nn.Linear(3, 1)
    counter = truestep.SampleCounter(model)
    assert counter.statistics() == {}
    inputs = torch.tensor([[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    model(inputs).sum().backward()
    assert counter.statistics(eps=0.5)["weight"] == {
        "batch_size": 3.0,
        "smallest": 0.0,
        "mean": 4 / 3,
        "largest": 3.0,
        "unreached": pytest.approx(1 / 3),
        "largest_factor": 3 / 1.5,
    }
    model.zero_grad()
    model(torch.zeros(2, 3)).sum().backward()
    assert counter.statistics()["weight"]["largest_factor"] == 1.0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_statistics_stay_readable_after_the_step(model, counter, set_to_none):
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    for samples in (5, 3):
        backward(model, sparse_inputs(samples, 4))
        before, counts = counter.statistics(), counter.counts()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert counter.statistics() == before
        assert counter.batch_size == samples
        for name, values in counter.counts().items():
            assert torch.equal(values, counts[name]), name


def test_nan_and_inf_are_named_and_stay(model, counter):
    inputs = sparse_inputs(5, 4)
    inputs[2, 1] = torch.nan
    backward(model, inputs)
    assert "0.weight" in counter.nonfinite()
    counter.correct_gradients()
    assert model[0].weight.grad.isnan().any()
    model.zero_grad()
    backward(model, sparse_inputs(5, 4))
    assert counter.nonfinite() == []


# Memory.


def test_the_record_of_a_wide_batch_takes_a_bit_per_sample_and_unit():
    model = nn.Linear(1000, 500, bias=False)
    counter = truestep.SampleCounter(model)
    model(sparse_inputs(640, 1000)).relu().sum().backward()
    assert counter.nbytes == 640 * (1000 + 500) // 8


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", [(64, 10), (7, 10), (6, 5, 10)])
def test_bits_that_are_all_on_take_no_memory(shape, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(dispatch, "installed", lambda: False)
    model = nn.Sequential(nn.Linear(10, 5), nn.GELU(), nn.Linear(5, 2))
    counter = truestep.SampleCounter(model)
    model(torch.ones(shape)).sum().backward()
    assert counter.nbytes == 0
    assert all((values == shape[0]).all() for values in counter.counts().values())


def test_many_micro_batches_hold_no_more_than_the_counts():
    model = nn.Linear(20, 10)
    counter = truestep.SampleCounter(model)
    for _ in range(50):
        model(torch.randn(64, 20)).sum().backward()
    assert counter.batch_size == 50 * 64
    assert counter.nbytes <= 2 * 8 * (20 * 10 + 10)
    assert counter.counts()["weight"].unique().tolist() == [50 * 64]


def test_steps_leave_no_growth(model, counter):
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)

    def step():
        optimizer.zero_grad()
        backward(model, torch.ones(5, 4))
        optimizer.step()
        return counter.nbytes

    sizes = {step() for _ in range(5)}
    handles = len(counter._watch._handles)
    gc.collect()
    objects = len(gc.get_objects())
    sizes |= {step() for _ in range(20)}
    gc.collect()
    assert len(sizes) == 1
    assert len(counter._watch._handles) == handles
    assert len(gc.get_objects()) - objects < 20
    assert not counter._records._pending
    assert not counter._watch._calls


def test_errors_are_one_paragraph(model, counter):
    model[0].bias.grad = torch.ones(6)
    with pytest.raises(TruestepError) as error:
        counter.correct_gradients()
    assert not re.search(r"\n\n", str(error.value))


def test_an_output_may_be_a_view_whose_base_was_written_to():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            output = self.layer(x)
            output.view(-1)[:3].zero_()
            return output

    model = Masked()
    counter = truestep.SampleCounter(model)
    model(torch.ones(2, 1, 3)).sum().backward()
    assert counter.counts()["layer.bias"].tolist() == [1, 1, 1, 2]
