"""What waits at an output for its gradient stands back for whoever else hangs hooks there."""

import gc
import io
import warnings
import weakref

import pytest
import torch
from torch import nn

import truestep
from truestep import ways
from truestep.hooks import hang

LAYERS = {
    "rows": lambda: (nn.Linear(3, 4), torch.rand(6, 3)),
    "positions": lambda: (nn.Linear(3, 4), torch.rand(6, 2, 3)),
    "images": lambda: (nn.Conv2d(2, 4, 3), torch.rand(6, 2, 5, 5)),
    "normalised": lambda: (nn.LayerNorm(3), torch.rand(6, 3)),
}


def half(gradient):
    """Takes the gradient of every second sample away."""
    changed = gradient.clone()
    changed[::2] = 0
    return changed


def halved(_module, _inputs, output):
    output.register_hook(half)


def early(model, layer):
    layer.register_forward_hook(halved)
    counter = truestep.SampleCounter(model)
    return counter, model


def late(model, layer):
    counter = truestep.SampleCounter(model)
    layer.register_forward_hook(halved)
    return counter, model


def outside(model, _layer):
    counter = truestep.SampleCounter(model)

    def call(x):
        y = model(x)
        y.register_hook(half)
        return y

    return counter, call


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("hook", [early, late, outside])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_gradient_is_seen_as_other_hooks_leave_it(kind, hook, passes, short, monkeypatch):
    if not short:
        monkeypatch.setattr(ways.Direct, "node", lambda *_: None)
    torch.manual_seed(0)
    layer, x = LAYERS[kind]()
    model = nn.Sequential(layer)
    counter, call = hook(model, layer)
    for _ in range(2):  # the first call takes the long way
        model.zero_grad()
        y = call(x)
        for number in range(passes):
            y.square().sum().backward(retain_graph=number + 1 < passes)
    assert all(count.eq(3 * passes).all() for count in counter.counts().values())


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradient_of_an_output_itself_is_left_alone(kind, create_graph):
    layer, x = LAYERS[kind]()
    counter = truestep.SampleCounter(layer)
    layer(x).sum().backward()
    layer.zero_grad()
    y = layer(x)
    (found,) = torch.autograd.grad(y.square().sum(), y, create_graph=create_graph)
    assert torch.equal(found, 2 * y)
    assert found.requires_grad == create_graph
    y.sum().backward()
    assert all(count.eq(len(x)).all() for count in counter.counts().values())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_constant_gradient_of_an_output_itself_stays_one(kind):
    layer, x = LAYERS[kind]()
    counter = truestep.SampleCounter(layer)
    layer(x).sum().backward()
    y = layer(x)
    y.sum().backward(retain_graph=True)  # the input is not followed any longer
    (found,) = torch.autograd.grad(y.sum(), y, create_graph=True)
    assert not found.requires_grad
    assert counter.batch_size == 2 * len(x)


@pytest.mark.parametrize("kind", ["rows", "images", "normalised"])
def test_an_output_that_is_detached_in_place_has_no_hooks(kind):
    layer, x = LAYERS[kind]()
    counter = truestep.SampleCounter(layer)
    layer(x).sum().backward()
    layer.zero_grad()
    given = x.clone().requires_grad_()
    y, kept = layer(given).detach_().requires_grad_(), weakref.ref(given)
    del given
    gc.collect()
    assert kept() is None
    (layer(x) * y).sum().backward()
    assert all(count.eq(len(x)).all() for count in counter.counts().values())


def test_hooks_of_an_output_that_is_written_to_get_the_gradient_after_it():
    layer, x = LAYERS["rows"]()
    counter = truestep.SampleCounter(layer)
    seen = []
    for _ in range(2):
        layer.zero_grad()
        y = layer(x).mul_(3)
        y.register_hook(seen.append)
        y.sum().backward()
    assert [gradient.eq(1).all() for gradient in seen] == [True, True]
    assert torch.equal(layer.bias.grad, torch.full((4,), 18.0))
    assert all(count.eq(6).all() for count in counter.counts().values())


@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_can_be_saved(kind):
    layer, x = LAYERS[kind]()
    counter = truestep.SampleCounter(layer)
    layer(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(layer(x), io.BytesIO())
    assert counter.batch_size == len(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_that_is_dropped_takes_the_input_with_it(kind):
    layer, x = LAYERS[kind]()
    counter = truestep.SampleCounter(layer)
    layer(x).sum().backward()
    gc.collect()
    gc.disable()
    try:
        given = x.clone()
        kept, y = weakref.ref(given), layer(given)
        y.register_hook(half)
        y.sum().backward()
        del given, y
        assert kept() is None
    finally:
        gc.enable()
    assert counter.batch_size == 2 * len(x)  # of two backward passes


def test_a_hook_hangs_at_a_view_whose_base_was_written_to():
    w = torch.ones(2, 2, requires_grad=True)
    base = 2 * w
    view, seen = base[0], []
    hang(view, seen.append)
    base.mul_(3)
    hang(view, lambda gradient: seen.append(2 * gradient))
    assert len(view._backward_hooks) == 1
    view.sum().backward()
    assert [gradient.tolist() for gradient in seen] == [[2.0, 2.0]]
    assert w.grad.tolist() == [[6.0, 6.0], [0.0, 0.0]]


def test_hooks_of_ours_and_of_others_run_in_turn():
    y, seen = 2 * torch.ones(1, requires_grad=True), []
    y.register_hook(lambda gradient: gradient + 1)
    hang(y, lambda gradient: seen.append(gradient.item()))
    handle = y.register_hook(lambda gradient: seen.append(-gradient.item()))
    assert min(y._backward_hooks) < 0 <= max(y._backward_hooks)
    handle.remove()
    y.sum().backward()
    assert seen == [2.0]


@pytest.mark.filterwarnings(
    "ignore:<class .torch.autograd.function.Function.> should not be instantiated"
)
@pytest.mark.parametrize("compiled", [False, True])
def test_an_earlier_hook_may_put_another_output_in_a_layers_place(compiled):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    handle = model[0].register_forward_hook(lambda _module, _args, output: output.relu())
    counter = truestep.SampleCounter(model)
    inputs = torch.randn(7, 6)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    run(inputs).sum().backward()
    handle.remove()
    expected = (model[0](inputs) > 0).sum(0)
    assert counter.counts()["0.bias"].equal(expected)
