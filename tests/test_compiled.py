import copy
import gc
import tempfile
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import distributed, nn
from torch._dynamo.utils import counters as dynamo_counters
from torch.utils.checkpoint import checkpoint

import truestep
from properties import count
from truestep import TruestepError, rules_bare
from truestep.compiled import CALLS
from zoo import ZOO, Gated, Sequence, Twice, mlp, sparse_inputs

BACKEND = "aot_eager"  # with a compiled backward pass, and without a compiler's time

pytestmark = [
    # Dynamo makes one for any custom function that it traces.
    pytest.mark.filterwarnings(
        "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
    ),
    # Dynamo looks at the inputs of a graph in the middle of a model.
    pytest.mark.filterwarnings(
        r"ignore:The \.grad attribute of a Tensor that is not a leaf Tensor:UserWarning"
    ),
    # Inductor imports what uses it.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    dynamo_counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def loss_of(output):
    return output.square().mean()


def uncompiled(model, *batches, loss_of=loss_of, **options):
    """Counts of the batches, one after the other, by hooks on a copy of the model."""
    total = {}
    for inputs in batches:
        counts, _ = count(
            copy.deepcopy(model), lambda out, _: loss_of(out), inputs, None, **options
        )
        total = {name: total.get(name, 0) + values for name, values in counts.items()}
    return total


def assert_same(counts, expected):
    assert counts.keys() == expected.keys()
    assert any(values.any() for values in expected.values())
    for name, values in expected.items():
        assert torch.equal(counts[name], values), name


def graphs():
    return dynamo_counters["stats"]["unique_graphs"]


# Every kind of layer and use.

MODELS = ["mlp", "twice", "tied", "tied embedding", "two tables", "sequence", "bag", "cnn"]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, BACKEND) for name in [*MODELS, "in-place relu"]),
        ("in-place relu", "eager"),
        ("sequence", "eager"),
        ("twice", "inductor"),
    ],
)
def test_counts_equal_the_oracle_in_one_graph(name, backend):
    model, loss_fn, inputs, targets = ZOO[name]()
    counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = truestep.oracle.counts(model, loss_fn, inputs, targets)
    for _ in range(2):
        model.zero_grad()
        loss_fn(compiled(inputs), targets).backward()
        assert_same(counter.counts(), expected)
        assert counter.batch_size == len(inputs)
    assert graphs() == 1


@pytest.mark.parametrize("unit", ["sample", "position"])
def test_a_compiled_loss_keeps_calls_on_equal_inputs_apart(unit):
    model, inputs = Sequence(), torch.randint(0, 9, (6, 4))

    def loss(x):
        return loss_of(model(x)) + loss_of(model(x))

    expected = uncompiled(model, inputs, inputs, unit=unit)
    counter = truestep.SampleCounter(model, unit=unit)
    compiled = torch.compile(loss, backend=BACKEND, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        compiled(inputs).backward()
        assert_same(counter.counts(), expected)
    compiled(inputs).backward()  # and accumulates
    assert_same(counter.counts(), {name: 2 * values for name, values in expected.items()})


class Language(nn.Module):
    """Logits at each position, and an output that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 9)
        self.other = nn.Linear(5, 2)

    def forward(self, x):
        hidden = torch.relu(self.hidden(self.embedding(x)))
        return {"logits": [self.head(hidden)], "other": (self.other(hidden[:, :2]), None)}


def test_by_position_the_batch_size_leaves_padding_out():
    model, inputs = Language(), torch.randint(0, 9, (6, 4))

    def partial_loss(output):
        return loss_of(output["logits"][0][:, 1:])

    expected = uncompiled(model, inputs, loss_of=partial_loss, unit="position")
    counter = truestep.SampleCounter(model, unit="position")
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    partial_loss(compiled(inputs)).backward()
    counts = counter.counts()
    # An unused output of a compiled graph has a gradient, of zeros.
    assert not counts.pop("other.weight").any()
    assert not counts.pop("other.bias").any()
    assert_same(counts, expected)
    assert counter.batch_size == 6 * 3


def test_separate_batches_add_up():
    model = Twice()
    counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True, dynamic=True)
    first, second = sparse_inputs(5, 4), sparse_inputs(3, 4)
    expected = uncompiled(model, first, second)
    (loss_of(compiled(first)) + loss_of(compiled(second))).backward()
    assert_same(counter.counts(), expected)
    model.zero_grad()
    for inputs in (first, second):
        loss_of(compiled(inputs)).backward()
    assert_same(counter.counts(), expected)
    assert counter.batch_size == 8
    assert graphs() == 1


def test_batch_sizes_that_change_compile_once_more():
    model = Twice()
    counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for size in (8, 5, 3, 9):
            inputs = sparse_inputs(size, 4)
            model.zero_grad()
            loss_of(compiled(inputs)).backward()
            assert_same(counter.counts(), uncompiled(model, inputs))
            assert counter.batch_size == size
    assert graphs() == 2


class Attentive(nn.Module):
    """A small transformer, and a recurrent layer, which torch.compile leaves out of its graphs."""

    def __init__(self, *, dropout=0.0, recurrent=False):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout, batch_first=True)
        self.recurrent = nn.LSTM(4, 4, batch_first=True) if recurrent else None
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.relu(self.encoder(self.embedding(x)))
        hidden = self.recurrent(hidden)[0] if self.recurrent else hidden
        return self.head(hidden)


@pytest.mark.parametrize("unit", ["sample", "position"])
def test_attention_is_seen_by_running_it_once_more(unit):
    model, inputs = Attentive(), torch.randint(0, 9, (6, 4))
    expected = uncompiled(model, inputs, unit=unit)
    counter = truestep.SampleCounter(model, unit=unit)
    state = torch.get_rng_state()
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        loss_of(compiled(inputs)).backward()
        assert_same(counter.counts(), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", [BACKEND, "inductor"])
def test_modules_without_a_rule_run_once_more(backend):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Gated(), nn.ReLU(), Gated()).double()
    inputs, targets = sparse_inputs(7, 4).double(), torch.randn(7, 4).double()
    loss_fn = nn.functional.mse_loss
    expected = truestep.oracle.counts(model, loss_fn, inputs, targets)
    counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        loss_fn(compiled(inputs), targets).backward()
        assert_same(counter.counts(), expected)
        assert counter.batch_size == 7
    assert graphs() == 1


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.scale - x.mean(0)


def test_a_module_that_mixes_samples_is_refused_in_its_backward_pass(monkeypatch):
    def read(_self, _outputs):
        raise rules_bare.UncountableError("'0.scale' is used in a way that is not known")

    monkeypatch.setattr(rules_bare._Reader, "read", read)
    model = nn.Sequential(Centred(), nn.Linear(3, 2))
    counter = truestep.SampleCounter(model)
    output = torch.compile(model, backend=BACKEND, fullgraph=True)(sparse_inputs(4, 3))
    with pytest.raises(TruestepError, match=r"'0.scale'.*mixes samples"):
        loss_of(output).backward()
    counter.close()


def test_a_recurrent_layer_counts_beside_graphs():
    model, inputs = Attentive(recurrent=True), torch.randint(0, 9, (6, 4))
    expected = uncompiled(model, inputs)
    counter = truestep.SampleCounter(model)
    loss_of(torch.compile(model, backend=BACKEND)(inputs)).backward()
    assert_same(counter.counts(), expected)


def test_random_attention_in_a_graph_is_an_error_with_a_way_out():
    model, inputs = Attentive(dropout=0.5), torch.randint(0, 9, (6, 4))
    counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    with pytest.raises(TruestepError, match=r"'encoder\.self_attn' draws random numbers"):
        loss_of(compiled(inputs)).backward()
    torch.compiler.reset()
    attention = model.encoder.self_attn
    attention.forward = torch.compiler.disable(attention.forward)
    model.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=False):  # of linear maps by themselves
        loss_of(torch.compile(model, backend=BACKEND)(inputs)).backward()
    assert counter.counts()["encoder.self_attn.in_proj_weight"].any()


# Parts of a model, parts of a step.


class Broken(Twice):
    def forward(self, x):
        hidden = torch.relu(self.layer(x))
        torch._dynamo.graph_break()
        return self.head(torch.relu(self.layer(hidden)))


@pytest.mark.parametrize("root", ["hooked by itself", "in the graph"])
def test_one_call_in_several_graphs_is_one_call(root):
    model, inputs = Broken(), sparse_inputs(6, 4)
    expected = uncompiled(model, inputs)
    counter = truestep.SampleCounter(model)

    def function(x):
        return model(x)

    compiled = torch.compile(model if root == "hooked by itself" else function, backend=BACKEND)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for _ in range(2):
            model.zero_grad()
            loss_of(compiled(inputs)).backward()
            assert_same(counter.counts(), expected)
    assert graphs() >= 2
    assert not counter._watch._calls


class Blocks(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.Linear(4, 4, **options)

    def forward(self, x):
        return torch.relu(self.layer(x))


def test_compiled_blocks_share_their_graph_and_not_their_counts():
    model, inputs = Blocks(12), sparse_inputs(8, 4) + 1
    expected = uncompiled(model, inputs)
    counter = truestep.SampleCounter(model)
    for block in model.blocks:
        block.compile(backend=BACKEND, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for _ in range(2):
            model.zero_grad()
            loss_of(model(inputs)).backward()
            assert_same(counter.counts(), expected)
    assert graphs() == 2  # inputs that need a gradient, and those of the first block


@pytest.mark.parametrize("compiles", ["step with backward", "step with optimizer", "optimizer"])
def test_a_compiled_step_trains_as_an_uncompiled_one(compiles):
    batches = [sparse_inputs(8, 4) for _ in range(3)]
    trained = []
    torch.manual_seed(1)
    start = mlp().state_dict()
    for on in (False, True):
        model = mlp()
        model.load_state_dict(start)
        counter = truestep.SampleCounter(model)
        optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)

        def forward_and_backward(inputs, model=model):
            loss_of(model(inputs)).backward()

        def step(inputs, model=model, optimizer=optimizer):
            loss_of(model(inputs)).backward()
            optimizer.step()

        whole = compiles == "step with optimizer"
        run = step if whole else forward_and_backward
        run = torch.compile(run, backend=BACKEND) if on and compiles != "optimizer" else run
        update = optimizer.step
        update = (
            torch.compile(update, backend=BACKEND) if on and compiles == "optimizer" else update
        )
        for inputs in batches:
            model.zero_grad()
            run(inputs)
            if not whole:
                update()
        trained.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other)
    assert graphs() == (0 if compiles == "optimizer" else 1)  # never the counting


@pytest.mark.parametrize("kind", ["DASGD", "attach"])
def test_compiled_optimizer_steps_equal_uncompiled_ones(kind):
    def make(model):
        if kind == "DASGD":
            return truestep.DASGD(model.parameters(), lr=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        counter = truestep.SampleCounter(model)
        truestep.attach(
            optimizer, truestep.mean_effective_gradient(counter), truestep.directional_boost()
        )
        return optimizer

    models = [mlp(), mlp()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make(model) for model in models]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, backend=BACKEND)]
    for step in range(5):
        # The first step has no state, and what it makes is new to the second.
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            inputs = sparse_inputs(8, 4)
            for model, update in zip(models, steps, strict=True):
                model.zero_grad()
                loss_of(model(inputs)).backward()
                update()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


class Checkpointed(nn.Module):
    def __init__(self, *, on):
        super().__init__()
        self.layer, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.other.weight = self.layer.weight  # tied across two checkpoints
        self.on = on

    def block(self, x):
        return torch.relu(self.layer(torch.relu(self.layer(x))))

    def last(self, x):
        return torch.relu(self.other(x))

    def forward(self, x):
        for part in (self.block, self.last):
            x = checkpoint(part, x, use_reentrant=False) if self.on else part(x)
        return self.head(x)


@pytest.mark.parametrize("place", ["inside", "around", "around compiled layers"])
def test_activation_checkpointing_counts_the_same(place):
    model, inputs = Checkpointed(on=False), sparse_inputs(8, 4)
    expected = uncompiled(model, inputs)
    counter = truestep.SampleCounter(model)
    model.on = place != "around"
    function = model
    if place == "around compiled layers":
        model.layer.compile(backend=BACKEND, fullgraph=True)
    else:
        function = torch.compile(model, backend=BACKEND, fullgraph=True)
    if place == "around":
        compiled = function
        function = lambda x: checkpoint(compiled, x, use_reentrant=False)  # noqa: E731
    with torch._dynamo.config.patch(error_on_recompile=place == "inside"):
        for _ in range(2):
            model.zero_grad()
            loss_of(function(inputs)).backward()
            assert_same(counter.counts(), expected)


@pytest.fixture
def _one_process():
    with tempfile.TemporaryDirectory() as folder:
        store = distributed.FileStore(str(Path(folder) / "store"), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("order", ["compile(DDP)", "DDP(compile)"])
@pytest.mark.parametrize("watched", ["model", "wrapper"])
@pytest.mark.parametrize("make", [Twice, mlp])  # whose own hooks run, and are traced
def test_distributed_data_parallel(order, watched, make):
    model, inputs = make(), sparse_inputs(8, 4)
    expected = uncompiled(model, inputs)
    if order == "compile(DDP)":
        wrapper = torch.compile(nn.parallel.DistributedDataParallel(model), backend=BACKEND)
    else:
        wrapper = nn.parallel.DistributedDataParallel(torch.compile(model, backend=BACKEND))
    counter = truestep.SampleCounter(model if watched == "model" else wrapper)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for _ in range(2):
            model.zero_grad()
            loss_of(wrapper(inputs)).backward()
            assert_same(counter.counts(), expected)
    assert counter._batch._ranks is not None


# What leaves nothing, and what is refused.


def test_a_counter_made_on_the_compiled_model_has_its_names():
    model, inputs = Twice(), sparse_inputs(8, 4)
    expected = uncompiled(model, inputs)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    counter = truestep.SampleCounter(compiled)
    loss_of(compiled(inputs)).backward()
    assert_same(counter.counts(), expected)
    with pytest.raises(TruestepError, match="another SampleCounter watches"):
        truestep.SampleCounter(model)


def test_evaluation_and_steps_leave_nothing():
    model, inputs = Twice(), sparse_inputs(8, 4)
    counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)

    def step():
        model.zero_grad()
        loss_of(compiled(inputs)).backward()

    step()
    counts = counter.counts()
    with torch._dynamo.config.patch(error_on_recompile=False), torch.no_grad():
        compiled(inputs[:2])
    compiled(inputs)  # evaluation by someone who forgot no_grad
    torch.autograd.grad(loss_of(compiled(inputs)), list(model.parameters()))
    assert_same(counter.counts(), counts)
    assert not counter._watch._calls
    assert not counter._records._pending
    assert not counter._records._entered
    gc.collect()
    calls, handles, objects = len(CALLS), len(counter._watch._handles), len(gc.get_objects())
    for _ in range(20):
        step()
    gc.collect()
    assert (len(CALLS), len(counter._watch._handles)) == (calls, handles)
    assert len(gc.get_objects()) - objects < 20


@pytest.mark.parametrize("looks", [False, True])
def test_another_compiled_model_without_a_counter_has_a_way_out(looks):
    one, other = mlp(), mlp()
    counter = truestep.SampleCounter(one)
    optimizer = truestep.AdaptiveBatchSGD(one.parameters(), lr=0.1, counter=counter)
    models = [torch.compile(model, backend=BACKEND) for model in (one, other)]
    options = {"error_on_recompile": False, "skip_nnmodule_hook_guards": not looks}
    with torch._dynamo.config.patch(**options):
        for number in range(3):
            optimizer.zero_grad()
            for model in models:
                loss_of(model(sparse_inputs(5, 4))).backward()
            if number and not looks:
                with pytest.raises(TruestepError, match="skip_nnmodule_hook_guards = False"):
                    optimizer.step()
                return
            optimizer.step()
    assert counter.batch_size == 5


def test_a_model_compiled_and_run_before_is_an_error_with_a_way_out():
    model, inputs = mlp(), sparse_inputs(8, 4)
    compiled = torch.compile(model, backend=BACKEND)
    loss_of(compiled(inputs)).backward()
    counter = truestep.SampleCounter(model)
    optimizer = truestep.AdaptiveBatchSGD(model.parameters(), lr=0.1, counter=counter)
    model.zero_grad()
    loss_of(compiled(inputs)).backward()
    with pytest.raises(
        TruestepError, match=r"'0\.weight' has a gradient.*call torch\.compiler\.reset\(\)"
    ):
        optimizer.step()
    torch.compiler.reset()
    model.zero_grad()
    loss_of(compiled(inputs)).backward()
    assert_same(counter.counts(), uncompiled(model, inputs))
    optimizer.step()


@pytest.mark.parametrize("how", ["whole", "in place", "around", "layers"])
def test_another_counter_on_a_compiled_model_counts_as_the_first_did(how):
    model, inputs = Twice(), sparse_inputs(8, 4)
    expected = uncompiled(model, inputs)
    if how == "layers":
        for layer in model.children():
            layer.compile(backend=BACKEND, fullgraph=True)
        compiled = model
    else:
        ways = {"whole": compile_model, "in place": compile_in_place, "around": compile_around}
        compiled = ways[how](model)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for _ in range(3):
            counter = truestep.SampleCounter(model)
            model.zero_grad()
            loss_of(compiled(inputs)).backward()
            assert_same(counter.counts(), expected)
            counter.close()


class Stem(nn.Module):
    """A part that may be compiled by itself; its only parameter is used outside of it, too."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = Block(bias=False), nn.Linear(4, 4), nn.Linear(4, 3)
        self.layer.weight = self.stem.layer.weight

    def forward(self, x):
        return self.head(torch.relu(self.layer(self.stem(x))))


def test_a_part_compiled_before_is_an_error_though_its_weight_has_other_uses():
    model, inputs = Stem(), sparse_inputs(8, 4)
    expected = uncompiled(model, inputs)
    model.stem.compile(backend=BACKEND)
    model(inputs)
    counter = truestep.SampleCounter(model)
    with pytest.raises(
        TruestepError, match=r"^'stem\.layer' ran in a graph .*torch\.compiler\.reset"
    ):
        model(inputs)
    torch.compiler.reset()
    loss_of(model(inputs)).backward()
    assert_same(counter.counts(), expected)


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.middle = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(self.middle(self.words(x)).relu(), self.words.weight)


def compile_model(model):
    return torch.compile(model, backend=BACKEND, fullgraph=True)


def compile_in_place(model):
    model.compile(backend=BACKEND, fullgraph=True)
    return model


def compile_around(model):
    def output(x):
        return model(x) * 1

    return torch.compile(output, backend=BACKEND, fullgraph=True)


@pytest.mark.parametrize("make", [compile_model, compile_in_place, compile_around])
def test_a_use_that_bypasses_its_module_in_a_graph_is_an_error(make):
    model, inputs = TiedHead(), torch.randint(0, 7, (3, 5))
    counter = truestep.SampleCounter(model)
    with pytest.raises(TruestepError, match=r"'words\.weight' without calling the module"):
        make(model)(inputs).square().sum().backward()
    counter.close()


class Remembers(nn.Sequential):
    """Keeps what its losses need on itself, as layers of experts do."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("calls", torch.zeros(()))
        self.history = []

    def forward(self, x):
        self.calls = self.calls + 1
        output = super().forward(x)
        self.penalty = output.square().mean()
        self.history.append(len(self.history))
        return output


def test_comparing_a_model_with_its_graph_leaves_no_trace():
    model, inputs = Remembers(nn.Linear(4, 3)), sparse_inputs(8, 4)
    counter = truestep.SampleCounter(model)
    output = torch.compile(model, backend=BACKEND)(inputs)
    assert model.calls == 1
    assert model.history == [0]
    assert torch.equal(model.penalty, output.square().mean())
    (loss_of(output) + model.penalty).backward()
    assert counter.batch_size == 8


class NeedsNumbers(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * (2.0 if x.sum() > 0 else 3.0)


def test_a_model_that_cannot_be_compared_with_its_graph_says_so():
    model, inputs = NeedsNumbers(nn.Linear(4, 3)), sparse_inputs(8, 4)
    expected = uncompiled(model, inputs)
    counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend=BACKEND)
    with pytest.warns(UserWarning, match="call it once without compiling"):
        loss_of(compiled(inputs)).backward()
    assert_same(counter.counts(), expected)


def test_a_closed_counter_counts_nothing():
    model, inputs = mlp(), sparse_inputs(8, 4)
    counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    before = compiled(inputs)
    counter.close()
    loss_of(before).backward()
    with torch._dynamo.config.patch(error_on_recompile=False):
        loss_of(compiled(inputs)).backward()
    assert counter.counts() == {}
    assert not counter._watch._handles
    assert model[0].weight.grad is not None


def test_a_copy_counts_nothing_and_another_model_only_its_own():
    model, other = Twice(), Twice()
    counter, of_other = truestep.SampleCounter(model), truestep.SampleCounter(other)
    duplicate = copy.deepcopy(model)
    first, second = sparse_inputs(8, 4), sparse_inputs(3, 4)
    expected = uncompiled(model, first), uncompiled(other, second)
    with torch._dynamo.config.patch(error_on_recompile=False):
        outputs = [
            torch.compile(one, backend=BACKEND, fullgraph=True)(inputs)
            for one, inputs in ((model, first), (other, second), (duplicate, second))
        ]
        sum(loss_of(output) for output in outputs).backward()
    assert_same(counter.counts(), expected[0])
    assert_same(of_other.counts(), expected[1])
    assert duplicate.head.weight.grad is not None


def test_layers_outside_the_model_and_their_ambiguity():
    model, inputs = mlp(), sparse_inputs(8, 4)
    counter = truestep.SampleCounter(model)

    def apart(x):
        return loss_of(model[2](torch.relu(model[0](x))))

    def ambiguous(x):
        return loss_of(model[0](x) + model[0](x))

    torch.compile(apart, backend=BACKEND, fullgraph=True)(inputs).backward()
    assert_same(counter.counts(), uncompiled(model, inputs))
    with pytest.raises(TruestepError, match=r"'0\.\w+' is used several times outside a call"):
        torch.compile(ambiguous, backend=BACKEND, fullgraph=True)(inputs).backward()


def test_another_batch_size_inside_the_model_is_an_error():
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 3)

        def forward(self, x):
            return self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    model = Flattened()
    counter = truestep.SampleCounter(model)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    with pytest.raises(TruestepError, match="'body' sees a batch of 12, the model one of 4"):
        loss_of(compiled(torch.ones(4, 3, 3))).backward()
    counter.close()


class Rounded(nn.Linear):
    def forward(self, x, dtype):
        return super().forward(x.to(dtype).to(x.dtype))


class Rounding(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Rounded(4, 3)

    def forward(self, x):
        return self.layer(x, dtype=torch.bfloat16)


def test_an_argument_that_no_graph_can_keep_breaks_the_graph():
    def rule(layout, module, x, dtype):
        return truestep.RULES[nn.Linear](layout, module, x.to(dtype))

    model, inputs = Rounding(), sparse_inputs(8, 4)
    rules = truestep.RULES | {Rounded: rule}
    expected = uncompiled(model, inputs, rules=rules)
    counter = truestep.SampleCounter(model, rules=rules)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="dtype given to a layer cannot be kept"
    ):
        torch.compile(model, backend=BACKEND, fullgraph=True)(inputs)
    loss_of(torch.compile(model, backend=BACKEND)(inputs)).backward()
    assert_same(counter.counts(), expected)


def test_plain_and_nested_arguments_reach_the_rule():
    class Scaled(nn.Linear):
        def forward(self, x, by, *, more=None, name="x"):
            return super().forward(x[0] * by["a"][0])

    seen = []

    def rule(layout, module, x, by, *, more=None, name="x"):
        seen.append((by["a"][0], by["b"], more, name))
        return truestep.RULES[nn.Linear](layout, module, x[0] * by["a"][0])

    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Scaled(4, 3)

        def forward(self, x):
            return self.layer((x,), {"a": [2.0], "b": True}, more=(None, 1), name="it's {0}")

    model, inputs = Scaling(), sparse_inputs(8, 4)
    rules = truestep.RULES | {Scaled: rule}
    counter = truestep.SampleCounter(model, rules=rules)
    loss_of(torch.compile(model, backend=BACKEND, fullgraph=True)(inputs)).backward()
    assert seen == [(2.0, True, (None, 1), "it's {0}")]
    assert counter.counts()["layer.bias"].max() > 0


def test_an_exported_model_holds_no_counting():
    model = mlp()
    truestep.SampleCounter(model)
    exported = torch.export.export(model, (sparse_inputs(8, 4),))
    assert "truestep" not in str(exported.graph)
