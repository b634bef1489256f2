import pytest
import torch
from torch import nn
from torch.nn import functional

import truestep
from properties import (
    assert_accumulation_equals_joint_batch,
    assert_counts_equal_oracle,
    assert_resuming_is_bit_exact,
    assert_step_equals_oracle,
    batch_dim_of,
    called,
    count,
    each,
)
from truestep import TruestepError
from truestep.layout import tensors_in
from zoo import ZOO, classify, frozen_first, sparse_inputs
from zoo_layers import LAYERS
from zoo_wiring import OPTIONS, WIRING, Checkpointed, MaskedExperts, RoutedExperts

# torch says so, once, of LSTM(proj_size=) in float32.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

EVERY = ZOO | LAYERS | WIRING
every_model = pytest.mark.parametrize("name", EVERY)


def options_of(name):
    return OPTIONS.get(name, {})


@every_model
def test_counts_equal_the_oracle(name):
    assert_counts_equal_oracle(*EVERY[name](), **options_of(name))


@every_model
def test_a_step_equals_the_reference(name):
    assert_step_equals_oracle(*EVERY[name](), **options_of(name))


@pytest.mark.parametrize("name", [name for name in EVERY if name != "one sample"])
def test_accumulation_of_unequal_parts_equals_the_joint_batch(name):
    model, loss_fn, inputs, targets = EVERY[name]()
    second = (len(targets) - 1) // 3
    sizes = [1, second, len(targets) - 1 - second]
    assert_accumulation_equals_joint_batch(
        model, loss_fn, inputs, targets, sizes, **options_of(name)
    )


def dasgd(model, _counter):
    return truestep.DASGD(model.parameters(), lr=0.05)


def adaptive_with_momentum(model, counter):
    return truestep.AdaptiveBatchSGD(model.parameters(), lr=0.05, counter=counter, momentum=0.9)


def both_before_adam(model, counter):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    truestep.attach(
        optimizer, truestep.mean_effective_gradient(counter), truestep.directional_boost()
    )
    return optimizer


@every_model
@pytest.mark.parametrize("make", [dasgd, adaptive_with_momentum, both_before_adam])
def test_resuming_is_bit_exact(name, make):
    assert_resuming_is_bit_exact(*EVERY[name](), make, **options_of(name))


def test_frozen_parameters_have_no_counts():
    model, loss_fn, inputs, targets = classify(frozen_first(), sparse_inputs(6, 4))
    assert_counts_equal_oracle(model, loss_fn, inputs, targets)


def test_a_dataclass_out_of_reentrant_checkpointing_counts_the_same():
    inputs, targets = sparse_inputs(7, 4).requires_grad_(), torch.rand(7, 3)
    models = [Checkpointed(reentrant=reentrant) for reentrant in (True, False)]
    models[1].load_state_dict(models[0].state_dict())

    def loss_of(output, targets):
        return functional.mse_loss(output.logits, targets)

    counts = [count(model, loss_of, inputs, targets) for model in models]
    assert counts[0][1] == counts[1][1] == 7
    assert counts[0][0].keys() == counts[1][0].keys()
    for name, values in counts[0][0].items():
        assert torch.equal(values, counts[1][0][name]), name


class RoutedLinear(nn.Module):
    """An expert without a rule of its own around its layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, input, index, samples):
        return self.layer(input)


def test_experts_without_a_rule_are_an_error_with_ways_out():
    model = RoutedExperts()
    model.experts = nn.ModuleList(RoutedLinear() for _ in range(3))
    counter = truestep.SampleCounter(model)
    loss = functional.mse_loss(model(sparse_inputs(9, 4)), torch.rand(9, 3))
    with pytest.raises(
        TruestepError,
        match=r"'experts\.\d\.layer' sees a batch of \d, the model one of 9\..*a rule that puts",
    ):
        loss.backward()
    assert counter.counts().keys() <= {"head.weight", "head.bias"}


def test_experts_count_the_same_with_their_samples_or_with_all_of_them():
    routed, masked = RoutedExperts(), MaskedExperts()
    masked.load_state_dict(routed.state_dict())
    inputs, targets = sparse_inputs(9, 4), torch.rand(9, 3)
    counts = [
        count(model, functional.mse_loss, inputs, targets, **options_of("routed experts"))[0]
        for model in (routed, masked)
    ]
    assert counts[0].keys() == counts[1].keys()
    for name, values in counts[0].items():
        assert torch.equal(values, counts[1][name]), name
        assert values.max() > 0, name


# Whose instance norm torch refuses without samples.
NOT_EMPTY = {"instance norm"}


@pytest.mark.parametrize("name", [name for name in EVERY if name not in NOT_EMPTY])
def test_an_empty_batch_is_counted(name):
    model, _, inputs, _ = EVERY[name]()
    dim = batch_dim_of(options_of(name))
    counter = truestep.SampleCounter(model, **options_of(name))
    outputs = called(model, each(inputs, lambda tensor: tensor.narrow(dim, 0, 0)))
    sum(output.sum() for output in tensors_in(outputs)).backward()
    assert counter.batch_size == 0
    assert not any(values.any() for values in counter.counts().values())
