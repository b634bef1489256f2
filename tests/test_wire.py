import pytest
import torch

import truestep
from truestep.combine import Counts, Shared, total
from truestep.wire import _write, message, of_rows, read
from zoo import ZOO


def activities(name):
    """The activity of each parameter of a model of the zoo."""
    model, loss_fn, inputs, targets = ZOO[name]()
    counter = truestep.SampleCounter(model)
    loss_fn(model(inputs), targets).backward()
    return [record.activity for record in counter._records.committed.values()]


def end_to_end(tensors):
    nothing = torch.empty(0, dtype=torch.int64)  # activity whose bits are all on holds no tensor
    return torch.cat([nothing, *(tensor.reshape(-1) for tensor in tensors)])


def sent(activity):
    """What arrives of an activity."""
    parcel = message(activity)
    words = end_to_end(parcel.make())
    assert words.dtype == torch.int64
    assert len(words) == parcel.length
    return read(parcel.header, words, activity.shape)


@pytest.mark.parametrize("name", ZOO)
def test_what_is_sent_arrives(name):
    for activity in activities(name):
        for whole in (activity, Shared(activity, 3), total([activity, activity])):
            found = sent(whole)
            assert (found.shape, found.samples) == (whole.shape, whole.samples)
            assert torch.equal(found.count().long(), whole.count())


@pytest.mark.parametrize("name", ZOO)
def test_rows_of_an_activity_count_as_rows_of_its_counts(name):
    for activity in activities(name):
        rows = activity.shape[0]
        for start, stop in ((0, rows), (0, 1), (1, rows), (rows // 2, rows), (rows, rows)):
            part = of_rows(activity, start, stop)
            assert part.shape == (stop - start, *activity.shape[1:])
            assert part.samples == activity.samples
            assert torch.equal(part.count(), activity.count()[start:stop])
            assert torch.equal(sent(part).count().long(), activity.count()[start:stop])


@pytest.mark.parametrize("name", ZOO)
def test_bits_arrive_as_they_are(name):
    for activity in activities(name):
        for whole in (activity, Shared(activity, 3), total([activity, activity])):
            header, tensors = [], []
            if not _write(whole, header, tensors):
                assert isinstance(whole, Counts)  # bits that outgrew their counts
                continue
            found = read(header, end_to_end(tensors), whole.shape)
            assert type(found) is type(whole)
            kept = list(found.tensors()), list(whole.tensors())
            assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))
            assert torch.equal(found.count(), whole.count())


def test_counts_are_sent_as_counts():
    counts = Counts(torch.arange(6).reshape(3, 2), 9)
    found = sent(counts)
    assert torch.equal(found.count().long(), counts.counts)
    assert torch.equal(sent(of_rows(counts, 1, 3)).count().long(), counts.counts[1:])
