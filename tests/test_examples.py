"""The examples run as their docstrings say, and the loss falls."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def run(*command, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(  # noqa: S603 - our own examples
        list(map(str, command)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(output):
    return {
        int(n): float(x) for n, x in re.findall(r"^epoch (\d+): loss (\S+)", output, re.MULTILINE)
    }


def require(*modules):
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.mark.parametrize(
    ("command", "modules"),
    [
        ([*PYTHON, EXAMPLES / "train_huggingface.py"], ["transformers", "accelerate"]),
        ([*PYTHON, EXAMPLES / "train_lightning.py"], ["lightning"]),
        ([*TORCHRUN, EXAMPLES / "train_accelerate.py"], ["accelerate"]),
    ],
    ids=lambda value: getattr(value[-1], "stem", None),
)
def test_a_framework_trains_and_the_loss_falls_by_half(command, modules, tmp_path):
    require(*modules)
    found = losses(run(*command, folder=tmp_path))
    assert list(found) == [1, 2, 3, 4]
    assert found[4] < found[1] / 2


def test_the_plain_run_resumes_where_it_stopped(tmp_path, monkeypatch, capsys):
    def here(*options):
        monkeypatch.setattr(sys, "argv", ["train_plain.py", *options])
        runpy.run_path(str(EXAMPLES / "train_plain.py"), run_name="__main__")
        return losses(capsys.readouterr().out)

    whole = here()
    assert list(whole) == [1, 2, 3, 4]
    assert whole[4] < whole[1] / 2
    checkpoint = str(tmp_path / "run.pt")
    first = here("--checkpoint", checkpoint, "--stop-after", "2")
    second = here("--checkpoint", checkpoint)
    assert list(second) == [3, 4]
    assert first | second == whole


def test_a_task_of_ones_own_loads(tmp_path):
    require("sklearn")
    output = run(*PYTHON, EXAMPLES / "my_task.py", folder=tmp_path)
    assert "100 wines to train on" in output


def test_every_example_is_run():
    here = Path(__file__).parent
    tests = "".join(
        (here / name).read_text() for name in ("test_examples.py", "test_distributed.py")
    )
    for example in EXAMPLES.glob("*.py"):
        assert f'"{example.name}"' in tests, example.name
