"""What must hold for every model: properties as named functions."""

import copy

import torch

import truestep


def count(model, loss_fn, inputs, targets, **options):
    """One backward pass of the batch; its counts and batch size."""
    counter = truestep.SampleCounter(model, **options)
    model.zero_grad()
    loss_fn(model(inputs), targets).backward()
    counts, batch_size = counter.counts(), counter.batch_size
    counter.close()
    return counts, batch_size


def assert_counts_equal_oracle(model, loss_fn, inputs, targets, **options):
    counts, batch_size = count(model, loss_fn, inputs, targets, **options)
    expected = truestep.oracle.counts(model, loss_fn, inputs, targets)
    assert batch_size == len(inputs)
    assert counts.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(counts[name], values), name


def assert_step_equals_oracle(model, loss_fn, inputs, targets, lr=0.1):
    """One AdaptiveBatchSGD step equals the step along the oracle's mean effective gradients."""
    model = copy.deepcopy(model).double()
    wide = inputs.double() if inputs.is_floating_point() else inputs
    goals = targets.double() if targets.is_floating_point() else targets
    expected = truestep.oracle.mean_effective_gradients(model, loss_fn, wide, goals)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=lr, counter=counter)
    loss_fn(model(wide), goals).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - lr * expected[name])


def assert_accumulation_equals_joint_batch(model, loss_fn, inputs, targets, split):
    joint, size = count(model, loss_fn, inputs, targets)
    counter = truestep.SampleCounter(model)
    model.zero_grad()
    for part in (slice(None, split), slice(split, None)):
        loss_fn(model(inputs[part]), targets[part]).backward()
    assert counter.batch_size == size
    counts = counter.counts()
    counter.close()
    for name, values in joint.items():
        assert torch.equal(counts[name], values), name


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
