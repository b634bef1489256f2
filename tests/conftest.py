import os
import signal

import pytest
import torch
from hypothesis import register_random, settings


class TorchRandom:
    """PyTorch's generator as hypothesis resets it before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# Triton's interpreter runs kernels on the CPU; it must be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

TORCH_RANDOM = TorchRandom()  # hypothesis keeps only a weak reference
register_random(TORCH_RANDOM)

# Machines are shared and slow; what hypothesis finds must not depend on the clock or on luck.
settings.register_profile("truestep", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("truestep")


# A shell that runs tests in the background ignores SIGINT, and so would all commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
