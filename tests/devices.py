"""Where Triton's kernels run in tests: on a CUDA device, or in Triton's interpreter on the CPU's tensors.

And what they and the CPU's loops reckon in.
"""

import pytest
import torch

from truestep.kernels import dispatch, packing, scanning, stepping

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="there is no CUDA device")
needs_no_cuda = pytest.mark.skipif(CUDA, reason="Triton's kernels run on the CUDA device")
needs_triton = pytest.mark.skipif(not dispatch.triton_installed(), reason="Triton is not installed")


def choose(monkeypatch, kernels):
    """From now on tensors of all devices go to Triton's kernels, or to torch operations."""
    monkeypatch.setattr(dispatch, "installed", lambda: False)
    monkeypatch.setattr(dispatch, "on_triton", lambda _: kernels == "triton")
    for module in (packing, scanning, stepping):
        monkeypatch.setattr(module, "loops", _no_loops)


def reckoned(dtype):
    """What kernels and loops reckon in for parameters of a dtype; they round what they store."""
    return torch.promote_types(dtype, torch.float32)


def _no_loops():
    raise AssertionError("a device's tensor came to compiled loops")
