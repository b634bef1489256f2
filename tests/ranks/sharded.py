"""Cases with fully_shard (FSDP2): each rank owns some rows of each parameter."""

import copy
import functools

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional

import truestep
from ranks.reference import (
    Attentive,
    Joint,
    Sent,
    assert_same_counts,
    assert_same_gradients,
    assert_same_step_sizes,
    assert_same_weights,
    deal,
    globally_normalised,
    whole,
    wide,
)
from truestep.rules import find_rule
from zoo import ZOO, Gated, classify, mlp, sparse_inputs


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model, *, parts=True, **options):
    """fully_shard on a float64 copy: on its first and second child by themselves, and on the rest."""
    model = copy.deepcopy(model).double()
    if parts:
        shared = [p for m in model.modules() for p in m.parameters(recurse=False)]
        alone = len({id(p) for p in shared}) == len(shared)
        for child in list(model.children())[:2]:
            if alone and any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh(), **options)
    return fully_shard(model, mesh=mesh(), **options)


def sharded(model, **options):
    model = shard(model, **options)
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, momentum=0.5, counter=counter)
    return model, counter, optimizer


def as_it_is(model):
    return model


def train_together(model, loss_fn, inputs, targets, steps=2, through=as_it_is, **options):
    joint = Joint(model)
    mine, counter, optimizer = sharded(model, **options)
    call = through(mine)
    inputs, targets = wide(inputs), wide(targets)
    for step in range(steps):
        set_to_none = step != 1
        joint.optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_fn(joint.model(inputs), targets).backward()
        goals = deal(targets)
        globally_normalised(loss_fn, call(deal(inputs)), goals, len(targets)).backward()
        assert counter.batch_size == len(goals)
        assert_same_gradients(mine, joint)
        assert_same_counts(counter, joint)
        assert_same_step_sizes(counter, joint, mine)
        joint.optimizer.step()
        optimizer.step()
        assert_same_weights(mine, joint)


def sharded_models_equal_one_process():
    for place, (name, make) in enumerate(ZOO.items()):
        parts = place % 2 == 0  # parts sharded by themselves, or all as one
        try:
            train_together(*make(), parts=parts)
        except Exception as error:
            raise AssertionError(f"{name}, parts {parts}") from error


COMPILE = functools.partial(torch.compile, backend="aot_eager")


def compiled_models_equal_one_process():
    for name in ("mlp", "twice", "sequence", "cnn", "tied embedding"):
        for parts in (True, False):
            torch.compiler.reset()
            try:
                train_together(*ZOO[name](), steps=3, through=COMPILE, parts=parts)
            except Exception as error:
                raise AssertionError(f"{name}, parts {parts}") from error


def gradients_may_be_reduced_after_several_backward_passes():
    for later in (True, False):
        model, loss_fn, inputs, targets = classify(mlp(), sparse_inputs(67, 4))
        inputs, joint = wide(inputs), Joint(model)
        mine, counter, optimizer = sharded(model)
        for step in range(3):
            joint.optimizer.zero_grad(set_to_none=step != 1)
            optimizer.zero_grad(set_to_none=step != 1)
            loss_fn(joint.model(inputs), targets).backward()
            part, goals = deal(inputs), deal(targets)
            for piece in (slice(None, 2), slice(2, 7), slice(7, None)):
                if later:
                    mine.set_requires_gradient_sync(piece.stop is None)
                globally_normalised(loss_fn, mine(part[piece]), goals[piece], 67).backward()
            assert counter.batch_size == len(part)
            assert_same_gradients(mine, joint)
            assert_same_counts(counter, joint)
            assert_same_step_sizes(counter, joint, mine)
            joint.optimizer.step()
            optimizer.step()
            assert_same_weights(mine, joint)
        assert not counter._records._held


def gradients_of_a_sharded_model_that_are_asked_for_are_not_counted():
    model, loss_fn, inputs, targets = classify(mlp(), sparse_inputs(9, 4))
    inputs, joint = wide(inputs), Joint(model)
    mine, counter, _ = sharded(model)
    loss_fn(joint.model(inputs), targets).backward()
    asked = deal(inputs).clone().requires_grad_()
    torch.autograd.grad(mine(asked).sum(), asked)
    assert counter.batch_size == 0
    assert not counter._records._held
    globally_normalised(loss_fn, mine(deal(inputs)), deal(targets), len(inputs)).backward()
    assert_same_counts(counter, joint)


def gradient_penalties_equal_one_process():
    for parts in (True, False):
        model, inputs = mlp(), sparse_inputs(9, 4).double()
        joint, (mine, counter, _) = (
            Joint(model),
            sharded(model, parts=parts, reshard_after_forward=False),
        )
        mine.set_reshard_after_backward(False)  # torch differentiates no backward pass otherwise
        for network, rows in ((joint.model, inputs), (mine, deal(inputs))):
            given = rows.clone().requires_grad_()
            output = network(given)
            (slope,) = torch.autograd.grad(output.sum(), given, create_graph=True)
            (output.square().sum() + (slope.square().sum(1) - 1).square().sum()).backward()
        assert_same_counts(counter, joint)


def transforms_work_on_shards():
    model, loss_fn, inputs, targets = classify(mlp(), sparse_inputs(9, 4))
    inputs, weights = wide(inputs), []
    for alone in (True, False):
        trained = copy.deepcopy(model).double() if alone else shard(model)
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
                globally_normalised(loss_fn, trained(deal(inputs)), deal(targets), 9).backward()
            if step % 2:
                counter.correct_gradients(factor_limit=3.0)
                nn.utils.clip_grad_norm_(trained.parameters(), 0.1)
            optimizer.step()
        weights.append([whole(p.detach()) for p in trained.parameters()])
    for one, many in zip(*weights, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-12)


def dasgd_steps_on_shards():
    model, inputs = mlp(), sparse_inputs(8, 4).double()
    alone, many = copy.deepcopy(model).double(), shard(model)
    sizes = [8 // dist.get_world_size()] * (dist.get_world_size() - 1)
    sizes.append(8 - sum(sizes))
    optimizers = [truestep.DASGD(m.parameters(), lr=0.1) for m in (alone, many)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        alone(inputs).square().sum().backward()
        (many(deal(inputs, sizes)).square().sum() * dist.get_world_size()).backward()
        for optimizer in optimizers:
            optimizer.step()
    for one, part in zip(alone.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(whole(part.detach()), one.detach(), rtol=1e-9, atol=1e-12)


def mixed_precision_counts_what_is_computed():
    model, _, inputs, _ = classify(mlp(), sparse_inputs(9, 4))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mine = copy.deepcopy(model)
    fully_shard(mine[0], mesh=mesh(), mp_policy=policy)
    fully_shard(mine, mesh=mesh(), mp_policy=policy)
    counter = truestep.SampleCounter(mine)
    optimizer = truestep.AdaptiveBatchSGD(mine.parameters(), lr=0.1, counter=counter)
    reference = copy.deepcopy(model).bfloat16()
    joint = truestep.SampleCounter(reference)
    reference(inputs.bfloat16()).square().sum().backward()
    mine(deal(inputs)).square().sum().backward()
    counts = counter.counts(reduce=True)
    for name, values in joint.counts().items():
        assert torch.equal(whole(counts[name]), values), name
    optimizer.step()
    assert all(p.dtype == torch.float32 for p in mine.parameters())


def changed_classes_keep_their_rules():
    layer = fully_shard(nn.Linear(3, 2), mesh=mesh())
    assert type(layer) is not nn.Linear
    assert find_rule(layer, truestep.RULES) is truestep.RULES[nn.Linear]
    train_together(*classify(nn.Sequential(nn.Linear(4, 3)), sparse_inputs(5, 4)))
    train_together(*classify(nn.Linear(4, 3), sparse_inputs(5, 4)))


def a_counter_made_before_sharding_says_so():
    model = mlp()
    counter = truestep.SampleCounter(model)
    fully_shard(model, mesh=mesh())
    with pytest.raises(truestep.TruestepError, match=r"fully_shard.*make the counter afterwards"):
        model(sparse_inputs(3, 4))
    counter.close()


class Bypass(nn.Module):
    """Uses a weight both through its module and without it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 4)

    def forward(self, x):
        return functional.linear(torch.relu(self.table(x)), self.table.weight)


def uses_that_bypass_a_sharded_module_are_refused():
    model = fully_shard(Bypass(), mesh=mesh())
    counter = truestep.SampleCounter(model)
    with pytest.raises(truestep.TruestepError, match=r"uses 'table.weight' without calling"):
        model(torch.tensor([1, 2]))
    counter.close()


def uses_that_bypass_a_sharded_module_in_a_graph_are_refused():
    for parts in (True, False):
        torch.compiler.reset()
        model = nn.Sequential(Bypass(), nn.Linear(5, 3))
        if parts:
            fully_shard(model[0], mesh=mesh())
        fully_shard(model, mesh=mesh())
        counter = truestep.SampleCounter(model)
        with pytest.raises(truestep.TruestepError, match=r"uses '0.table.weight' without calling"):
            COMPILE(model)(torch.tensor([1, 2])).sum().backward()
        counter.close()


def other_ways_to_shard_are_refused():
    other = nn.Linear(12, 12, bias=False)
    fully_shard(other, mesh=mesh(), shard_placement_fn=lambda _: Shard(1))
    with pytest.raises(truestep.TruestepError, match=r"'weight' is placed as .*Shard\(0\)"):
        truestep.SampleCounter(other)
    spread = mlp()
    parallelize_module(spread, mesh(), {"0": ColwiseParallel(output_layouts=Replicate())})
    counter = truestep.SampleCounter(spread[0])
    with pytest.raises(truestep.TruestepError, match="tensor parallelism"):
        spread(torch.ones(3, 4))
    assert not counter.counts()
    partly = mlp()
    fully_shard(partly[0], mesh=mesh())
    with pytest.raises(truestep.TruestepError, match=r"'2.weight', '2.bias' are not sharded"):
        truestep.SampleCounter(partly)


def a_sharded_gradient_set_by_hand_has_no_record():
    model, _, optimizer = sharded(mlp())
    model(sparse_inputs(3, 4).double()).sum().backward()
    bias = model[0].bias
    bias.grad = bias.grad.clone()
    with pytest.raises(truestep.TruestepError, match=r"'0.bias' has a gradient.*by hand"):
        optimizer.step()


def a_rank_is_told_about_its_own_rows():
    """The formula of docs/distributed.md: the input bits, and the output bits of the rows that are owned."""
    size, rank = dist.get_world_size(), dist.get_rank()
    for samples, features, outputs in ((64, 400, 200), (64, 4, 6), (4096, 100, 60), (70, 400, 3)):
        model = fully_shard(nn.Linear(features, outputs, bias=False), mesh=mesh())
        counter = truestep.SampleCounter(model)
        optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
        model(sparse_inputs(samples, features)).relu().sum().backward()
        step = -(-outputs // size)
        told = 0
        for other in range(size):
            rows = max(0, min(step, outputs - other * step))
            words = -(-samples // 64) * (features + rows)
            counts = 2 + -(-rows * features // 2)
            if other != rank:
                told += 8 * min(35 + words, counts)
        with Sent() as sent:
            optimizer.step()
        assert sent.calls == ["all_to_all", "all_to_all"]
        assert sent.told - 5 * 8 * (size - 1) == told, (samples, features, outputs)
        # never more than a reduce-scatter of the counts, but for its two numbers of header
        assert told <= (outputs * features * 4 + 8) + 16 * size


def stacked_parameters_are_sharded_over_their_blocks():
    train_together(*classify(Attentive(), sparse_inputs(9, 5, 4)), parts=False)


def layers_that_run_again_may_be_sharded_by_themselves():
    for parts in (True, False):
        for layer in (nn.GRUCell(4, 4), Gated()):
            model = nn.Sequential(layer, nn.Linear(4, 3))
            train_together(*classify(model, sparse_inputs(5, 4)), parts=parts)


def rows_of_a_sharded_embedding_travel_to_their_owners():
    model = nn.Embedding(501, 8)
    inputs = torch.randint(0, 501, (9, 4))
    train_together(model, functional.mse_loss, inputs, torch.randn(9, 4, 8), parts=False)


CASES = [
    sharded_models_equal_one_process,
    compiled_models_equal_one_process,
    gradients_may_be_reduced_after_several_backward_passes,
    gradients_of_a_sharded_model_that_are_asked_for_are_not_counted,
    gradient_penalties_equal_one_process,
    transforms_work_on_shards,
    dasgd_steps_on_shards,
    mixed_precision_counts_what_is_computed,
    changed_classes_keep_their_rules,
    a_counter_made_before_sharding_says_so,
    uses_that_bypass_a_sharded_module_are_refused,
    uses_that_bypass_a_sharded_module_in_a_graph_are_refused,
    other_ways_to_shard_are_refused,
    a_sharded_gradient_set_by_hand_has_no_record,
    a_rank_is_told_about_its_own_rows,
    stacked_parameters_are_sharded_over_their_blocks,
    layers_that_run_again_may_be_sharded_by_themselves,
    rows_of_a_sharded_embedding_travel_to_their_owners,
]
