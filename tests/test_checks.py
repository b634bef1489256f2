"""Arguments of a wrong kind, or numbers that no step could use, are one clear error at once."""

import math

import pytest
import torch
from torch import nn

import truestep
from truestep import ensemble
from truestep.integrations import lightning


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def optimizer():
    return torch.optim.SGD(model().parameters(), lr=0.1)


def counted(**options):
    return truestep.SampleCounter(model(), **options)


def adaptive(**options):
    trained = model()
    counter = truestep.SampleCounter(trained)
    return truestep.AdaptiveBatchSGD(trained.parameters(), **({"counter": counter} | options))


def set_batch_size(value):
    counted().batch_size = value


MISTAKES = {
    "the model's parameters": (
        lambda: truestep.SampleCounter(model().parameters()),
        "torch.nn.Module",
    ),
    "rules that are a list": (lambda: counted(rules=[1]), "rules is of type list"),
    "a rule that is None": (lambda: counted(rules={nn.Linear: None}), "leave out"),
    "a rule for a layer, not its class": (lambda: counted(rules={nn.ReLU(): print}), "by classes"),
    "batch_dim as text": (lambda: counted(batch_dim="0"), "batch_dim is of type str"),
    "batch_dim of no module": (
        lambda: counted(batch_dim={"nope": 0}),
        "'nope', which is no module",
    ),
    "batch_dim that is no number": (lambda: counted(batch_dim={"0": "1"}), "'1' for '0'"),
    "batch_size as text": (lambda: set_batch_size("4"), "batch_size is '4'"),
    "lr as text": (lambda: truestep.DASGD(model().parameters(), lr="0.1"), "lr is '0.1'"),
    "no lr": (lambda: adaptive(lr=None), "lr is None"),
    "an infinite lr": (lambda: adaptive(lr=math.inf), "lr is inf; use a finite number"),
    "a lr that is nan": (lambda: adaptive(lr=torch.tensor(math.nan)), "lr is tensor"),
    "eps as text": (lambda: adaptive(eps="1"), "eps is '1'"),
    "a limit of nothing": (lambda: adaptive(factor_limit=0), "factor_limit is 0"),
    "a model for a counter": (lambda: adaptive(counter=model()), "of type Sequential"),
    "no optimizer": (lambda: truestep.attach(model(), print), "optimizer is of type Sequential"),
    "aSGD of a model": (lambda: truestep.mean_effective_gradient(model()), "counter is of type"),
    "aSGD with eps below 0": (
        lambda: truestep.mean_effective_gradient(counted(), eps=-1),
        "eps is -1",
    ),
    "aSGD with a limit of 0": (
        lambda: truestep.mean_effective_gradient(counted(), factor_limit=0),
        "factor_limit is 0",
    ),
    "corrections with eps below 0": (lambda: counted().correct_gradients(eps=-1), "eps is -1"),
    "statistics with eps below 0": (lambda: counted().statistics(eps=-1), "eps is -1"),
    "one gradient with a limit below 0": (
        lambda: counted().effective_gradient(nn.Parameter(torch.ones(1)), factor_limit=-1),
        "factor_limit is -1",
    ),
    "nodes of nothing": (lambda: truestep.find_dummy_nodes(None, []), "model is of type NoneType"),
    "a model that is a path": (lambda: truestep.shrink_to("model.pt", {}), "model is of type str"),
    "a state that is a path": (
        lambda: truestep.shrink_to(model(), "file.pt"),
        "saved is of type str",
    ),
    "a table of a counter": (lambda: truestep.monitor.table(counted()), "counter.statistics()"),
    "scalars of a counter": (lambda: truestep.monitor.scalars(counted()), "counter.statistics()"),
    "an ensemble's data in a tuple": (
        lambda: ensemble.train(
            ensemble.Network((2, 2)),
            ([0], [0]),
            replicas=1,
            steps=1,
            optimizer=ensemble.Optimizer(),
        ),
        "data is of type tuple",
    ),
    "Lightning with a model": (
        lambda: lightning.MeanEffectiveGradient(model()),
        "counter is of type",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    make, said = MISTAKES[mistake]
    with pytest.raises(truestep.TruestepError) as error:
        make()
    assert said in str(error.value)


def test_numbers_that_are_fine():
    adaptive(lr=torch.tensor(0.1), eps=0, factor_limit=math.inf)
    adaptive(lr=0, eps=2)
    counted(batch_dim={"0": None, "2": 1}, rules=truestep.RULES | {"my.Layer": print})
    set_batch_size(None)


def test_a_closed_counter_says_so_at_the_step():
    trained = model()
    counter = truestep.SampleCounter(trained)
    step = truestep.AdaptiveBatchSGD(trained.parameters(), counter=counter).step
    counter.close()
    trained(torch.ones(5, 4)).sum().backward()
    with pytest.raises(truestep.TruestepError, match="its SampleCounter was closed"):
        step()


def test_a_smaller_model_needs_no_batch_dim_of_layers_that_are_gone():
    trained = model()
    counter = truestep.SampleCounter(trained, batch_dim={"0": 0, "2": 0})
    moved = counter.moved(nn.Sequential(nn.Linear(4, 3)))
    moved.close()
