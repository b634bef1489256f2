"""Made-up results that look like a race's, for the tests of what stores and shows them."""

import math
from zlib import crc32

import numpy as np

from truestep.lab.statistics import at_reference, choose
from truestep.lab.store import RunKey, RunResult

VERSIONS = {
    "truestep": "0.1.0",
    "torch": "2.13.0",
    "numpy": "2.4.0",
    "python": "3.11.7",
    "machine": "x86_64, 2 cores",
    "threads": "1",
    "git commit": "0123abc",
}


def make_result(
    optimizer="sgd",
    lr=0.1,
    batch_size=64,
    seed=0,
    *,
    final=False,
    losses=(2.0, 1.0, 1.5),
    status="done",
    experiment="e0",
    **changes,
):
    """A result whose curve has these validation losses, an epoch apart; best is the lowest."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    fields = {
        "key": RunKey(experiment, optimizer, lr, batch_size, seed, final),
        "status": status,
        "curve": [
            {
                "epoch": epoch,
                "step": 10 * epoch,
                "seconds": 0.5 * epoch,
                "train_loss": loss,
                "loss": loss,
                "accuracy": 1 - loss / 4,
            }
            for epoch, loss in enumerate(losses, start=1)
        ],
        "best": list(losses).index(min(finite)) if finite else -1,
        "test": {"loss": min(finite) + 0.1, "accuracy": 0.9} if final and finite else {},
        "step_seconds": 0.001,
        "optimizer_bytes": 400,
        "parameters": 100,
        "versions": VERSIONS,
    }
    return RunResult(**fields | changes)


# Per optimizer: best learning rate at batch 256, lowest loss at batch 64, what it grows by each time
# the batch does fourfold, bytes per parameter, step time in milliseconds.
FIELD = {
    "sgd": (3.0, 1.08, 0.06, 0, 1.0),
    "momentum": (0.5, 1.06, 0.03, 4, 1.1),
    "adagrad": (0.05, 0.985, 0.004, 4, 1.15),
    "adam": (0.004, 1.005, 0.004, 8, 1.3),
    "dasgd": (2.0, 1.09, 0.036, 4, 1.2),
    "asgd": (0.12, 1.025, 0.002, 0.4, 1.25),
    "asgd+dasgd": (0.08, 1.03, 0.002, 4.4, 1.45),
    "adamw": (0.004, 1.004, 0.004, 8, 1.35),
    "asgd+adam": (0.003, 1.01, 0.004, 8.4, 1.5),
}
STEPS_OF_GRID = (-1.0, -0.5, 0.0, 0.5, 1.0)


def make_run(optimizer, lr, batch_size, seed, *, final, epochs=8, samples=1500, scale=1.0):
    """A run of a made-up task: a bowl over log learning rate that shifts with the batch size."""
    best_lr, floor, growth, memory, time = FIELD[optimizer]
    noise = np.random.default_rng(crc32(f"{optimizer}{lr:g}{batch_size}{seed}".encode()))
    seed_effect = 0.006 * np.random.default_rng(seed).normal()
    quadruplings = math.log(batch_size / 64, 4)
    off = math.log10(lr / (best_lr * 2 ** (quadruplings - 1)))
    width = 0.9 if "a" in optimizer[:2] else 0.45
    lowest = floor * (1 + seed_effect + 0.004 * noise.normal()) + growth * quadruplings**1.7
    lowest += 0.3 * (off / width) ** 2 * (0.5 if off < 0 else 1.0)
    diverged = off > 0.85 + 0.1 * noise.normal()
    length = int(noise.integers(1, 4)) if diverged else epochs
    rate = 1.1 / (1 + 0.15 * quadruplings)
    steps = max(1, samples // batch_size)
    curve = []
    for epoch in range(1, length + 1):
        loss = lowest + 1.6 * math.exp(-rate * epoch) + 0.005 * noise.normal()
        loss = scale * (loss + 0.01 * max(0, epoch - 6))
        curve.append(
            {
                "epoch": float(epoch),
                "step": steps * epoch,
                "seconds": steps * epoch * time * 1e-3,
                "train_loss": 0.9 * loss,
                "loss": loss,
                "accuracy": math.exp(-0.4 * loss / scale),
            }
        )
    if diverged:
        curve[-1] |= {"loss": math.nan, "train_loss": math.inf, "accuracy": 0.1}
    finite = [row["loss"] for row in curve if math.isfinite(row["loss"])]
    test = {}
    if final and finite:
        loss = min(finite) * 1.03
        test = {"loss": loss, "accuracy": math.exp(-0.4 * loss / scale)}
    return RunResult(
        key=RunKey("e0", optimizer, lr, batch_size, seed, final),
        status="diverged" if diverged else "done",
        curve=curve,
        best=int(np.argmin(finite)) if finite else -1,
        test=test,
        step_seconds=time * 1e-3,
        optimizer_bytes=int(memory * 25_000),
        parameters=25_000,
        versions=VERSIONS,
    )


def make_race(
    optimizers=("sgd", "momentum", "adam", "asgd", "dasgd"),
    batch_sizes=(64,),
    seeds=3,
    reference=None,
    grid=STEPS_OF_GRID,
    **task,
):
    """Selection and final runs as a race leaves them, the reference's learning rates included."""
    selection = [
        make_run(optimizer, lr, batch_size, seed, final=False, **task)
        for optimizer in optimizers
        for lr in (float(f"{FIELD[optimizer][0] * 10**step:.1g}") for step in grid)
        for batch_size in batch_sizes
        for seed in range(seeds)
    ]
    chosen = choose(selection)
    places = [(*place, lr) for place, lr in chosen["lr"].items()]
    if reference is not None:
        fixed = at_reference(chosen, reference)
        places += [(*place, lr) for place, lr in fixed["lr"].items()]
    finals = [
        make_run(optimizer, lr, batch_size, seed, final=True, **task)
        for optimizer, batch_size, lr in dict.fromkeys(places)
        for seed in range(seeds)
    ]
    return selection + finals


def make_task_info(**changes):
    """What a report is told about the task."""
    return {
        "name": "digits",
        "title": "Handwritten digits",
        "source": "digits: 1,797 images of 8 x 8 pixels that come with scikit-learn",
        "epochs": 8,
        "metrics": ["accuracy"],
        "target": ["accuracy", 0.9],
        "command": "truestep race --task digits --seeds 3",
        "engines": "The torch loop trains all runs: asked for.",
        "reference_batch_size": None,
        "train": 1257,
        "validation": 270,
        "test": 270,
        "parameters": 25_000,
        "experiment": "3fa9c2e1d0b4",
    } | changes
