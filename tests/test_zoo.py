import pytest

from properties import (
    assert_accumulation_equals_joint_batch,
    assert_counts_equal_oracle,
    assert_step_equals_oracle,
)
from zoo import ZOO, classify, frozen_first, sparse_inputs

every_model = pytest.mark.parametrize("name", ZOO)


@every_model
def test_counts_equal_the_oracle(name):
    assert_counts_equal_oracle(*ZOO[name]())


@every_model
def test_a_step_equals_the_reference(name):
    assert_step_equals_oracle(*ZOO[name]())


@every_model
def test_accumulation_equals_the_joint_batch(name):
    model, loss_fn, inputs, targets = ZOO[name]()
    if len(inputs) > 1:
        assert_accumulation_equals_joint_batch(
            model, loss_fn, inputs, targets, len(inputs) // 3 + 1
        )


def test_frozen_parameters_have_no_counts():
    model, loss_fn, inputs, targets = classify(frozen_first(), sparse_inputs(6, 4))
    assert_counts_equal_oracle(model, loss_fn, inputs, targets)
