"""Records of the papers' experiments with planted effects, made without training."""

import numpy as np

from truestep.lab.paper.compression import MEASURES
from truestep.lab.paper.curves import measured_epochs
from truestep.lab.paper.experiments import EXPERIMENTS
from truestep.lab.paper.premise import SIZES
from truestep.lab.paper.unit import Outcome, Record, key, settings

VERSIONS = {"truestep": "0.1.0", "torch": "2.13.0", "machine": "x86_64, 2 cores"}
COMMAND = "truestep paper run <all> --scale small"


def images(unit, gain):
    """Curves that fall with lr x epochs; the papers' optimizers gain on SGD."""
    epochs = np.array(measured_epochs(unit.epochs, unit.measure))
    random = np.random.default_rng([unit.seed, len(unit.data)])
    shift = random.normal(0, 0.01)  # of the seed: paired trainings share it
    noise = np.random.default_rng([unit.seed, int(unit.lr * 1e6), unit.batch_size])
    better = gain if unit.optimizer in {"asgd", "dasgd"} else 0.0
    # A larger learning rate is better throughout; a larger batch gains more.
    loss = 0.5 + shift + 0.5 / (1 + epochs) - unit.lr - better * (1 + np.log2(unit.batch_size))
    loss = loss + noise.normal(0, 1e-4, len(epochs))
    arrays = {"epochs": epochs.astype(np.int32)}
    for split in ("train", "validation", "test"):
        arrays[f"{split}_loss"] = loss.astype(np.float32)
        arrays[f"{split}_accuracy"] = (1 - loss / 2).astype(np.float32)
    arrays["gradients"] = np.full(len(epochs), 1e-3, np.float32)
    arrays["signs"] = np.full(len(epochs), 0.7, np.float32)
    read = {"quickdraw10": "quickdraw10-other"}.get(unit.data, unit.data)
    summary = {"status": "done", "source": f"{read}: {unit.data} <made up>", "fingerprint": "f00"}
    summary |= {"train": 50, "validation": 10, "test": 10}
    return Outcome(summary, arrays, "ensemble, compiled", 1000, 1.0 + 0.01 * unit.seed)


def premise(unit):
    grid = np.ones((len(unit.epochs), len(SIZES)), np.float32) / np.sqrt(SIZES)
    arrays = {"gradients": grid.astype(np.float32), "signs": (1 - grid / 2).astype(np.float32)}
    return Outcome({"source": "made up", "fingerprint": "f00"}, arrays, "torch", 10, 1.0)


def compressions(unit):
    """Networks that lose a tenth of their parameters under SGD and more under aSGD."""
    random = np.random.default_rng([unit.first, int(1e6 * unit.lr)])
    left = (0.85 if unit.optimizer == "asgd" else 0.9) + random.normal(0, 0.01, unit.replicas)
    accuracy = 0.9 - unit.lr / 10 + random.normal(0, 0.001, unit.replicas)
    before = {"parameters": 1000, "bytes": 5000, "flops": 2000}
    values = {name: size * left for name, size in before.items()}
    values |= dict.fromkeys(("validation_loss", "accuracy", "accuracy_before"), accuracy)
    values |= {"difference": 1e-6 * left, "largest": left}
    arrays = {
        name: np.asarray(values.get(name, np.ones(unit.replicas)), np.float32) for name in MEASURES
    }
    summary = {"source": f"{unit.data} <made up>", "fingerprint": "f00", "before": before}
    return Outcome(summary, arrays, "ensemble, compiled, then torch", 10, 1.0)


def outcome(unit, gain):
    if unit.kind == "compression" and unit.data_sets():
        return compressions(unit)
    if unit.kind == "images":
        return images(unit, gain)
    return premise(unit) if unit.kind == "premise" else unit.run(None)


def record(unit, gain=0.0):
    return Record(unit.kind, settings(unit), outcome(unit, gain), 2.0, COMMAND, VERSIONS)


def fill(store, scale="smoke", gain=0.0, names=EXPERIMENTS):
    """Puts the units of experiments into a store; those of small networks are really trained."""
    there = store.keys()
    for name in names:
        for item in EXPERIMENTS[name].units(scale):
            if key(item.unit) not in there:
                store.add(record(item.unit, gain))
                there.add(key(item.unit))
