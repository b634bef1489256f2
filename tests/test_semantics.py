"""What users rely on, row by row of the table in docs/reference.md, seen from a training step.

What a record holds in these situations is in test_counter.py; optimizers are in test_optim.py, ranks in
test_distributed.py, graphs in test_compiled.py.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import truestep
from properties import own_counts
from truestep.errors import TruestepError
from zoo import mlp, sparse_inputs

LR = 0.5


def adaptive(model, **options):
    return truestep.AdaptiveBatchSGD(
        model.parameters(), lr=LR, counter=truestep.SampleCounter(model), **options
    )


def attached(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    counter = truestep.SampleCounter(model)
    truestep.attach(optimizer, truestep.mean_effective_gradient(counter, **options))
    optimizer.counter = counter
    return optimizer


both_forms = pytest.mark.parametrize("make", [adaptive, attached])


@pytest.fixture
def model():
    return mlp().double()


@pytest.fixture
def twin(model):
    """The same model, for what happens without the situation."""
    return copy.deepcopy(model)


def batch(samples):
    return sparse_inputs(samples, 4).double()


def sum_loss(model, inputs):
    return model(inputs).square().sum()


def assert_same_parameters(model, twin):
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name


def expected_step(model, inputs, *, samples, factor=1):
    """Parameters after plain autograd and the formula, `samples` being N and counts those of `inputs`.

    Args:
        model: left unchanged.
        inputs: of the batch.
        samples: N.
        factor: how often the batch went through the backward pass.
    """
    own = copy.deepcopy(model)
    sum_loss(own, inputs).backward()
    zeros = torch.zeros(len(inputs), 0)
    counts = truestep.oracle.counts(own, lambda out, _: out.square().sum(), inputs, zeros)
    for name, parameter in own.named_parameters():
        m = factor * counts[name]
        scale = torch.where(m > 0, samples / (m + 1.0), 1.0)
        parameter.data -= LR * factor * parameter.grad * scale
    return own


def assert_close_parameters(model, other):
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, expected)


# Several backward passes per step.


@both_forms
def test_several_backward_passes_step_as_one_over_the_joint_batch(model, twin, make):
    optimizer, inputs = make(model), batch(9)
    for part in inputs.split([1, 5, 3]):
        sum_loss(model, part).backward()
    optimizer.step()
    assert optimizer.counter.batch_size == 9
    assert_close_parameters(model, expected_step(twin, inputs, samples=9))


# zero_grad, and steps that GradScaler skips.

DROPS = {
    "optimizer": lambda _, optimizer: optimizer.zero_grad(),
    "optimizer, in place": lambda _, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, _: model.zero_grad(),
    "model, in place": lambda model, _: model.zero_grad(set_to_none=False),
    "by hand": lambda model, _: [setattr(p, "grad", None) for p in model.parameters()],
    "by hand, in place": lambda model, _: [p.grad.zero_() for p in model.parameters()],
}


@both_forms
@pytest.mark.parametrize("drop", DROPS)
def test_zero_grad_of_either_kind_leaves_nothing_of_the_batch(model, twin, make, drop):
    optimizer, others = make(model), make(twin)
    sum_loss(model, batch(9)).backward()
    DROPS[drop](model, optimizer)
    inputs = batch(4)
    for network, its in ((model, optimizer), (twin, others)):
        sum_loss(network, inputs).backward()
        its.step()
    assert_same_parameters(model, twin)


@both_forms
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_skipped_by_gradscaler_leaves_nothing_of_its_batch(model, twin, make, set_to_none):
    optimizer, others = make(model), make(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(sum_loss(model, batch(9)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same_parameters(model, twin)
    optimizer.zero_grad(set_to_none=set_to_none)
    inputs = batch(4)
    scaler.scale(sum_loss(model, inputs)).backward()
    scaler.step(optimizer)
    sum_loss(twin, inputs).backward()
    others.step()
    assert_same_parameters(model, twin)  # the scale is a power of 2


# Backward twice through one forward, a forward without a backward, torch.autograd.grad.


@both_forms
def test_backward_twice_through_one_forward_counts_twice(model, twin, make):
    optimizer, inputs = make(model), batch(5)
    loss = sum_loss(model, inputs)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert_close_parameters(model, expected_step(twin, inputs, samples=10, factor=2))


@both_forms
def test_a_forward_without_a_backward_changes_no_step(model, twin, make):
    optimizer, inputs = make(model), batch(5)
    before, kept = model(batch(7)), []
    sum_loss(model, inputs).backward()
    kept.append(model(batch(3)))
    optimizer.step()
    assert before.requires_grad
    assert kept[0].requires_grad
    assert_close_parameters(model, expected_step(twin, inputs, samples=5))


@both_forms
def test_torch_autograd_grad_changes_no_step(model, twin, make):
    optimizer, inputs = make(model), batch(5)
    torch.autograd.grad(sum_loss(model, batch(7)), list(model.parameters()))
    assert optimizer.counter.counts() == {}
    sum_loss(model, inputs).backward()
    torch.autograd.grad(sum_loss(model, batch(7)), list(model.parameters()))
    optimizer.step()
    assert_close_parameters(model, expected_step(twin, inputs, samples=5))


# Several losses or optimizers on one model, part of the model in the backward.


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 3)])

    def forward(self, x, head):
        return self.heads[head](torch.relu(self.trunk(x)))


def test_each_parameter_has_the_n_of_the_losses_that_reach_it():
    model = TwoHeads()
    counter = truestep.SampleCounter(model)
    model(sparse_inputs(5, 4), 0).square().mean().backward()
    model(sparse_inputs(3, 4), 1).square().mean().backward()
    sizes = {name: values["batch_size"] for name, values in counter.statistics().items()}
    assert sizes == {
        "trunk.weight": 8,
        "trunk.bias": 8,
        "heads.0.weight": 5,
        "heads.0.bias": 5,
        "heads.1.weight": 3,
        "heads.1.bias": 3,
    }


def test_two_optimizers_on_one_model_step_as_one_over_all():
    model = TwoHeads()
    twin = copy.deepcopy(model)
    counters = [truestep.SampleCounter(network) for network in (model, twin)]
    alone = truestep.AdaptiveBatchSGD(twin.parameters(), lr=LR, counter=counters[1])
    own = [
        truestep.AdaptiveBatchSGD(part.parameters(), lr=LR, counter=counters[0])
        for part in (model.trunk, model.heads[0], model.heads[1])
    ]
    for _ in range(2):
        first, second = sparse_inputs(5, 4), sparse_inputs(3, 4)
        for network in (model, twin):
            network.zero_grad()
            (network(first, 0).square().mean() + network(second, 1).square().mean()).backward()
        alone.step()
        for optimizer in own:
            optimizer.step()
    assert_same_parameters(model, twin)


def test_a_backward_into_part_of_the_model_leaves_the_rest_as_it_was(model, twin):
    optimizer, inputs = adaptive(model), batch(5)
    sum_loss(model, inputs).backward()
    hidden = torch.relu(model[0](batch(7))).detach()
    model[2].zero_grad()
    model[2](hidden).square().sum().backward()
    counter = optimizer.counter
    sizes = {name: values["batch_size"] for name, values in counter.statistics().items()}
    assert sizes == {"0.weight": 5, "0.bias": 5, "2.weight": 7, "2.bias": 7}
    optimizer.step()
    expected = expected_step(twin, inputs, samples=5)
    torch.testing.assert_close(model[0].weight, expected[0].weight)


# Evaluation between.


def evaluate_without_grad(model):
    with torch.no_grad():
        model(batch(50))


def evaluate_in_inference_mode(model):
    with torch.inference_mode():
        model(batch(50))


def evaluate_with_grad(model):
    model.eval()
    model(batch(50))
    model.train()


@both_forms
@pytest.mark.parametrize(
    "evaluate", [evaluate_without_grad, evaluate_in_inference_mode, evaluate_with_grad]
)
def test_evaluation_between_backward_and_step_leaves_nothing(model, twin, make, evaluate):
    optimizer, inputs = make(model), batch(5)
    evaluate(model)
    sum_loss(model, inputs).backward()
    held = optimizer.counter.nbytes
    evaluate(model)
    assert optimizer.counter.nbytes == held
    optimizer.step()
    assert_close_parameters(model, expected_step(twin, inputs, samples=5))


@pytest.mark.parametrize("evaluate", [evaluate_without_grad, evaluate_in_inference_mode])
def test_evaluation_without_gradients_runs_no_rule(model, evaluate):
    asked = []

    def spy(layout, module, input):
        asked.append(module)
        return truestep.RULES[nn.Linear](layout, module, input)

    counter = truestep.SampleCounter(model, rules={nn.Linear: spy})
    evaluate(model)
    assert asked == []
    sum_loss(model, batch(5)).backward()
    assert asked == [model[0], model[2]]
    assert counter.batch_size == 5


# Gradient clipping.


def step_norm(model, start):
    steps = [one - other for one, other in zip(model.parameters(), start.parameters(), strict=True)]
    return torch.cat([step.flatten() for step in steps]).norm().item() / LR


@both_forms
@pytest.mark.parametrize("correct_first", [True, False])
def test_clipping_bounds_what_it_follows(model, twin, make, correct_first):
    optimizer, inputs = make(model), batch(5)
    sum_loss(model, inputs).backward()
    if correct_first:
        optimizer.counter.correct_gradients()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    assert (step_norm(model, twin) == pytest.approx(0.01, rel=1e-4)) == correct_first
    expected = expected_step(twin, inputs, samples=5)
    for parameter, start, whole in zip(
        model.parameters(), twin.parameters(), expected.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, start + (whole - start) * 0.01 / (norm + 1e-6))


# Schedulers, groups, closures.


def test_groups_have_their_own_eps_and_limit(model, twin):
    counter = truestep.SampleCounter(model)
    groups = [
        {"params": model[0].parameters(), "eps": 3.0},
        {"params": model[2].parameters(), "factor_limit": 1.0, "lr": 0.1},
    ]
    optimizer = truestep.AdaptiveBatchSGD(groups, lr=LR, counter=counter)
    inputs = batch(5)
    sum_loss(model, inputs).backward()
    sum_loss(twin, inputs).backward()
    counts = counter.counts()
    optimizer.step()
    m = counts["0.weight"]
    factor = torch.where(m > 0, 5 / (m + 3.0), 1.0)
    torch.testing.assert_close(model[0].weight, twin[0].weight - LR * factor * twin[0].weight.grad)
    factor = (5 / (counts["2.weight"] + 1.0)).clamp(max=1.0)
    torch.testing.assert_close(model[2].weight, twin[2].weight - 0.1 * factor * twin[2].weight.grad)


@both_forms
def test_the_correction_is_of_the_closures_gradients(model, twin, make):
    optimizer, inputs = make(model), batch(5)
    sum_loss(model, batch(9)).backward()  # what the closure drops

    def closure():
        optimizer.zero_grad()
        loss = sum_loss(model, inputs)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_close_parameters(model, expected_step(twin, inputs, samples=5))


@both_forms
def test_steps_inside_the_backward_pass_are_those_after_it(model, make):
    """A parameter's own optimizer in its hook frees its gradient at once."""
    counter, steps = truestep.SampleCounter(model), {}
    for parameter in model.parameters():
        if make is adaptive:
            steps[parameter] = truestep.AdaptiveBatchSGD([parameter], lr=LR, counter=counter)
        else:
            steps[parameter] = torch.optim.SGD([parameter], lr=LR)
            truestep.attach(steps[parameter], truestep.mean_effective_gradient(counter))

        def step(parameter):
            steps[parameter].step()
            steps[parameter].zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    for samples in (5, 7):
        inputs = batch(samples)
        expected = expected_step(model, inputs, samples=samples)
        sum_loss(model, inputs).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert_close_parameters(model, expected)


# State.

STATES = {
    "DASGD": (lambda m: truestep.DASGD(m.parameters(), lr=LR), {"previous_gradient"}),
    "AdaptiveBatchSGD": (adaptive, set()),
    "momentum": (lambda m: adaptive(m, momentum=0.9), {"momentum_buffer"}),
    "attach": (attached, set()),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_counts_are_never_state_and_state_has_the_gradients_dtype(name, dtype):
    make, keys = STATES[name]
    model = mlp().to(dtype)
    optimizer = make(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(sparse_inputs(5, 4).to(dtype)).square().mean().backward()
        optimizer.step()
    for parameter in model.parameters():
        state = {k: v for k, v in optimizer.state[parameter].items() if v is not None}
        assert state.keys() == keys
        for value in state.values():
            assert value.dtype == dtype
            assert value.shape == parameter.shape
    saved = optimizer.state_dict()
    twin = copy.deepcopy(model)
    resumed = make(twin)
    resumed.load_state_dict(saved)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        for key in keys:
            assert torch.equal(optimizer.state[one][key], resumed.state[other][key])


# Precision.


def assert_counts_of_own_gradients(model, inputs, counter, output, loss):
    """Counts equal the samples' own gradients through the same graph, in the same precision."""
    (delta,) = torch.autograd.grad(loss, output, retain_graph=True)
    expected = own_counts(model, [output], [delta], len(inputs))
    loss.backward()
    counts = counter.counts()
    assert counts.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(counts[name], values), name
    assert any(((values > 0) & (values < len(inputs))).any() for values in expected.values())


def convolutional():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_models_of_any_precision_count_their_own_gradients(dtype):
    body = nn.Linear(4, 6, dtype=dtype)
    head = nn.Linear(6, 3, dtype=dtype)
    activation = nn.Tanh() if dtype.is_complex else nn.ReLU()
    model = nn.Sequential(body, activation, head)
    counter = truestep.SampleCounter(model)
    inputs = sparse_inputs(8, 4).to(dtype)
    output = model(inputs)
    assert output.dtype == dtype
    assert_counts_of_own_gradients(model, inputs, counter, output, output.abs().square().sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_of_any_precision_are_the_formula(dtype):
    model = nn.Linear(4, 3, dtype=dtype)
    start = copy.deepcopy(model)
    optimizer = adaptive(model)
    model(sparse_inputs(8, 4).to(dtype)).abs().square().mean().backward()
    counts = optimizer.counter.counts()
    optimizer.step()
    wide = torch.promote_types(dtype, torch.float32)
    for name, parameter in model.named_parameters():
        factor = torch.where(counts[name] > 0, 8 / (counts[name] + 1.0), 1.0)
        expected = start.get_parameter(name).to(wide) - LR * (parameter.grad.to(wide) * factor)
        torch.testing.assert_close(parameter.detach(), expected.detach().to(dtype))
        assert parameter.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [mlp, convolutional])
@pytest.mark.parametrize("usual", [False, True])
def test_autocast_counts_what_it_computes(dtype, make, usual):
    model = make()
    counter = truestep.SampleCounter(model)
    inputs = sparse_inputs(8, 4) if make is mlp else sparse_inputs(8, 2, 8)
    inputs *= torch.where(torch.rand_like(inputs) < 0.2, 1e-9, 1.0)  # nothing in float16
    if usual:
        with torch.autocast("cpu", dtype=dtype):
            model(inputs).sum().backward()
        model.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        output = model(inputs)
    assert output.dtype == dtype
    assert_counts_of_own_gradients(model, inputs, counter, output, output.float().square().sum())


@both_forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unscale", [True, False])
def test_autocast_and_gradscaler_step_as_without_the_scale(make, dtype, unscale):
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, others = make(model), make(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    inputs = sparse_inputs(8, 4)

    def loss_of(network):
        with torch.autocast("cpu", dtype=dtype):
            output = network(inputs)
        return output.float().square().sum()

    scaler.scale(loss_of(model)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    loss_of(twin).backward()
    others.step()
    assert scaler.get_scale() == 2048
    assert_same_parameters(model, twin)  # the scale is a power of 2 and nothing underflows


# Sparse gradients.


@pytest.mark.parametrize("form", ["AdaptiveBatchSGD", "attach"])
def test_sparse_gradients_step_as_dense_ones(form):
    make = adaptive if form == "AdaptiveBatchSGD" else attached
    tables = [nn.Embedding(7, 3, sparse=sparse).double() for sparse in (False, True)]
    tables[1].load_state_dict(tables[0].state_dict())
    for table in tables:
        optimizer = make(table)
        for rows in ([[0, 1, 1], [1, 2, 5]], [[3, 3, 3], [0, 1, 5]]):
            optimizer.zero_grad()
            for sample in torch.tensor(rows).split(1):  # accumulated, uncoalesced
                table(sample).square().sum().backward()
            optimizer.step()
        assert table.weight.grad.is_sparse == table.sparse
    torch.testing.assert_close(tables[0].weight, tables[1].weight)


# NaN and inf.


@both_forms
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_reach_the_parameters_that_they_belong_to(model, twin, make, value):
    optimizer = make(model)
    inputs = batch(5)
    sum_loss(model, inputs).backward()
    model[2].weight.grad[1, 2] = value
    assert optimizer.counter.nonfinite() == ["2.weight"]
    optimizer.step()
    broken = torch.zeros(3, 6, dtype=torch.bool)
    broken[1, 2] = True
    assert torch.equal(~model[2].weight.isfinite(), broken)
    expected = expected_step(twin, inputs, samples=5)
    torch.testing.assert_close(model[2].weight[~broken], expected[2].weight[~broken])
    torch.testing.assert_close(model[0].weight, expected[0].weight)


def test_a_sample_of_nan_counts_and_its_nan_stays(model):
    counter = truestep.SampleCounter(model)
    inputs = batch(5)
    inputs[2] = torch.nan
    sum_loss(model, inputs).backward()
    assert counter.nonfinite() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert counter.counts()["2.bias"].tolist() == [5, 5, 5]
    counter.correct_gradients()
    assert all(parameter.grad.isnan().all() for parameter in model.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_boost_keeps_nan_and_inf_and_gets_over_them(value):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = truestep.DASGD([parameter], lr=1.0)
    for gradient in ([1.0, 1.0], [value, 1.0]):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    assert parameter.isfinite().tolist() == [False, True]
    parameter.data.zero_()
    for _ in range(2):
        parameter.grad = torch.tensor([-1.0 if value > 0 else 1.0, 1.0])
        optimizer.step()
    assert parameter.isfinite().all()


class Inside(nn.Module):
    """A table whose weight is used past it, in a function under activation checkpointing."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, x):
        def head(hidden):
            return functional.linear(hidden, self.table.weight)

        return checkpoint(head, self.layer(self.table(x)).relu(), use_reentrant=True)


@both_forms
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_use_that_reentrant_checkpointing_hides_is_an_error(make, set_to_none):
    model = Inside()
    optimizer = make(model)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        sum_loss(model, torch.randint(0, 9, (5, 4))).backward()
        assert "table.weight" not in optimizer.counter.counts()
        with pytest.raises(truestep.TruestepError, match=r"'table\.weight' got a gradient"):
            optimizer.step()


@both_forms
def test_a_batch_without_a_gradient_counts_when_it_is_clipped_before_the_next(make, model):
    optimizer = make(model)
    (model(batch(5)) * 0).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    sum_loss(model, batch(6)).backward()
    assert optimizer.counter.batch_size == 11


@both_forms
def test_a_gradient_from_elsewhere_gets_no_factor_of_a_batch_that_was_dropped(make, model):
    optimizer = make(model)
    sum_loss(model, batch(6)).backward()
    optimizer.zero_grad(set_to_none=False)
    sum(p.square().sum() for p in model.parameters()).backward()
    with pytest.raises(truestep.TruestepError, match="no sample was counted"):
        optimizer.step()


@both_forms
def test_gradients_from_elsewhere_join_those_of_a_batch(make, model):
    optimizer = make(model)
    sum_loss(model, batch(6)).backward()
    for _ in range(2):
        sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    assert optimizer.counter.batch_size == 6


@pytest.mark.parametrize("sparse", [False, True])
def test_a_parameter_made_smaller_before_the_step_is_an_error(sparse):
    model = nn.Embedding(8, 2, sparse=sparse)
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=1.0, counter=counter)
    model(torch.arange(4)).sum().backward()
    values = torch.zeros(8, 2)
    model.weight.data = values[:4]
    gradient = model.weight.grad
    if sparse:
        rows, ones = gradient._indices(), gradient._values()
        model.weight.grad.data = torch.sparse_coo_tensor(rows, ones, (4, 2), check_invariants=True)
    else:
        gradient.data = gradient[:4]
    with pytest.raises(
        TruestepError, match=r"shape \(8, 2\) in the backward pass has the shape \(4, 2\)"
    ):
        optimizer.step()
    assert not values.any()


def test_many_batches_zeroed_in_place_without_a_step_are_forgotten():
    model = nn.Linear(6, 2)
    counter = truestep.SampleCounter(model)
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        for samples in (5, 70, 64):
            model(torch.rand(samples, 6) + 1).sum().backward()
        assert counter.batch_size == 139
        assert counter.counts()["weight"].tolist() == [[139] * 6] * 2


def test_samples_whose_inputs_are_zero_count_in_n_though_the_gradient_is_clipped_before_the_next():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    counter = truestep.SampleCounter(model)
    model(-torch.ones(4, 2)).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model(torch.ones(4, 2)).sum().backward()
    statistics = counter.statistics()
    assert [statistics[name]["batch_size"] for name in ("0.weight", "2.weight")] == [8, 8]
    assert counter.counts()["2.weight"].tolist() == [[4, 4]]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_batch_size_is_that_of_the_present_batch_though_it_leaves_a_branch_unused(set_to_none):
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    model.forward = lambda x, name: model[name](x)
    counter = truestep.SampleCounter(model)
    for size, name in ((64, "a"), (5, "b")):
        model.zero_grad(set_to_none=set_to_none)
        model(torch.rand(size, 3), name).sum().backward()
        assert counter.batch_size == size


@both_forms
def test_a_gradient_of_zeros_that_nobody_counted_is_left_alone(make, model):
    optimizer = make(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.counter.counts()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_goes_through_distributed_checkpoints(momentum):
    from torch.distributed.checkpoint import state_dict  # noqa: PLC0415 - takes a second

    def made():
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        counter = truestep.SampleCounter(model)
        options = {"lr": 0.1, "momentum": momentum, "counter": counter}
        return model, truestep.AdaptiveBatchSGD(model.parameters(), **options)

    def train(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()

    first, second = made(), made()
    train(*first)
    first[1].zero_grad()
    saved = copy.deepcopy(state_dict.get_state_dict(*first))
    state_dict.set_state_dict(*second, model_state_dict=saved[0], optim_state_dict=saved[1])
    for each in (first, second):
        train(*each)
    torch.testing.assert_close([*first[0].parameters()], [*second[0].parameters()])


@pytest.mark.parametrize("usual", [False, True])
def test_gradients_in_batches_and_transforms_of_functions_count_nothing(usual):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    counter = truestep.SampleCounter(model)
    if usual:
        model(x).sum().backward()
        model.zero_grad()
    given = x.clone().requires_grad_()
    many = torch.eye(2).unsqueeze(1).expand(2, 5, 2)
    torch.autograd.grad(model(given), given, many, is_grads_batched=True)
    torch.autograd.functional.jacobian(model, x, vectorize=True)
    torch.func.vjp(model, x)[1](torch.ones(5, 2))

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, sample.unsqueeze(0)).square().sum()

    own = {name: p.detach() for name, p in model.named_parameters()}
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(own, x)
    model(x).square().sum().backward()
    assert counter.batch_size == 5
    for name, counts in counter.counts().items():
        assert torch.equal(counts, (each[name] != 0).sum(0))


def test_a_gradient_s_gradient_may_be_none():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    counter = truestep.SampleCounter(model)
    assert torch.autograd.gradgradcheck(model, torch.randn(2, 3).double().requires_grad_())
    assert counter.batch_size == 0
