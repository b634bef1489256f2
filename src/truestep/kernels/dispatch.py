"""Whether tensors can go to compiled loops, or to Triton's kernels, and those."""

import functools
import hashlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "CHANNELS_LAST",
    "LIKE",
    "PLAIN",
    "STORED",
    "address_of",
    "all_plain",
    "channels_last",
    "compiled_loops",
    "device_of",
    "finds_addresses",
    "gpu",
    "installed",
    "is_plain",
    "is_wrapped",
    "loops",
    "machine_code",
    "on_triton",
    "triton_installed",
    "triton_works",
    "when_compiling",
]

# numpy has no bfloat16: loops that take 16-bit floats read their bits.
DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool}
# What tells compiled loops the dtype of numbers to reckon with.
LIKE: dict[torch.dtype, NDArray[Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
}
# What loops see parameters as, and reckon in, but for uint16: that is bfloat16, reckoned with in float32.
STORED = LIKE | {torch.bfloat16: np.empty(0, np.uint16)}
# Looked up once: torch's namespaces are large, and out of the processor's caches when a step asks for them.
_peek = torch._C._functorch.peek_interpreter_stack  # noqa: SLF001
_is_of_transform: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001
_is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor  # noqa: SLF001
STRIDED = torch.strided
CHANNELS_LAST, IMAGES = torch.channels_last, 4  # dimensions
# What has memory of its own to read; subclasses may not.
PLAIN = {Tensor, torch.nn.Parameter}


@functools.cache
def installed() -> bool:
    """Whether numba is there."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def triton_installed() -> bool:
    """Whether Triton is there, as it is with torch for CUDA; for ROCm the kernels were never tried."""
    return torch.version.hip is None and importlib.util.find_spec("triton") is not None


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: it may be too old, or there may be no C compiler.

    Warns:
        UserWarning: once, if they do not.
    """
    if not triton_installed():
        return False
    try:
        gpu().probe(device)
    except Exception as error:  # noqa: BLE001 - Triton, its compilers and the driver raise many kinds
        warnings.warn(
            f"Triton's kernels do not run on {device}, so torch operations count there, several times "
            f"as slowly: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    return True


def on_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels go over the device where a tensor is."""
    return tensor.is_cuda and triton_works(tensor.device)


def device_of(tensor: Tensor) -> torch.device | None:
    """Where Triton's kernels go over a tensor; None for the CPU, whose loops are compiled by numba."""
    return tensor.device if on_triton(tensor) else None


def compiled_loops(tensor: Tensor) -> bool:
    """Whether a compiled loop or a kernel can read a tensor's memory.

    Args:
        tensor: of floating point numbers, or bool.
    """
    return (
        ((tensor.is_cpu and installed()) or on_triton(tensor))
        and tensor.dtype in DTYPES
        and tensor.layout is STRIDED
        and is_plain(tensor)
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has numbers of its own, which can be looked at."""
    return type(tensor) in PLAIN and not is_wrapped(tensor)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether it stands for others, in torch.func's transforms or in batched backward passes."""
    return _is_of_transform(tensor) or _is_batched(tensor)


def finds_addresses() -> bool:
    """Whether tensors have addresses: functorch's have none to ask for."""
    return _peek() is None


def channels_last(tensor: Tensor) -> bool:
    """Whether a tensor holds images whose channels lie last."""
    return tensor.dim() == IMAGES and tensor.is_contiguous(memory_format=CHANNELS_LAST)


def address_of(tensor: Tensor, order: torch.memory_format | None = None) -> int:
    """Where loops or kernels can read a tensor's numbers, which lie without gaps; 0 where they cannot.

    Zeros that autograd makes up have no address; neither have tensors without elements.

    Args:
        tensor: of any kind, where `finds_addresses`.
        order: in which the numbers lie, if not in the usual one.
    """
    if (
        type(tensor) in PLAIN
        and ((tensor.is_cpu and installed()) or on_triton(tensor))
        and tensor.layout is STRIDED
        and (tensor.is_contiguous() if order is None else tensor.is_contiguous(memory_format=order))
    ):
        return tensor.data_ptr()
    return 0


def all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether loops or kernels can read the numbers of all tensors, which lie without gaps."""
    return finds_addresses() and all(t.dtype in DTYPES and address_of(t) for t in tensors)


@functools.cache
def loops() -> Any:
    """The package of compiled loops, imported when it is first needed: numba takes half a second."""
    from truestep.kernels import loops  # noqa: PLC0415

    return loops


@functools.cache
def gpu() -> Any:
    """The package of Triton's kernels, imported when it is first needed."""
    from truestep.kernels import gpu  # noqa: PLC0415

    return gpu


@contextmanager
def when_compiling(tell: Callable[[], None]) -> Iterator[None]:
    """Calls `tell` once if loops are compiled inside; those that were compiled earlier are loaded.

    Args:
        tell: is called when the first begins.
    """
    if not installed():
        yield
        return
    from numba.core import event  # noqa: PLC0415

    waiting = [tell]

    class Teller(event.Listener):
        def on_start(self, event: Any) -> None:
            if waiting:
                waiting.pop()()

        def on_end(self, event: Any) -> None:
            pass

    # What C calls (cfunc) has no event of its own, but the compiler's passes have.
    with event.install_listener("numba:run_pass", Teller()):
        yield


def machine_code(chosen: str) -> Path:
    """Where machine code is kept, under a name made from all the loops' source.

    numba itself looks only at the file of the function that is called, not at what that calls.

    Args:
        chosen: the folder that the user has chosen (NUMBA_CACHE_DIR), or nothing.
    """
    here = Path(__file__).parent / "loops"
    sources = b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    name = f"loops-{hashlib.sha256(sources).hexdigest()[:16]}"
    if chosen:
        return Path(chosen) / name
    beside = here / "__pycache__"
    if os.access(beside if beside.exists() else here, os.W_OK):
        return beside / name
    from numba.misc import appdirs  # noqa: PLC0415

    return Path(appdirs.user_cache_dir("truestep")) / name  # type: ignore[no-untyped-call]
