"""What must hold for every model: properties as named functions.

Inputs are what `truestep.oracle` takes: a tensor, a tuple of arguments or a dict of keyword arguments.
"""

import copy
import io

import torch

import truestep


def each(value, function):
    """A function of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: each(item, function) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(each(item, function) for item in value)
    return value


def called(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def double(value):
    return each(value, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def batch_dim_of(options):
    """Where the model's inputs hold the samples."""
    batch_dim = options.get("batch_dim", 0)
    return batch_dim.get("", 0) if isinstance(batch_dim, dict) else batch_dim


def count(model, loss_fn, inputs, targets, **options):
    """One backward pass of the batch; its counts and batch size."""
    counter = truestep.SampleCounter(model, **options)
    model.zero_grad()
    loss_fn(called(model, inputs), targets).backward()
    counts, batch_size = counter.counts(), counter.batch_size
    counter.close()
    return counts, batch_size


def assert_counts_equal_oracle(model, loss_fn, inputs, targets, **options):
    counts, batch_size = count(model, loss_fn, inputs, targets, **options)
    batch_dim = batch_dim_of(options)
    expected = truestep.oracle.counts(model, loss_fn, inputs, targets, batch_dim=batch_dim)
    assert batch_size == len(targets)
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert counts.keys() == with_gradient
    assert with_gradient <= expected.keys()
    for name, values in expected.items():
        assert torch.equal(counts.get(name, torch.zeros_like(values)), values), name


def assert_step_equals_oracle(model, loss_fn, inputs, targets, lr=0.1, **options):
    """One AdaptiveBatchSGD step equals the step along the oracle's mean effective gradients."""
    model = copy.deepcopy(model).double()
    wide, goals, batch_dim = double(inputs), double(targets), batch_dim_of(options)
    expected = truestep.oracle.mean_effective_gradients(
        model, loss_fn, wide, goals, batch_dim=batch_dim
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    counter = truestep.SampleCounter(model, **options)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=lr, counter=counter)
    loss_fn(called(model, wide), goals).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        step = lr * expected[name] if parameter.requires_grad else torch.zeros_like(parameter)
        torch.testing.assert_close(parameter.detach(), before[name] - step)


def assert_accumulation_equals_joint_batch(model, loss_fn, inputs, targets, sizes, **options):
    """Micro-batches of these sizes, one after the other, count as the whole batch does."""
    assert sum(sizes) == len(targets)
    joint, size = count(model, loss_fn, inputs, targets, **options)
    counter = truestep.SampleCounter(model, **options)
    model.zero_grad()
    batch_dim, start = batch_dim_of(options), 0
    for part in sizes:
        place = (start, part)
        some = each(inputs, lambda tensor, place=place: tensor.narrow(batch_dim, *place))
        goals = each(targets, lambda tensor, place=place: tensor.narrow(0, *place))
        loss_fn(called(model, some), goals).backward()
        start += part
    assert counter.batch_size == size
    counts = counter.counts()
    counter.close()
    assert counts.keys() == joint.keys()
    for name, values in joint.items():
        assert torch.equal(counts[name], values), name


def assert_resuming_is_bit_exact(model, loss_fn, inputs, targets, make, **options):
    """A training that was saved and goes on in fresh objects ends where an uninterrupted one does.

    Args:
        model: trained in place.
        loss_fn: (output, targets) to a scalar.
        inputs: of the one batch that is trained on.
        targets: of that batch.
        make: model and counter to optimizer.
        options: the counter's.
    """

    def train(network, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn(called(network, inputs), targets).backward()
            optimizer.step()

    fresh = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    optimizer = make(model, truestep.SampleCounter(model, **options))
    train(model, optimizer)
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    train(model, optimizer)

    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    resumed = make(fresh, truestep.SampleCounter(fresh, **options))
    fresh.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(fresh, resumed)
    assert any(not torch.equal(start[name], value) for name, value in saved["model"].items())
    for (name, one), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other), name


def own_counts(model, outputs, deltas, samples):
    """Counts from each sample's own gradient through one graph: dropout and all else is the same.

    Args:
        outputs: of `model`, samples first.
        deltas: their gradients.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    counts = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in model.named_parameters()}
    for index in range(samples):
        alone = [torch.zeros_like(delta) for delta in deltas]
        for delta, row in zip(deltas, alone, strict=True):
            row[index] = delta[index]
        gradients = torch.autograd.grad(
            outputs, parameters, alone, retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                counts[name] += gradient != 0
    return counts


def upstream(*shape):
    """A gradient ``[samples, positions, ...]`` with zeros, whole positions and samples among them."""
    delta = torch.randn(*shape) * (torch.rand(*shape) < 0.4)
    delta *= torch.rand(*shape[:2], *[1] * (len(shape) - 2)) < 0.6
    delta[torch.randint(0, shape[0], ())] *= torch.randint(0, 2, ())
    return delta.double()
