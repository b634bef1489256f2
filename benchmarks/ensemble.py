"""Training many small networks at once beside other ways to do it, per replica-step.

    python benchmarks/ensemble.py [--cores 1,2] [--rounds 7] [--cases 784-30,full] [--json FILE] [--markdown]
    python benchmarks/ensemble.py --read FILE --markdown

Each number of cores has a process of its own that may use no other. In it each way is first tried with
several numbers of replicas and of threads, and keeps the fastest; then all take turns, and each turn is
compared with truestep.ensemble's of the same round. The rate is of multiply-adds, beside that of a product of
matrices of 2048 x 2048. Seconds are of the processor on one core, of the clock on more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from replicas import CASES, OURS, WAYS, Case, Run, Way
from timing import enough_rounds, machine, machine_line

TURN_SECONDS = 0.4
TRIAL_STEPS = 8
TRIAL_SECONDS = 0.15
Row = dict[str, Any]


def seconds_of(run: Run, cores: int) -> float:
    """Of the processor on one core, where they don't count what else the machine does; else of the clock."""
    clock = time.process_time if cores == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def best_setting(way: Way, case: Case, optimizer: str, cores: int) -> tuple[float, int, int]:
    """Seconds per replica-step, replicas and threads of the fastest setting."""
    found = []
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        for replicas in way.replicas:
            steps, seconds = TRIAL_STEPS, 0.0
            while seconds < TRIAL_SECONDS:
                # Long enough for what a call costs besides its steps not to matter.
                if seconds:
                    steps = int(steps * min(1.5 * TRIAL_SECONDS / seconds, 50)) + 1
                run = way.build(case, optimizer, replicas, steps)
                run()  # compiles and allocates
                seconds = seconds_of(run, cores)
            found.append((seconds / (replicas * steps), replicas, threads))
    return min(found)


def compare(name: str, case: Case, optimizer: str, cores: int, rounds: int) -> Iterator[Row]:
    turns: dict[str, tuple[Run, int, int, int]] = {}
    for way, build in WAYS.items():
        row = {"case": name, "optimizer": optimizer, "way": way}
        if optimizer not in build.optimizers:
            continue
        if not build.installed:
            yield row | {"skipped": f"{build.package} is not installed; pip install -e '.[peers]'"}
            continue
        each, replicas, threads = best_setting(build, case, optimizer, cores)
        steps = max(TRIAL_STEPS, int(TURN_SECONDS / (each * replicas)))
        torch.set_num_threads(threads)
        run = build.build(case, optimizer, replicas, steps)
        run()
        turns[way] = run, replicas, steps, threads
    times: dict[str, list[float]] = {way: [] for way in turns}
    for _ in range(rounds):
        for way, (run, replicas, steps, threads) in turns.items():
            torch.set_num_threads(threads)
            times[way].append(seconds_of(run, cores) / (replicas * steps))
    for way, (_, replicas, _, threads) in turns.items():
        ratios = [theirs / ours for theirs, ours in zip(times[way], times[OURS], strict=True)]
        yield {
            "case": name,
            "optimizer": optimizer,
            "way": way,
            "seconds": statistics.median(times[way]),
            "ratio": statistics.quantiles(ratios, n=4),
            "replicas": replicas,
            "threads": threads,
            "rate": case.products / statistics.median(times[way]),
        }


def peak_rate(cores: int) -> float:
    """Multiply-adds per second of a large product of matrices."""
    torch.set_num_threads(cores)
    a = torch.rand(2048, 2048)
    torch.mm(a, a)
    return 2048**3 / statistics.median(seconds_of(lambda: torch.mm(a, a), cores) for _ in range(7))


def measure_here(arguments: argparse.Namespace, cores: int) -> dict[str, Any]:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    wanted = arguments.cases.split(",")
    cases = {name: case for name, case in CASES.items() if any(part in name for part in wanted)}
    before, load = peak_rate(cores), os.getloadavg()[0]
    rows = []
    for name, case in cases.items():
        for optimizer in ("SGD", "aSGD"):
            for row in compare(name, case, optimizer, cores, arguments.rounds):
                print(line(row), file=sys.stderr, flush=True)
                rows.append(row)
    # Of others too: how much the seconds, unlike the ratios, are to be trusted.
    loads = [load, os.getloadavg()[0]]
    return {"rows": rows, "peak": [before, peak_rate(cores)], "load": loads}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"machine": machine(), "cores": {}}
    for cores in arguments.cores.split(","):
        print(f"{cores} cores", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [
                sys.executable,
                __file__,
                "--cores",
                cores,
                "--rounds",
                str(arguments.rounds),
            ]
            command += ["--cases", arguments.cases, "--here", str(file)]
            environment = os.environ | {"OMP_NUM_THREADS": cores}
            subprocess.run(command, check=True, env=environment)  # noqa: S603 - this script
            results["cores"][cores] = json.loads(file.read_text())
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def line(row: Row) -> str:
    start = f"{row['case']:36} {row['optimizer']:5} {row['way']:35}"
    if "skipped" in row:
        return f"{start} skipped: {row['skipped']}"
    low, middle, high = row["ratio"]
    return (
        f"{start} {row['seconds'] * 1e6:9.1f} us {middle:7.2f} ({low:.2f} to {high:.2f}) "
        f"{row['rate'] / 1e9:6.1f} G/s, {row['replicas']} replicas, {row['threads']} threads"
    )


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/ensemble.md."""
    parts = [f"Measured on {machine_line(results['machine'])}.\n"]
    for cores, found in results["cores"].items():
        peak = statistics.median(found["peak"]) / 1e9
        parts.append(f"### {cores} core{'s' if cores != '1' else ''}\n")
        before, after = found["load"]
        parts.append(
            f"A large product of matrices reaches {peak:.0f}G multiply-adds per second. The machine's "
            f"load was {before:.1f} before and {after:.1f} after, of {results['machine']['cores']} cores.\n"
        )
        parts.append(
            "| network | optimizer | by | us per replica-step | times truestep's | quartiles | "
            "G multiply-adds/s | replicas at once |"
        )
        parts.append("|---|---|---|---:|---:|---:|---:|---:|")
        for row in found["rows"]:
            start = f"| {row['case']} | {row['optimizer']} | {row['way']} |"
            if "skipped" in row:
                parts.append(f"{start} | | | | {row['skipped']} |")
                continue
            low, middle, high = row["ratio"]
            parts.append(
                f"{start} {row['seconds'] * 1e6:.1f} | {middle:.2f} | {low:.2f} to {high:.2f} | "
                f"{row['rate'] / 1e9:.1f} | {row['replicas']} |"
            )
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", default="1,2", help="numbers of cores, by commas")
    parser.add_argument("--rounds", type=enough_rounds, default=7)
    parser.add_argument("--cases", default="-", help="parts of names, by commas")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--read", type=Path, help="figures of an earlier run instead of a new one")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        found = measure_here(arguments, int(arguments.cores))
        arguments.here.write_text(json.dumps(found))
        return
    results = json.loads(arguments.read.read_text()) if arguments.read else measure(arguments)
    if arguments.markdown:
        print(markdown(results))


if __name__ == "__main__":
    main()
