"""Training with Lightning equals a loop in plain torch with the same optimizer, bit for bit."""

import csv
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import truestep
from zoo import sparse_inputs

lightning = pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")
integration = pytest.importorskip("truestep.integrations.lightning")

# What Lightning itself warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),
]

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def data():
    """26 samples, of which only a few use each input, in batches of 4: the last one has 2."""
    torch.manual_seed(2)
    inputs, targets = sparse_inputs(26, 12), torch.randint(0, 3, (26,))
    return DataLoader(TensorDataset(inputs, targets), batch_size=4)


def asgd(model, counter):
    return truestep.AdaptiveBatchSGD(model.parameters(), lr=0.3, counter=counter, momentum=0.9)


def attached(model, counter):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    truestep.attach(optimizer, truestep.mean_effective_gradient(counter))
    return optimizer


def boosted(model, counter):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    transforms = truestep.mean_effective_gradient(counter), truestep.directional_boost()
    truestep.attach(optimizer, *transforms)
    return optimizer


def plain(model, _):
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


class Automatic(lightning.LightningModule):
    def __init__(self, make_optimizer):
        super().__init__()
        self.net = net()
        self.make_optimizer = make_optimizer
        self.counter = truestep.SampleCounter(self.net)

    def training_step(self, batch):
        inputs, targets = batch
        return functional.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.net, self.counter)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


class Manual(Automatic):
    def __init__(self, make_optimizer, clip=None):
        super().__init__(make_optimizer)
        self.automatic_optimization = False
        self.clip = clip

    def training_step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        if self.clip:
            self.counter.correct_gradients()
            self.clip_gradients(optimizer, self.clip, "norm")
        optimizer.step()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()


def loop(make_optimizer, *, epochs=2, accumulate=1, clip=None, dtype=None, correct=True):
    """What the Trainer is expected to do, in plain torch."""
    model, batches = net(), list(data())
    counter = truestep.SampleCounter(model)
    optimizer = make_optimizer(model, counter)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    norms = []
    for _ in range(epochs):
        for index, (inputs, targets) in enumerate(batches):
            if index % accumulate == 0:
                optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = functional.cross_entropy(model(inputs), targets)
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(batches):
                if correct:
                    counter.correct_gradients()
                if clip:
                    norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
                optimizer.step()
        scheduler.step()
    assert not clip or max(norms) > clip
    return model


def fit(module, *callbacks, epochs=2, ckpt_path=None, **options):
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), **(QUIET | options))
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer


def assert_equal(model, other):
    for (name, value), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected), name


OPTIMIZERS = pytest.mark.parametrize("make_optimizer", [asgd, attached, boosted])


@OPTIMIZERS
def test_automatic_optimization(make_optimizer):
    module = Automatic(make_optimizer)
    fit(module)
    assert_equal(module.net, loop(make_optimizer, correct=False))


@OPTIMIZERS
def test_manual_optimization(make_optimizer):
    module = Manual(make_optimizer)
    fit(module)
    assert_equal(module.net, loop(make_optimizer, correct=False))


def test_accumulate_grad_batches_with_a_last_step_of_fewer_batches():
    module = Automatic(asgd)
    fit(module, accumulate_grad_batches=3)
    assert_equal(module.net, loop(asgd, accumulate=3))
    assert module.counter.batch_size == 2  # the seventh batch alone


@pytest.mark.parametrize("make_optimizer", [plain, asgd, attached])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_callback_corrects_before_the_trainer_clips(make_optimizer, accumulate):
    module = Automatic(make_optimizer)
    callback = integration.MeanEffectiveGradient(module.counter)
    fit(module, callback, gradient_clip_val=0.9, accumulate_grad_batches=accumulate)
    assert_equal(module.net, loop(make_optimizer, clip=0.9, accumulate=accumulate))


def test_manual_clipping_after_the_correction():
    module = Manual(asgd, clip=0.9)
    fit(module)
    assert_equal(module.net, loop(asgd, clip=0.9))


def test_the_callback_passes_on_eps_and_the_limit():
    module = Automatic(plain)
    fit(module, integration.MeanEffectiveGradient(module.counter, eps=2, factor_limit=1.1))
    limited = lambda model, counter: truestep.AdaptiveBatchSGD(  # noqa: E731
        model.parameters(), lr=0.3, counter=counter, momentum=0.9, eps=2, factor_limit=1.1
    )
    assert_equal(module.net, loop(limited, correct=False))


@pytest.mark.parametrize("make_optimizer", [plain, asgd])
def test_bf16_mixed(make_optimizer):
    module = Automatic(make_optimizer)
    callback = integration.MeanEffectiveGradient(module.counter)
    fit(module, callback, precision="bf16-mixed", gradient_clip_val=0.9)
    assert_equal(module.net, loop(make_optimizer, clip=0.9, dtype=torch.bfloat16))


@pytest.mark.parametrize("make_optimizer", [plain, *OPTIMIZERS.args[1]])
def test_a_run_resumed_from_a_checkpoint_equals_one_that_was_not_interrupted(
    make_optimizer, tmp_path
):
    interrupted, resumed = Automatic(make_optimizer), Automatic(make_optimizer)
    options = {"gradient_clip_val": 0.9, "accumulate_grad_batches": 2}
    path = tmp_path / "middle.ckpt"
    callback = integration.MeanEffectiveGradient(interrupted.counter)
    fit(interrupted, callback, epochs=2, **options).save_checkpoint(path)
    callback = integration.MeanEffectiveGradient(resumed.counter)
    fit(resumed, callback, epochs=4, ckpt_path=path, **options)
    assert_equal(resumed.net, loop(make_optimizer, epochs=4, clip=0.9, accumulate=2))


def test_weights_that_are_averaged_in_a_copy_of_the_module():
    """The copy has the module's attributes, the counter among them."""
    module, averages = Automatic(asgd), []
    callback = lightning.callbacks.StochasticWeightAveraging(
        swa_lrs=0.1,
        swa_epoch_start=1,
        avg_fn=lambda mean, new, n: averages.append(n) or (mean * n + new) / (n + 1),
    )
    fit(module, callback, epochs=3)
    assert averages
    assert module.counter.batch_size == 2  # the seventh batch's


def test_an_optimizer_of_other_parameters_is_an_error():
    module = Automatic(plain)
    counter = truestep.SampleCounter(net())
    with pytest.raises(truestep.TruestepError, match="not in the counter's model"):
        fit(module, integration.MeanEffectiveGradient(counter))


def test_statistics_reach_the_loggers(tmp_path):
    module = Automatic(asgd)
    callback = integration.MeanEffectiveGradient(module.counter, log_statistics=True)
    logger = lightning.loggers.CSVLogger(tmp_path)
    fit(module, callback, epochs=1, logger=logger, log_every_n_steps=3)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "5"]
    inputs, _ = list(data())[5]
    assert rows[1]["batch_size/0.weight"] == str(float(len(inputs)))
    assert 0 < float(rows[1]["largest/0.weight"]) <= (inputs != 0).sum(0).max()
