"""What finding dummy nodes costs: one pass over MNIST's 60,000 images beside a plain inference pass.

python benchmarks/nodes.py --rounds 7
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import truestep
from tasks import mlp
from timing import machine
from truestep.lab.tasks import load_image_task


def images(samples: int) -> torch.Tensor:
    """MNIST's training images, flat, in 0..1."""
    data = load_image_task("mnist")
    return torch.cat([data.train.inputs, data.validation.inputs])[:samples]


def seconds(function: Callable[[], object]) -> float:
    """Processor time, which other work on the machine lengthens less than the clock's."""
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = mlp(784, 1024, 1024, 10, batch=1).model
    batches = images(arguments.samples).split(arguments.batch_size)

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    pairs = [
        (seconds(plain), seconds(lambda: truestep.find_dummy_nodes(model, batches)))
        for _ in range(1 + arguments.rounds)
    ][1:]
    results = {
        "machine": machine(),
        "model": "784-1024-1024-10",
        "samples": arguments.samples,
        "batch_size": arguments.batch_size,
        "plain_seconds": statistics.median(first for first, _ in pairs),
        "nodes_seconds": statistics.median(second for _, second in pairs),
        "ratio": statistics.median(second / first for first, second in pairs),
        "ratios": sorted(second / first for first, second in pairs),
    }
    print(json.dumps(results, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
