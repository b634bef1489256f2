"""A task of your own: everything that `truestep race` needs to know, in one file.

Run it from anywhere:

    truestep race examples/my_task.py --seeds 3

Here: which wine is it, by 13 chemical measurements of 178 wines (part of scikit-learn). Replace the
functions with yours; `load` may read whatever files you like from `data_dir`, the folder given
with --data-dir.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_wine
from torch import nn

from truestep.lab.tasks import Split, Splits, Task, accuracy


def load(data_dir: Path | None) -> Splits:
    """Training, validation and test data as tensors, always the same, whatever the seed."""
    del data_dir  # this data set is part of scikit-learn
    wines = load_wine()
    inputs = torch.tensor(wines.data, dtype=torch.float32)
    targets = torch.tensor(wines.target)
    # the file lists one class after the other: shuffle before splitting
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    train, validation, test = order[:100], order[100:139], order[139:]
    # scaled by what the training part says; the other parts stay unseen
    inputs = (inputs - inputs[train].mean(dim=0)) / inputs[train].std(dim=0)
    return Splits(
        train=Split(inputs[train], targets[train]),
        validation=Split(inputs[validation], targets[validation]),
        test=Split(inputs[test], targets[test]),
        source="scikit-learn's wines: 178 wines, 13 measurements, 3 growers",
    )


def model() -> nn.Module:
    """A fresh network; truestep seeds torch before it calls this."""
    return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))


task = Task(
    name="wine",
    title="Which grower is a wine from",
    load=load,
    model=model,
    loss=nn.functional.cross_entropy,
    # or functions of your own, (output, targets) to a number; the ensemble engine knows this one
    metrics={"accuracy": accuracy},
    batch_size=10,
    epochs=15,
    # "epochs to target" is the first evaluation with at least this validation accuracy
    target=("accuracy", 0.95),
    # for optimizers not named here, truestep tries its general learning rates
    learning_rates={"sgd": (0.03, 0.1, 0.3), "adam": (0.003, 0.01, 0.03)},
    optimizers=("sgd", "adam", "asgd", "dasgd"),
)

if __name__ == "__main__":
    splits = task.load(None)
    output = task.model()(splits.validation.inputs)
    print(f"{task.title}: {len(splits.train.inputs)} wines to train on")
    print(f"Untrained accuracy: {accuracy(output, splits.validation.targets):.2f}")
