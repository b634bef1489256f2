"""Where compiled loops do not reach, Triton's kernels or torch operations count, on every device."""

import pytest
import torch

import truestep
from devices import choose, needs_cuda, needs_no_cuda, needs_triton
from properties import (
    assert_accumulation_equals_joint_batch,
    assert_counts_equal_oracle,
    assert_step_equals_oracle,
    called,
    each,
)
from zoo import ZOO

DEVICES = [
    "cpu in torch",
    pytest.param("cpu in triton", marks=[needs_triton, needs_no_cuda]),
    pytest.param("cuda in torch", marks=needs_cuda),
    pytest.param("cuda in triton", marks=[needs_triton, needs_cuda]),
]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    name, kernels = request.param.split(" in ")
    choose(monkeypatch, kernels)
    return name


def moved(name, device):
    torch.manual_seed(0)
    model, loss_fn, inputs, targets = ZOO[name]()
    inputs, targets = (each(value, lambda t: t.to(device)) for value in (inputs, targets))
    return model.to(device), loss_fn, inputs, targets


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_on_every_device(name, device):
    assert_counts_equal_oracle(*moved(name, device))
    assert_step_equals_oracle(*moved(name, device))


def test_accumulation_on_every_device(device):
    assert_accumulation_equals_joint_batch(*moved("twice", device), sizes=[4, 1, 3])


def test_a_model_that_moves_after_its_counter_is_made(device):
    model, loss_fn, inputs, targets = ZOO["tied"]()
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    model.to(device)
    inputs, targets = (each(value, lambda t: t.to(device)) for value in (inputs, targets))
    loss_fn(called(model, inputs), targets).backward()
    expected = truestep.oracle.counts(model, loss_fn, inputs, targets)
    for name, counts in counter.counts().items():
        assert torch.equal(counts, expected[name])
        assert counts.device.type == torch.device(device).type
    optimizer.step()


def test_counts_are_exact_beyond_what_floats_hold(device):
    """Products of masks are summed in float32, exact below 2**24 samples; bfloat16 would stop at 256."""
    model = torch.nn.Linear(1, 1).to(device)
    counter = truestep.SampleCounter(model)
    with torch.autocast(device, dtype=torch.bfloat16):
        model(torch.ones(1001, 1, device=device)).sum().backward()
    assert counter.counts()["weight"].item() == 1001


class Several(torch.nn.Module):
    """Layers of many kinds."""

    def __init__(self):
        super().__init__()
        self.table, self.cell = torch.nn.Embedding(9, 6), torch.nn.LSTM(6, 5, batch_first=True)
        self.look, self.norm = torch.nn.Conv1d(5, 4, 3), torch.nn.GroupNorm(2, 4)
        self.end = torch.nn.Linear(12, 3)

    def forward(self, rows):
        inner = self.cell(self.table(rows))[0].transpose(1, 2)
        return self.end(self.norm(self.look(inner)).relu().flatten(1))


def test_a_default_device_other_than_the_model_s_changes_nothing():
    found = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        model, rows = Several(), torch.randint(0, 9, (7, 5))
        counter = truestep.SampleCounter(model)
        optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
        with torch.device(default):
            for _ in range(3):
                optimizer.zero_grad()
                model(rows).square().sum().backward()
                model(rows[:3]).square().sum().backward()
                optimizer.step()
            found.append([*model.parameters(), *counter.counts().values()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_model_is_compressed_under_another_default_device():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6), torch.nn.ReLU()]
    model, data = torch.nn.Sequential(*layers, torch.nn.Linear(6, 2)), torch.randn(40, 4)
    with torch.no_grad():
        model[0].bias[:3] = -100
        model[2].bias[:2] = 100
    with torch.device("meta"):
        nodes = truestep.find_dummy_nodes(model, [data])
        small, report = truestep.compress(model, nodes, data)
    assert report.removed
    torch.testing.assert_close(small(data), model(data))
