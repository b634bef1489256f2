"""Each replica equals one training with torch from the same numbers, in both backends."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.reference import trained
from truestep.ensemble import Data, Network, Optimizer, Record, Split, train
from truestep.ensemble.starts import orders

BACKENDS = ("compiled", "torch")
WIDTHS = ((2, 10, 10, 1), (3, 5, 4), (70, 20, 17, 3))
HEADS = (
    ("softmax", "cross_entropy"),
    ("sigmoid", "binary_cross_entropy"),
    ("linear", "squared_error"),
    ("sigmoid", "squared_error"),
    ("softmax", "mean_squared_error"),
)
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "gelu")
# With this eps in its denominator, a gradient that is nothing but rounding makes no step of its own.
EPS = 1e-3
OPTIMIZERS = (
    Optimizer(lr=0.1),
    Optimizer(lr=0.03, momentum=0.9),
    Optimizer(lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.1),
    Optimizer(lr=0.1, asgd=True),
    Optimizer(lr=0.1, asgd=True, weight_decay=0.1, factor_limit=1.5, asgd_eps=2.0),
    Optimizer(lr=0.03, asgd=True, momentum=0.9),
    Optimizer(lr=0.1, dasgd=True),
    Optimizer(lr=0.1, dasgd=True, weight_decay=0.1),
    Optimizer(lr=0.1, asgd=True, dasgd=True),
    Optimizer(lr=0.1, schedule="cosine"),
    Optimizer("adam", lr=0.01, betas=(0.8, 0.99), eps=EPS),
    Optimizer("adam", lr=0.01, asgd=True, weight_decay=0.1, eps=EPS),
    Optimizer("adamw", lr=0.01, weight_decay=0.1, eps=EPS),
    Optimizer("adagrad", lr=0.01, dasgd=True, eps=EPS),
    Optimizer("rmsprop", lr=0.01, eps=EPS),
)
DEFAULT_EPS = tuple(Optimizer(name, lr=0.01) for name in ("adam", "adamw", "adagrad", "rmsprop"))
SAMPLES = 37


def split_for(network, seed=0, samples=SAMPLES, *, classes=True):
    generator = np.random.default_rng(seed)
    features, outputs = network.widths[0], network.widths[-1]
    inputs = generator.standard_normal((samples, features)).astype(np.float32)
    inputs[generator.random(inputs.shape) < 0.3] = 0
    if classes:
        return Split(inputs, generator.integers(0, max(outputs, 2), samples))
    return Split(inputs, generator.standard_normal((samples, outputs)).astype(np.float32))


def batches_of(seed, samples, batch_size, steps):
    if batch_size is None:
        return [np.arange(samples)] * steps
    epochs = math.ceil(steps * batch_size / samples) + 1
    order = orders([seed], range(epochs), samples)[0].reshape(epochs, samples)
    parts = (np.split(row, range(batch_size, samples, batch_size)) for row in order)
    return list(itertools.chain.from_iterable(parts))[:steps]


def assert_replicas_equal_torch(network, split, optimizers, batch_size, backend, steps=8):
    """Replica k is trained with the kth optimizer."""
    record = Record(every=1, parameters=True, batch_sizes=True, gradients=True)
    result = train(
        network,
        Data(split),
        replicas=len(optimizers),
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizers,
        seed=5,
        record=record,
        backend=backend,
        threads=1,
    )
    for replica, optimizer in enumerate(optimizers):
        batches = batches_of(5 + replica, split.samples, batch_size, steps)
        start = result.parameters[replica, 0]
        reference = trained(network, split, optimizer, start, batches)
        for step, (parameters, loss, counts, gradient) in enumerate(reference):
            measured = result.parameters[replica, step + 1]
            np.testing.assert_allclose(measured, parameters, atol=2e-5, rtol=2e-5)
            np.testing.assert_allclose(
                result.batch_loss[replica, step + 1], loss, atol=1e-5, rtol=1e-5
            )
            size = np.abs(gradient).mean()
            np.testing.assert_allclose(result.gradients[replica, step], size, atol=1e-6, rtol=1e-4)
            if counts is not None:
                assert (result.batch_sizes[replica, step] == counts.numpy()).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [None, 8, 1])
@pytest.mark.parametrize(("output", "loss"), HEADS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_network_loss_and_optimizer(activation, output, loss, batch_size, backend):
    for widths in WIDTHS:
        if widths[-1] == 1 and output == "softmax":
            continue
        network = Network(widths, activation, output, loss)
        split = split_for(network, classes=loss != "mean_squared_error")
        assert_replicas_equal_torch(network, split, OPTIMIZERS, batch_size, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS + DEFAULT_EPS, ids=lambda o: f"{o.label}-{o.eps}")
def test_every_optimizer_alone(optimizer, backend):
    network = Network(WIDTHS[1], start="he_normal")
    split = split_for(network)
    assert_replicas_equal_torch(network, split, [optimizer] * 2, 8, backend)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    features=st.sampled_from([1, 2, 5, 63, 64, 65, 100]),
    outputs=st.integers(2, 18),
    samples=st.integers(1, 150),
    batch_size=st.integers(1, 150),
    asgd=st.booleans(),
)
def test_any_shape(widths, features, outputs, samples, batch_size, asgd):
    network = Network((features, *widths, outputs), start="glorot_uniform")
    split = split_for(network, samples=samples)
    optimizer = Optimizer(lr=0.1, asgd=asgd)
    size = None if batch_size >= samples else batch_size
    assert_replicas_equal_torch(network, split, [optimizer] * 2, size, "compiled", steps=3)


def test_both_backends_record_the_same():
    network = Network((3, 8, 8, 4), start="glorot_uniform")
    data = Data(split_for(network), test=split_for(network, seed=1, samples=300))
    results = [
        train(
            network,
            data,
            replicas=6,
            steps=40,
            batch_size=batch_size,
            optimizer=[Optimizer(lr=0.3, asgd=replica % 2 == 0) for replica in range(6)],
            record=Record(every=7, nodes=True, gradients=True, under=1.3),
            backend=backend,
        )
        for batch_size in (None, 10)
        for backend in BACKENDS
    ]
    for ours, twin in (results[:2], results[2:]):
        for split in ("train", "test"):
            np.testing.assert_allclose(ours.loss[split], twin.loss[split], rtol=1e-4)
            assert (ours.accuracy[split] == twin.accuracy[split]).all()
            assert (ours.end_accuracy[split] == twin.end_accuracy[split]).all()
        assert (ours.nodes == twin.nodes).all()
        assert (ours.end_nodes == twin.end_nodes).all()
        assert (ours.first_under == twin.first_under).all()
        assert (ours.first_under > 0).any()
        np.testing.assert_allclose(ours.gradients, twin.gradients, rtol=1e-3)
        np.testing.assert_allclose(ours.signs, twin.signs, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dummy_nodes_and_losses_are_those_of_the_model(backend):
    import torch  # noqa: PLC0415

    from ensemble.reference import loss_of, model_of  # noqa: PLC0415

    network = Network(
        (2, 12, 9, 1), output="sigmoid", loss="binary_cross_entropy", start="he_normal"
    )
    split, test = split_for(network), split_for(network, seed=3, samples=200)
    result = train(
        network,
        Data(split, test=test),
        replicas=4,
        steps=30,
        optimizer=Optimizer(lr=1.0, asgd=True),
        record=Record(nodes=True),
        backend=backend,
    )
    kinds = set()
    for replica in range(4):
        model = model_of(network, result.final[replica])
        values, places = torch.from_numpy(split.inputs[0]), []
        for layer in model:
            values = layer(values)
            if isinstance(layer, torch.nn.Linear):
                places.append((values > 0).sum(0))
        on = torch.cat(places[:-1]).numpy()
        expected = np.where(on == 0, 1, np.where(on == split.samples, 2, 0))
        assert (result.end_nodes[replica] == expected).all()
        kinds |= set(expected.tolist())
        z, targets = model(torch.from_numpy(test.inputs[0])), torch.from_numpy(test.targets[0])
        loss = loss_of(network)(z, targets).item()
        np.testing.assert_allclose(result.end_loss["test"][replica], loss, rtol=1e-4)
        right = ((z[:, 0] > 0) == (targets == 1)).float().mean().item()
        np.testing.assert_allclose(result.end_accuracy["test"][replica], right, rtol=1e-6)
    assert len(kinds) > 1
