"""Triton's kernels beside their twins in torch operations (see `devices`), and whether they compile."""

import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import truestep
from devices import CUDA, choose, needs_cuda, needs_triton, reckoned
from truestep import waiting
from truestep.activity import Elements, Outer, Rows, Window
from truestep.bits import join, pack
from truestep.combine import Counts
from truestep.fused import Pass
from truestep.kernels import boosting, dispatch, packing, scanning, stepping
from truestep.update import adaptive_factor, boosted, scale_
from zoo import ZOO

pytestmark = needs_triton

DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
CASES = 200 if CUDA else 1  # of each test's random ones: the interpreter takes seconds for some
DENSITIES = [0.0, 0.05, 0.4, 0.9, 1.0]


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    choose(monkeypatch, "triton")


@pytest.fixture(params=range(2))
def seed(request):
    torch.manual_seed(request.param)
    random.seed(request.param)
    return request.param


def mask(*shape):
    density = torch.tensor([random.choice(DENSITIES) for _ in range(shape[-1])])
    if random.random() < 0.5:
        density = random.choice(DENSITIES)
    return (torch.rand(*shape) < density).to(DEVICE)


DIGITS = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-5}  # it cuts bfloat16 off


def same(one, other):
    """Equal, but for the roundings that the interpreter adds where the device multiplies and adds at once."""
    if CUDA:
        assert torch.equal(one, other)
    else:
        digits = DIGITS[one.dtype]
        torch.testing.assert_close(one, other, rtol=digits, atol=digits)


def assert_counted(activity):
    """Counts, and gradients corrected by them, are those of torch operations."""
    expected = activity.count_masks()
    assert activity.entries(DEVICE) is not None
    assert torch.equal(activity.count(), expected)
    gradient = torch.randn(activity.shape, device=DEVICE)
    factor = adaptive_factor(expected, activity.samples, 1.0, 3.0, dtype=torch.float32)
    corrected = gradient * factor
    assert torch.equal(scale_(gradient, activity, activity.samples, 1.0, 3.0), corrected)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool]
)
def test_packing_equals_its_twin(dtype, seed):
    for _ in range(CASES):
        samples, positions, units = (random.randint(1, size) for size in (70, 5, 140))
        values = mask(samples, positions, units)
        values = values if dtype == torch.bool else values * torch.randn_like(values, dtype=dtype)
        for arranged in (values, values[:, 0], values.transpose(1, 2).contiguous().transpose(1, 2)):
            assert torch.equal(packing.pack(arranged), packing.pack_torch(arranged))


def test_what_is_off_its_mean_equals_its_twin(seed):
    for _ in range(CASES):
        samples, positions, groups = (random.randint(1, size) for size in (9, 70, 4))
        dtype = random.choice([torch.float32, torch.float64])
        values = torch.randint(0, 3, (samples, positions, 6 * groups), device=DEVICE).to(dtype)
        of_rows = torch.randint(0, 3, (samples, positions, 1), device=DEVICE).to(dtype)
        by_unit = values.transpose(1, 2).contiguous().transpose(1, 2)
        of_groups = torch.randint(0, 3, (samples, 1, groups), device=DEVICE).to(dtype)
        for numbers, means in ((values, of_rows), (by_unit, of_groups)):
            twin = packing.pack_torch(numbers, means)
            assert torch.equal(packing.pack(numbers, means), twin)


def test_numbers_of_several_types_are_packed_at_once():
    """As where a norm's inputs have means and a layer beside it is in 16 bits."""
    torch.manual_seed(0)
    wide, means = (
        torch.randint(0, 3, (5, 7, 6), device=DEVICE).float(),
        torch.ones(5, 7, 1, device=DEVICE),
    )
    half = mask(9, 40).to(torch.bfloat16)
    lines = packing.Lines(
        packing.Rows(5, 7, 6, groups=packing.EACH_ROW), packing.Rows(5, 7, 6), torch.float32
    )
    others = packing.Lines(packing.Rows(9, 1, 40), packing.Rows(9, 1, 40), torch.bfloat16)
    table = packing.PackTable()
    table.add(lines, wide.data_ptr(), wide.data_ptr(), means.data_ptr())
    table.add(others, half.data_ptr(), half.data_ptr())
    words = table.pack(DEVICE)
    twins = [
        packing.pack_torch(wide, means),
        packing.pack_torch(wide),
        *[packing.pack_torch(half)] * 2,
    ]
    assert torch.equal(words, torch.cat([twin.flatten() for twin in twins]))


def test_scanning_a_device_does_not_come_to_loops():
    values = torch.randn(9, 4, device=DEVICE)
    low, high, _ = scanning.scan(values, 1)
    assert torch.equal(low, values.amin(0))
    assert torch.equal(high, values.amax(0))


def test_kernels_that_do_not_run_are_told_once(monkeypatch):
    def refuse(_device):
        raise RuntimeError("no compiler")

    dispatch.triton_works.cache_clear()
    monkeypatch.setattr(dispatch.gpu(), "probe", refuse)
    with pytest.warns(UserWarning, match="torch operations count there.*no compiler"):
        assert not dispatch.triton_works(DEVICE)
    assert not dispatch.triton_works(DEVICE)
    dispatch.triton_works.cache_clear()


def test_the_probe_runs():
    assert dispatch.triton_works(DEVICE)


def test_counts_come_to_the_gradients_device():
    gradient, counts = torch.ones(3, device=DEVICE), torch.tensor([0, 1, 3])
    scale_(gradient, Counts(counts, 4), 4)
    assert gradient.tolist() == [1.0, 2.0, 1.0]


def test_joining_equals_its_twin(seed):
    for _ in range(CASES):
        shape = [random.randint(1, size) for size in (130, 140, 9)]
        one, other = mask(*shape), mask(*shape)
        alone, both = join([(pack(one), None), (pack(one), pack(other))])
        assert torch.equal(alone.mask(), one.any(1))
        assert torch.equal(both.mask(), (one & other).any(1))


def test_linear_maps_equal_their_twin(seed):
    for _ in range(CASES):
        samples, positions = random.choice([1, 63, 65, 130]), random.choice([1, 1, 2, 64, 65])
        rows, columns = random.randint(1, 40), random.randint(1, 70)
        outputs, inputs = mask(samples, positions, rows), mask(samples, positions, columns)
        if positions == 1:
            outputs, inputs = outputs[:, 0], inputs[:, 0]
        assert_counted(Outer(torch.Size([rows, columns]), pack(outputs), pack(inputs)))


def test_biases_equal_their_twin(seed):
    for columns in (1, 2047, 2049, 5000):
        assert_counted(Elements(torch.Size([columns]), pack(mask(random.randint(1, 200), columns))))


def test_samples_counted_in_parts():
    """So many words that programs share them."""
    torch.manual_seed(0)
    assert_counted(Elements(torch.Size([3]), pack(mask(64 * 40 + 5, 3))))
    assert_counted(
        Outer(torch.Size([4, 5]), pack(mask(64 * 70 + 5, 4)), pack(mask(64 * 70 + 5, 5)))
    )
    assert_counted(Outer(torch.Size([4, 5]), pack(mask(40, 20, 4)), pack(mask(40, 20, 5))))


def test_convolutions_equal_their_twin(seed):
    done = 0
    while done < CASES:
        axes = random.randint(1, 3)
        size = [random.randint(1, [90, 12, 5][axes - 1]) for _ in range(axes)]
        kernel, stride, dilation = ([random.randint(1, 3) for _ in size] for _ in range(3))
        padding = [random.randint(0, 2) for _ in size]
        if done == 0:  # sees its own position alone
            kernel, stride, padding = [1] * axes, [1] * axes, [0] * axes
        parts = zip(size, kernel, stride, dilation, padding, strict=True)
        seen = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, d, p in parts]
        groups, channels, rows = (
            random.choice([1, 1, 2, 5]),
            random.randint(1, 5),
            random.randint(1, 9),
        )
        samples = random.choice([1, 3, 70])
        work = samples * math.prod(seen) * math.prod(kernel) * channels * groups
        if min(seen) < 1 or work > 3e4:
            continue
        sides = tuple(side for p in reversed(padding) for side in (p, p))
        shapes = (tuple(each) for each in (size, seen, kernel, stride, dilation))
        by_position = random.random() < 0.3
        window = Window(*shapes, sides, "constant", channels * groups, groups, by_position)
        outputs = mask(samples, math.prod(seen), rows * groups)
        inputs = mask(samples, math.prod(size), channels * groups)
        shape = torch.Size([rows * groups, channels, *kernel])
        assert_counted(Outer(shape, pack(outputs), pack(inputs), window))
        done += 1


@pytest.mark.parametrize("by_entry", [False, True])
def test_embeddings_equal_their_twin(by_entry, seed):
    for _ in range(CASES):
        rows, columns, entries, samples = (random.randint(1, size) for size in (9, 140, 70, 20))
        looked_up = torch.randint(0, rows, (entries,), dtype=torch.int32, device=DEVICE)
        owners = torch.randint(0, samples, (entries,), dtype=torch.int32).sort()[0].to(DEVICE)
        outputs = pack(mask(entries if by_entry else samples, columns))
        shape = torch.Size([rows, columns])
        assert_counted(Rows(shape, samples, looked_up, owners, outputs, by_entry))


def test_an_embedding_that_is_not_looked_up():
    nothing = torch.empty(0, dtype=torch.int32, device=DEVICE)
    outputs = pack(torch.ones(3, 4, device=DEVICE))
    assert_counted(Rows(torch.Size([5, 4]), 3, nothing, nothing, outputs, by_entry=False))


@pytest.mark.parametrize(
    ("dtype", "momentum", "weight_decay", "extra"),
    [
        (torch.float32, 0.0, 0.0, {}),
        (torch.float64, 0.0, 0.1, {"maximize": True}),
        (torch.float64, 0.9, 0.0, {"nesterov": True}),
        (torch.float32, 0.9, 0.1, {"dampening": 0.3}),
        (torch.float32, 0.9, 0.1, {"nesterov": True, "maximize": True}),
        (torch.bfloat16, 0.0, 0.0, {}),
        (torch.bfloat16, 0.9, 0.1, {"nesterov": True}),
    ],
)
def test_a_fused_step_equals_the_step_of_torch(dtype, momentum, weight_decay, extra):
    torch.manual_seed(0)
    shapes, real = [(7, 9), (5,), (3,), (90, 6), (40, 70)], reckoned(dtype)
    ours = [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]
    theirs = [nn.Parameter(tensor.to(real, copy=True)) for tensor in ours]
    settings = {"lr": 0.03, "momentum": momentum, "weight_decay": weight_decay, **extra}
    reference = torch.optim.SGD(theirs, foreach=False, **settings)
    buffers = [torch.empty_like(tensor) if momentum else None for tensor in ours]
    for number in range(2):
        weight = Outer(ours[0].shape, pack(mask(20, 7)), pack(mask(20, 9)))
        bias = Elements(ours[1].shape, pack(mask(20, 5)))
        places = torch.randint(0, 90, (60,), dtype=torch.int32, device=DEVICE)
        owners = torch.arange(60, dtype=torch.int32, device=DEVICE) // 3
        table = Rows(ours[3].shape, 20, places, owners, pack(mask(20, 6)), by_entry=False)
        wide = Outer(ours[4].shape, pack(mask(20, 3, 40)), pack(mask(20, 3, 70)))
        size = torch.tensor(20, device=DEVICE)  # of which the host knows nothing
        found = [(weight, 20), (bias, size), None, (table, 20), (wide, size)]
        whole = Pass(stepping.Options(**settings))
        for parameter, copy, reached, buffer in zip(ours, theirs, found, buffers, strict=True):
            gradient = torch.randn_like(parameter)
            copy.grad = gradient.to(real, copy=True)
            if reached is not None:
                copy.grad *= adaptive_factor(reached[0].count_masks(), 20, dtype=real)
            assert whole.takes(gradient, parameter)
            whole.add(gradient, reached, parameter, buffer, fresh=number == 0)
        whole.run()
        reference.step()
        for one, other, buffer in zip(ours, theirs, buffers, strict=True):
            same(one, other.detach().to(dtype))
            other.data.copy_(one)
            if buffer is not None:
                kept = reference.state[other]["momentum_buffer"]
                same(buffer, kept.to(dtype))
                kept.copy_(buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_boosted_step_equals_its_twin(dtype, weight_decay, maximize, monkeypatch):
    torch.manual_seed(0)
    start = [torch.randn(size, dtype=dtype, device=DEVICE) for size in (3, 1025, 2048, 0, 40)]
    gradients = [[torch.randn_like(t).clamp(min=-0.5) for t in start] for _ in range(3)]
    ends = []
    for kernels, number in (("triton", dtype), ("torch", reckoned(dtype))):
        choose(monkeypatch, kernels)
        weights = [nn.Parameter(tensor.to(number, copy=True)) for tensor in start]
        optimizer = truestep.DASGD(weights, lr=0.1, weight_decay=weight_decay, maximize=maximize)
        for given in gradients:
            for weight, gradient in zip(weights, given, strict=True):
                weight.grad = gradient.to(number, copy=True)
                weight.data.copy_(weight.to(dtype))
            optimizer.step()
        ends.append([weight.detach().to(dtype) for weight in weights])
    for one, other in zip(*ends, strict=True):
        same(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boosting_gradients_in_place(dtype):
    gradients, previous = torch.randn(2, 3000, device=DEVICE).to(dtype)
    expected, now = boosted(gradients.float(), previous.float()).to(dtype), gradients.clone()
    boosting.boost_(boosting.table([gradients], [previous]))
    same(gradients, expected)
    assert torch.equal(previous, now)


@pytest.mark.parametrize("most", [waiting.MOST_LAUNCHED, 600])
@pytest.mark.parametrize("name", ["mlp", "cnn", "bag", "tied"])
def test_training_ends_at_the_weights_of_torch_operations(name, most, monkeypatch):
    """Also where the inputs and gradients that wait are packed in between."""
    monkeypatch.setattr(waiting, "MOST_LAUNCHED", most)
    ends = []
    for kernels in ("triton", "torch"):
        choose(monkeypatch, kernels)
        torch.manual_seed(0)
        model, loss_fn, inputs, targets = ZOO[name]()
        model, inputs, targets = model.to(DEVICE), inputs.to(DEVICE), targets.to(DEVICE)
        counter = truestep.SampleCounter(model)
        optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
        for _ in range(3):
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@needs_cuda
def test_a_model_on_two_devices():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.here, self.there = nn.Linear(5, 6), nn.Linear(6, 3, device=DEVICE)

        def forward(self, x):
            return self.there(torch.relu(self.here(x)).to(DEVICE))

    model, inputs = Model(), torch.randn(9, 5).relu()
    targets = torch.randint(0, 3, (9,), device=DEVICE)
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        expected = truestep.oracle.counts(model, nn.functional.cross_entropy, inputs, targets)
        for name, counts in counter.counts().items():
            assert torch.equal(counts, expected[name])
        optimizer.step()


def test_what_kernels_do_not_take_goes_to_torch():
    for gradient in (torch.ones(3, 4, dtype=torch.float16), torch.ones(4, 3).T):
        assert not Pass.takes(gradient.to(DEVICE))
    assert Pass.takes(torch.ones(3, 4, device=DEVICE))


def test_kernels_compile_without_a_device():
    """The interpreter knows nothing of types: some of what it runs is refused by the compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(  # noqa: S603
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) > 10
