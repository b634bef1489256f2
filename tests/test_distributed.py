"""Ranks against one process: each world runs every case of `tests/ranks` in one start of its processes."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranks import CASES, frameworks

HERE = Path(__file__).parent
RUNS = [(ranks, case.__name__) for ranks, cases in CASES.items() for case in cases]


def torchrun(ranks, *command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONFAULTHANDLER": "1",
    }
    return subprocess.run(  # noqa: S603
        [*launch, *rendezvous, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Runs a world once, and gives for each rank what each case came to."""
    known = {}

    def outcomes(ranks):
        if ranks not in known:
            folder = tmp_path_factory.mktemp(f"world{ranks}")
            ended = torchrun(ranks, HERE / "ranks" / "run.py", folder)
            files = [folder / f"rank{rank}.json" for rank in range(ranks)]
            known[ranks] = ended, [json.loads(f.read_text()) if f.exists() else {} for f in files]
        return known[ranks]

    return outcomes


@pytest.mark.parametrize(("ranks", "case"), RUNS)
def test_ranks(worlds, ranks, case):
    ended, outcomes = worlds(ranks)
    for rank, outcome in enumerate(outcomes):
        assert case in outcome, f"rank {rank} did not come to it:\n{ended.stderr[-2000:]}"
        assert not outcome[case], f"rank {rank}:\n{outcome[case]}"


EXAMPLE = HERE.parent / "examples" / "train_ddp.py"


@pytest.fixture(scope="module")
def losses_of_one_process():
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(EXAMPLE), "--epochs", "2"])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return losses(printed.getvalue())


def losses(printed):
    return [float(line.split()[-1]) for line in printed.splitlines()]


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["ddp", "shard"])
def test_the_example_trains_as_one_process_does(losses_of_one_process, options):
    ended = torchrun(2, EXAMPLE, "--epochs", "2", *options)
    assert ended.returncode == 0, ended.stderr
    found = losses(ended.stdout)
    assert len(found) == 2
    assert found[1] < found[0]
    # The sampler deals the same samples out in another order within a batch.
    assert found == pytest.approx(losses_of_one_process, abs=2e-4)


@pytest.mark.parametrize(
    ("framework", "package"), [("lightning", "lightning"), ("huggingface", "transformers")]
)
def test_a_frameworks_trainer_on_two_ranks_trains_as_one_process_does(framework, package, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    ended = torchrun(2, HERE / "ranks" / "frameworks.py", framework, tmp_path / "outcome.pt")
    assert ended.returncode == 0, ended.stderr
    found = torch.load(tmp_path / "outcome.pt")
    expected = frameworks.outcome(*frameworks.in_one_process())
    assert (found["own"], expected["own"]) == (frameworks.PER_RANK, 2 * frameworks.PER_RANK)
    for name, counts in expected["counts"].items():
        assert torch.equal(found["counts"][name], counts), name
    for name, weights in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weights)
