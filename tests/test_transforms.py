import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import truestep
from truestep import TruestepError
from zoo import mlp, sparse_inputs


def backward(model):
    model(sparse_inputs(6, 4)).square().mean().backward()


def test_transforms_run_in_order_before_the_step_and_finish_after_it():
    model, seen = mlp(), []

    def transform(label):
        def run(optimizer):
            seen.append(label)
            return lambda: seen.append(f"after {label}")

        return run

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truestep.attach(optimizer, transform("one"), transform("two"))
    backward(model)
    optimizer.step()
    assert seen == ["one", "two", "after one", "after two"]


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closures_gradients_are_transformed(keyword):
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)

    def double(optimizer):
        parameter.grad.mul_(2)

    truestep.attach(optimizer, double)

    def closure():
        optimizer.zero_grad()
        loss = 3 * parameter.sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert loss.item() == 3
    assert parameter.item() == 1 - 2 * 3


def test_the_boost_remembers_without_touching_the_first_step_of_adam():
    model = mlp()
    other = copy.deepcopy(model)
    boosted, plain = torch.optim.Adam(model.parameters()), torch.optim.Adam(other.parameters())
    truestep.attach(boosted, truestep.directional_boost())
    for _ in range(2):
        # A gradient that flips its sign is never boosted: the two must stay equal.
        for optimizer, network in ((boosted, model), (plain, other)):
            for parameter in network.parameters():
                parameter.grad = torch.full_like(parameter, (-1.0) ** _)
            optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert boosted.state[model[0].weight]["previous_gradient"].unique().tolist() == [-1.0]


def test_the_boost_is_saved_with_the_optimizer():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truestep.attach(optimizer, truestep.directional_boost())
    backward(model)
    gradient = model[0].weight.grad.clone()
    optimizer.step()
    state = optimizer.state_dict()["state"][0]
    assert torch.equal(state["previous_gradient"], gradient)


def test_remove_gives_the_plain_optimizer_back():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    handle = truestep.attach(optimizer, truestep.directional_boost())
    handle.remove()
    assert optimizer.state_dict()["param_groups"] == groups
    backward(model)
    optimizer.step()
    assert not optimizer.state[model[0].weight]


def test_loading_a_transformed_state_without_transforms_raises_with_both_ways_out():
    model = mlp()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    truestep.attach(first, truestep.directional_boost())
    backward(model)
    first.step()
    second.load_state_dict(first.state_dict())
    with pytest.raises(TruestepError, match="transformed by directional_boost") as error:
        second.step()
    way_out = str(error.value).split("`")[1]
    assert way_out == "del optimizer.param_groups[0]['transforms']"
    del second.param_groups[0]["transforms"]
    second.step()


def test_a_closure_that_raised_lets_no_copy_step_without_transforms():
    model = mlp()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    truestep.attach(first, truestep.directional_boost())
    with pytest.raises(ZeroDivisionError):
        first.step(lambda: 1 / 0)
    second.load_state_dict(first.state_dict())
    with pytest.raises(TruestepError, match="transformed by directional_boost"):
        second.step()


def test_transforms_survive_loading_a_plain_state():
    model = mlp()
    plain, optimizer = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    truestep.attach(optimizer, truestep.directional_boost())
    optimizer.load_state_dict(plain.state_dict())
    backward(model)
    optimizer.step()
    assert "previous_gradient" in optimizer.state[model[0].weight]
    with pytest.raises(TruestepError):
        copy.deepcopy(optimizer).step()


def test_refusals():
    model = mlp()
    with pytest.raises(TruestepError, match="LBFGS"):
        truestep.attach(torch.optim.LBFGS(model.parameters()), truestep.directional_boost())
    with pytest.raises(TruestepError, match="DASGD adds the booster itself"):
        truestep.attach(truestep.DASGD(model.parameters()), truestep.directional_boost())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TruestepError, match="no transform"):
        truestep.attach(optimizer)
    truestep.attach(optimizer, truestep.directional_boost())
    with pytest.raises(TruestepError, match="transforms already"):
        truestep.attach(optimizer, truestep.directional_boost())


def test_a_step_on_corrected_and_plain_gradients_added_up_is_an_error():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truestep.attach(optimizer, truestep.mean_effective_gradient(truestep.SampleCounter(model)))
    assert model  # the counter lives as long as its transform
    backward(model)
    optimizer.step()
    backward(model)
    with pytest.raises(TruestepError, match=r"zero_grad\(\) first"):
        optimizer.step()
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def adaptive(model, counter):
    return truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)


def attached(model, counter):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    truestep.attach(optimizer, truestep.mean_effective_gradient(counter))
    return optimizer


@pytest.mark.parametrize("make", [adaptive, attached])
def test_a_gan_in_the_usual_order(make):
    """The generator's turn adds gradients to the discriminator's that nobody uses."""
    generator, discriminator = mlp(), nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))
    counters = [truestep.SampleCounter(network) for network in (generator, discriminator)]
    ours, theirs = make(generator, counters[0]), make(discriminator, counters[1])
    for _ in range(2):
        theirs.zero_grad()
        fake = generator(sparse_inputs(6, 4))
        (discriminator(torch.randn(8, 3)).mean() - discriminator(fake.detach()).mean()).backward()
        assert counters[1].batch_size == 8 + 6
        theirs.step()
        ours.zero_grad()
        discriminator(fake).mean().backward()
        assert counters[0].batch_size == 6
        ours.step()


def test_a_transform_that_was_not_called_is_named():
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    for wrong in (truestep.mean_effective_gradient, truestep.directional_boost, None):
        with pytest.raises(TruestepError, match="which is not a transform; pass mean_effective"):
            truestep.attach(optimizer, wrong)


def scaled_step(optimizer, model, *, unscale, factor=1.0):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(sparse_inputs(6, 4)).square().mean() * factor).backward()
    if unscale:
        scaler.unscale_(optimizer)
    gradient = model[0].weight.grad.clone()
    scaler.step(optimizer)
    return gradient


def test_scaled_gradients_of_a_fused_optimizer_are_refused():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    truestep.attach(optimizer, truestep.directional_boost())
    with pytest.raises(TruestepError, match=r"scaler\.unscale_\(optimizer\) before"):
        scaled_step(optimizer, model, unscale=False)


def test_unscaled_gradients_of_a_fused_optimizer_are_boosted():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    truestep.attach(optimizer, truestep.directional_boost())
    gradient = scaled_step(optimizer, model, unscale=True)
    assert torch.equal(optimizer.state[model[0].weight]["previous_gradient"], gradient)


def test_a_skipped_fused_step_leaves_no_memory():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    truestep.attach(optimizer, truestep.directional_boost())
    scaled_step(optimizer, model, unscale=True, factor=float("inf"))
    assert "previous_gradient" not in optimizer.state[model[0].weight]


def test_sparse_gradients_are_refused_by_the_boost_and_taken_by_the_mean():
    layer = nn.Embedding(5, 2, sparse=True)
    counter = truestep.SampleCounter(layer)
    optimizer = torch.optim.SparseAdam(layer.parameters(), lr=0.1)
    handle = truestep.attach(optimizer, truestep.directional_boost())
    layer(torch.tensor([1, 1, 3])).sum().backward()
    with pytest.raises(TruestepError, match="sparse=False"):
        optimizer.step()
    handle.remove()
    truestep.attach(optimizer, truestep.mean_effective_gradient(counter))
    optimizer.step()
    # N = 3: row 1 has m = 2, its gradient 2 * 3 / 3; row 3 has m = 1, its gradient 1 * 3 / 2
    assert layer.weight.grad.to_dense()[:, 0].tolist() == [0, 2, 0, 1.5, 0]


def test_a_differentiable_optimizer_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, differentiable=True)
    with pytest.raises(TruestepError, match="differentiable=True"):
        truestep.attach(optimizer, truestep.directional_boost())


def test_a_handle_that_was_removed_leaves_a_later_one_alone():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    first = truestep.attach(optimizer, truestep.directional_boost())
    first.remove()
    second = truestep.attach(optimizer, truestep.directional_boost())
    first.remove()
    with pytest.raises(TruestepError, match="it is a copy"):
        copy.deepcopy(optimizer).step()
    second.remove()
    copy.deepcopy(optimizer).step()


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_optimizer_inside_the_transformed_one_takes_its_step(one_rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415 - it warns

    found = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        counter = truestep.SampleCounter(model)
        if wrapped:
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        transforms = truestep.mean_effective_gradient(counter), truestep.directional_boost()
        truestep.attach(optimizer, *transforms)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
        found.append([*model.parameters()])
    torch.testing.assert_close(*found)
    with pytest.raises(TruestepError, match="attach the transforms again"):
        copy.deepcopy(optimizer.optim).step()


@pytest.mark.parametrize("attributes", [{}, {"_optimizer_step_pre_hooks": OrderedDict()}])
def test_a_wrapper_without_hooks_is_refused(attributes):
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.param_groups = optimizer.param_groups
            vars(self).update(attributes)

        def step(self, closure=None):
            pass

    optimizer = Wrapper(torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    with pytest.raises(TruestepError, match="attach the transforms to the one that it wraps"):
        truestep.attach(optimizer, truestep.directional_boost())


@pytest.mark.parametrize("outer", [False, True])
def test_a_wrapper_with_hooks_takes_the_step_of_either(outer):
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, {})
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

        def step(self, closure=None):
            return self.optimizer.step(closure)

    parameter = nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([parameter], lr=1.0)
    optimizer = Wrapper(inner)
    truestep.attach(optimizer if outer else inner, truestep.directional_boost())
    for _ in range(2):
        parameter.grad = torch.ones(2)
        optimizer.step()
    assert parameter.tolist() == [-3, -3]
    with pytest.raises(TruestepError, match="attach the transforms again"):
        copy.deepcopy(optimizer).step()
