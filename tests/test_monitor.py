import pytest
import torch

import truestep
from truestep import monitor
from zoo import mlp, sparse_inputs


@pytest.fixture
def statistics():
    model = mlp()
    counter = truestep.SampleCounter(model)
    model(sparse_inputs(12, 4)).square().mean().backward()
    return counter.statistics()


def test_scalars_have_every_quantity_of_every_parameter(statistics):
    found = monitor.scalars(statistics)
    assert len(found) == sum(map(len, statistics.values())) > 0
    for parameter, quantities in statistics.items():
        for quantity, value in quantities.items():
            assert found[f"{quantity}/{parameter}"] == value


def test_tensorboard_takes_scalars(statistics, tmp_path):
    tensorboard = pytest.importorskip(
        "torch.utils.tensorboard", reason="the package tensorboard is not installed"
    )
    found = monitor.scalars(statistics)
    with tensorboard.SummaryWriter(tmp_path) as writer:
        for tag, value in found.items():
            writer.add_scalar(tag, value, 7)
    from tensorboard.backend.event_processing.event_accumulator import (  # noqa: PLC0415
        EventAccumulator,
    )

    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(found)
    for tag, value in found.items():
        (event,) = events.Scalars(tag)
        assert event.step == 7
        assert event.value == torch.tensor(value).item()


def test_the_table_shows_the_largest_factors_first(statistics):
    head, *lines = monitor.table(statistics, rows=3).splitlines()
    assert set(head.split()) == {"parameter", *statistics["0.weight"]}
    factors = {name: s["largest_factor"] for name, s in statistics.items()}
    shown = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert list(shown.values()) == sorted(shown.values(), reverse=True)
    assert len(shown) == 3
    for name, factor in shown.items():
        assert factor == pytest.approx(factors[name], rel=1e-3)
    left_out = factors.keys() - shown.keys()
    assert min(factors[name] for name in shown) >= max(factors[name] for name in left_out)


def test_the_table_of_no_parameter_is_its_head():
    assert monitor.table({}).split()[0] == "parameter"
