"""DA-SGD in compiled loops and its twin in torch operations give the same."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import truestep
from truestep.kernels import boosting, dispatch
from truestep.update import boosted

pytestmark = pytest.mark.skipif(not dispatch.installed(), reason="numba is not installed")

# Zeros of both signs, what overflows and underflows when squared, infinities and NaN.
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]
SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def awkward(shape, dtype):
    values = torch.randn(shape, dtype=dtype)
    special = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(len(SPECIAL), shape)]
    return torch.where(torch.rand(shape) < 0.3, special, values)


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert ((one == other) | (one.isnan() & other.isnan())).all()


def steps_of(optimizer, parameters, gradients):
    """Weights and previous gradients after each step."""
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        yield [p.detach().clone() for p in parameters]
        yield [optimizer.state[p]["previous_gradient"].clone() for p in parameters]


@pytest.mark.parametrize("make", [truestep.DASGD, "attached"])
@given(
    shapes=SHAPES,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    weight_decay=st.sampled_from([0.0, 0.3]),
    maximize=st.booleans(),
    lr=st.sampled_from([0.1, torch.tensor(0.1), 0.0]),
)
def test_a_step_equals_its_twin(make, shapes, dtype, weight_decay, maximize, lr):
    parameters = [nn.Parameter(awkward(shape, dtype)) for shape in shapes]
    gradients = [[awkward(shape, dtype) for shape in shapes] for _ in range(3)]
    found = []
    for installed in (True, False):
        own = copy.deepcopy(parameters)
        options = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        if make == "attached":
            optimizer = torch.optim.SGD(own, **options)
            truestep.attach(optimizer, truestep.directional_boost())
        else:
            optimizer = make(own, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "installed", lambda installed=installed: installed)
            found.append(list(steps_of(optimizer, own, gradients)))
    for first, second in zip(*found, strict=True):
        assert_same(first, second)


@given(shapes=SHAPES, weight_decay=st.sampled_from([0.0, 0.3]), maximize=st.booleans())
def test_bfloat16_is_reckoned_in_float32_and_rounded_once(shapes, weight_decay, maximize):
    parameters = [nn.Parameter(awkward(shape, torch.bfloat16)) for shape in shapes]
    gradients = [[awkward(shape, torch.bfloat16) for shape in shapes] for _ in range(3)]
    wide = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    options = {"lr": 0.1, "weight_decay": weight_decay, "maximize": maximize}
    narrow_steps = steps_of(truestep.DASGD(parameters, **options), parameters, gradients)
    in_float32 = [[gradient.float() for gradient in step] for step in gradients]
    wide_steps = steps_of(truestep.DASGD(wide, **options), wide, in_float32)
    for narrow, expected in zip(narrow_steps, wide_steps, strict=True):
        assert_same(narrow, [numbers.to(torch.bfloat16) for numbers in expected])
        for one, other in zip(wide, parameters, strict=True):
            one.data.copy_(other.detach())


@given(shapes=SHAPES)
def test_a_boosted_gradient_in_bfloat16_is_rounded_once(shapes):
    present, previous = ([awkward(shape, torch.bfloat16) for shape in shapes] for _ in range(2))
    previous = [torch.where(gradient.isnan(), 0, gradient) for gradient in previous]
    kept = [gradient.clone() for gradient in present]
    expected = [
        boosted(one.float(), other.float()) for one, other in zip(present, previous, strict=True)
    ]
    found = boosting.table(present, previous)
    if found is not None:
        boosting.boost_(found)
        assert_same(present, [numbers.to(torch.bfloat16) for numbers in expected])
        assert_same(previous, kept)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("sizes", [(500_001,), (7, 300_000, 0, 199_999, 100_001), (100,) * 5000])
def test_threads_share_the_elements_of_all_parameters(sizes, monkeypatch):
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    gradients = [[torch.randn(size) for size in sizes] for _ in range(2)]
    found = []
    for installed in (True, False):
        monkeypatch.setattr(dispatch, "installed", lambda installed=installed: installed)
        own = copy.deepcopy(parameters)
        found.append(list(steps_of(truestep.DASGD(own, lr=0.1), own, gradients)))
    for first, second in zip(*found, strict=True):
        assert_same(first, second)


def tables_of(*tensors):
    return boosting.table(*([tensor] for tensor in tensors))


def test_what_the_loops_take():
    plain = torch.randn(2, 3, 4, 5)
    last = plain.to(memory_format=torch.channels_last)
    assert tables_of(plain, plain.clone(), nn.Parameter(plain)).elements == 120
    assert tables_of(last, last.clone()).elements == 120
    assert tables_of(plain[0, 0].T, plain[0, 0].clone().T).elements == 20
    assert tables_of(torch.empty(0), torch.empty(0)).elements == 0
    assert tables_of(plain.double(), plain.double()).like.itemsize == 8
    assert tables_of(plain.bfloat16(), plain.bfloat16()).like.itemsize == 2


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensors",
    {
        "no tensor": [[], []],
        "strides that differ": [[torch.ones(2, 3)], [torch.ones(3, 2).T]],
        "gaps": [[torch.ones(2, 6)[:, ::2]], [torch.ones(2, 6)[:, ::2]]],
        "one place for all": [[torch.ones(1).expand(4)], [torch.ones(1).expand(4)]],
        "16-bit": [[torch.ones(2, dtype=torch.float16)]] * 2,
        "two dtypes in all": [[torch.ones(2), torch.ones(2).double()]] * 2,
        "two dtypes of one parameter": [[torch.ones(2)], [torch.ones(2).double()]],
        "complex": [[torch.ones(2, dtype=torch.complex64)]] * 2,
        "another device": [[torch.ones(2, device="meta")]] * 2,
        "a subclass": [[torch.ones(2)], [torch.ones(2).as_subclass(Marked)]],
        "sparse": [[torch.eye(2).to_sparse()], [torch.eye(2)]],
        "not yet negated": [[torch.tensor([1 + 2j]).conj().imag], [torch.ones(1)]],
        "no memory": [[torch._efficientzerotensor((2,)), torch.ones(0)], [torch.ones(2)] * 2],
        "other sizes": [[torch.ones(3)], [torch.ones(2)]],
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_left_to_torch(tensors):
    gradients, previous = tensors[1]
    assert boosting.table(gradients, previous) is None


def test_inside_torch_func_torch_operations_run():
    def gradient_of_a_step(weight):
        return (weight if boosting.table([weight], [torch.ones(2)]) is None else 0 * weight).sum()

    assert torch.func.grad(gradient_of_a_step)(torch.ones(2)).tolist() == [1, 1]


def test_options_that_ask_for_torch_get_it(monkeypatch):
    monkeypatch.setattr(boosting, "table", lambda *_: pytest.fail("the loops were asked"))
    start = torch.ones(2, requires_grad=True)
    for options in ({"foreach": True}, {"differentiable": True}):
        weight = start.clone()
        weight.retain_grad()
        weight.grad = torch.ones(2)
        truestep.DASGD([weight], lr=0.5, **options).step()
        assert weight.tolist() == [0.5, 0.5]


def test_autograd_sees_that_weights_and_gradients_changed():
    parameter = nn.Parameter(torch.ones(2))
    loss = (parameter**2).sum()
    loss.backward(retain_graph=True)
    truestep.DASGD([parameter], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    gradient = torch.ones(2)
    version = gradient._version
    boosting.boost_(tables_of(gradient, torch.ones(2)))
    assert gradient._version > version


def test_a_parameter_that_comes_later_has_its_own_first_step():
    early, late = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = truestep.DASGD([early, late], lr=1.0)
    early.grad = torch.ones(3)
    optimizer.step()
    late.grad = torch.ones(3)
    optimizer.step()
    assert early.tolist() == [-3, -3, -3]
    assert late.tolist() == [-1, -1, -1]
    assert optimizer.state[late]["previous_gradient"].tolist() == [1, 1, 1]


def test_a_moved_parameter_is_found():
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = truestep.DASGD([parameter], lr=1.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    parameter.data = parameter.data.clone()
    optimizer.step()
    assert parameter.tolist() == [-3, -3, -3]
    parameter.data = parameter.data.double()
    parameter.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()  # the previous gradient is float32 still: torch operations take both
    assert parameter.tolist() == [-5, -5, -5]
