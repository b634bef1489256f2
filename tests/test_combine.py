from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truestep.activity import Elements, Outer, Rows
from truestep.bits import pack
from truestep.combine import Counts, Shared, Total, joint, nbytes, total

SHAPE = torch.Size([4, 3])


def mask(*shape):
    return torch.rand(*shape) < 0.4


def outer(samples, positions=None):
    lead = (samples,) if positions is None else (samples, positions)
    return Outer(SHAPE, pack(mask(*lead, 4)), pack(mask(*lead, 3)))


def rows(samples, by_entry):
    owners = torch.randint(0, samples, (3 * samples,)).sort().values.int()
    outputs = pack(mask(len(owners) if by_entry else samples, 3))
    looked_up = torch.randint(0, 4, (len(owners),), dtype=torch.int32)
    return Rows(SHAPE, samples, looked_up, owners, outputs, by_entry)


def elements(samples):
    return Elements(SHAPE, pack(mask(samples, 12)))


KINDS = [
    elements,
    outer,
    lambda samples: outer(samples, 5),
    lambda samples: rows(samples, by_entry=True),
    lambda samples: rows(samples, by_entry=False),
]


def dense(activity):
    return activity.masks(0, activity.samples)


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), st.integers(1, 70))
def test_a_joint_is_the_or_of_its_uses(kinds, samples):
    uses = [make(samples) for make in kinds]
    whole = joint(uses)
    expected = torch.stack([dense(use) for use in uses]).any(0)
    assert torch.equal(dense(whole), expected)
    assert torch.equal(whole.count(), expected.sum(0))
    assert whole.samples == samples


def ones(make):
    """Masks of which some are on everywhere."""

    def made(samples):
        use = make(samples)
        if isinstance(use, Elements):
            return Elements(SHAPE, pack(torch.ones(samples, 12)))
        which = "outputs" if torch.rand(()) < 0.5 else "inputs"
        return replace(use, **{which: pack(torch.ones_like(getattr(use, which).mask()))})

    return made


@pytest.mark.parametrize(
    ("make", "sizes", "one"),
    [
        (elements, (3, 64, 70), True),
        (outer, (3, 64, 70), True),
        (ones(elements), (3, 64, 70), True),
        (ones(outer), (3, 64, 1), True),
        (lambda samples: outer(samples, 5), (64, 128, 3), True),
        (lambda samples: outer(samples, 16), (4, 12, 8, 3), True),
        (lambda samples: outer(samples, 5), (3, 64), False),
    ],
)
@pytest.mark.parametrize("repeat", range(4))
def test_batches_are_counted_in_one_pass(make, sizes, one, repeat):
    torch.manual_seed(repeat)
    parts = [make(samples) for samples in sizes]
    whole = parts[0]
    for part in parts[1:]:
        whole = Total((*getattr(whole, "parts", (whole,)), part), nbytes(whole) + nbytes(part))
    assert (whole.as_one is not None) == one
    expected = sum(dense(part).sum(0) for part in parts)
    assert torch.equal(whole.count(), expected)
    assert whole.samples == sum(sizes)
    if one:
        assert torch.equal(whole.as_one.count(), expected)
        assert torch.equal(whole.as_one.count_masks(), expected)


def test_totals_of_totals_are_flat(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "nbytes", 0)
    parts = [outer(samples) for samples in (3, 4, 5)]
    assert total([total(parts[:2]), parts[2]]).parts == tuple(parts)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 70)), min_size=1, max_size=3))
def test_a_total_counts_its_parts_one_after_the_other(parts):
    activities = [make(samples) for make, samples in parts]
    whole = total(activities)
    assert torch.equal(whole.count(), sum(dense(part).sum(0) for part in activities))
    assert whole.samples == sum(samples for _, samples in parts)
    used, counts = whole.count_rows()
    if used is not None:
        assert torch.equal(torch.zeros(4, 3).long().index_copy(0, used, counts), whole.count())


@pytest.mark.parametrize("make", KINDS)
def test_masks_of_a_range_are_a_slice(make):
    activity = total([make(7), make(5)])
    if not isinstance(activity, Counts):
        assert torch.equal(activity.masks(4, 9), dense(activity)[4:9])


@pytest.mark.parametrize("make", KINDS)
def test_reached_are_the_samples_with_any_output_gradient(make):
    activity = make(20)
    reached = activity.reached()
    assert reached.shape == (20,)
    # a sample that reaches an element has an output gradient
    assert not (dense(activity).flatten(1).any(1) & ~reached).any()
    assert torch.equal(Total((activity,) * 2, 2 * nbytes(activity)).reached(), reached.repeat(2))
    assert torch.equal(joint([activity, activity]).reached(), reached)


@pytest.mark.parametrize("turned", [(True, True), (False, False), (False, True)])
def test_a_joint_of_linear_maps_asks_for_the_gradients_at_their_outputs(turned):
    lead, full = pack(torch.rand(40, 4) < 0.1), pack(torch.rand(40, 3) < 0.9)
    uses = [Outer(SHAPE, lead, full, transposed=each) for each in turned]
    expected = uses[0].reached() | uses[1].reached()
    assert torch.equal(joint(uses).reached(), expected)


def test_counts_belong_to_who_asked_for_them():
    activity = Counts(torch.ones(2, dtype=torch.int64), 3)
    activity.count().zero_()
    assert activity.count().tolist() == [1, 1]


def test_bits_that_would_outgrow_the_counts_become_counts():
    assert isinstance(total([elements(640)] * 2), Total)  # little
    parts = [elements(64 * 400) for _ in range(2)]
    assert isinstance(total(parts), Counts)
    wide = Outer(torch.Size([40, 30]), pack(mask(64, 40)), pack(mask(64, 30)))
    assert isinstance(total([wide, wide]), Total)


def test_counts_have_no_masks():
    with pytest.raises(TypeError, match="hold no mask"):
        Counts(torch.ones(2), 3).masks(0, 1)
    with pytest.raises(TypeError, match="do not say which"):
        Counts(torch.ones(2), 3).reached()


def test_shared_activity_is_repeated_by_each_sample():
    use = elements(2)
    shared = Shared(use, 3)
    assert shared.samples == 6
    assert torch.equal(shared.count(), 3 * use.count())
    assert torch.equal(shared.masks(0, 6), dense(use).repeat(3, 1, 1))
    assert torch.equal(shared.reached(), use.reached().repeat(3))
