"""What `import truestep` loads beside torch."""

import subprocess
import sys

LISTING = """
import sys, torch
before = set(sys.modules)
import truestep
print(*sorted(set(sys.modules) - before), sep="\\n")
"""
# Parts of torch that take hundreds of milliseconds and that torch itself imports only when asked.
HEAVY = {"torch._dynamo", "torch._inductor", "torch._functorch", "torch.onnx", "torch.testing"}


def test_importing_truestep_loads_torch_and_nothing_heavy():
    command = [sys.executable, "-c", LISTING]
    listing = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    loaded = set(listing.stdout.split())
    assert "truestep.counter" in loaded
    roots = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    assert roots <= {"truestep", "torch", "numpy"}
    assert not loaded & HEAVY
    assert "truestep.kernels.loops" not in loaded
