"""Cases with DistributedDataParallel and with gradients averaged by hand."""

import contextlib
import copy
import functools
import itertools
import weakref

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import truestep
from ranks.reference import (
    Attentive,
    Fork,
    Joint,
    Sent,
    assert_same_counts,
    assert_same_gradients,
    assert_same_step_sizes,
    assert_same_weights,
    deal,
    globally_normalised,
    wide,
)
from truestep import combine, wire
from truestep.activity import Outer
from zoo import ZOO, classify, mlp, sparse_inputs


def parallel(model, **options):
    wrapped = DistributedDataParallel(copy.deepcopy(model).double(), **options)
    counter = truestep.SampleCounter(wrapped)
    optimizer = truestep.AdaptiveBatchSGD(
        wrapped.parameters(), lr=0.1, momentum=0.5, counter=counter
    )
    return wrapped, counter, optimizer


def as_it_is(model):
    return model


def train_together(model, loss_fn, inputs, targets, steps=2, through=as_it_is, **options):
    """Some steps on uneven parts of a batch equal those of one process on the whole."""
    joint = Joint(model)
    wrapped, counter, optimizer = parallel(model, **options)
    call = through(wrapped)
    inputs = wide(inputs)
    targets = wide(targets)
    for step in range(steps):
        set_to_none = step != 1
        joint.optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_fn(joint.model(inputs), targets).backward()
        mine = deal(targets)
        globally_normalised(loss_fn, call(deal(inputs)), mine, len(targets)).backward()
        assert counter.batch_size == len(mine)
        assert_same_gradients(wrapped, joint)
        assert_same_counts(counter, joint)
        assert_same_step_sizes(counter, joint, wrapped)
        joint.optimizer.step()
        optimizer.step()
        assert_same_weights(wrapped, joint)


def zoo(**options):
    for name, make in ZOO.items():
        model, loss_fn, inputs, targets = make()
        try:
            train_together(model, loss_fn, inputs, targets, **options)
        except Exception as error:
            raise AssertionError(f"{name} with {options}") from error


def every_model_equals_one_process():
    zoo()


def gradients_may_be_views_of_buckets():
    zoo(gradient_as_bucket_view=True)


def a_static_graph_equals_one_process():
    for view in (False, True):
        for name in ("mlp", "twice", "two tables"):
            train_together(*ZOO[name](), static_graph=True, gradient_as_bucket_view=view, steps=3)


def a_compiled_wrapper_equals_one_process():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    through = functools.partial(torch.compile, backend=backend)
    counts = {}
    for name in ("mlp", "twice", "sequence", "tied"):
        for small in (True, False):
            torch.compiler.reset()
            graphs.clear()
            with pytest.MonkeyPatch.context() as patch:
                if small:  # torch.compile makes a graph for each bucket
                    patch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 64)
                options = {"bucket_cap_mb": 1e-4} if small else {"gradient_as_bucket_view": True}
                train_together(*ZOO[name](), steps=3, through=through, **options)
            counts[name, small] = len(graphs)
    for name in ("twice", "sequence", "tied"):
        assert counts[name, True] > counts[name, False], counts


def gradient_penalties_equal_one_process():
    model, inputs = mlp(), sparse_inputs(9, 4).double()
    joint, (wrapped, counter, optimizer) = Joint(model), parallel(model)

    def backward(network, given):
        given = given.clone().requires_grad_()
        output = network(given)
        (slope,) = torch.autograd.grad(output.sum(), given, create_graph=True)
        (output.square().sum() + (slope.square().sum(1) - 1).square().sum()).backward()

    for _ in range(3):
        joint.optimizer.zero_grad()
        optimizer.zero_grad()
        backward(joint.model, inputs)
        backward(wrapped, deal(inputs))
        assert_same_counts(counter, joint)
        assert_same_step_sizes(counter, joint, wrapped)


def layers_with_stacked_parameters_equal_one_process():
    train_together(*classify(Attentive(), sparse_inputs(9, 5, 4)))


def sparse_gradients_equal_one_process():
    model = nn.Sequential(nn.EmbeddingBag(8, 5, mode="sum", sparse=True), nn.Linear(5, 3))
    train = classify(model, torch.randint(0, 8, (7, 4)))
    joint, inputs = Joint(train[0]), train[2]
    wrapped, counter, _ = parallel(train[0])
    train[1](joint.model(inputs), train[3]).backward()
    mine = deal(train[3])
    globally_normalised(train[1], wrapped(deal(inputs)), mine, len(inputs)).backward()
    assert_same_counts(counter, joint)
    assert_same_step_sizes(counter, joint, wrapped)
    joint.counter.correct_gradients()
    counter.correct_gradients()
    assert_same_gradients(wrapped, joint)


def even_batches_need_no_normalisation():
    model, loss_fn, inputs, targets = classify(mlp(), sparse_inputs(12, 4))
    joint, (wrapped, counter, optimizer) = Joint(model), parallel(model)
    sizes = [12 // dist.get_world_size()] * dist.get_world_size()
    loss_fn(joint.model(wide(inputs)), targets).backward()
    loss_fn(wrapped(deal(wide(inputs), sizes)), deal(targets, sizes)).backward()
    assert_same_gradients(wrapped, joint)
    assert_same_counts(counter, joint)
    joint.optimizer.step()
    optimizer.step()
    assert_same_weights(wrapped, joint)


def accumulation_under_no_sync_equals_the_joint_batch():
    for view in (False, True):
        for synchronised in (False, True):
            model, loss_fn, inputs, targets = classify(mlp(), sparse_inputs(67, 4))
            inputs, joint = wide(inputs), Joint(model)
            wrapped, counter, optimizer = parallel(model, gradient_as_bucket_view=view)
            for step in range(3):
                joint.optimizer.zero_grad(set_to_none=step != 1)
                optimizer.zero_grad(set_to_none=step != 1)
                loss_fn(joint.model(inputs), targets).backward()
                mine, goals = deal(inputs), deal(targets)
                for part in (slice(None, 2), slice(2, 7), slice(7, None)):
                    last = part.stop is None
                    waiting = (
                        contextlib.nullcontext() if last or synchronised else wrapped.no_sync()
                    )
                    with waiting:
                        globally_normalised(
                            loss_fn, wrapped(mine[part]), goals[part], 67
                        ).backward()
                assert counter.batch_size == len(mine)
                assert_same_gradients(wrapped, joint)
                assert_same_counts(counter, joint)
                assert_same_step_sizes(counter, joint, wrapped)
                joint.optimizer.step()
                optimizer.step()
                assert_same_weights(wrapped, joint)


def ranks_may_leave_parameters_unused():
    for view in (False, True):
        inputs = sparse_inputs(9, 4).double()
        # Rank 0 goes left and the others right, as one process does whose first samples are positive.
        first = torch.tensor(len(deal(inputs)))
        dist.broadcast(first, 0)
        inputs[:, 0] = -1.0
        inputs[:first, 0] = 1.0
        targets = torch.randint(0, 3, (9,))
        model = Fork()
        joint = Joint(model)
        wrapped, counter, optimizer = parallel(
            model, find_unused_parameters=True, gradient_as_bucket_view=view
        )
        rank = dist.get_rank()
        for step in range(4):
            joint.optimizer.zero_grad(set_to_none=step != 1)
            optimizer.zero_grad(set_to_none=step != 1)
            functional.cross_entropy(joint.model(inputs), targets).backward()
            mine = deal(inputs)
            way = "left" if rank == 0 else "right"
            output = wrapped(mine, "both" if step == 2 else way)
            globally_normalised(functional.cross_entropy, output, deal(targets), 9).backward()
            assert_same_gradients(wrapped, joint)
            assert_same_counts(counter, joint)
            if step == 3:
                counter.correct_gradients()
                joint.counter.correct_gradients()
                assert_same_gradients(wrapped, joint)
            else:
                assert_same_step_sizes(counter, joint, wrapped)
            joint.optimizer.step()
            optimizer.step()
            assert_same_weights(wrapped, joint)
    # What a larger batch left behind is nothing to a smaller one: rank r goes its way with r + 1 samples.
    wrapped, counter, optimizer = parallel(Fork(), find_unused_parameters=True)
    wrapped(inputs).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    wrapped(inputs[: rank + 1], way).sum().backward()
    assert counter.batch_size == rank + 1
    assert ("left.weight" in counter.counts()) == (way == "left")
    assert whole_batch(counter) == sum(range(dist.get_world_size() + 1))
    # A branch that nobody uses keeps no gradient and takes no part.
    wrapped, counter, optimizer = parallel(Fork(), find_unused_parameters=True)
    wrapped(inputs[: rank + 1], "left").sum().backward()
    optimizer.step()
    assert "right.weight" not in counter.counts(reduce=True)
    assert whole_batch(counter) == sum(range(dist.get_world_size() + 1))


def whole_batch(counter):
    parameters = [p for p in counter._records.names if p.grad is not None]
    counter.prepare(parameters)
    sizes = {counter._batch.find(p)[1] for p in parameters}
    counter.mark_step([])
    assert len(sizes) == 1
    return sizes.pop()


def what_a_rank_has_left_unused_since_adds_nothing():
    """In a batch that all used, then in one in which rank 0 alone goes left."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    way = "left" if rank == 0 else "right"
    for view, to_none, steps in itertools.product((False, True), repeat=3):
        wrapped, counter, optimizer = parallel(
            Fork(), find_unused_parameters=True, gradient_as_bucket_view=view
        )
        for ways in ("both", way, way):
            optimizer.zero_grad(set_to_none=to_none)
            wrapped(torch.rand(5, 4).double() + 0.1, ways).sum().backward()
            counts = counter.counts(reduce=True)
            if steps:
                optimizer.step()
        assert int(counts["left.bias"].max()) <= 5
        assert int(counts["right.bias"].max()) <= 5 * (ranks - 1)
        own = counter.counts()
        assert bool(own["left.bias"].any()) == (rank == 0) if "left.bias" in own else rank > 0
        assert counter.batch_size == 5


def gradients_added_up_by_hand_may_be_zeros_that_nobody_counted():
    model = Fork().double()
    counter = truestep.SampleCounter(model, process_group=dist.group.WORLD)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    before = copy.deepcopy(model.state_dict())
    for to_none in (True, False, False):
        optimizer.zero_grad(set_to_none=to_none)
        model(torch.rand(5, 4).double(), "right").sum().backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        optimizer.step()
    after = model.state_dict()
    assert torch.equal(before["left.weight"], after["left.weight"])
    assert not torch.equal(before["right.bias"], after["right.bias"])


def transforms_clip_and_schedulers_see_the_joint_batch():
    model, loss_fn, inputs, targets = classify(mlp(), sparse_inputs(9, 4))
    inputs = wide(inputs)
    weights = []
    for alone in (True, False):
        trained = copy.deepcopy(model).double()
        trained = trained if alone else DistributedDataParallel(trained)
        counter = truestep.SampleCounter(trained)
        optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
        truestep.attach(
            optimizer,
            truestep.mean_effective_gradient(counter, factor_limit=3.0),
            truestep.directional_boost(),
        )
        for step in range(4):
            optimizer.zero_grad()
            if alone:
                loss_fn(trained(inputs), targets).backward()
            else:
                globally_normalised(
                    loss_fn, trained(deal(inputs)), deal(targets), len(inputs)
                ).backward()
            if step % 2:
                counter.correct_gradients(factor_limit=3.0)
                nn.utils.clip_grad_norm_(trained.parameters(), 0.1)
            optimizer.step()
        weights.append([p.detach() for p in trained.parameters()])
    for one, many in zip(*weights, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-12)


def positions_add_up_over_ranks():
    model = nn.Sequential(nn.Embedding(9, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs, targets = torch.randint(0, 9, (7, 5)), torch.randint(0, 3, (7, 5))
    targets[:, 2:] = -100
    joint = Joint(model, unit="position")
    wrapped = DistributedDataParallel(copy.deepcopy(model).double())
    counter = truestep.SampleCounter(wrapped, unit="position")

    def loss(output, goals):
        return functional.cross_entropy(output.flatten(0, 1), goals.flatten(), reduction="sum")

    loss(joint.model(inputs), targets).backward()
    loss(wrapped(deal(inputs)), deal(targets)).backward()
    assert whole_batch(counter) == joint.counter.batch_size == 14
    assert_same_counts(counter, joint)


def a_counter_on_the_wrapped_model_joins_when_it_is_called():
    model = mlp()
    inner = copy.deepcopy(model).double()
    counter = truestep.SampleCounter(inner)
    wrapped = DistributedDataParallel(inner, gradient_as_bucket_view=True)
    inputs, joint = sparse_inputs(9, 4).double(), Joint(model)
    joint.model(inputs).square().sum().backward()
    wrapped(deal(inputs)).square().sum().backward()
    assert_same_counts(counter, joint)
    assert whole_batch(counter) == 9


def gradients_may_be_averaged_by_hand():
    model, loss_fn, inputs, targets = classify(Fork(), sparse_inputs(9, 4))
    inputs, joint = wide(inputs), Joint(model)
    mine = copy.deepcopy(model).double()
    counter = truestep.SampleCounter(mine, process_group=dist.group.WORLD)
    optimizer = truestep.AdaptiveBatchSGD(mine.parameters(), lr=0.1, momentum=0.5, counter=counter)
    for _ in range(2):
        loss_fn(joint.model(inputs), targets).backward()
        part, goals = deal(inputs), deal(targets)
        if len(part):
            globally_normalised(loss_fn, mine(part), goals, len(inputs)).backward()
        for parameter in mine.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        assert_same_counts(counter, joint)
        joint.optimizer.step()
        optimizer.step()
        assert_same_weights(mine, joint)
        joint.optimizer.zero_grad()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        mine(inputs).sum().backward()
    with pytest.raises(truestep.TruestepError, match=r"'left.weight'.* on ranks \[0\] alone"):
        optimizer.step()


def a_plain_model_does_without_collectives():
    model = mlp()
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    with Sent() as sent:
        model(sparse_inputs(dist.get_rank() + 1, 4)).sum().backward()
        assert counter.counts(reduce=True)["0.bias"].max() <= dist.get_rank() + 1
        counter.correct_gradients()
        optimizer.step()
    assert not sent.calls


def a_gradient_set_by_hand_has_no_record():
    for where in ({0}, set(range(dist.get_world_size()))):
        for view in (False, True):
            wrapped, counter, optimizer = parallel(mlp(), gradient_as_bucket_view=view)
            wrapped(sparse_inputs(3, 4).double()).sum().backward()
            bias = wrapped.module[0].bias
            if dist.get_rank() in where:
                bias.grad = torch.ones_like(bias)
            with pytest.raises(truestep.TruestepError, match=r"'0.bias' has a gradient.*by hand"):
                optimizer.step()
    # A backward pass that goes elsewhere does not take it for the gradient that it replaced.
    wrapped, counter, optimizer = parallel(
        Fork(), find_unused_parameters=True, gradient_as_bucket_view=True
    )
    wrapped(sparse_inputs(3, 4).double()).sum().backward()
    wrapped.module.right.bias.grad = torch.ones(5, dtype=torch.float64)
    for _ in range(2):
        with wrapped.no_sync():
            wrapped(sparse_inputs(3, 4).double(), "left").sum().backward()
        with pytest.raises(truestep.TruestepError, match=r"'right.bias' has a gradient.*by hand"):
            counter.effective_gradient(wrapped.module.right.bias)


def join_is_refused():
    wrapped, counter, _ = parallel(mlp())
    with wrapped.join():
        wrapped(sparse_inputs(3, 4).double()).sum().backward()
        with pytest.raises(truestep.TruestepError, match="empty batches"):
            counter.correct_gradients()


def a_batch_size_that_is_set_is_each_ranks_share():
    wrapped, counter, _ = parallel(mlp())
    wrapped(sparse_inputs(3, 4).double()).sum().backward()
    counter.batch_size = 10 + dist.get_rank()
    assert whole_batch(counter) == sum(10 + rank for rank in range(dist.get_world_size()))


def header_of(counter):
    """How many numbers describe the bits of the model's only parameter."""
    (record,) = counter._records.committed.values()
    header = []
    assert wire._write(record.activity, header, [])
    assert len(header) < 40
    return len(header)


def words_of(samples, units):
    return -(-samples // 64) * units


def the_fewest_bytes_move():
    """The formula of docs/distributed.md, for a layer on either side of the choice."""
    size = dist.get_world_size()
    for samples, features, outputs in ((64, 400, 200), (64, 4, 6), (4096, 100, 60), (70, 400, 3)):
        wrapped = DistributedDataParallel(nn.Linear(features, outputs, bias=False))
        counter = truestep.SampleCounter(wrapped)
        optimizer = truestep.AdaptiveBatchSGD(wrapped.parameters(), lr=0.1, counter=counter)
        wrapped(sparse_inputs(samples, features)).relu().sum().backward()
        elements = features * outputs
        bits = header_of(counter) + words_of(samples, features + outputs)
        message = min(bits, 2 + -(-elements // 2))
        with Sent() as sent:
            optimizer.step()
        agreement = 5 * 8 * (size - 1)
        if size * message < elements:
            assert sent.calls == ["all_to_all", "all_to_all"]
            assert sent.told == agreement + 8 * message * (size - 1)
            assert sent.told - agreement < 2 * (size - 1) / size * 4 * elements
        else:
            assert sent.calls == ["all_to_all", "all_reduce"]
            assert sent.told == agreement
            assert sent.reduced == 2 * (size - 1) / size * 4 * elements
            assert sent.reduced <= 8 * message * (size - 1)


def a_step_makes_three_collectives_for_all_parameters():
    layers = [nn.Linear(30, 30) for _ in range(10)]
    wrapped, counter, optimizer = parallel(nn.Sequential(*layers))
    wrapped(sparse_inputs(5, 30).double()).sum().backward()
    with Sent() as sent:
        optimizer.step()
    assert sent.calls == ["all_to_all", "all_reduce", "all_to_all"]
    assert counter._batch._exchange is None


def an_embeddings_indices_move_with_its_bits():
    size = dist.get_world_size()
    wrapped = DistributedDataParallel(nn.Embedding(5000, 64))
    counter = truestep.SampleCounter(wrapped)
    inputs = torch.randint(0, 5000, (16, 3))
    wrapped(inputs).relu().sum().backward()
    (record,) = counter._records.committed.values()
    with Sent() as sent:
        counts = counter.counts(reduce=True)["weight"]
    told = sent.told - 5 * 8 * (size - 1)
    entries, header = 48, header_of(counter)
    # a row and a sample of 32 bits for each look-up, and one bit for each of its features
    assert told == 8 * (size - 1) * (header + entries + words_of(entries, 64))
    expected = record.activity.count()
    dist.all_reduce(expected)
    assert torch.equal(counts, expected)


def convolutions_move_unfolded_bits_never():
    size = dist.get_world_size()
    wrapped = DistributedDataParallel(nn.Conv2d(16, 32, 5, bias=False))
    counter = truestep.SampleCounter(wrapped)
    wrapped(sparse_inputs(1, 16, 12, 12)).square().sum().backward()
    (record,) = counter._records.committed.values()
    assert isinstance(record.activity, Outer)
    with Sent() as sent:
        counts = counter.counts(reduce=True)["weight"]
    assert sent.calls == ["all_to_all", "all_to_all"]
    assert sent.told < 8 * (size - 1) * (words_of(64, 3 * 16 + 32) + 150)
    expected = record.activity.count()
    dist.all_reduce(expected)
    assert torch.equal(counts, expected)


def parameters_travel_in_buckets():
    from truestep import exchange  # noqa: PLC0415

    limit, exchange.BUCKET_ELEMENTS = exchange.BUCKET_ELEMENTS, 10
    try:
        for name in ("mlp", "cnn", "tied embedding"):
            train_together(*ZOO[name](), steps=1)
    finally:
        exchange.BUCKET_ELEMENTS = limit


def a_counter_goes_with_its_last_reference():
    # What outlives destroy_process_group() keeps the group's threads running.
    wrapped, counter, optimizer = parallel(mlp())
    wrapped(sparse_inputs(3, 4).double()).sum().backward()
    optimizer.step()
    reference = weakref.ref(counter)
    del counter, optimizer
    assert reference() is None


def counts_that_outgrew_their_bits_are_reduced():
    model, inputs = nn.Linear(3, 2), sparse_inputs(900, 3).double()
    joint, (wrapped, counter, _) = Joint(model), parallel(model)
    joint.model(inputs).sum().backward()
    little, combine.LITTLE = combine.LITTLE, 0
    try:
        with wrapped.no_sync():
            for part in deal(inputs).split(50):
                wrapped(part).sum().backward()
    finally:
        combine.LITTLE = little
    assert type(counter._records.committed[id(wrapped.module.weight)].activity).__name__ == "Counts"
    assert_same_counts(counter, joint)


CASES = [
    every_model_equals_one_process,
    gradients_may_be_views_of_buckets,
    a_static_graph_equals_one_process,
    a_compiled_wrapper_equals_one_process,
    gradient_penalties_equal_one_process,
    layers_with_stacked_parameters_equal_one_process,
    sparse_gradients_equal_one_process,
    even_batches_need_no_normalisation,
    accumulation_under_no_sync_equals_the_joint_batch,
    ranks_may_leave_parameters_unused,
    what_a_rank_has_left_unused_since_adds_nothing,
    gradients_added_up_by_hand_may_be_zeros_that_nobody_counted,
    transforms_clip_and_schedulers_see_the_joint_batch,
    positions_add_up_over_ranks,
    a_counter_on_the_wrapped_model_joins_when_it_is_called,
    gradients_may_be_averaged_by_hand,
    a_plain_model_does_without_collectives,
    a_gradient_set_by_hand_has_no_record,
    join_is_refused,
    a_batch_size_that_is_set_is_each_ranks_share,
    the_fewest_bytes_move,
    a_step_makes_three_collectives_for_all_parameters,
    an_embeddings_indices_move_with_its_bits,
    convolutions_move_unfolded_bits_never,
    parameters_travel_in_buckets,
    a_counter_goes_with_its_last_reference,
    counts_that_outgrew_their_bits_are_reduced,
]
