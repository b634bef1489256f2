"""Training with Hugging Face's Trainer, or with Accelerate, equals a loop in plain torch, bit for bit."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import truestep
from truestep.integrations.huggingface import MeanEffectiveGradient
from zoo import sparse_inputs

transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
accelerate = pytest.importorskip("accelerate", reason="the extra huggingface is not installed")

IGNORED = -100


class Trainer(MeanEffectiveGradient, transformers.Trainer):
    pass


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def language_model():
    torch.manual_seed(1)
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
        )
    )


def sentences():
    """22 sequences of 6 to 9 tokens, padded to 9: in batches of 4 the last one has 2."""
    torch.manual_seed(2)
    tokens, lengths = torch.randint(1, 40, (22, 9)), torch.randint(6, 10, (22,))
    used = torch.arange(9) < lengths[:, None]
    columns = {
        "input_ids": tokens * used,
        "attention_mask": used.long(),
        "labels": torch.where(used, tokens, IGNORED),
    }
    return [{name: values[i] for name, values in columns.items()} for i in range(22)]


class Classifier(nn.Module):
    """A model that is none of transformers': it returns a dict and takes no loss arguments."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, inputs, labels):
        return {"loss": functional.cross_entropy(self.net(inputs), labels)}


def vectors():
    torch.manual_seed(2)
    inputs, labels = sparse_inputs(22, 12), torch.randint(0, 3, (22,))
    return [{"inputs": row, "labels": label} for row, label in zip(inputs, labels, strict=True)]


def asgd(model, counter):
    return truestep.AdaptiveBatchSGD(model.parameters(), lr=0.3, counter=counter, momentum=0.9)


def attached(model, counter):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    transforms = truestep.mean_effective_gradient(counter), truestep.directional_boost()
    truestep.attach(optimizer, *transforms)
    return optimizer


def plain(model, _):
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


TASKS = {"transformer": (language_model, sentences), "module": (Classifier, vectors)}
OPTIMIZERS = pytest.mark.parametrize("make_optimizer", [plain, asgd, attached])


def batches_of(samples):
    return [transformers.default_data_collator(samples[i : i + 4]) for i in range(0, 22, 4)]


def losses(model, batches, dtype):
    """The micro-batches' losses whose sum a step goes along, as the Trainer scales them."""
    items = sum((batch["labels"][..., 1:] != IGNORED).sum() for batch in batches)
    for batch in batches:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            if isinstance(model, Classifier):
                yield model(**batch)["loss"] / len(batches)
            else:
                yield model(**batch, num_items_in_batch=items).loss


def loop(task, make_optimizer, *, epochs=2, accumulate=1, clip=None, dtype=None, **options):
    """What the Trainer is expected to do, in plain torch; also the counter."""
    make_model, make_samples = TASKS[task]
    model, batches = make_model(), batches_of(make_samples())
    counter = truestep.SampleCounter(model, **options)
    optimizer = make_optimizer(model, counter)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    norms = []
    for _ in range(epochs):
        for first in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            for loss in losses(model, batches[first : first + accumulate], dtype):
                loss.backward()
            counter.correct_gradients()
            if clip:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
            optimizer.step()
            scheduler.step()
    assert not clip or max(norms) > clip
    return model, counter


def trainer_of(task, make_optimizer, folder, *, epochs=2, accumulate=1, clip=0.0, **options):
    make_model, make_samples = TASKS[task]
    model = make_model()
    counter = truestep.SampleCounter(model, unit=options.pop("unit", "sample"))
    optimizer = make_optimizer(model, counter)
    settings = {"save_strategy": "no", "logging_strategy": "no"} | options
    own = {name: settings.pop(name) for name in ("log_statistics", "eps") if name in settings}
    return counter, Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            num_train_epochs=epochs,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=clip,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=make_samples(),
        data_collator=transformers.default_data_collator,
        optimizers=(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)),
        counter=counter,
        **own,
    )


def assert_equal(model, other):
    for (name, value), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(value, expected), name


CLIP = {"transformer": 1.4, "module": 0.7}


@OPTIMIZERS
@pytest.mark.parametrize("task", TASKS)
def test_the_trainer_accumulates_corrects_and_then_clips(task, make_optimizer, tmp_path):
    options = {"accumulate": 4, "clip": CLIP[task]}
    _, trainer = trainer_of(task, make_optimizer, tmp_path, **options)
    trainer.train()
    expected, _ = loop(task, make_optimizer, **options)
    assert_equal(trainer.model, expected)


def test_positions_are_the_items_that_the_loss_is_divided_by(tmp_path):
    counter, trainer = trainer_of("transformer", asgd, tmp_path, accumulate=4, unit="position")
    trainer.train()
    expected, _ = loop("transformer", asgd, accumulate=4, unit="position")
    assert_equal(trainer.model, expected)
    last = batches_of(sentences())[4:]
    assert counter.batch_size == sum((b["labels"][:, 1:] != IGNORED).sum() for b in last)


def test_the_trainer_in_bf16(tmp_path):
    options = {"accumulate": 4, "clip": CLIP["transformer"]}
    _, trainer = trainer_of("transformer", plain, tmp_path, bf16=True, **options)
    trainer.train()
    expected, _ = loop("transformer", plain, dtype=torch.bfloat16, **options)
    assert_equal(trainer.model, expected)


@OPTIMIZERS
def test_a_trainer_resumed_in_the_middle_of_an_epoch(make_optimizer, tmp_path):
    options = {"clip": CLIP["module"], "save_strategy": "steps", "save_steps": 8}
    _, trainer = trainer_of("module", make_optimizer, tmp_path, max_steps=8, **options)
    trainer.train()
    options |= {"epochs": 3}
    _, resumed = trainer_of("module", make_optimizer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    expected, _ = loop("module", make_optimizer, epochs=3, clip=CLIP["module"])
    assert_equal(resumed.model, expected)


def test_statistics_are_logged_beside_the_loss(tmp_path):
    options = {"logging_strategy": "steps", "logging_steps": 6, "log_statistics": True, "eps": 2}
    counter, trainer = trainer_of("module", plain, tmp_path, epochs=1, **options)
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    expected = truestep.monitor.scalars(counter.statistics(eps=2))
    assert len(expected) > 0
    assert {name: logged[name] for name in expected} == expected


def test_a_counter_of_another_model_is_an_error(tmp_path):
    _, trainer = trainer_of("module", plain, tmp_path)
    trainer._counter = truestep.SampleCounter(Classifier())
    with pytest.raises(truestep.TruestepError, match="not in the counter's model"):
        trainer.train()


def accelerated(make_optimizer, folder=None, *, epochs=2, resume=False, clip=None, **options):
    """A loop as Accelerate's documentation has it, with one line of truestep's."""
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = Classifier()
    counter = truestep.SampleCounter(model)
    optimizer = make_optimizer(model, counter)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    columns = zip(*(sample.values() for sample in vectors()), strict=True)
    loader = DataLoader(TensorDataset(*map(torch.stack, columns)), batch_size=4)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if resume:
        accelerator.load_state(str(folder))
    for _ in range(epochs):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(inputs, labels)["loss"])
                if clip and accelerator.sync_gradients:
                    counter.correct_gradients()
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    if folder and not resume:
        accelerator.save_state(str(folder))
    return model


@pytest.mark.parametrize("make_optimizer", [asgd, attached])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, CLIP["module"]])
def test_accelerate(make_optimizer, accumulate, clip):
    options = {"gradient_accumulation_steps": accumulate, "clip": clip}
    expected, _ = loop("module", make_optimizer, accumulate=accumulate, clip=clip)
    assert_equal(accelerated(make_optimizer, **options), expected)


def test_accelerate_in_bf16():
    expected, _ = loop("module", asgd, accumulate=3, dtype=torch.bfloat16)
    options = {"gradient_accumulation_steps": 3, "mixed_precision": "bf16"}
    assert_equal(accelerated(asgd, **options), expected)


@pytest.mark.parametrize("make_optimizer", [asgd, attached])
def test_accelerate_resumed_from_a_saved_state(make_optimizer, tmp_path):
    options = {"clip": CLIP["module"], "gradient_accumulation_steps": 3}
    accelerated(make_optimizer, tmp_path, epochs=1, **options)
    resumed = accelerated(make_optimizer, tmp_path, epochs=1, resume=True, **options)
    expected, _ = loop("module", make_optimizer, accumulate=3, clip=CLIP["module"])
    assert_equal(resumed, expected)
