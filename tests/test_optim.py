"""Every optimizer is a row of OPTIMIZERS, and the same tests run on all rows."""

import copy
import importlib
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import truestep
from properties import assert_step_equals_oracle
from truestep import TruestepError, fused
from zoo import mlp, sparse_inputs

COUNTERS = {}


def counter_of(model):
    """The one counter that a test's optimizers of this model share."""
    if model not in COUNTERS:
        COUNTERS[model] = truestep.SampleCounter(model)
    return COUNTERS[model]


@pytest.fixture(autouse=True)
def _no_counters_left():
    yield
    COUNTERS.clear()


def adaptive(**options):
    return lambda model, params, lr: truestep.AdaptiveBatchSGD(
        params, lr, counter=counter_of(model), **options
    )


def attached(make, *, mean=False, boost=False):
    def build(model, params, lr):
        optimizer = make(params, lr)
        transforms = [truestep.mean_effective_gradient(counter_of(model))] * mean
        transforms += [truestep.directional_boost()] * boost
        truestep.attach(optimizer, *transforms)
        return optimizer

    return build


OPTIMIZERS = {
    "DASGD": lambda _, params, lr: truestep.DASGD(params, lr),
    "DASGD foreach": lambda _, params, lr: truestep.DASGD(params, lr, foreach=True),
    "DASGD decay": lambda _, params, lr: truestep.DASGD(params, lr, weight_decay=0.1),
    "DASGD maximize": lambda _, params, lr: truestep.DASGD(params, lr, maximize=True),
    "AdaptiveBatchSGD": adaptive(),
    "AdaptiveBatchSGD momentum": adaptive(momentum=0.9, dampening=0.1, weight_decay=0.01),
    "AdaptiveBatchSGD nesterov": adaptive(momentum=0.9, nesterov=True, foreach=True),
    "asgd+adam": attached(torch.optim.Adam, mean=True),
    "asgd+adamw foreach": attached(
        lambda params, lr: torch.optim.AdamW(params, lr, foreach=True), mean=True
    ),
    "asgd+dasgd": attached(torch.optim.SGD, mean=True, boost=True),
    "asgd+dasgd+rmsprop": attached(torch.optim.RMSprop, mean=True, boost=True),
    "dasgd+adam": attached(torch.optim.Adam, boost=True),
    "dasgd+adagrad": attached(torch.optim.Adagrad, boost=True),
    "dasgd+momentum": attached(
        lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9), boost=True
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
TARGETS = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])


def batches(count):
    generator = torch.Generator().manual_seed(7)
    masks = torch.rand(count, 8, 4, generator=generator) < 0.6
    return torch.randn(count, 8, 4, generator=generator) * masks


def loss_of(model, inputs):
    return functional.cross_entropy(model(inputs), TARGETS)


def train(model, optimizer, inputs):
    for batch in inputs:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@every_optimizer
def test_it_changes_every_parameter(name):
    model = mlp()
    before = [p.detach().clone() for p in model.parameters()]
    after = train(model, OPTIMIZERS[name](model, model.parameters(), 0.05), batches(3))
    for one, other in zip(before, after, strict=True):
        assert not torch.equal(one, other)


@every_optimizer
def test_save_and_load_in_the_middle_is_bit_exact(name):
    model = mlp()
    start = copy.deepcopy(model.state_dict())
    whole = train(model, OPTIMIZERS[name](model, model.parameters(), 0.05), batches(6))

    first = mlp()
    first.load_state_dict(start)
    optimizer = OPTIMIZERS[name](first, first.parameters(), 0.05)
    train(first, optimizer, batches(6)[:3])
    stream = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], stream)
    stream.seek(0)
    weights, state = torch.load(stream, weights_only=True)
    second = mlp()
    second.load_state_dict(weights)
    resumed = OPTIMIZERS[name](second, second.parameters(), 0.05)
    resumed.load_state_dict(state)
    assert_same(train(second, resumed, batches(6)[3:]), whole)


@every_optimizer
def test_a_closure_takes_the_same_step(name):
    model = mlp()
    other = copy.deepcopy(model)
    expected = train(model, OPTIMIZERS[name](model, model.parameters(), 0.05), batches(3))
    optimizer = OPTIMIZERS[name](other, other.parameters(), 0.05)
    for batch in batches(3):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(other, batch)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    assert_same([p.detach() for p in other.parameters()], expected)


@every_optimizer
def test_two_groups_have_their_own_learning_rates(name):
    model, frozen = mlp(), mlp()
    frozen.load_state_dict(model.state_dict())
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    train(model, OPTIMIZERS[name](model, groups, 0.05), batches(1))
    assert not torch.equal(model[0].weight, frozen[0].weight)
    assert torch.equal(model[2].weight, frozen[2].weight)


@every_optimizer
def test_a_scheduler_really_changes_the_step(name):
    model = mlp()
    before = model[0].weight.detach().clone()
    optimizer = OPTIMIZERS[name](model, model.parameters(), 0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    scheduler.step()
    optimizer.zero_grad()
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@every_optimizer
def test_parameters_without_a_gradient_stay(name):
    model = mlp()
    model[0].requires_grad_(requires_grad=False)
    before = model[0].weight.clone()
    train(model, OPTIMIZERS[name](model, model.parameters(), 0.05), batches(2))
    assert torch.equal(model[0].weight, before)


@every_optimizer
def test_add_param_group(name):
    model = mlp()
    optimizer = OPTIMIZERS[name](model, [model[0].weight], 0.05)
    optimizer.add_param_group({"params": [model[2].weight]})
    before = model[2].weight.detach().clone()
    train(model, optimizer, batches(2))
    assert not torch.equal(model[2].weight, before)


@every_optimizer
def test_named_parameters(name):
    model = mlp()
    train(model, OPTIMIZERS[name](model, model.named_parameters(), 0.05), batches(2))


@every_optimizer
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_or_says_what_it_lacks(name, how):
    model = mlp()
    optimizer = OPTIMIZERS[name](model, model.parameters(), 0.05)
    train(model, optimizer, batches(2))
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))  # noqa: S301
    if name.startswith("DASGD"):
        assert_same(train(twin, other, batches(3)), train(model, optimizer, batches(3)))
    else:
        with pytest.raises(
            TruestepError, match=r"SampleCounter\(model\)|attach the transforms again"
        ):
            train(twin, other, batches(1))


# DASGD.


def test_dasgd_equals_numpy_over_100_steps():
    rng = np.random.default_rng(0)
    matrix, target = rng.normal(size=(20, 8)), rng.normal(size=20)
    weights, previous = np.zeros(8), np.zeros(8)
    parameter = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = truestep.DASGD([parameter], lr=0.05)
    for _ in range(100):
        gradient = 2 * matrix.T @ (matrix @ weights - target) / 20
        rho = np.where(np.sign(gradient) == np.sign(previous), (gradient + previous) / 2, 0)
        weights, previous = weights - 0.05 * (gradient + rho), gradient
        optimizer.zero_grad()
        residual = torch.from_numpy(matrix) @ parameter - torch.from_numpy(target)
        residual.square().mean().backward()
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), weights, rtol=1e-12, atol=1e-14)


def test_the_first_step_is_plain_sgd():
    model = mlp()
    other = copy.deepcopy(model)
    plain = train(other, torch.optim.SGD(other.parameters(), lr=0.05), batches(1))
    assert_same(train(model, truestep.DASGD(model.parameters(), lr=0.05), batches(1)), plain)


@pytest.mark.parametrize("maximize", [False, True])
def test_weight_decay_equals_sgd_with_the_boost_attached(maximize):
    model = mlp()
    other = copy.deepcopy(model)
    options = {"lr": 0.05, "weight_decay": 0.3, "maximize": maximize}
    attached = torch.optim.SGD(other.parameters(), **options)
    truestep.attach(attached, truestep.directional_boost())
    expected = train(other, attached, batches(5))
    assert_same(train(model, truestep.DASGD(model.parameters(), **options), batches(5)), expected)


def test_foreach_equals_one_by_one():
    model = mlp()
    other = copy.deepcopy(model)
    one = truestep.DASGD(model.parameters(), lr=0.05, weight_decay=0.1, foreach=False)
    many = truestep.DASGD(other.parameters(), lr=0.05, weight_decay=0.1, foreach=True)
    assert_same(train(model, one, batches(5)), train(other, many, batches(5)))


def test_a_learning_rate_may_be_a_tensor():
    model = mlp()
    other = copy.deepcopy(model)
    number = train(model, truestep.DASGD(model.parameters(), lr=0.5), batches(4))
    tensor = truestep.DASGD(other.parameters(), lr=torch.tensor(0.5))
    assert_same(train(other, tensor, batches(4)), number)


def test_differentiable_steps_carry_gradients_to_the_start():
    start = torch.tensor([1.0, -2.0], requires_grad=True)
    weights = start.clone()
    optimizer = truestep.DASGD([weights], lr=0.1, differentiable=True)
    for _ in range(2):
        # the gradient of 0.5 w^2 is w: w <- w - 0.1 w, then w <- w - 0.1 (w + (w + w_before) / 2)
        weights.grad = weights.clone()
        optimizer.step()
    weights.sum().backward()
    first = 1 - 0.1
    expected = first - 0.1 * (first + (first + 1) / 2)
    torch.testing.assert_close(start.grad, torch.full((2,), expected))


def test_differentiable_steps_carry_gradients_to_the_learning_rate():
    lr = torch.tensor(0.1, requires_grad=True)
    weights = torch.zeros(2, requires_grad=True).clone()
    weights.retain_grad()
    weights.grad = torch.ones(2)
    optimizer = truestep.DASGD([weights], lr=lr, differentiable=True)
    for _ in range(2):
        optimizer.step()
    weights.sum().backward()
    assert lr.grad == -2 * (1 + 2)


def test_complex_parameters_are_boosted_part_by_part():
    parameter = nn.Parameter(torch.tensor([0j]))
    optimizer = truestep.DASGD([parameter], lr=1.0)
    for gradient in (3 - 3j, 1 + 1j):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
    assert parameter.detach().tolist() == [-(3 - 3j) - (3 + 1j)]


def test_dasgd_refuses_sparse_gradients_with_the_way_out():
    layer = nn.Embedding(5, 2, sparse=True)
    optimizer = truestep.DASGD(layer.parameters(), lr=0.1)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(TruestepError, match=r"shape \(5, 2\) has a sparse gradient.*sparse=False"):
        optimizer.step()


# AdaptiveBatchSGD.


def test_a_step_equals_per_sample_autograd():
    assert_step_equals_oracle(mlp(), functional.cross_entropy, sparse_inputs(8, 4), TARGETS)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_ratio_to_plain_sgd_does_not_depend_on_the_reduction(reduction):
    model = mlp().double()
    counter = truestep.SampleCounter(model)
    inputs = sparse_inputs(8, 4).double()
    functional.cross_entropy(model(inputs), TARGETS, reduction=reduction).backward()
    for name, parameter in model.named_parameters():
        counts = counter.counts()[name]
        factor = torch.where(counts > 0, 8 / (counts + 1), 1.0)
        torch.testing.assert_close(counter.effective_gradient(parameter), parameter.grad * factor)


def test_momentum_acts_on_the_corrected_gradient():
    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    counter, twin = truestep.SampleCounter(model), truestep.SampleCounter(other)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    plain = torch.optim.SGD(other.parameters(), **options)
    truestep.attach(plain, truestep.mean_effective_gradient(twin))
    expected = train(other, plain, batches(5))
    ours = truestep.AdaptiveBatchSGD(model.parameters(), counter=counter, **options)
    assert_same(train(model, ours, batches(5)), expected)


def test_the_step_leaves_the_gradient_and_keeps_no_state():
    model = mlp()
    optimizer = truestep.AdaptiveBatchSGD(
        model.parameters(), lr=0.05, counter=truestep.SampleCounter(model)
    )
    loss_of(model, batches(1)[0]).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert_same([p.grad for p in model.parameters()], gradients)
    assert not optimizer.state


@pytest.mark.parametrize("bag", [False, True])
def test_sparse_gradients_take_the_same_step_as_dense_ones(bag):
    make = nn.EmbeddingBag if bag else nn.Embedding
    results = []
    for sparse in (False, True):
        torch.manual_seed(3)
        layer = make(6, 3, sparse=sparse)
        counter = truestep.SampleCounter(layer)
        optimizer = truestep.AdaptiveBatchSGD(layer.parameters(), lr=0.5, counter=counter)
        for rows in ([[0, 1, 1], [1, 2, 5]], [[3, 3, 3], [0, 1, 5]]):
            optimizer.zero_grad()
            layer(torch.tensor(rows)).square().mean().backward()
            optimizer.step()
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0][0], results[0][4])


def test_eps_and_factor_limit_reach_the_step():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    counter = truestep.SampleCounter(layer)
    inputs = torch.zeros(16, 1)
    inputs[0] = 16.0  # the mean gradient is 1, one sample in 16 contributes
    for options, step in (({}, 8.0), ({"eps": 0.0}, 16.0), ({"eps": 0.0, "factor_limit": 4}, 4.0)):
        nn.init.zeros_(layer.weight)
        optimizer = truestep.AdaptiveBatchSGD(
            layer.parameters(), lr=1.0, counter=counter, **options
        )
        optimizer.zero_grad()
        layer(inputs).mean().backward()
        optimizer.step()
        assert layer.weight.item() == -step


def test_it_goes_on_from_a_checkpoint_of_sgd():
    model = nn.Linear(3, 2)
    plain = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(5, 3)).sum().backward()
    plain.step()
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(
        model.parameters(), 0.2, counter=counter, factor_limit=0.5
    )
    optimizer.load_state_dict(plain.state_dict())
    before, memory = (
        model.weight.detach().clone(),
        plain.state[model.weight]["momentum_buffer"].clone(),
    )
    optimizer.zero_grad()
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    expected = before - 0.1 * (0.9 * memory + 0.5 * model.weight.grad)
    torch.testing.assert_close(model.weight, expected)


def test_a_refused_step_leaves_no_momentum():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), 0.1, counter=counter, momentum=0.9)
    model(torch.ones(5, 3)).sum().backward()
    *_, last = model.parameters()
    last.grad = torch.ones_like(last)
    with pytest.raises(TruestepError, match="no sample was counted"):
        optimizer.step()
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_refused_step_moves_nothing_however_large(momentum):
    """Large parameters have a pass of their own, which must not run before all were looked at."""
    model = nn.Sequential(nn.Linear(2048, 600), nn.ReLU(), nn.Linear(600, 2))
    counter = truestep.SampleCounter(model)
    groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
    optimizer = truestep.AdaptiveBatchSGD(groups, lr=0.1, momentum=momentum, counter=counter)
    model(torch.rand(4, 2048)).sum().backward()
    model[2].bias.grad = torch.ones(2)  # of no sample
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    assert model[0].weight.numel() > fused.LARGE
    for step in (optimizer.step, counter.correct_gradients):
        with pytest.raises(TruestepError, match=r"'2\.bias' has a gradient, but no sample"):
            step()
    assert all(map(torch.equal, before, (p.detach() for p in model.parameters())))
    assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))


def test_parameters_of_another_model_are_refused():
    model, other = mlp(), mlp()
    counter = truestep.SampleCounter(model)
    with pytest.raises(TruestepError, match=r"parameter 0 of the optimizer, of shape \(6, 4\)"):
        truestep.AdaptiveBatchSGD(other.parameters(), lr=0.1, counter=counter)


def test_an_optimizer_uses_only_its_own_parameters():
    model = mlp()
    counter = truestep.SampleCounter(model)
    first = truestep.AdaptiveBatchSGD(model[0].parameters(), lr=0.1, counter=counter)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    truestep.attach(second, truestep.mean_effective_gradient(counter))
    loss_of(model, batches(1)[0]).backward()
    before = model[2].weight.grad.clone()
    first.step()
    assert torch.equal(model[2].weight.grad, before)
    second.step()
    assert not torch.equal(model[2].weight.grad, before)


def test_two_optimizers_that_step_in_turns_have_batches_of_their_own():
    model = mlp()
    counter = truestep.SampleCounter(model)
    first, second = (
        truestep.AdaptiveBatchSGD(part.parameters(), lr=0.1, counter=counter)
        for part in (model[0], model[2])
    )
    for turn, batch in enumerate(batches(4)):
        loss_of(model, batch).backward()
        sizes = {name: values["batch_size"] for name, values in counter.statistics().items()}
        later = 8 * (turn % 2 + 1)
        assert sizes == {"0.weight": 8, "0.bias": 8, "2.weight": later, "2.bias": later}
        first.step()
        first.zero_grad()
        if turn % 2:
            second.step()
            second.zero_grad()


@pytest.mark.parametrize("how", ["directly", "attached"])
def test_a_layer_unfrozen_and_added_later_takes_corrected_steps(how):
    model = mlp().double()
    model[0].requires_grad_(requires_grad=False)
    counter = truestep.SampleCounter(model)
    if how == "directly":
        optimizer = truestep.AdaptiveBatchSGD(model[2].parameters(), lr=0.1, counter=counter)
    else:
        optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
        truestep.attach(optimizer, truestep.mean_effective_gradient(counter))
    first, second = batches(2).double()
    train(model, optimizer, [first])
    model[0].requires_grad_(requires_grad=True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.5})
    expected = truestep.oracle.mean_effective_gradients(
        model, functional.cross_entropy, second, TARGETS
    )
    before = model[0].weight.detach().clone()
    train(model, optimizer, [second])
    torch.testing.assert_close(model[0].weight.detach(), before - 0.5 * expected["0.weight"])


@pytest.mark.parametrize("name", ["momentum", "weight_decay", "eps"])
def test_an_option_that_is_a_tensor_may_change_in_place(name):
    ends, start = [], mlp()
    for value, changed in ((0.5, 0.125), (torch.tensor(0.5), torch.tensor(0.125))):
        model = copy.deepcopy(start)
        optimizer = truestep.AdaptiveBatchSGD(
            model.parameters(), lr=0.1, counter=counter_of(model), **{name: value}
        )
        train(model, optimizer, batches(1))
        if isinstance(value, torch.Tensor):
            value.copy_(changed)
        else:
            optimizer.param_groups[0][name] = changed
        ends.append(train(model, optimizer, batches(2)))
    assert_same(*ends)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_step_leaves_a_gradient_that_was_corrected_before_it(foreach):
    model = mlp()
    counter = counter_of(model)
    optimizer = truestep.AdaptiveBatchSGD(
        model.parameters(), lr=0.1, counter=counter, momentum=0.9, nesterov=True, foreach=foreach
    )
    for batch in batches(2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        counter.correct_gradients()
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert_same(gradients, [p.grad for p in model.parameters()])


def test_a_refused_group_is_not_added():
    model, other = mlp(), mlp()
    optimizer = truestep.AdaptiveBatchSGD(
        model.parameters(), lr=0.1, counter=truestep.SampleCounter(model)
    )
    with pytest.raises(TruestepError, match="is not in the counter's model"):
        optimizer.add_param_group({"params": other.parameters()})
    assert len(optimizer.param_groups) == 1


def test_torch_chooses_its_own_step_where_no_loop_runs(monkeypatch):
    asked = []

    def choose(params, **options):
        asked.append(len(params))
        return False, True

    monkeypatch.setattr(
        importlib.import_module("torch.optim.sgd"), "_default_to_fused_or_foreach", choose
    )
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float16))
    parameter.grad = torch.ones_like(parameter)
    truestep.DASGD([parameter], lr=0.5).step()
    truestep.DASGD([parameter], lr=0.5, foreach=False).step()
    weight = torch.ones(2, requires_grad=True).clone()
    weight.retain_grad()
    weight.grad = torch.ones(2)
    truestep.DASGD([weight], lr=0.5, differentiable=True).step()
    assert asked == [1]


def test_wrong_values_are_named():
    model = mlp()
    counter = truestep.SampleCounter(model)

    def make(**options):
        return truestep.AdaptiveBatchSGD(model.parameters(), counter=counter, **options)

    for name, value in {"lr": -1, "momentum": -0.1, "weight_decay": -1, "eps": -1}.items():
        with pytest.raises(TruestepError, match=f"{name} is {value}"):
            make(**{name: value})
    with pytest.raises(TruestepError, match=r"lr is tensor\(\[1\., 1\.\]\); use a finite number"):
        make(lr=torch.ones(2))
    with pytest.raises(TruestepError, match="lr is nan"):
        truestep.DASGD(model.parameters(), lr=float("nan"))
    with pytest.raises(TruestepError, match="needs momentum > 0"):
        make(nesterov=True)
    with pytest.raises(
        TruestepError, match=r"counter is of type Linear; pass .*SampleCounter\(model\)"
    ):
        truestep.AdaptiveBatchSGD(model.parameters(), counter=model[0])
    with pytest.raises(TruestepError, match="factor_limit is 0"):
        make(factor_limit=0)


def test_grad_scaler_skips_a_bad_step_and_drops_its_batch():
    model = mlp()
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(loss_of(model, batches(1)[0]) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same([p.detach() for p in model.parameters()], before)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batches(1)[0])).backward()
    assert counter.batch_size == 8
    scaler.step(optimizer)
    assert not torch.equal(model[0].weight, before[0])
