"""What `import truestep` loads beside torch."""

import subprocess
import sys

import pytest

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
    later = {
        "kernels.loops",
        "compression",
        "ensemble",
        "history",
        "monitor",
        "nodes",
        "oracle",
        "surgery",
    }
    assert not loaded & {f"truestep.{name}" for name in later}


def test_what_is_imported_later_is_there_all_the_same():
    import truestep  # noqa: PLC0415

    assert set(truestep.__all__) <= set(dir(truestep))
    assert all(getattr(truestep, name) is not None for name in truestep.__all__)
    with pytest.raises(AttributeError, match="'truestep' has no attribute 'compres'"):
        truestep.compres  # noqa: B018
