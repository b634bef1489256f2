"""Made-up results that look like a race's, for the tests of what stores and shows them."""

import math

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
