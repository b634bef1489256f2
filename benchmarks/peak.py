"""Peak memory of training steps, each candidate in a process of its own.

The peak is the kernel's own mark of resident memory (VmHWM) over a few steps, which sees whatever took
memory: torch, compiled loops, oneDNN's scratch space. What was resident before the model existed is
subtracted, after a step of the same kind has loaded and compiled everything. malloc is told to hand each
freed block of 64 KiB and more back at once; otherwise the mark would measure its habit of keeping them.

On a CUDA device it is the allocator's own mark.

    python benchmarks/peak.py TASK CANDIDATE [DEVICE]
"""

import ctypes
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from candidates import CANDIDATES, PEERS
from tasks import task_on

STEPS = 3  # the first one allocates what the optimizer keeps
BLOCK = str(1 << 16)


def peak_of(task: str, candidate: str, device: str = "cpu") -> int:
    """Bytes above what is resident without the model, measured in a new process."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": BLOCK, "MALLOC_TRIM_THRESHOLD_": BLOCK}
    command = [sys.executable, __file__, task, candidate, device]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
    return int(done.stdout.split()[-1])


def measure(task: str, candidate: str, device: str = "cpu") -> int:
    torch.set_num_threads(1)
    build = CANDIDATES[candidate] if candidate in CANDIDATES else PEERS[candidate][1]
    step = build(task_on(device, task))
    step()
    del step
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        step = build(task_on(device, task))
        for _ in range(STEPS):
            step()
        return torch.cuda.max_memory_allocated() - allocated
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step = build(task_on(device, task))
    for _ in range(STEPS):
        step()
    return resident("VmHWM") - before


def resident(mark: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at most since the mark was cleared (VmHWM)."""
    found = re.search(rf"{mark}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {mark}; this benchmark needs Linux")
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    print(measure(*sys.argv[1:]))
