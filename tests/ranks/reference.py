"""What ranks compare themselves with: one process on the joint batch; and how the batch is dealt out."""

import copy

import torch
from torch import distributed as dist
from torch import nn

import truestep


def deal(samples, sizes=None):
    """This rank's part of a joint batch; uneven unless sizes are given."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if sizes is None:
        # Rank 0 takes half, and so on: 9 over 3 ranks is 5, 2, 2; 1 over 2 is 1, 0.
        sizes, left = [], len(samples)
        for others in range(size - 1, -1, -1):
            sizes.append(left if others == 0 else -(-left // 2))
            left -= sizes[-1]
    start = sum(sizes[:rank])
    return samples[start : start + sizes[rank]]


def globally_normalised(loss_fn, output, targets, samples):
    """A rank's loss whose average over ranks is the mean over the joint batch."""
    if len(targets) == 0:
        return output.sum() * 0
    return loss_fn(output, targets) * len(targets) / samples * dist.get_world_size()


class Joint:
    """A float64 copy of a model in this process alone, with a counter and aSGD."""

    def __init__(self, model, **options):
        self.model = copy.deepcopy(model).double()
        self.counter = truestep.SampleCounter(self.model, **options)
        self.optimizer = truestep.AdaptiveBatchSGD(
            self.model.parameters(), lr=0.1, momentum=0.5, counter=self.counter
        )


def wide(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_counts(counter, joint):
    """The reduced counts and N equal those of one process; the ranks' own counts add up to them."""
    expected = joint.counter.counts()
    reduced = counter.counts(reduce=True)
    assert reduced.keys() == expected.keys()
    for name, values in expected.items():
        found = whole(reduced[name])
        assert found.dtype == torch.int64
        assert torch.equal(found, values), name
    own = counter.counts()
    for name, values in expected.items():
        added = own[name].clone() if name in own else torch.zeros_like(values)
        dist.all_reduce(added)
        assert torch.equal(added, values), name


def assert_same_step_sizes(counter, joint, model):
    """The N and m that a step would use."""
    named = dict(model.named_parameters())
    chosen = [p for p in named.values() if p.grad is not None]
    counter.prepare(chosen)
    for name, parameter in named.items():
        other = joint.model.get_parameter(name.removeprefix("module."))
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            activity, size = counter._batch.find(parameter)
            expected = joint.counter._batch.find(other)
            assert size == expected[1], (name, size, expected[1])
            counts = expected[0].count()
            if hasattr(parameter, "device_mesh"):
                rank, ranks = dist.get_rank(), dist.get_world_size()
                pieces = counts.chunk(ranks)
                counts = pieces[rank] if rank < len(pieces) else counts[:0]
            assert torch.equal(activity.count().long(), counts), name
    counter.mark_step([])


def assert_same_weights(model, joint):
    for name, parameter in model.named_parameters():
        other = joint.model.get_parameter(name.removeprefix("module."))
        torch.testing.assert_close(
            whole(parameter.detach()), other.detach(), rtol=1e-9, atol=1e-12, msg=name
        )


def assert_same_gradients(model, joint):
    for name, parameter in model.named_parameters():
        other = joint.model.get_parameter(name.removeprefix("module."))
        if other.grad is not None:
            torch.testing.assert_close(
                whole(parameter.grad).to_dense(), other.grad.to_dense(), rtol=1e-9, atol=1e-12
            )


class Sent:
    """Counts the bytes that this rank hands to collectives for other ranks, while it is entered.

    An all-to-all sends what is addressed to others; a ring all-reduce 2 (W - 1) / W times its tensor.
    """

    def __init__(self):
        self.told, self.reduced, self.calls = 0, 0, []

    def __enter__(self):
        self._real = dist.all_to_all_single, dist.all_reduce
        dist.all_to_all_single, dist.all_reduce = self._all_to_all, self._all_reduce
        return self

    def __exit__(self, *_):
        dist.all_to_all_single, dist.all_reduce = self._real

    def _all_to_all(self, output, input, output_splits=None, input_splits=None, **options):
        size, rank = dist.get_world_size(), dist.get_rank()
        splits = input_splits or [len(input) // size] * size
        assert splits[rank] == 0 or input_splits is None
        row = input[0].nbytes if len(input) else 0
        self.told += sum(split * row for to, split in enumerate(splits) if to != rank)
        self.calls.append("all_to_all")
        return self._real[0](output, input, output_splits, input_splits, **options)

    def _all_reduce(self, tensor, **options):
        size = dist.get_world_size()
        self.reduced += 2 * (size - 1) * tensor.nbytes / size
        self.calls.append("all_reduce")
        return self._real[1](tensor, **options)


class Attentive(nn.Module):
    """Attention and a recurrent layer, whose parameters stack several."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.memory = nn.GRU(4, 3, batch_first=True)

    def forward(self, x):
        hidden, _ = self.attention(x, x, x)
        return self.memory(torch.relu(hidden))[0].mean(1)


class Fork(nn.Module):
    """Two branches of which a call uses one, so that ranks may leave a parameter unused."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(4, 5)
        self.right = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x, way="both"):
        chosen = (x[:, :1] > 0).to(x.dtype)
        if way == "left":
            return self.head(torch.relu(self.left(x)))
        if way == "right":
            return self.head(torch.relu(self.right(x)))
        return self.head(torch.relu(chosen * self.left(x) + (1 - chosen) * self.right(x)))
