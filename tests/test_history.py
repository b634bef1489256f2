import pytest
import torch
from torch import nn

import truestep
from planting import plant
from truestep import NodeHistory, SampleCounter, TruestepError, combine
from zoo import sparse_inputs


def mlp():
    return nn.Sequential(
        plant(nn.Linear(4, 6), {2: "true", 3: "pseudo"}),
        nn.ReLU(),
        nn.Linear(6, 5),
        nn.ReLU(),
        nn.Linear(5, 2),
    )


def cnn():
    return nn.Sequential(
        plant(nn.Conv2d(1, 4, 3, padding=1), {1: "true", 2: "pseudo"}),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(12, 2),
    )


@pytest.mark.parametrize(("make", "shape"), [(mlp, (4,)), (cnn, (1, 4, 4))])
def test_a_stretch_counts_what_a_pass_over_its_batches_finds(make, shape):
    model = make()
    counter = SampleCounter(model)
    batches = [torch.randn(size, *shape).clamp(-2, 2) for size in (70, 64, 1, 33)]
    history = NodeHistory(counter, model, batches[0])
    for batch in batches:
        model.zero_grad()
        model(batch).square().sum().backward()
        history.add()
    history.mark("all")
    found = truestep.find_dummy_nodes(model, batches)
    assert [row["layer"] for row in history.rows] == [layer.layer for layer in found]
    for row, layer in zip(history.rows, found, strict=True):
        assert row["samples"] == 168
        assert row["units"] == len(layer)
        assert row["true"] == int(layer.true.sum())
        assert row["pseudo"] == int(layer.pseudo.sum())
    assert history.rows[0]["true"] >= 1
    assert history.rows[0]["pseudo"] >= 1


def test_each_mark_begins_anew():
    model = mlp()
    counter = SampleCounter(model)
    history = NodeHistory(counter, model, torch.randn(2, 4))
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.01, counter=counter)
    for epoch in range(3):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(20, 4)).sum().backward()
            history.add()
            optimizer.step()
        history.mark(epoch)
    assert [row["label"] for row in history.rows] == [0, 0, 1, 1, 2, 2]
    assert {row["samples"] for row in history.rows} == {40}


def test_a_norm_behind_the_relu_hides_which_units_are_on():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 2), nn.Sigmoid(), nn.Linear(2, 1)
    )
    with pytest.raises(TruestepError, match="no layer of this model reads the output of a ReLU"):
        NodeHistory(SampleCounter(model), model, torch.randn(2, 4))


def test_without_a_gradient_there_is_nothing_to_add():
    model = mlp().train()
    history = NodeHistory(SampleCounter(model), model, sparse_inputs(3, 4))
    assert model.training
    with pytest.raises(
        TruestepError, match=r"reads '0' has no counted gradient; call add\(\) after"
    ):
        history.add()


def test_a_gradient_that_was_corrected_has_its_bits():
    model = mlp()
    counter = SampleCounter(model)
    history = NodeHistory(counter, model, torch.randn(2, 4))
    model(torch.randn(20, 4)).sum().backward()
    counter.correct_gradients()
    history.add()
    history.mark("corrected")
    assert history.rows[0]["samples"] == 20


def test_a_counter_of_another_model_is_an_error():
    with pytest.raises(TruestepError, match="is not in the counter's model"):
        NodeHistory(SampleCounter(mlp()), mlp(), torch.randn(2, 4))
    with pytest.raises(TruestepError, match="counter is of type Sequential"):
        NodeHistory(mlp(), mlp(), torch.randn(2, 4))


def test_bits_that_became_counts_are_an_error(monkeypatch):
    monkeypatch.setattr(combine, "LITTLE", 0)
    model = mlp()
    counter = SampleCounter(model)
    history = NodeHistory(counter, model, torch.randn(2, 4))
    for _ in range(4):
        model(torch.randn(70, 4)).square().sum().backward()
    with pytest.raises(TruestepError, match=r"accumulated batches into counts.*zero the gradients"):
        history.add()


def test_units_off_before_the_last_position_are_seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(3, 2))
        model[0].bias.copy_(torch.tensor([0.0, 0.0, 9.0]))
    x = torch.ones(4, 5, 2)
    x[1, 2] = -2  # at one position, not the last, two units are off
    counter = truestep.SampleCounter(model)
    history = truestep.NodeHistory(counter, model, x)
    for _ in range(3):  # the first call takes the long way
        model.zero_grad()
        model(x).square().sum().backward()
        history.add()
        history.mark("once")
        assert counter.counts()["2.weight"].eq(4).all()
    assert [row["pseudo"] for row in history.rows] == [1, 1, 1]
