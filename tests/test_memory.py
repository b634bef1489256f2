"""What the counter holds, and that it does not grow. Peaks are measured by benchmarks/memory.py."""

import gc
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import truestep
from zoo import mlp, sparse_inputs
from zoo_layers import GPT, Residual

# Model and shape of its input. Samples, or positions where layers keep them apart, are multiples of 64, so
# that they fill whole words of bits.
HELD = {
    "mlp": lambda: (nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 9)), (128, 40)),
    "sequence": lambda: (
        nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3)),
        (5, 64, 6),
    ),
    "convolution": lambda: (nn.Conv2d(3, 5, 3, padding=1, bias=False), (4, 3, 8, 8)),
    "residual block": lambda: (Residual(4, 4, 1), (4, 4, 8, 8)),
}


def look_at_layers(model):
    """How many bits the layers' inputs and outputs take, filled in by the next forward pass."""
    seen = {"numbers": 0, "bytes": 0, "lookups": 0}

    def see(module, inputs, output):
        tensors = (*inputs, output)
        seen["numbers"] += sum(t.numel() for t in tensors if t.is_floating_point())
        seen["bytes"] += sum(t.nbytes for t in tensors if t.is_floating_point())
        seen["lookups"] += sum(t.numel() for t in tensors if not t.is_floating_point())

    for module in model.modules():
        if type(module) in truestep.RULES:
            module.register_forward_hook(see)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HELD)
def test_bits_take_a_32nd_of_float32_activations_and_a_16th_of_bfloat16(name, dtype):
    model, shape = HELD[name]()
    model.to(dtype)
    seen = look_at_layers(model)
    counter = truestep.SampleCounter(model)
    model(sparse_inputs(*shape).to(dtype)).relu().sum().backward()
    assert 0 < counter.nbytes <= seen["bytes"] / (32 if dtype == torch.float32 else 16)


RAGGED = {
    "mlp": lambda: (nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 9)), (70, 40)),
    "sequence": lambda: (
        nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Linear(7, 3)),
        (50, 10, 6),
    ),
    "convolution": lambda: (nn.Conv2d(3, 5, 3, padding=1), (30, 3, 7, 7)),
    "residual block": lambda: (Residual(4, 4, 1), (30, 4, 7, 7)),
}


@pytest.mark.parametrize("name", RAGGED)
def test_bits_are_rounded_up_to_a_word_per_unit_at_most(name):
    model, shape = RAGGED[name]()
    seen, units = look_at_layers(model), []

    def see(module, inputs, output):
        channels = 1 if output.dim() == 4 else -1
        units.extend(tensor.shape[channels] for tensor in (*inputs, output))

    for module in model.modules():
        if type(module) in truestep.RULES:
            module.register_forward_hook(see)
    counter = truestep.SampleCounter(model)
    model(sparse_inputs(*shape)).relu().sum().backward()
    # Biases and weights of norms: one bit per sample more, whole words too.
    words = -(-shape[0] // 64)
    joined = 8 * words * sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert 0 < counter.nbytes <= seen["bytes"] / 32 + 8 * sum(units) + joined


def test_a_bias_shared_by_positions_takes_a_bit_per_sample_more():
    model = nn.Conv2d(3, 5, 3, padding=1)
    seen = look_at_layers(model)
    counter = truestep.SampleCounter(model)
    model(torch.randn(64, 3, 8, 8)).square().sum().backward()
    assert counter.nbytes <= seen["bytes"] / 32 + 64 * 5 / 8


def test_embeddings_take_indices_of_32_bits_and_bits():
    model = GPT(length=64)
    seen = look_at_layers(model)
    counter = truestep.SampleCounter(model)
    model(torch.randint(0, 11, (6, 64))).square().sum().backward()
    # a row and an owner, 4 bytes each
    assert 0 < counter.nbytes <= seen["numbers"] / 8 + 8 * seen["lookups"]


def resident():
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def adaptive(model):
    counter = truestep.SampleCounter(model)
    return truestep.AdaptiveBatchSGD(model.parameters(), lr=0.01, counter=counter, momentum=0.9)


def both_before_adam(model):
    optimizer = torch.optim.Adam(model.parameters())
    counter = truestep.SampleCounter(model)
    truestep.attach(
        optimizer, truestep.mean_effective_gradient(counter), truestep.directional_boost()
    )
    return optimizer


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounts")
@pytest.mark.parametrize("make", [adaptive, both_before_adam])
def test_10000_steps_leave_no_growth(make):
    model, inputs = mlp(), sparse_inputs(8, 4)
    optimizer = make(model)

    def resident_after(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        gc.collect()
        objects.append(len(gc.get_objects()))
        return resident()

    objects = []
    sizes = [resident_after(2000) for _ in range(5)]
    assert objects[-1] - objects[1] < 20
    # A leak grows all the time; memory that is touched for the first time grows now and then.
    assert min(after - before for before, after in pairwise(sizes)) < 2000 * 50
